"""Launches patch matching: one kernel where an image's patches are one block each side, else two."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ...kernels import matching as kernels
from ...plan import index_shapes
from ..aten.matching import MAX_COORDINATES
from .configs import Key, Machine, Matching, choose, launch_options
from .launch import block_of, by_direction, products

# Patches of a program of the selection, and blocks whose nearest it reads at a time; matches and channels of one of the
# distances.
_SELECTED, _PARTS = 64, 8
_MEASURED, _CHANNELS = 16, 64


def _axes(rows: Tensor) -> int:
    """Channels of rows that are compared as locations are; 0 of longer ones."""
    return rows.shape[2] if rows.shape[2] <= MAX_COORDINATES else 0


def key(maps: Sequence[Tensor], machine: Machine) -> Key:
    """What the configuration is chosen by; kind "half": 16-bit features, multiplied as they are."""
    x, y = maps
    # Triton's interpreter computes bfloat16 wrong: there it is read as float32.
    half = x.dtype == y.dtype and x.dtype.itemsize == 2 and not _axes(x)
    half = half and (x.device.type != "cpu" or x.dtype == torch.float16)
    aligned = all(z.stride(2) == 1 and not z.stride(1) % 16 for z in maps)
    B, P1, C = x.shape
    return Key(*machine, aligned, "matching", "half" if half else "fp32", B, max(P1, y.shape[1]), C)


def match(
    maps: Sequence[Tensor],
    locations: Sequence[Tensor],
    counts: Sequence[int],
    match_order: str,
    across: bool,
    machine: Machine,
) -> list[Tensor]:
    """Numbers of matched patches, by location and by feature: see :func:`vicreg_fast.operators.match`.

    And a ticket, zero, which the launch that comes next counts its programs with.
    """
    x, y = maps
    x_location, y_location = locations or maps
    chosen_by = key(maps, machine)
    config: Matching = choose(chosen_by)
    B, P1, C = x.shape
    P2 = y.shape[1]
    both = len(counts) == 2
    m1, m2 = counts if both else (counts[0], 0)
    groups = 2 if locations else 1
    wide = torch.float64 in (x_location.dtype, y_location.dtype)
    largest = min(config.tile, 64) if wide else config.tile  # float64 distances take twice the registers
    block_q, block_c = block_of(P1, largest), block_of(P2, largest)
    whole = max(P1, P2) <= largest
    blocks = -(-P1 // block_q)
    found = [
        torch.empty(shape, dtype=torch.int64, device=x.device)
        for shape in index_shapes(B, counts, across) * groups
    ]
    numbers = by_direction(found)
    ticket = torch.empty(1, dtype=torch.int32, device=x.device)
    left = 0 if whole else groups * B * (P1 + blocks * P2)
    value = torch.empty(left, dtype=torch.float64 if wide else torch.float32, device=x.device)
    nearest = torch.empty(left, dtype=torch.int32, device=x.device)
    kernels._match_forward_kernel[(groups * B * blocks,)](
        x, y, x_location, y_location, *numbers, value, nearest, ticket, B, P1, P2, C, m1, m2,
        *x.stride(), *y.stride(), *x_location.stride(), *y_location.stride(),
        AXES=_axes(x), LOCATION_AXES=_axes(x_location) if locations else 0,
        SCORE=tl.float64 if wide else tl.float32, NATIVE=chosen_by.kind == "half",
        PRECISION=products(None, maps, machine).exact,
        BOTH=both, WHOLE=whole, PATCH=match_order == "patch", ACROSS=across,
        BLOCK_Q=block_q, BLOCK_C=block_c, BLOCK_K=config.inner,
        **launch_options(machine, config.warps, config.stages),
    )  # fmt: skip
    if not whole:
        programs = -(-P1 // _SELECTED) + (-(-P2 // _SELECTED) if both else 0)
        kernels._select_forward_kernel[(groups * B * programs,)](
            value, nearest, *numbers, B, P1, P2, m1, m2, blocks,
            BOTH=both, ACROSS=across, BLOCK=_SELECTED, PARTS=_PARTS, **launch_options(machine, warps=8),
        )  # fmt: skip
        if match_order == "patch":
            for views in found:
                _by_number(views, across)
    return [*found, ticket]


def _by_number(views: Tensor, across: bool) -> None:
    """Put matches (V, B, m), ``across``: (V, m, B), in the order of their queries, in place."""
    m = -2 if across else -1
    query, order = views[::2].sort(dim=m)
    views[1::2] = views[1::2].gather(m, order)
    views[::2] = query


def match_distances(queries: Tensor, candidates: Tensor, matches: Tensor, machine: Machine) -> Tensor:
    """Euclidean distances (B, m) of matches (2, B, m)."""
    _, B, m = matches.shape
    distance = torch.empty(B, m, dtype=torch.float32, device=queries.device)
    kernels._distance_forward_kernel[(B * -(-m // _MEASURED),)](
        queries, candidates, matches, distance, B, queries.shape[2], m, *queries.stride(), *candidates.stride(),
        BLOCK_M=_MEASURED, BLOCK_K=_CHANNELS, **launch_options(machine, warps=4),
    )  # fmt: skip
    return distance
