"""The dual side of VICReg's forward pass: moments of the columns, then G = o o' / (N - 1), N x N.

    hi + lo = mean_n z_n          std = sqrt(sum_n (z_n - hi - lo)^2 / (N - 1))
    o = round(z - hi - lo)        vhat = sum_n o_n^2 / (N - 1)
    cov = (sum G^2 - sum vhat^2) / D

1. _moments_forward_kernel reads each view once from memory and twice more from the cache.  It writes the moments, the
   operand o (unless rows are gathered by index), the squared row norms of o, and the partial sums of (x - y)^2,
   relu(gamma - sqrt(std^2 + eps)) and vhat^2.  2 bytes moved a byte of input, about 10 operations an element.
2. _gram_forward_kernel multiplies the tiles on and below G's diagonal: N^2 D operations a view.  Most tiles are computed
   by one program each.  The last ones, which would leave most of the device idle, are split along the features, and
   vicreg_splitk.py adds the splits.  Gathered rows are centred and rounded here.

x, y: (P, N, D), any strides.  Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .epilogue import reduce_terms, store_tile
from .numerics import (
    divide,
    exponent_scale,
    hinge_of,
    hinge_slope,
    operand_of,
    relu_propagating_nan,
    round_to_format,
    to_storage,
    tril_tile,
    undo_halves,
)
from .views import (
    block_of_rows,
    column_pointers,
    load_rows,
    load_tile,
    row_offsets,
    select_source,
    zero_outside,
)


@triton.jit
def _load_block(source, columns, index_ptr, v, p, top, n, d, P, N, D, EVEN: tl.constexpr):
    """Rows top + n and columns d of a view, as float32, 0 where they are not inside.  EVEN: all of them are."""
    columns, rows = block_of_rows(source, columns, index_ptr, v, p, top, n, P, N)
    mask = (top + n < N)[:, None] & (d < D)[None, :]
    return load_tile(columns[None, :] + rows[:, None], mask, EVEN).to(tl.float32)


@triton.jit
def _inside(e, top, n, d, N, D, EVEN: tl.constexpr):
    """e with zeros in the rows and columns of a block that are not inside."""
    return zero_outside(e, (top + n < N)[:, None] & (d < D)[None, :], EVEN)


@triton.jit
def _column_moments(
    source, columns, index_ptr, v, p, n, d, P, N, D, z_kept,
    EVEN: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hi, lo and std of columns d (a vector).  z_kept: all rows, or None if they are more than BLOCK_N.

    The first row is subtracted first, so that the mean of a constant column is its value, exactly.  Deviations are scaled
    by a power of two before they are squared: squares of deviations below 1.1e-19 are subnormal.
    """
    inverse_N = divide(1.0, N)
    if z_kept is not None:
        z0 = tl.sum(tl.where((n == 0)[:, None], z_kept, 0.0), 0)
        total = _inside(z_kept - z0[None, :], 0, n, d, N, D, EVEN)
        largest = tl.abs(total)
    else:
        first_row = row_offsets(source, index_ptr, v, p, tl.zeros((1,), tl.int32), P, N)
        z0 = tl.sum(load_rows(columns, first_row, (d < D)[None, :]), 0)
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        largest = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for top in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            z = _load_block(source, columns, index_ptr, v, p, top, n, d, P, N, D, EVEN)
            e = _inside(z - z0[None, :], top, n, d, N, D, EVEN)
            total += e
            largest = tl.maximum(largest, tl.abs(e))
    # lo is what the mean is more than hi, whatever the roundings of hi.
    hi = z0 + tl.sum(total, 0) * inverse_N
    # Deviations from the mean are at most twice those from the first row.
    scale, inverse = exponent_scale(tl.max(largest, 0))
    if z_kept is not None:
        total = _inside((z_kept - hi[None, :]) * inverse[None, :], 0, n, d, N, D, EVEN)
        squares = total * total
    else:
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for top in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            z = _load_block(source, columns, index_ptr, v, p, top, n, d, P, N, D, EVEN)
            e = _inside((z - hi[None, :]) * inverse[None, :], top, n, d, N, D, EVEN)
            total += e
            squares = tl.fma(e, e, squares)
    lo = tl.sum(total, 0) * inverse_N
    # lo is as small as the rounding of the mean, so N lo^2 is negligible beside the squares and subtracting it is safe.
    centred = relu_propagating_nan(tl.sum(squares, 0) - N * lo * lo)
    return hi, lo * scale, tl.sqrt_rn(centred * divide(1.0, N - 1)) * scale


