"""Split-K reduction of VICReg's forward pass, and its epilogue: M from its splits, then the terms.

    dual     G = sum_k S_k / (N - 1), with the diagonal from the squared row norms of vicreg_dual.py
    primal   C = sum_k [S_k - t_k t_k' / n_k + n_k (m_k - m)(m_k - m)'] / (N - 1), zero diagonal, m_k = s_k + t_k / n_k
             (Chan); the columns' means, deviations and hinge by the same formula, in float64

Reads the split tiles and the primal side's chunk sums once.  Several splits are read at a time: one after the other, each
would wait for memory.  Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .epilogue import reduce_terms, store_tile
from .numerics import divide, hinge_and_slope, relu_propagating_nan, tril_tile
from .vicreg_dual import finish_gram_tile


@triton.jit
def _column_mean(
    chunk_sums_ptr, problem, problems, d, D, N, split_length, splits, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Mean of columns d as (the first chunk's centre, the mean minus that centre), float64."""
    base = tl.load(chunk_sums_ptr + problem * 3 * D + d, mask=d < D, other=0.0).to(tl.float64)
    offset = tl.zeros((BLOCK_C, BLOCK_R), tl.float64)
    for start in range(0, splits, BLOCK_C):
        k = start + tl.arange(0, BLOCK_C)
        sums = chunk_sums_ptr + ((k.to(tl.int64) * problems + problem) * 3 * D)[:, None] + d[None, :]
        mask = (k < splits)[:, None] & (d < D)[None, :]
        s = tl.load(sums, mask=mask, other=0.0).to(tl.float64)
        t = tl.load(sums + D, mask=mask, other=0.0).to(tl.float64)
        n = tl.minimum(split_length, N - k * split_length)[:, None]
        offset += tl.where(mask, (s - base[None, :]) * n + t, 0.0)
    return base, tl.sum(offset, 0) * (1.0 / N.to(tl.float64))


@triton.jit
def _chunk_means(chunk_sums_ptr, k, splits, problem, problems, d, D, inverse_n, base, mean):
    """Of columns d in chunks k: (m_k - s_k, m_k - m, root of q), each (BLOCK_C, columns), float64; inverse_n: 1 / n_k."""
    sums = chunk_sums_ptr + ((k.to(tl.int64) * problems + problem) * 3 * D)[:, None] + d[None, :]
    mask = (k < splits)[:, None] & (d < D)[None, :]
    s = tl.load(sums, mask=mask, other=0.0).to(tl.float64)
    t = tl.load(sums + D, mask=mask, other=0.0).to(tl.float64) * inverse_n[:, None]
    q = tl.load(sums + 2 * D, mask=mask, other=0.0).to(tl.float64)
    return t, tl.where(mask, s - base[None, :] + t - mean[None, :], 0.0), q


@triton.jit
def _load_splits(split_ptr, k, splits, BLOCK_M: tl.constexpr):
    """Splits k of the rows that split_ptr points to: (BLOCK_C, BLOCK_R, BLOCK_M)."""
    return tl.load(
        split_ptr + (k * BLOCK_M * BLOCK_M)[:, None, None], mask=(k < splits)[:, None, None], other=0.0
    )


