"""Split-K reduction of VICReg's forward pass, and its epilogue: M from its splits, then the terms.

    dual     G = sum_k S_k / (N - 1), with the diagonal from the squared row norms of vicreg_dual.py
    primal   C = sum_k [S_k + u_k (n_k u_k + t_k)' + t_k u_k'] / (N - 1), zero diagonal, u_k = s_k - m
             (Chan); in float64 the columns' means and deviations, by the same formula with s_1 for m, and hinge; of bfloat16 also m C0

Reads the split tiles and the primal side's chunk sums.  Several splits are read at a time: one after the other, each
would wait for memory.  Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .epilogue import reduce_terms
from .numerics import divide, hinge_and_slope, relu_propagating_nan, round_matrix, tril_tile
from .vicreg_dual import finish_gram_tile
from .views import store_rows

# Columns that are added up to one part of m C0.  No tile is narrower.
MEAN_COLUMNS = tl.constexpr(32)


@triton.jit
def _load_sums(at, k, splits, d, D, EVEN: tl.constexpr):
    """Sums of columns d in chunk k, zeros if there is no such chunk.  EVEN: there always is, and all columns are."""
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=d < tl.where(k < splits, D, 0), other=0.0)


@triton.jit
def _rows_of_chunk(k, N, split_length):
    """How many rows chunk k has."""
    return tl.maximum(tl.minimum(split_length, N - k * split_length), 0)


@triton.jit
def _means(sums_ptr, chunk, row, column, D, N, split_length, splits, EVEN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Means of the columns ``row`` and ``column``, each as (the first chunk's centre, the mean minus that centre)."""
    at_r = sums_ptr + row
    at_c = sums_ptr + column
    base_r = _load_sums(at_r, 0, splits, row, D, EVEN)
    base_c = _load_sums(at_c, 0, splits, column, D, EVEN)
    sum_r = tl.zeros_like(base_r)
    sum_c = tl.zeros_like(base_c)
    for start in range(0, splits, BLOCK_C):
        for c in tl.static_range(BLOCK_C):
            k = tl.full((), start + c, tl.int32)
            n = _rows_of_chunk(k, N, split_length).to(tl.float32)
            s_r = _load_sums(at_r + k * chunk, k, splits, row, D, EVEN)
            t_r = _load_sums(at_r + k * chunk + D, k, splits, row, D, EVEN)
            s_c = _load_sums(at_c + k * chunk, k, splits, column, D, EVEN)
            t_c = _load_sums(at_c + k * chunk + D, k, splits, column, D, EVEN)
            sum_r = tl.fma(s_r - base_r, n, sum_r + t_r)
            sum_c = tl.fma(s_c - base_c, n, sum_c + t_c)
    inverse = divide(1.0, N)
    return base_r, sum_r * inverse, base_c, sum_c * inverse


@triton.jit
def _inverse(n):
    """1 / n in float64, to about its last place: each of Newton's steps doubles the digits.  A division takes more code."""
    wide = n.to(tl.float64)
    inverse = divide(1.0, n).to(tl.float64)
    for _ in tl.static_range(2):
        inverse = tl.fma(inverse, tl.fma(inverse, -wide, 1.0), inverse)
    return inverse