@triton.jit(do_not_specialize=["P"])
def _moments_forward_kernel(
    views, operand_ptr, moments_ptr, row_sq_norms_ptr, partials, P, N, D, gamma, eps,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr, ONE_BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of one problem of one view.  A pair's second view reads the first for the invariance.

    EVEN: all blocks are full.  ONE_BLOCK: N <= BLOCK_N, and z is read once.
    Programs of the views of one block are neighbours: what one reads is in the cache for the other.
    """
    program = tl.program_id(0)
    if program == 0:
        tl.store(partials.arrival_counter_ptr, 0)
    blocks = tl.cdiv(D, BLOCK_D)
    v = program % VIEWS
    block = (program // VIEWS) % blocks
    p = program // VIEWS // blocks
    n = tl.arange(0, BLOCK_N)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    P = P.to(tl.int64)
    source = select_source(views, v)
    columns = column_pointers(source, d)
    z_kept = None
    if ONE_BLOCK:
        z_kept = _load_block(source, columns, views.index_ptr, v, p, 0, n, d, P, N, D, EVEN)
    hi, lo, std = _column_moments(
        source, columns, views.index_ptr, v, p, n, d, P, N, D, z_kept, EVEN, STAGES, BLOCK_N, BLOCK_D
    )
    other_source = select_source(views, v ^ 1)
    other_columns = column_pointers(other_source, d)
    row_sq_norms = row_sq_norms_ptr + ((v * P + p) * blocks + block) * N
    # With float32 sums the rounding of one strong feature would show in what the float32-accurate dual side subtracts.
    WIDE: tl.constexpr = tl.float64 if FORMAT == "fp32" else tl.float32
    # Summed over rows at the end; float64 ones would take too many registers.
    operand_squares = tl.zeros((BLOCK_D,), WIDE) if FORMAT == "fp32" else tl.zeros((BLOCK_N, BLOCK_D), WIDE)
    differences = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for top in tl.range(0, BLOCK_N if ONE_BLOCK else N, BLOCK_N, num_stages=STAGES):
        if ONE_BLOCK:
            z = z_kept
        else:
            z = _load_block(source, columns, views.index_ptr, v, p, top, n, d, P, N, D, EVEN)
        stored, o = operand_of(_inside(z - hi[None, :] - lo[None, :], top, n, d, N, D, EVEN), FORMAT)
        if operand_ptr is not None:
            at = operand_ptr + (v * P + p) * N * D + d
            at = at[None, :] + (top + n).to(tl.int64)[:, None] * D
            if EVEN:
                tl.store(at, stored)
            else:
                tl.store(at, stored, mask=(top + n < N)[:, None] & inside[None, :])
        wide = o.to(WIDE)
        squares = wide * wide
        operand_squares += tl.sum(squares, 0) if FORMAT == "fp32" else squares
        tl.store(row_sq_norms + top + n, tl.sum(squares, 1), mask=top + n < N)
        if VIEWS > 1:
            if v % 2 == 1:
                other = _load_block(
                    other_source, other_columns, views.index_ptr, v ^ 1, p, top, n, d, P, N, D, EVEN
                )
                difference = other - z
                differences = tl.fma(difference, difference, differences)
    if FORMAT != "fp32":
        operand_squares = tl.sum(operand_squares, 0)
    operand_v = operand_squares.to(tl.float64) * (1.0 / (N.to(tl.float64) - 1))
    if moments_ptr is not None:
        at = moments_ptr + (p * VIEWS + v).to(tl.int64) * D + d
        step = P * VIEWS * D  # of moments (4, P, V, D)
        tl.store(at, hi, mask=inside)
        tl.store(at + step, lo, mask=inside)
        tl.store(at + 2 * step, hinge_slope(std, gamma, eps), mask=inside)
        tl.store(at + 3 * step, operand_v.to(tl.float32), mask=inside)
    hinge = hinge_of(std, gamma, eps)
    at = partials.column_ptr + program.to(tl.int64) * 3
    tl.store(at, tl.sum(tl.sum(differences, 0).to(tl.float64)))
    tl.store(at + 1, tl.sum(tl.where(inside, hinge, 0.0).to(tl.float64)))
    tl.store(at + 2, tl.sum(tl.where(inside, operand_v * operand_v, 0.0)))


@triton.jit
def replace_diagonal(G, row, column, row_sq_norms_ptr, problem, column_blocks, N, BLOCK_R: tl.constexpr):
    """G with the diagonal that the moments kernel summed apart: row_sq_norms (V * P, column blocks, N).

    tl.dot accumulates serially.  sum vhat^2 is subtracted from sum G^2, so G's own diagonal would amplify its error.
    """
    # Blocks at a time: one by one, each would wait for memory.
    BLOCK_E: tl.constexpr = min(128, 2048 // BLOCK_R)
    norms = tl.zeros((BLOCK_E, BLOCK_R), tl.float64)
    for start in range(0, column_blocks, BLOCK_E):
        block = start + tl.arange(0, BLOCK_E)
        at = row_sq_norms_ptr + (problem * column_blocks + block)[:, None] * N + row[None, :]
        mask = (block < column_blocks)[:, None] & (row < N)[None, :]
        norms += tl.load(at, mask=mask, other=0.0).to(tl.float64)
    diagonal = (tl.sum(norms, 0) / (N - 1)).to(tl.float32)
    return tl.where(row[:, None] == column[None, :], diagonal[:, None], G)


@triton.jit
def load_operand(source, rows, n, N, d, D, hi_ptr, lo_ptr, FORMAT: tl.constexpr):
    """Rows n < N and columns d < D of a view, centred and rounded, 0 elsewhere; hi, lo: of all its columns."""
    mask = (n < N)[:, None] & (d < D)[None, :]
    z = load_rows(column_pointers(source, d), rows, mask)
    hi = tl.load(hi_ptr + d, mask=d < D, other=0.0)
    lo = tl.load(lo_ptr + d, mask=d < D, other=0.0)
    return round_to_format(tl.where(mask, z - hi[None, :] - lo[None, :], 0.0), FORMAT)


@triton.jit
def _gram_tile(
    views, operand_ptr, moments_ptr, problem, row, column, begin, end, P, N, D,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(N - 1) G in rows ``row`` and columns ``column``, from the features begin <= d < end."""
    if operand_ptr is not None:
        a_ptr = operand_ptr + problem * N * D + row.to(tl.int64) * D
        b_ptr = operand_ptr + problem * N * D + column.to(tl.int64) * D
    else:
        v = problem // P
        p = problem % P
        source = select_source(views, v)
        a_rows = row_offsets(source, views.index_ptr, v, p, row, P, N)
        b_rows = row_offsets(source, views.index_ptr, v, p, column, P, N)
        hi_ptr = moments_ptr + (p * VIEWS + v) * D
        lo_ptr = hi_ptr + P.to(tl.int64) * VIEWS * D
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for start in range(begin, end, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        if operand_ptr is not None:
            a = tl.load(a_ptr[:, None] + d[None, :], mask=(row < N)[:, None] & (d < end)[None, :], other=0.0)
            b = tl.load(b_ptr[None, :] + d[:, None], mask=(column < N)[None, :] & (d < end)[:, None], other=0.0)
        else:
            a = load_operand(source, a_rows, row, N, d, end, hi_ptr, lo_ptr, FORMAT)
            b = load_operand(source, b_rows, column, N, d, end, hi_ptr, lo_ptr, FORMAT)
            a = to_storage(a, FORMAT).to(OPERAND_TYPE)
            b = tl.trans(to_storage(b, FORMAT).to(OPERAND_TYPE))
        acc = tl.dot(a, b, acc, input_precision=DOT_PRECISION)
    return undo_halves(acc, FORMAT)


@triton.jit(do_not_specialize=["P", "tiles", "full_tiles", "splits", "tile_partials", "column_partials"])
def _gram_forward_kernel(
    views, operand_ptr, moments_ptr, row_sq_norms_ptr, split_tiles_ptr, M_ptr, partials, terms, scales,
    P, N, D, tiles, full_tiles, splits, split_length, column_blocks, tile_partials, column_partials,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one of the first ``full_tiles`` tiles; or ``split_length`` features of a later one, which has ``splits``.

    tiles: of one G.  split_tiles_ptr None: no tile is split, and this kernel reduces the terms too.
    """
    program = tl.program_id(0)
    is_full = program < full_tiles
    split = program - full_tiles
    tile = tl.where(is_full, program, full_tiles + split // splits)
    begin = tl.where(is_full, 0, (split % splits) * split_length)
    end = tl.where(is_full, D, tl.minimum(begin + split_length, D))
    problem = (tile // tiles).to(tl.int64)
    i, j = tril_tile(tile % tiles)
    m = tl.arange(0, BLOCK_M)
    row = i * BLOCK_M + m
    column = j * BLOCK_M + m
    acc = _gram_tile(
        views, operand_ptr, moments_ptr, problem, row, column, begin, end, P, N, D,
        VIEWS, FORMAT, OPERAND_TYPE, DOT_PRECISION, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    if is_full:
        G = divide(acc, N - 1)
        if i == j:
            G = replace_diagonal(G, row, column, row_sq_norms_ptr, problem, column_blocks, N, BLOCK_M)
        tl.store(
            partials.tile_ptr + tile.to(tl.int64) * 2,
            store_tile(G, row, column, i != j, N, problem, M_ptr, FORMAT),
        )
    elif split_tiles_ptr is not None:
        at = split_tiles_ptr + split.to(tl.int64) * BLOCK_M * BLOCK_M
        tl.store(at + m[:, None] * BLOCK_M + m[None, :], acc)
    if split_tiles_ptr is None:
        reduce_terms(partials, tile_partials, column_partials, terms, scales, True)
