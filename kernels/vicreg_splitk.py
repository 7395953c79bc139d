"""Split-K reduction of VICReg's forward pass, and its epilogue: M from its splits, then the terms.

    dual     G = sum_k S_k / (N - 1), with the diagonal from the squared row norms of vicreg_dual.py
    primal   C = sum_k [S_k + u_k (n_k u_k + t_k)' + t_k u_k'] / (N - 1), zero diagonal, u_k = s_k - m
             (Chan); the columns' means, deviations and hinge by the same formula, in float64; of bfloat16 also m C0

Reads the split tiles and the primal side's chunk sums.  Several splits are read at a time: one after the other, each
would wait for memory.  Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .epilogue import reduce_terms
from .numerics import divide, hinge_and_slope, relu_propagating_nan, round_matrix, tril_tile
from .vicreg_dual import finish_gram_tile

# Columns that are added up to one part of m C0.  No tile is narrower.
MEAN_COLUMNS = tl.constexpr(32)


@triton.jit
def _load_chunk(sums_ptr, chunk, k, splits, N, split_length, d, D, TYPE: tl.constexpr):
    """(rows, s, t) of columns d in chunk k; zeros if there is no such chunk.  ``chunk``: elements of one."""
    n = tl.maximum(tl.minimum(split_length, N - k * split_length), 0)
    at = sums_ptr + k * chunk + d
    mask = d < tl.where(k < splits, D, 0)
    s = tl.load(at, mask=mask, other=0.0).to(TYPE)
    return n.to(TYPE), s, tl.load(at + D, mask=mask, other=0.0).to(TYPE)


@triton.jit
def _column_mean(sums_ptr, chunk, d, D, N, split_length, splits, TYPE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean of columns d as (the first chunk's centre, the mean minus that centre)."""
    base = tl.load(sums_ptr + d, mask=d < D, other=0.0).to(TYPE)
    offset = tl.zeros_like(base)
    for start in range(0, splits, BLOCK_C):
        for c in tl.static_range(BLOCK_C):
            k = tl.full((), start + c, tl.int32)
            n, s, t = _load_chunk(sums_ptr, chunk, k, splits, N, split_length, d, D, TYPE)
            offset = tl.fma(s - base, n, offset + t)
    return base, offset * (divide(1.0, N) if offset.dtype == tl.float32 else 1.0 / N.to(TYPE))


@triton.jit
def _moments_of_rows(
    sums_ptr, chunk, moments_ptr, step, row, D, N, split_length, splits, gamma, eps, BLOCK_C: tl.constexpr
):
    """Sum of the hinge of columns ``row``, in float64; stores hi, lo and slope, ``step`` elements apart."""
    base, mean = _column_mean(sums_ptr, chunk, row, D, N, split_length, splits, tl.float64, BLOCK_C)
    v = tl.zeros_like(base)
    for start in range(0, splits, BLOCK_C):
        for c in tl.static_range(BLOCK_C):
            k = tl.full((), start + c, tl.int32)
            n, s, t = _load_chunk(sums_ptr, chunk, k, splits, N, split_length, row, D, tl.float64)
            at = sums_ptr + k * chunk + 2 * D + row
            q = tl.load(at, mask=row < tl.where(k < splits, D, 0), other=0.0).to(tl.float64)
            u = s - base - mean
            v += q * q + u * (n * u + 2.0 * t)
    v = relu_propagating_nan(v) * (1.0 / (N.to(tl.float64) - 1))
    std = tl.sqrt(v)  # exact in float64
    if moments_ptr is not None:
        hi = (base + mean).to(tl.float32)
        tl.store(moments_ptr + row, hi, mask=row < D)
        tl.store(moments_ptr + step + row, (base - hi + mean).to(tl.float32), mask=row < D)
        _, slope = hinge_and_slope(std.to(tl.float32), gamma, eps)
        tl.store(moments_ptr + 2 * step + row, slope, mask=row < D)
    hinge = relu_propagating_nan(gamma - (tl.sqrt(v + eps) if eps > 0 else std))
    return tl.sum(tl.where(row < D, hinge, 0.0))


