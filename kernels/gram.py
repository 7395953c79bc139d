"""The dual side: G = o o' / (N - 1), N x N, of the copies that moments.py wrote, or of rows by number, centred here.

Only tiles on or below the diagonal are multiplied.  Most are multiplied whole, by one program each, which finishes them;
those that would not fill the device are split along the features, and combine.py adds up their parts.

operand (V * P, N, D); G (V * P, N, N); N^2 D operations a view.
"""

import triton
import triton.language as tl

from .finish import finish_terms, finish_tile
from .rows import load_operand, row_offsets, stored, triangle, view_of


@triton.jit
def with_diagonal(G, row, column, energy_ptr, problem, blocks, N, BLOCK_R: tl.constexpr):
    """G with the diagonal that the moments' launch summed: energy (V * P, blocks, N).

    A product adds in sequence; what the sum of vhat^2 is taken from must be as exact as that is.
    """
    BLOCK_E: tl.constexpr = min(128, 2048 // BLOCK_R)  # at a time: one by one, each would wait for memory
    energy = tl.zeros((BLOCK_E, BLOCK_R), tl.float64)
    for start in range(0, blocks, BLOCK_E):
        block = start + tl.arange(0, BLOCK_E)
        at = energy_ptr + (problem * blocks + block)[:, None] * N + row[None, :]
        mask = (block < blocks)[:, None] & (row < N)[None, :]
        energy += tl.load(at, mask=mask, other=0.0).to(tl.float64)
    diagonal = (tl.sum(energy, 0) / (N - 1)).to(tl.float32)
    return tl.where(row[:, None] == column[None, :], diagonal[:, None], G)


@triton.jit(do_not_specialize=["P", "tiles", "whole", "parts", "found", "sums"])
def _gram_forward_kernel(
    x_ptr, y_ptr, index_ptr, operand_ptr, moments_ptr, product_ptr, energy_ptr, M_ptr, found_ptr, sums_ptr, ticket_ptr,
    inv_ptr, var_ptr, cov_ptr, total_ptr,
    P, N, D, tiles, whole, parts, length, blocks, found, sums, w_inv, w_var, w_cov,
    x_stride_p, x_stride_n, x_stride_i, x_stride_d, y_stride_p, y_stride_n, y_stride_i, y_stride_d,
    VIEWS: tl.constexpr, HAS_INDEX: tl.constexpr, ROUND: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr, LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: a whole tile, the first ``whole`` of them; then ``length`` features of a tile that has ``parts``.

    product (split tiles, parts, B, B), float32.  LAST: no tile is split, so that nothing is left to another kernel.
    """
    program = tl.program_id(0)
    is_whole = program < whole
    split = program - whole
    tile = tl.where(is_whole, program, whole + split // parts)
    begin = tl.where(is_whole, 0, (split % parts) * length)
    end = tl.where(is_whole, D, tl.minimum(begin + length, D))
    problem = (tile // tiles).to(tl.int64)
    i, j = triangle(tile % tiles)
    m = tl.arange(0, BLOCK_M)
    row = i * BLOCK_M + m
    column = j * BLOCK_M + m
    a_ptr = operand_ptr + problem * N * D + row.to(tl.int64) * D
    b_ptr = operand_ptr + problem * N * D + column.to(tl.int64) * D
    if HAS_INDEX:
        v = problem // P
        p = problem % P
        z_ptr, z_index, stride_p, stride_n, stride_i, stride_d = view_of(
            v, P, N, x_ptr, y_ptr, index_ptr, x_stride_p, x_stride_n, x_stride_i, x_stride_d,
            y_stride_p, y_stride_n, y_stride_i, y_stride_d, True,
        )  # fmt: skip
        a_rows = row_offsets(p, row, N, z_index, stride_p, stride_n, stride_i, True)
        b_rows = row_offsets(p, column, N, z_index, stride_p, stride_n, stride_i, True)
        hi_ptr = moments_ptr + (p * VIEWS + v) * D
        lo_ptr = hi_ptr + P.to(tl.int64) * VIEWS * D
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for start in range(begin, end, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        if HAS_INDEX:
            a = load_operand(z_ptr, a_rows, row, N, d, end, stride_d, hi_ptr, lo_ptr, ROUND)
            b = load_operand(z_ptr, b_rows, column, N, d, end, stride_d, hi_ptr, lo_ptr, ROUND)
            a = stored(a, ROUND).to(TYPE)
            b = tl.trans(stored(b, ROUND).to(TYPE))
        else:
            a = tl.load(a_ptr[:, None] + d[None, :], mask=(row < N)[:, None] & (d < end)[None, :], other=0.0)
            b = tl.load(b_ptr[None, :] + d[:, None], mask=(column < N)[None, :] & (d < end)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if ROUND == "fp16":
        acc *= 4.0  # of halves, see rounded()
    if is_whole:
        G = acc / (N - 1)
        if i == j:
            G = with_diagonal(G, row, column, energy_ptr, problem, blocks, N, BLOCK_M)
        tl.store(
            found_ptr + tile.to(tl.int64) * 2,
            finish_tile(G, row, column, i != j, N, problem, M_ptr, KEEP, ROUND),
        )
    else:
        at = product_ptr + split.to(tl.int64) * BLOCK_M * BLOCK_M
        tl.store(at + m[:, None] * BLOCK_M + m[None, :], acc)
    if LAST:
        finish_terms(
            found_ptr, found, sums_ptr, sums, ticket_ptr, inv_ptr, var_ptr, cov_ptr, total_ptr,
            P, N, D, w_inv, w_var, w_cov, VIEWS, True,
        )  # fmt: skip
