"""The dual side of VICReg's forward pass: G = o o' / (N - 1), N x N, from the operand o of vicreg_moments.py.

    o_d = s_d (high_d + 2^-11 low_d)      G = sum_d s_d^2 (high_d high_d' + 2^-11 (high_d low_d' + low_d high_d')) / (N - 1)

Multiplies the tiles on and below G's diagonal: N^2 D operations a view.  Most tiles are computed by one program each.  The last
ones, which would leave most of the device idle, are split along the features, and vicreg_splitk.py adds the splits.
Gathered rows are centred and rounded here.  Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .epilogue import reduce_terms, store_tile
from .numerics import SCALE_STEP, divide, join_pair, power_of_two, to_storage, tril_tile, undo_halves
from .vicreg_moments import load_operand
from .views import row_offsets, select_source


@triton.jit
def gram_scale(partials, problem, P, N, D, column_blocks, VIEWS: tl.constexpr):
    """(s, 1 / s): the power of two by which G is divided before it is rounded to float16.

    |G| is at most the largest |o_n|^2 / (N - 1), so at most sum vhat and D times the largest vhat, which is between 2^14 and
    2^15 times s.
    """
    BLOCK: tl.constexpr = 512
    largest = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, column_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        program = ((problem % P) * column_blocks + block) * VIEWS + problem // P
        largest = tl.maximum(
            largest, tl.load(partials.column_ptr + program * 4 + 3, mask=block < column_blocks, other=0.0)
        )
    bound = tl.max(largest, 0) * D
    # From 2^-110 to 2^126: both powers are normal.
    exponent = (bound.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1023
    exponent = tl.minimum(tl.maximum(exponent, -110), 126) - 14
    return power_of_two(exponent), power_of_two(-exponent)


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
def _operand_matmul(
    a_rows, b_rows, of_low, row, column, begin, end, N,
    PAIR: tl.constexpr, DOT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows ``row`` times rows ``column`` of the stored operand over the features begin <= d < end.

    a_rows, b_rows: pointers to the rows, (rows, 1) and (1, rows); of_low: from there to the low parts.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    acc_low = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for start in range(begin, end, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        a_mask = (row < N)[:, None] & (d < end)[None, :]
        b_mask = (column < N)[None, :] & (d < end)[:, None]
        a = tl.load(a_rows + d[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_rows + d[:, None], mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=DOT_PRECISION)
        if PAIR:
            acc_low = tl.dot(a, tl.load(b_rows + of_low + d[:, None], mask=b_mask, other=0.0), acc_low)
            acc_low = tl.dot(tl.load(a_rows + of_low + d[None, :], mask=a_mask, other=0.0), b, acc_low)
    return join_pair(acc, acc_low) if PAIR else acc


@triton.jit
def _matmul_by_scale(
    a_rows, b_rows, of_low, scale_ptr, least, most, row, column, begin, end, N,
    PAIR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As _operand_matmul(), for columns of different scales: one scale after the other, from the least, in units of the last.

    A factor of each column would be 2^-32 for each step of the scales, and the products underflow.
    """
    STEP: tl.constexpr = 2.0**SCALE_STEP
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    acc_low = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    scale = least
    while scale <= most:
        acc *= 1.0 / (STEP * STEP)
        acc_low *= 1.0 / (STEP * STEP)
        for start in tl.range(begin, end, BLOCK_K, num_stages=1):  # registers are for the other loop
            d = start + tl.arange(0, BLOCK_K)
            of_scale = (tl.load(scale_ptr + d, mask=d < end, other=0.0) == scale)[None, :]
            a_mask = (row < N)[:, None] & (d < end)[None, :]
            b_mask = (column < N)[None, :] & (d < end)[:, None]
            a = tl.load(a_rows + d[None, :], mask=a_mask, other=0.0)
            a = tl.where(of_scale, a, 0.0).to(tl.float16)
            b = tl.load(b_rows + d[:, None], mask=b_mask, other=0.0)
            acc = tl.dot(a, b, acc)
            if PAIR:
                acc_low = tl.dot(a, tl.load(b_rows + of_low + d[:, None], mask=b_mask, other=0.0), acc_low)
                a_low = tl.load(a_rows + of_low + d[None, :], mask=a_mask, other=0.0)
                acc_low = tl.dot(tl.where(of_scale, a_low, 0.0).to(tl.float16), b, acc_low)
        scale *= STEP
    return join_pair(acc, acc_low) if PAIR else acc


@triton.jit
def _extreme_scales(scale_ptr, begin, end):
    """The smallest and the largest scale of the columns begin <= d < end."""
    BLOCK: tl.constexpr = 1024
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        d = start + tl.arange(0, BLOCK)
        least = tl.minimum(least, tl.load(scale_ptr + d, mask=d < end, other=float("inf")))
        most = tl.maximum(most, tl.load(scale_ptr + d, mask=d < end, other=0.0))
    return tl.min(least, 0), tl.max(most, 0)