@triton.jit
def _load_splits(split_ptr, k, splits, BLOCK_M: tl.constexpr):
    """Splits k of the elements that split_ptr points to: (BLOCK_C, rows, BLOCK_M)."""
    return tl.load(
        split_ptr + (k * BLOCK_M * BLOCK_M)[:, None, None], mask=(k < splits)[:, None, None], other=0.0
    )


@triton.jit
def _load_split(split_ptr, at, k, splits, BLOCK_M: tl.constexpr):
    """Split k of the elements of a tile that split_ptr points to, 0 if there is no such split; ``at``: their rows or columns."""
    return tl.load(split_ptr + k * (BLOCK_M * BLOCK_M), mask=at < tl.where(k < splits, BLOCK_M, 0), other=0.0)


@triton.jit
def _covariance(
    split_ptr, sums_ptr, chunk, i, j, row, column, N, D, splits, split_length,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(C with a zero diagonal, zeros outside; means of the columns) for rows of tile row i and the columns of tile column j.

    float32, as its splits are: a chunk's centre is no farther from the mean than a fraction of sqrt(N) deviations.
    """
    base_r, mean_r = _column_mean(sums_ptr, chunk, row, D, N, split_length, splits, tl.float32, BLOCK_C)
    base_c, mean_c = _column_mean(sums_ptr, chunk, column, D, N, split_length, splits, tl.float32, BLOCK_C)
    r = (row - i * BLOCK_M)[:, None]
    m = (column - j * BLOCK_M)[None, :]
    tile = tl.where(j <= i, i * (i + 1) // 2 + j, j * (j + 1) // 2 + i).to(tl.int64)
    split_ptr += tile * splits * BLOCK_M * BLOCK_M
    acc = tl.zeros((row.shape[0], BLOCK_M), tl.float32)
    # Only tiles on and below the diagonal are in memory: those above it are read transposed.
    if j <= i:
        for start in range(0, splits, BLOCK_C):
            for c in tl.static_range(BLOCK_C):
                k = tl.full((), start + c, tl.int32)
                acc += _load_split(split_ptr + (r * BLOCK_M + m), r, k, splits, BLOCK_M)
    else:
        for start in range(0, splits, BLOCK_C):
            for c in tl.static_range(BLOCK_C):
                k = tl.full((), start + c, tl.int32)
                acc += _load_split(split_ptr + (m * BLOCK_M + r), m, k, splits, BLOCK_M)
    for start in range(0, splits, BLOCK_C):
        for c in tl.static_range(BLOCK_C):
            k = tl.full((), start + c, tl.int32)
            n, s_r, t_r = _load_chunk(sums_ptr, chunk, k, splits, N, split_length, row, D, tl.float32)
            _, s_c, t_c = _load_chunk(sums_ptr, chunk, k, splits, N, split_length, column, D, tl.float32)
            u_r = s_r - base_r - mean_r
            u_c = s_c - base_c - mean_c
            acc = tl.fma(u_r[:, None], tl.fma(u_c, n, t_c)[None, :], acc)
            acc = tl.fma(t_r[:, None], u_c[None, :], acc)
    kept = (row[:, None] != column[None, :]) & (row < D)[:, None] & (column < D)[None, :]
    return tl.where(kept, acc * divide(1.0, N - 1), 0.0), base_c + mean_c


@triton.jit
def _reduce_covariance(
    split_tiles_ptr, chunk_sums_ptr, moments_ptr, M_ptr, program, P, N, D, tiles, splits, split_length, gamma, eps,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(sum of C0^2, sum of the hinge) of BLOCK_R rows and BLOCK_M columns of C0; the first columns' programs have the moments."""
    blocks = tl.cdiv(D, BLOCK_M)
    strips = tl.cdiv(D, BLOCK_R)
    problems = tl.num_programs(0) // (blocks * strips)
    problem = (program // (blocks * strips)).to(tl.int64)
    j = program % blocks
    first = program // blocks % strips * BLOCK_R
    row = first + tl.arange(0, BLOCK_R)
    column = j * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = problems.to(tl.int64) * 3 * D
    sums_ptr = chunk_sums_ptr + problem * 3 * D
    C0, mean = _covariance(
        split_tiles_ptr + problem * tiles * splits * BLOCK_M * BLOCK_M, sums_ptr, chunk, first // BLOCK_M, j, row, column,
        N, D, splits, split_length, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    wide = C0.to(tl.float64)
    square_sum = tl.sum(tl.sum(wide * wide, 1), 0)
    step = problems.to(tl.int64) * D  # of moments (3 + blocks of MEAN_COLUMNS columns, P, V, D)
    if moments_ptr is not None:
        moments_ptr += ((problem % P) * VIEWS + problem // P) * D
    if M_ptr is not None:
        rounded = round_matrix(C0, FORMAT)
        at = M_ptr + problem * D * D + row.to(tl.int64)[:, None] * D + column[None, :]
        tl.store(at, rounded, mask=(row < D)[:, None] & (column < D)[None, :])
        if FORMAT == "bf16" or FORMAT == "bf16_bits":
            parts = tl.reshape(rounded * mean[None, :], (BLOCK_R, BLOCK_M // MEAN_COLUMNS, MEAN_COLUMNS))
            b = j * (BLOCK_M // MEAN_COLUMNS) + tl.arange(0, BLOCK_M // MEAN_COLUMNS)
            at = moments_ptr + (3 + b)[None, :] * step + row[:, None]
            tl.store(at, tl.sum(parts, 2), mask=(row < D)[:, None] & (b * MEAN_COLUMNS < D)[None, :])
    hinge_sum = tl.full((), 0.0, tl.float64)
    if j == 0:
        hinge_sum += _moments_of_rows(
            sums_ptr, chunk, moments_ptr, step, row, D, N, split_length, splits, gamma, eps, BLOCK_C
        )
    return square_sum, hinge_sum


@triton.jit(do_not_specialize=["P", "tiles", "full_tiles", "splits", "tile_partials", "column_partials"])
def _splitk_reduction_kernel(
    split_tiles_ptr, chunk_sums_ptr, row_sq_norms_ptr, moments_ptr, M_ptr, M_scale_ptr, partials, terms, scales,
    P, N, D, tiles, full_tiles, splits, split_length, column_blocks, tile_partials, column_partials, gamma, eps,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows, BLOCK_C splits at a time: dual, of a split tile; primal, of a tile's columns.

    The last program reduces the terms.  chunk_sums_ptr None: the dual side, which has row_sq_norms_ptr instead.
    """
    DUAL: tl.constexpr = chunk_sums_ptr is None
    program = tl.program_id(0)
    if DUAL:
        STRIPS: tl.constexpr = BLOCK_M // BLOCK_R
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
        acc = tl.zeros((BLOCK_C, BLOCK_R, BLOCK_M), tl.float32)
        for start in range(0, splits, BLOCK_C):
            acc += _load_splits(split_ptr, start + tl.arange(0, BLOCK_C), splits, BLOCK_M)
        square_sum = finish_gram_tile(
            divide(tl.sum(acc, 0), N - 1), row, column, i, j, problem, P, N, D, row_sq_norms_ptr, column_blocks,
            M_ptr, M_scale_ptr, partials, VIEWS, FORMAT, BLOCK_R,
        )  # fmt: skip
        hinge_sum = tl.full((), 0.0, tl.float64)
    else:
        square_sum, hinge_sum = _reduce_covariance(
            split_tiles_ptr, chunk_sums_ptr, moments_ptr, M_ptr, program, P, N, D, tiles, splits, split_length, gamma,
            eps, VIEWS, FORMAT, BLOCK_M, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    at = partials.tile_ptr + (full_tiles + program).to(tl.int64) * 2
    tl.store(at, square_sum)
    tl.store(at + 1, hinge_sum)
    reduce_terms(partials, tile_partials, column_partials, terms, scales, DUAL)