@triton.jit
def _reduce_covariance(
    split_ptr, chunk_sums_ptr, moments_ptr, problem, problems, row, column, on_diagonal,
    P, N, D, splits, split_length, gamma, eps,
    VIEWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(C with a zero diagonal, sum of the hinge) of a tile's rows; the hinge and the moments come from diagonal tiles."""
    base_r, mean_r = _column_mean(
        chunk_sums_ptr, problem, problems, row, D, N, split_length, splits, BLOCK_R, BLOCK_C
    )
    base_c, mean_c = _column_mean(
        chunk_sums_ptr, problem, problems, column, D, N, split_length, splits, BLOCK_M, BLOCK_C
    )
    acc = tl.zeros((BLOCK_C, BLOCK_R, BLOCK_M), tl.float32)
    square = tl.zeros((BLOCK_C, BLOCK_R), tl.float64)
    for start in range(0, splits, BLOCK_C):
        k = start + tl.arange(0, BLOCK_C)
        S = _load_splits(split_ptr, k, splits, BLOCK_M)
        n = tl.maximum(tl.minimum(split_length, N - k * split_length), 1).to(tl.float64)
        inverse_n = 1.0 / n
        t_r, b_r, q = _chunk_means(
            chunk_sums_ptr, k, splits, problem, problems, row, D, inverse_n, base_r, mean_r
        )
        t_c, b_c, _ = _chunk_means(
            chunk_sums_ptr, k, splits, problem, problems, column, D, inverse_n, base_c, mean_c
        )
        square += q * q + n[:, None] * (b_r * b_r - t_r * t_r)
        # The means are float64, their products need not be: C is as exact as its splits.
        b_r = (b_r * n[:, None]).to(tl.float32)
        t_r = (t_r * -n[:, None]).to(tl.float32)
        acc = tl.fma(b_r[:, :, None], b_c.to(tl.float32)[:, None, :], acc + S)
        acc = tl.fma(t_r[:, :, None], t_c.to(tl.float32)[:, None, :], acc)
    C0 = tl.where(row[:, None] == column[None, :], 0.0, tl.sum(acc, 0) * divide(1.0, N - 1))
    hinge_sum = tl.full((), 0.0, tl.float64)
    if on_diagonal:
        v = relu_propagating_nan(tl.sum(square, 0)) * (1.0 / (N.to(tl.float64) - 1))
        std = tl.sqrt(v)  # exact in float64
        if moments_ptr is not None:
            at = moments_ptr + ((problem % P) * VIEWS + problem // P) * D + row
            step = problems.to(tl.int64) * D  # of moments (3, P, V, D)
            hi = (base_r + mean_r).to(tl.float32)
            tl.store(at, hi, mask=row < D)
            tl.store(at + step, (base_r - hi + mean_r).to(tl.float32), mask=row < D)
            _, slope = hinge_and_slope(std.to(tl.float32), gamma, eps)
            tl.store(at + 2 * step, slope, mask=row < D)
        hinge = relu_propagating_nan(gamma - (tl.sqrt(v + eps) if eps > 0 else std))
        hinge_sum += tl.sum(tl.where(row < D, hinge, 0.0))
    return C0, hinge_sum


@triton.jit(do_not_specialize=["P", "tiles", "full_tiles", "splits", "tile_partials", "column_partials"])
def _splitk_reduction_kernel(
    split_tiles_ptr, chunk_sums_ptr, row_sq_norms_ptr, moments_ptr, M_ptr, M_scale_ptr, partials, terms, scales,
    P, N, D, tiles, full_tiles, splits, split_length, column_blocks, tile_partials, column_partials, gamma, eps,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows of one split tile, BLOCK_C splits at a time.  The last program reduces the terms.

    chunk_sums_ptr None: the dual side, which has row_sq_norms_ptr instead.
    """
    DUAL: tl.constexpr = chunk_sums_ptr is None
    STRIPS: tl.constexpr = BLOCK_M // BLOCK_R
    program = tl.program_id(0)
    split = (program // STRIPS).to(tl.int64)
    tile = full_tiles + program // STRIPS
    problem = (tile // tiles).to(tl.int64)
    i, j = tril_tile(tile % tiles)
    r = (program % STRIPS) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    row = i * BLOCK_M + r
    column = j * BLOCK_M + m
    split_ptr = split_tiles_ptr + split * splits * BLOCK_M * BLOCK_M
    split_ptr += (r[:, None] * BLOCK_M + m[None, :])[None, :, :]
    hinge_sum = tl.full((), 0.0, tl.float64)
    if DUAL:
        acc = tl.zeros((BLOCK_C, BLOCK_R, BLOCK_M), tl.float32)
        for start in range(0, splits, BLOCK_C):
            acc += _load_splits(split_ptr, start + tl.arange(0, BLOCK_C), splits, BLOCK_M)
        squares = finish_gram_tile(
            divide(tl.sum(acc, 0), N - 1), row, column, i, j, problem, P, N, D, row_sq_norms_ptr, column_blocks,
            M_ptr, M_scale_ptr, partials, VIEWS, FORMAT, BLOCK_R,
        )  # fmt: skip
    else:
        problems = tl.num_programs(0) // STRIPS // tiles
        C0, hinge_sum = _reduce_covariance(
            split_ptr, chunk_sums_ptr, moments_ptr, problem, problems, row, column, i == j,
            P, N, D, splits, split_length, gamma, eps, VIEWS, BLOCK_M, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        squares = store_tile(C0, row, column, i != j, D, problem, problems, M_ptr, None, FORMAT)
    at = partials.tile_ptr + (full_tiles + program).to(tl.int64) * 2
    tl.store(at, squares)
    tl.store(at + 1, hinge_sum)
    reduce_terms(partials, tile_partials, column_partials, terms, scales, DUAL)
