"""Launches VICReg's kernels.

Forward, dual side: moments, gram, and the split-K reduction if tiles were split: two launches or three.  Primal side:
second moments and the split-K reduction: two.  The last one reduces the terms.  Backward: one launch for all views.  For
gathered rows two launches for each source: the gradients of its rows, then their scatter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels import (
    scatter_rows,
    vicreg_backward,
    vicreg_dual,
    vicreg_moments,
    vicreg_narrow_backward,
    vicreg_primal,
    vicreg_splitk,
)
from ...kernels.epilogue import Partials, Terms
from ...plan import Plan
from ...scales import Normalisation
from ...sides import FEW_SAMPLES, uses_dual
from .arguments import Call, Group, MatmulPolicy, block_of
from .configs import (
    INTERPRETER,
    Device,
    Gradient,
    Key,
    Moments,
    NarrowGradient,
    Product,
    choose,
    launch_options,
)
from .splitk import split, tril_tiles

# The split-K reduction's (BLOCK_C, BLOCK_R * BLOCK_M) on the dual side: splits at a time and elements of a tile, as many as
# leave a program for most SMs.
_DUAL_SPLITS = (4, 1024)
# The same on the primal side, at most: of a program's elements, and of the splits at a time.  No target spilled.
_MOST_ELEMENTS, _MOST_SPLITS = 4096, 8
# The most features of which a program of the backward pass keeps the whole of C0.
_NARROW = 64
# Rows of a chunk: 2^24 of 64 features are 2^30 elements, and offsets within a chunk are 32-bit.
_LONGEST_CHUNK = 1 << 24
# Patches, matches at a time and columns of a program of the scatter.  The interpreter wants few programs, but at least two
# for the tests' 130 columns.
_PATCHES, _MATCHES, _COLUMNS, _COLUMNS_INTERPRETED = 64, 32, 32, 128


def forward_keys(group: Group, matmul: MatmulPolicy, device: Device) -> list[Key]:
    """What the forward pass's configurations are chosen by: dual, of moments and gram; primal, of the second moments."""
    if group.dual:
        return [group.key(device, "moments"), group.key(device, "gram", matmul.kind)]
    return [group.key(device, "second_moment", matmul.kind)]


def _is_narrow(group: Group) -> bool:
    """Whether the backward pass keeps the whole of C0 in a program: rows are long columns of few features."""
    return not group.dual and group.match_index is None and group.D <= _NARROW


def gradient_keys(group: Group, matmul: MatmulPolicy, device: Device) -> list[Key]:
    """What the backward pass's configuration is chosen by."""
    return [group.key(device, "narrow_gradient" if _is_narrow(group) else "gradient", matmul.gradient_kind)]


