"""Launches patch matching: one kernel if each map of an image is one block, else two."""

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ...kernels import patch_matching
from ...kernels.patch_matching import Nearest, PatchMap
from ...plan import Matches, index_shapes, index_size
from ..aten.nearest_patches import MAX_COORDINATES
from .arguments import block_of, is_aligned, matmul_policy
from .configs import Device, Key, Matching, choose, launch_options

# Patches of a program of the selection, the most that it compares them with at a time, and blocks that it reads at a time.  Of
# 128, 256 and 512 the estimate is least with the fewest steps: of 1024 patches two, of 196 one.
_SELECT_BLOCK, _COMPARED, _BLOCKS_AT_ONCE = 64, 512, 8
# The largest tile whose program selects the matches too: with 128 patches Triton 3.6 spilled.
_SINGLE_TILE = 64
# Matches and channels at a time of a program of the distances.
_DISTANCE_BLOCK_M, _DISTANCE_BLOCK_K = 16, 64


def _axes(rows: Tensor) -> int:
    """Channels of rows that are compared as locations are; 0 for longer rows."""
    return rows.shape[2] if rows.shape[2] <= MAX_COORDINATES else 0


def _dividing(count: int, largest: int) -> int:
    """The largest block up to ``largest`` that divides a count, at least 16; ``largest`` if none does."""
    blocks = (largest >> k for k in range((largest // 16).bit_length()))
    return next((block for block in blocks if count % block == 0), largest)


def key(maps: Sequence[Tensor], device: Device) -> Key:
    """What the configuration is chosen by; kind "half": 16-bit features, multiplied unchanged."""
    x, y = maps
    # Triton's interpreter computes bfloat16 wrong: there it is read as float32.
    half = x.dtype == y.dtype and x.dtype.itemsize == 2 and not _axes(x)
    half = half and (x.device.type != "cpu" or x.dtype == torch.float16)
    aligned = all(map(is_aligned, maps))
    B, P1, C = x.shape
    return Key(*device, aligned, "matching", "half" if half else "fp32", B, max(P1, y.shape[1]), C)


def match(
    maps: Sequence[Tensor],
    locations: Sequence[Tensor],
    counts: Sequence[int],
    match_order: str,
    per_slot: bool,
    device: Device,
) -> Matches:
    """Match patches by location, if there are locations, and by feature: see :class:`vicreg_fast.plan.Matches`."""
    x, y = maps
    chosen_by = key(maps, device)
    config: Matching = choose(chosen_by)
    B, P1, C = x.shape
    P2 = y.shape[1]
    both = len(counts) == 2
    m1, m2 = counts if both else (counts[0], 0)
    kinds = 2 if locations else 1
    float64 = any(z.dtype == torch.float64 for z in locations or maps)
    # float64 distances take twice the registers.
    largest = min(config.largest_tile, 64) if float64 else config.largest_tile
    block_q, block_c = block_of(P1, largest), block_of(P2, largest)
    block_k = _dividing(C, config.block_k)
    single_tile = max(P1, P2) <= min(largest, _SINGLE_TILE)
    blocks = -(-P1 // block_q)
    index = torch.empty(index_size(B, counts, kinds), dtype=torch.int64, device=x.device)
    counter = torch.empty(1, dtype=torch.int32, device=x.device)
    nearest = None
    if not single_tile:
        size = kinds * B * (P1 + blocks * P2)
        nearest = Nearest(
            torch.empty(size, dtype=torch.int64 if float64 else torch.int32, device=x.device),
            torch.empty(size, dtype=torch.int32, device=x.device),
        )
    x_location, y_location = (PatchMap(z, *z.stride()) for z in locations) if locations else (None, None)
    patch_matching._match_forward_kernel[(kinds * B * blocks,)](
        x=PatchMap(x, *x.stride()), y=PatchMap(y, *y.stride()), x_location=x_location, y_location=y_location,
        match_index_ptr=index, nearest=nearest, arrival_counter_ptr=counter, B=B, P1=P1, P2=P2, C=C, m1=m1, m2=m2,
        AXES=_axes(x), LOCATION_AXES=_axes(locations[0]) if locations else 0,
        DISTANCE_TYPE=tl.float64 if float64 else tl.float32, EVEN=C % block_k == 0, NATIVE=chosen_by.kind == "half",
        DOT_PRECISION=matmul_policy(None, maps, device).exact_precision,
        BOTH=both, PATCH_ORDER=match_order == "patch", PER_SLOT=per_slot,
        BLOCK_Q=block_q, BLOCK_C=block_c, BLOCK_K=block_k,
        **launch_options(device, config.warps, config.stages),
    )  # fmt: skip
    if nearest is not None:
        programs = -(-P1 // _SELECT_BLOCK) + (-(-P2 // _SELECT_BLOCK) if both else 0)
        patch_matching._select_forward_kernel[(kinds * B * programs,)](
            nearest=nearest, match_index_ptr=index, B=B, P1=P1, P2=P2, m1=m1, m2=m2, blocks=blocks,
            BOTH=both, PER_SLOT=per_slot, BLOCK=_SELECT_BLOCK, BLOCK_COMPARED=block_of(max(P1, P2), _COMPARED),
            BLOCKS_AT_ONCE=_BLOCKS_AT_ONCE, **launch_options(device, warps=4),
        )  # fmt: skip
        if match_order == "patch":
            _sort_by_query(index, B, counts, kinds, per_slot)
    return Matches(index, counter)


def _sort_by_query(index: Tensor, B: int, counts: Sequence[int], kinds: int, per_slot: bool) -> None:
    """Put the matches of a flat index in the order of their queries, in place."""
    first = 0
    for shape in index_shapes(B, counts, per_slot) * kinds:
        size = math.prod(shape)
        views = index[first : first + size].view(shape)
        first += size
        matches = -2 if per_slot else -1  # the dimension that they run along
        query, order = views[::2].sort(dim=matches)
        views[1::2] = views[1::2].gather(matches, order)
        views[::2] = query


def squared_distances(
    maps: Sequence[Tensor], locations: Sequence[Tensor], counts: Sequence[int], per_slot: bool, matches: Matches
) -> list[Tensor]:
    """Squared distances of each match set, float64, (B, m), each image's in ascending order.

    Where two candidates are equally near up to rounding, configurations may choose either, and in either order.
    """
    B, first, found = maps[0].shape[0], 0, []
    image = torch.arange(B, device=maps[0].device)[:, None]
    for both_maps in [locations, maps] if locations else [maps]:
        direction = 0
        for shape in index_shapes(B, counts, per_slot):
            views = matches.match_index[first : first + math.prod(shape)].view(shape)
            first += math.prod(shape)
            for pair in views.view(-1, 2, *shape[1:]):
                pair_maps = (both_maps[direction], both_maps[1 - direction])
                # An index out of bounds would stop the device: it counts as the last patch.
                x, y = (
                    z[image, (index.T if per_slot else index).clamp(0, z.shape[1] - 1)].double()
                    for z, index in zip(pair_maps, pair, strict=True)
                )
                found.append((x - y).square().sum(-1).sort(-1).values)
                direction += 1
    return found


def match_distances(queries: Tensor, candidates: Tensor, matches: Tensor, device: Device) -> Tensor:
    """Euclidean distances (B, m) of matches (2, B, m)."""
    _, B, m = matches.shape
    distance = torch.empty(B, m, dtype=torch.float32, device=queries.device)
    patch_matching._distance_forward_kernel[(B * -(-m // _DISTANCE_BLOCK_M),)](
        x=PatchMap(queries, *queries.stride()), y=PatchMap(candidates, *candidates.stride()),
        match_index_ptr=matches, distance_ptr=distance, B=B, C=queries.shape[2], m=m,
        BLOCK_M=_DISTANCE_BLOCK_M, BLOCK_K=_DISTANCE_BLOCK_K, **launch_options(device, warps=4),
    )  # fmt: skip
    return distance