@triton.jit
def _moments_of_rows(
    sums_ptr, chunk, moments_ptr, step, row, D, N, split_length, splits, gamma, eps,
    EVEN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of the hinge of columns ``row``, in float64; stores hi, lo and slope, ``step`` elements apart.

    In one pass: sums of squares are about the first chunk's centre, and N (m - s_1)^2 is subtracted.  s_1 is about the mean of
    some rows, so that is at most N times the sum of squares: float64 keeps the digits that float32 has.
    """
    at = sums_ptr + row
    base = _load_sums(at, 0, splits, row, D, EVEN).to(tl.float64)
    total = tl.zeros_like(base)
    v = tl.zeros_like(base)
    for start in range(0, splits, BLOCK_C):
        for c in tl.static_range(BLOCK_C):
            k = tl.full((), start + c, tl.int32)
            n = _rows_of_chunk(k, N, split_length).to(tl.float64)
            u = _load_sums(at + k * chunk, k, splits, row, D, EVEN).to(tl.float64) - base
            t = _load_sums(at + k * chunk + D, k, splits, row, D, EVEN).to(tl.float64)
            q = _load_sums(at + k * chunk + 2 * D, k, splits, row, D, EVEN).to(tl.float64)
            around = tl.fma(u, n, t)
            total += around
            v = tl.fma(q, q, tl.fma(u, around + t, v))
    mean = total * _inverse(N)
    v = relu_propagating_nan(tl.fma(-mean, total, v)) * _inverse(N - 1)
    s = tl.sqrt(v + eps)  # exact in float64
    if moments_ptr is not None:
        hi = (base + mean).to(tl.float32)
        tl.store(moments_ptr + row, hi, mask=row < D)
        tl.store(moments_ptr + step + row, (base - hi + mean).to(tl.float32), mask=row < D)
        _, slope = hinge_and_slope(s.to(tl.float32), gamma, 0.0)
        tl.store(moments_ptr + 2 * step + row, slope, mask=row < D)
    return tl.sum(tl.where(row < D, relu_propagating_nan(gamma - s), 0.0))


@triton.jit
def _load_splits(split_ptr, k, splits, BLOCK_M: tl.constexpr):
    """Splits k of the elements that split_ptr points to: (BLOCK_C, rows, BLOCK_M)."""
    return tl.load(
        split_ptr + (k * BLOCK_M * BLOCK_M)[:, None, None], mask=(k < splits)[:, None, None], other=0.0
    )


@triton.jit
def _load_split(split_ptr, at, k, splits, EVEN: tl.constexpr, BLOCK_M: tl.constexpr):
    """Split k of the elements of a tile that split_ptr points to, 0 if there is no such split; ``at``: their rows or columns."""
    split_ptr += k * (BLOCK_M * BLOCK_M)
    if EVEN:
        return tl.load(split_ptr)
    return tl.load(split_ptr, mask=at < tl.where(k < splits, BLOCK_M, 0), other=0.0)


@triton.jit
def _covariance(
    split_ptr, sums_ptr, chunk, i, j, row, column, N, D, splits, split_length,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(C with a zero diagonal, zeros outside; means of the columns) for rows of tile row i and the columns of tile column j.

    float32, as its splits are: a chunk's centre is no farther from the mean than a fraction of sqrt(N) deviations.
    """
    base_r, mean_r, base_c, mean_c = _means(
        sums_ptr, chunk, row, column, D, N, split_length, splits, EVEN, BLOCK_C
    )
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
                acc += _load_split(split_ptr + (r * BLOCK_M + m), r, k, splits, EVEN, BLOCK_M)
    else:
        for start in range(0, splits, BLOCK_C):
            for c in tl.static_range(BLOCK_C):
                k = tl.full((), start + c, tl.int32)
                acc += _load_split(split_ptr + (m * BLOCK_M + r), m, k, splits, EVEN, BLOCK_M)
    at_r = sums_ptr + row
    at_c = sums_ptr + column
    for start in range(0, splits, BLOCK_C):
        for c in tl.static_range(BLOCK_C):
            k = tl.full((), start + c, tl.int32)
            n = _rows_of_chunk(k, N, split_length).to(tl.float32)
            s_r = _load_sums(at_r + k * chunk, k, splits, row, D, EVEN)
            t_r = _load_sums(at_r + k * chunk + D, k, splits, row, D, EVEN)
            s_c = _load_sums(at_c + k * chunk, k, splits, column, D, EVEN)
            t_c = _load_sums(at_c + k * chunk + D, k, splits, column, D, EVEN)
            u_r = s_r - base_r - mean_r
            u_c = s_c - base_c - mean_c
            acc = tl.fma(u_r[:, None], tl.fma(u_c, n, t_c)[None, :], acc)
            acc = tl.fma(t_r[:, None], u_c[None, :], acc)
    acc *= divide(1.0, N - 1)
    if EVEN:
        if i == j:  # no other tile has elements of the diagonal
            acc = tl.where(row[:, None] != column[None, :], acc, 0.0)
    else:
        kept = (row[:, None] != column[None, :]) & (row < D)[:, None] & (column < D)[None, :]
        acc = tl.where(kept, acc, 0.0)
    return acc, base_c + mean_c


@triton.jit
def _reduce_covariance(
    split_tiles_ptr, chunk_sums_ptr, moments_ptr, M_ptr, program, P, N, D, tiles, splits, split_length, gamma, eps,
    VIEWS: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
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
        N, D, splits, split_length, EVEN, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    wide = C0.to(tl.float64)
    square_sum = tl.sum(tl.sum(wide * wide, 1), 0)
    step = problems.to(tl.int64) * D  # of moments (3 + blocks of MEAN_COLUMNS columns, P, V, D)
    if moments_ptr is not None:
        moments_ptr += ((problem % P) * VIEWS + problem // P) * D
    if M_ptr is not None:
        rounded = round_matrix(C0, FORMAT)
        at = M_ptr + problem * D * D + row.to(tl.int64)[:, None] * D + column[None, :]
        store_rows(at, rounded, (row < D)[:, None] & (column < D)[None, :], EVEN)
        if FORMAT == "bf16" or FORMAT == "bf16_bits":
            parts = tl.reshape(rounded * mean[None, :], (BLOCK_R, BLOCK_M // MEAN_COLUMNS, MEAN_COLUMNS))
            b = j * (BLOCK_M // MEAN_COLUMNS) + tl.arange(0, BLOCK_M // MEAN_COLUMNS)
            at = moments_ptr + (3 + b)[None, :] * step + row[:, None]
            tl.store(at, tl.sum(parts, 2), mask=(row < D)[:, None] & (b * MEAN_COLUMNS < D)[None, :])
    hinge_sum = tl.full((), 0.0, tl.float64)
    if j == 0:
        hinge_sum += _moments_of_rows(
            sums_ptr, chunk, moments_ptr, step, row, D, N, split_length, splits, gamma, eps, EVEN, BLOCK_C
        )
    return square_sum, hinge_sum


@triton.jit(do_not_specialize=["P", "tiles", "full_tiles", "splits", "tile_partials", "column_partials"])
def _splitk_reduction_kernel(
    split_tiles_ptr, chunk_sums_ptr, row_sq_norms_ptr, moments_ptr, M_ptr, M_scale_ptr, partials, terms, scales,
    P, N, D, tiles, full_tiles, splits, split_length, column_blocks, tile_partials, column_partials, gamma, eps,
    VIEWS: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows, BLOCK_C splits at a time: dual, of a split tile; primal, of a tile's columns.

    EVEN: on the primal side all blocks of columns and of splits are full.
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
            eps, VIEWS, EVEN, FORMAT, BLOCK_M, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    at = partials.tile_ptr + (full_tiles + program).to(tl.int64) * 2
    tl.store(at, square_sum)
    tl.store(at + 1, hinge_sum)
    reduce_terms(partials, tile_partials, column_partials, terms, scales, DUAL)