def saved(
    plan: Plan, matmul: MatmulPolicy, indexed: bool, V: int, P: int, N: int, D: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what the backward pass reads: moments, M and its scales, and the dual side's operand.

    Not M's scales without a scaled operand, and not the operand if rows are gathered.
    """
    shapes: tuple[tuple[int, ...], ...] = ((0,), (0,), (0,), (0,))
    if plan.save_for_backward and uses_dual(P, N, D):
        matmul = matmul.of_side(dual=True, gathered=indexed)
        scales = (V * P,) if matmul.scaled else (0,)
        operand = (0,) if indexed else (matmul.parts, V, P, N, D)
        shapes = ((matmul.moments, P, V, D), (matmul.parts, V * P, N, N), scales, operand)
    elif plan.save_for_backward:
        # Of bfloat16 beside the moments m C0, in parts.
        parts = -(-D // vicreg_splitk.MEAN_COLUMNS.value) if matmul.format.startswith("bf16") else 0
        shapes = ((3 + parts, P, V, D), (1, V * P, D, D), (0,), (0,))
    dtypes = (torch.float32, matmul.matrix_dtype, torch.float32, matmul.dtype)
    return list(zip(shapes, dtypes, strict=True))


def _or_none(tensor: Tensor) -> Tensor | None:
    """A tensor as kernels take it: None for one without elements."""
    return tensor if tensor.numel() else None


def terms(call: Call) -> list[Tensor]:
    """[weighted inv, var, cov, their sum; moments, M, its scales, operand]; the last four are empty if nothing is saved."""
    group, plan, matmul, _ = call
    shapes = saved(plan, matmul, group.match_index is not None, group.V, group.P, group.N, group.D)
    kept = [group.empty(*shape, dtype=dtype) for shape, dtype in shapes]
    outputs = [group.empty() for _ in range(4)]
    forward = _dual_forward if group.dual else _primal_forward
    forward(call, kept, Terms(*outputs))
    return [*outputs, *kept]


def _normalisation(group: Group) -> Normalisation:
    return Normalisation(group.V, group.pairs, group.P, group.N, group.D)


def _splitk_blocks(product: Product, device: Device) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_R) of the split-K reduction on the dual side: splits added at a time, and rows of a tile, in a program."""
    block_c, elements = _DUAL_SPLITS
    if device.num_sms > 200:  # at 256x8192 1024 elements would leave three quarters of 304 compute units idle
        elements //= 4
    if device == INTERPRETER:  # few programs, but more than one of a tile, as on a GPU
        return block_c, product.block_m // 2
    return block_c, max(1, elements // product.block_m)


def _covariance_blocks(group: Group, product: Product, splits: int, device: Device) -> tuple[int, int, int]:
    """(BLOCK_C, BLOCK_R, warps) on the primal side: equal groups of splits, and rows that leave a program for most SMs."""
    rows = _MOST_ELEMENTS // product.block_m
    columns = group.V * group.P * -(-group.D // product.block_m)
    while rows > 2 and columns * -(-group.D // rows) < 0.75 * device.num_sms:
        rows //= 2
    # What is computed once a column is repeated by each warp.
    warps = 4 if rows * product.block_m > 256 else 1
    most_splits = min(_MOST_SPLITS, _MOST_ELEMENTS * warps // (rows * product.block_m))
    block_c = -(-splits // -(-splits // most_splits))
    if device == INTERPRETER:  # few programs, but more than one of a tile, as on a GPU
        return min(block_c, 2), product.block_m // 2, 4
    return block_c, rows, warps


def _dual_forward(call: Call, kept: Sequence[Tensor], terms: Terms) -> None:
    group, plan, matmul, device = call
    V, P, N, D = group.V, group.P, group.N, group.D
    moments, M, M_scale, operand = map(_or_none, kept)
    if moments is None and (group.match_index is not None or matmul.scaled):
        # The gram kernel centres gathered rows with the moments, and reads the scales of columns.
        moments = group.empty(matmul.moments, P, V, D)
    if group.match_index is None and operand is None:
        operand = group.empty(matmul.parts, V, P, N, D, dtype=matmul.dtype)
    moments_key, gram_key = forward_keys(group, matmul, device)
    config: Moments = choose(moments_key)
    even = N % config.block_n == 0 and D % config.block_d == 0
    if not even and config.warps < 4:  # masks take registers
        config = config._replace(warps=4)
    product: Product = choose(gram_key)
    column_blocks = -(-D // config.block_d)
    programs = V * P * column_blocks
    tiles = tril_tiles(N, product.block_m)
    shares = split(V * P * tiles, D, product, device.num_sms, allow_full_tiles=True)
    split_tiles = V * P * tiles - shares.full_tiles
    _, block_r = _splitk_blocks(product, device)
    tile_partials = shares.full_tiles + split_tiles * (product.block_m // block_r)
    partials = Partials(
        group.empty(tile_partials, 2, dtype=torch.float64),
        group.empty(programs, 4, dtype=torch.float64),
        group.empty(1, dtype=torch.int32),
    )
    row_sq_norms = group.empty(V * P, column_blocks, N)
    vicreg_moments._moments_forward_kernel[(programs,)](
        views=group.views, operand_ptr=operand, moments_ptr=moments, row_sq_norms_ptr=row_sq_norms, partials=partials,
        P=P, N=N, D=D, gamma=plan.gamma, eps=plan.eps,
        VIEWS=V, FORMAT=matmul.format, EVEN=even, ONE_BLOCK=config.block_n >= N, STAGES=config.stages,
        BLOCK_N=config.block_n, BLOCK_D=config.block_d, **launch_options(device, config.warps, config.stages),
    )  # fmt: skip
    splits = None
    if split_tiles:
        splits = group.empty(split_tiles * shares.splits, product.block_m, product.block_m)
    shared: dict[str, Any] = {
        "split_tiles_ptr": splits, "row_sq_norms_ptr": row_sq_norms, "M_ptr": M, "M_scale_ptr": M_scale, "partials": partials, "terms": terms,
        "scales": _normalisation(group).terms(plan.weights), "P": P, "N": N, "D": D, "tiles": tiles,
        **shares._asdict(), "column_blocks": column_blocks, "tile_partials": tile_partials, "column_partials": programs,
        "VIEWS": V, "FORMAT": matmul.format, "BLOCK_M": product.block_m,
    }  # fmt: skip
    vicreg_dual._gram_forward_kernel[(shares.programs(V * P * tiles),)](
        **shared, views=group.views if operand is None else None, operand_ptr=operand, moments_ptr=moments,
        OPERAND_TYPE=matmul.tl_dtype, DOT_PRECISION=matmul.dot_precision, BLOCK_K=product.block_k,
        **launch_options(device, product.warps, product.stages),
    )  # fmt: skip
    if splits is not None:
        _reduce_splits(call, product, shared, chunk_sums=None, moments=None)


def _primal_forward(call: Call, kept: Sequence[Tensor], terms: Terms) -> None:
    group, plan, matmul, device = call
    V, P, N, D = group.V, group.P, group.N, group.D
    moments, M, _, _ = map(_or_none, kept)
    (key,) = forward_keys(group, matmul, device)
    product: Product = choose(key)
    tiles = tril_tiles(D, product.block_m)
    narrow = tiles == 1
    unsplit_programs = group.pairs * P if narrow else V * P * tiles
    shares = split(unsplit_programs, N, product, device.num_sms, allow_full_tiles=False)
    programs = unsplit_programs * shares.splits
    _, block_r, _ = _covariance_blocks(group, product, shares.splits, device)
    tile_partials = V * P * -(-D // product.block_m) * -(-D // block_r)
    partials = Partials(
        group.empty(tile_partials, 2, dtype=torch.float64),
        group.empty(programs, dtype=torch.float64) if V > 1 else None,
        group.empty(1, dtype=torch.int32),
    )
    chunk_sums = group.empty(shares.splits, V * P, 3, D)
    shared: dict[str, Any] = {
        "split_tiles_ptr": group.empty(V * P * tiles * shares.splits, product.block_m, product.block_m),
        "partials": partials, "P": P, "N": N, "D": D, "splits": shares.splits, "split_length": shares.split_length,
        "VIEWS": V, "FORMAT": matmul.format, "BLOCK_M": product.block_m,
    }  # fmt: skip
    arguments: dict[str, Any] = {
        **shared, "views": group.views, "chunk_sums_ptr": chunk_sums,
        "EVEN": N % product.block_k == 0 and D % product.block_m == 0, "DOT_PRECISION": matmul.dot_precision, "BLOCK_K": product.block_k,
        **launch_options(device, product.warps, product.stages),
    }  # fmt: skip
    if narrow:
        kernel = vicreg_primal._narrow_second_moment_forward_kernel
        kernel[(programs,)](**arguments, FP64_SQUARES=N < FEW_SAMPLES)
    else:
        vicreg_primal._second_moment_forward_kernel[(programs,)](**arguments, tiles=tiles)
    shared |= {
        "row_sq_norms_ptr": None, "M_ptr": M, "M_scale_ptr": None, "terms": terms, "scales": _normalisation(group).terms(plan.weights),
        "tiles": tiles, "full_tiles": 0, "column_blocks": 0, "tile_partials": tile_partials, "column_partials": programs,
    }  # fmt: skip
    _reduce_splits(call, product, shared, chunk_sums, moments)


def _reduce_splits(
    call: Call, product: Product, shared: dict[str, Any], chunk_sums: Tensor | None, moments: Tensor | None
) -> None:
    """Add up the splits.  ``shared``: arguments that the kernel before has too; ``chunk_sums``: of the primal side."""
    group, plan, _, device = call
    if group.dual:
        (block_c, block_r), warps = _splitk_blocks(product, device), 4
    else:
        block_c, block_r, warps = _covariance_blocks(group, product, shared["splits"], device)
    vicreg_splitk._splitk_reduction_kernel[(shared["tile_partials"] - shared["full_tiles"],)](
        **shared, chunk_sums_ptr=chunk_sums, moments_ptr=moments, gamma=plan.gamma, eps=plan.eps,
        EVEN=not (group.dual or group.D % product.block_m or shared["splits"] % block_c),
        BLOCK_R=block_r, BLOCK_C=block_c, **launch_options(device, warps),
    )  # fmt: skip


def gradient(
    call: Call, kept: Sequence[Tensor], upstream: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of the views of each source that needs one, (views of the source, P, N, D), contiguous.

    In the source's type; float32 for gathered rows, whose gradients are added up in the source.
    """
    group, plan, matmul, device = call
    moments, M, M_scale, operand = kept
    V, P, N, D = group.V, group.P, group.N, group.D
    inv, var, cov = upstream
    gathered = torch.float32 if group.match_index is not None else None
    x, y = (
        group.empty(group.pairs, P, N, D, dtype=gathered or source.dtype) if need else None
        for source, need in zip((group.views.x_ptr, group.views.y_ptr), [*needs, False][:2], strict=True)
    )
    shared: dict[str, Any] = {
        "views": group.views, "moments_ptr": moments, "M_ptr": M, "x_grad_ptr": x, "y_grad_ptr": y,
        "upstream": vicreg_backward.Upstream(inv if V > 1 else None, var, cov),
        "scales": _normalisation(group).gradients(plan.weights), "P": P, "N": N, "D": D, "VIEWS": V, "FORMAT": matmul.format, "DOT_PRECISION": matmul.dot_precision,
    }  # fmt: skip
    (key,) = gradient_keys(group, matmul, device)
    if _is_narrow(group):
        narrow: NarrowGradient = choose(key)
        columns = P * len([grad for grad in (x, y) if grad is not None])
        chunks = -(-device.num_sms * narrow.ctas_per_sm // columns)
        chunk_length = min(-(-N // (chunks * narrow.block_n)) * narrow.block_n, _LONGEST_CHUNK)
        chunks = -(-N // chunk_length)
        vicreg_narrow_backward._narrow_gradient_kernel[(columns * chunks,)](
            **shared, chunks=chunks, chunk_length=chunk_length,
            BLOCK_N=narrow.block_n, BLOCK_D=block_of(D, _NARROW), STAGES=narrow.stages,
            **launch_options(device, narrow.warps, narrow.stages),
        )  # fmt: skip
        return [x, y][: len(needs)]
    config: Gradient = choose(key)
    views = V if x is not None and y is not None else group.pairs  # those that need a gradient
    tiles = -(-N // config.block_n) * -(-D // config.block_d)
    vicreg_backward._gradient_kernel[(tiles * views * P,)](
        **shared, operand_ptr=_or_none(operand), M_scale_ptr=_or_none(M_scale), DUAL=group.dual,
        UNCHANGED=matmul.format.startswith("bf16") and group.views.x_ptr.dtype == torch.bfloat16,
        EVEN=not (N % config.block_n or D % config.block_d or (N if group.dual else D) % config.block_k),
        BLOCK_N=config.block_n, BLOCK_D=config.block_d, BLOCK_K=config.block_k,
        **launch_options(device, config.warps, config.stages),
    )  # fmt: skip
    return [x, y][: len(needs)]


def scatter(call: Call, which: int, grads: Tensor, shape: Sequence[int], total: Tensor | None) -> Tensor:
    """Add the gradients of gathered rows, (views of the source, P, N, D), float32, to a source (images, patches, D).

    ``which``: 0, the source of the first view, or 1, that of the second.  ``total``: what is added to, in place.
    """
    group, _, matmul, device = call
    _, P, N, D = grads.shape
    images, patches, _ = shape
    add = total is not None
    if total is None:
        total = torch.empty(shape, dtype=torch.float32, device=grads.device)
    m, image_stride, match_stride = (P, 1, N) if group.per_slot else (N, N, 1)
    # Of the four views in kernels/views.py a source's are 0 and 3, or 1 and 2; of two, the one.
    first_view, view_step = (0, 3) if which == 0 else (1, 1)
    block_l = block_of(patches, _PATCHES)
    block_d = block_of(D, _COLUMNS_INTERPRETED if device == INTERPRETER else _COLUMNS)
    tiles = -(-patches // block_l) * -(-D // block_d)
    scatter_rows._scatter_backward_kernel[(images * tiles,)](
        g_ptr=grads, index_ptr=group.match_index, total_ptr=total,
        first_view=first_view, view_step=view_step,
        image_stride=image_stride, match_stride=match_stride, view_stride=P * N,
        m=m, L=patches, D=D,
        VIEWS=len(grads), ADD=add, DOT_PRECISION=matmul.exact_precision,
        BLOCK_L=block_l, BLOCK_K=_MATCHES, BLOCK_D=block_d, **launch_options(device, warps=4),
    )  # fmt: skip
    return total