@triton.jit
def _tile_of_operand(
    operand_ptr, moments_ptr, problem, row, column, begin, end, P, N, D,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, DOT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(N - 1) G in rows ``row`` and columns ``column``, from the features begin <= d < end of the stored operand."""
    PAIR: tl.constexpr = FORMAT == "scaled_fp16_pair"
    a_rows = (operand_ptr + problem * N * D + row.to(tl.int64) * D)[:, None]
    b_rows = (operand_ptr + problem * N * D + column.to(tl.int64) * D)[None, :]
    of_low = P.to(tl.int64) * VIEWS * N * D
    if PAIR or FORMAT == "scaled_fp16":
        scale_ptr = moments_ptr + ((4 * P.to(tl.int64) + problem % P) * VIEWS + problem // P) * D
        least, most = _extreme_scales(scale_ptr, begin, end)
        if least == most:
            acc = _operand_matmul(
                a_rows, b_rows, of_low, row, column, begin, end, N, PAIR, DOT_PRECISION, BLOCK_M, BLOCK_K
            )
        else:
            acc = _matmul_by_scale(
                a_rows, b_rows, of_low, scale_ptr, least, most, row, column, begin, end, N, PAIR, BLOCK_M, BLOCK_K
            )  # fmt: skip
        acc = acc * most * most
    else:
        acc = _operand_matmul(
            a_rows, b_rows, of_low, row, column, begin, end, N, PAIR, DOT_PRECISION, BLOCK_M, BLOCK_K
        )
    return acc


@triton.jit
def _tile_of_gathered_rows(
    views, moments_ptr, problem, row, column, begin, end, P, N, D,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As _tile_of_operand(), from the views: rows are centred and rounded here."""
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
        a = load_operand(source, a_rows, row, N, d, end, hi_ptr, lo_ptr, FORMAT)
        b = load_operand(source, b_rows, column, N, d, end, hi_ptr, lo_ptr, FORMAT)
        a = to_storage(a, FORMAT).to(OPERAND_TYPE)
        b = tl.trans(to_storage(b, FORMAT).to(OPERAND_TYPE))
        acc = tl.dot(a, b, acc, input_precision=DOT_PRECISION)
    return undo_halves(acc, FORMAT)


@triton.jit
def finish_gram_tile(
    G, row, column, i, j, problem, P, N, D, row_sq_norms_ptr, column_blocks, M_ptr, M_scale_ptr, partials,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Replace the diagonal of rows ``row`` of tile (i, j), and store them, for which see store_tile(); their share of sum G^2."""
    if i == j:
        G = replace_diagonal(G, row, column, row_sq_norms_ptr, problem, column_blocks, N, BLOCK_R)
    inverse = None
    if M_scale_ptr is not None:
        s, inverse = gram_scale(partials, problem, P, N, D, column_blocks, VIEWS)
        if i == 0:
            tl.store(M_scale_ptr + problem, s)
    return store_tile(G, row, column, i != j, N, problem, P * VIEWS, M_ptr, inverse, FORMAT)


@triton.jit(do_not_specialize=["P", "tiles", "full_tiles", "splits", "tile_partials", "column_partials"])
def _gram_forward_kernel(
    views, operand_ptr, moments_ptr, row_sq_norms_ptr, split_tiles_ptr, M_ptr, M_scale_ptr, partials, terms, scales,
    P, N, D, tiles, full_tiles, splits, split_length, column_blocks, tile_partials, column_partials,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one of the first ``full_tiles`` tiles; or ``split_length`` features of a later one, which has ``splits``.

    tiles: of one G.  views None: the operand is read instead.  split_tiles_ptr None: no tile is split, and this kernel
    reduces the terms too.
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
    if operand_ptr is not None:
        acc = _tile_of_operand(
            operand_ptr, moments_ptr, problem, row, column, begin, end, P, N, D,
            VIEWS, FORMAT, DOT_PRECISION, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    else:
        acc = _tile_of_gathered_rows(
            views, moments_ptr, problem, row, column, begin, end, P, N, D,
            VIEWS, FORMAT, OPERAND_TYPE, DOT_PRECISION, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    if is_full:
        squares = finish_gram_tile(
            divide(acc, N - 1), row, column, i, j, problem, P, N, D, row_sq_norms_ptr, column_blocks,
            M_ptr, M_scale_ptr, partials, VIEWS, FORMAT, BLOCK_M,
        )  # fmt: skip
        tl.store(partials.tile_ptr + tile.to(tl.int64) * 2, squares)
    elif split_tiles_ptr is not None:
        at = split_tiles_ptr + split.to(tl.int64) * BLOCK_M * BLOCK_M
        tl.store(at + m[:, None] * BLOCK_M + m[None, :], acc)
    if split_tiles_ptr is None:
        reduce_terms(partials, tile_partials, column_partials, terms, scales, True)
