"""Adds up the parts of split products, and with them the terms.

    dual     G = sum_k S_k / (N - 1), the diagonal by the energy that moments.py summed
    primal   C = sum_k [S_k - t_k t_k' / n_k + n_k (m_k - m)(m_k - m)'] / (N - 1), zero diagonal, m_k = s_k + t_k / n_k
             (Chan), and the columns' mean and standard deviation by the same formula, in float64

S (split tiles, K, B, B) and sums (K, V * P, 3, D) as gram.py and second_moment.py wrote them; every number is read once,
parts many at a time: one after the other, each would wait for memory.
"""

import triton
import triton.language as tl

from .finish import finish_terms, finish_tile
from .gram import with_diagonal
from .rows import above_zero, triangle


@triton.jit
def _column_mean(
    sums_ptr, problem, problems, d, D, N, length, parts, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Mean of columns d as (the first chunk's centre, what the mean exceeds it by), float64."""
    base = tl.load(sums_ptr + problem * 3 * D + d, mask=d < D, other=0.0).to(tl.float64)
    offset = tl.zeros((BLOCK_C, BLOCK_R), tl.float64)
    for start in range(0, parts, BLOCK_C):
        k = start + tl.arange(0, BLOCK_C)
        sums = sums_ptr + ((k.to(tl.int64) * problems + problem) * 3 * D)[:, None] + d[None, :]
        mask = (k < parts)[:, None] & (d < D)[None, :]
        s = tl.load(sums, mask=mask, other=0.0).to(tl.float64)
        t = tl.load(sums + D, mask=mask, other=0.0).to(tl.float64)
        n = tl.minimum(length, N - k * length)[:, None]
        offset += tl.where(mask, (s - base[None, :]) * n + t, 0.0)
    return base, tl.sum(offset, 0) / N


@triton.jit
def _chunk_means(sums_ptr, k, parts, problem, problems, d, D, n, base, mean):
    """(mean - s, mean - the whole mean, root of q) of columns d in chunks k: each (BLOCK_C, columns), float64."""
    sums = sums_ptr + ((k.to(tl.int64) * problems + problem) * 3 * D)[:, None] + d[None, :]
    mask = (k < parts)[:, None] & (d < D)[None, :]
    s = tl.load(sums, mask=mask, other=0.0).to(tl.float64)
    t = tl.load(sums + D, mask=mask, other=0.0).to(tl.float64) / n[:, None]
    q = tl.load(sums + 2 * D, mask=mask, other=0.0).to(tl.float64)
    return t, tl.where(mask, s - base[None, :] + t - mean[None, :], 0.0), q


@triton.jit(do_not_specialize=["P", "tiles", "whole", "parts", "found", "sums_count"])
def _combine_forward_kernel(
    product_ptr, sums_ptr, energy_ptr, moments_ptr, M_ptr, found_ptr, term_sums_ptr, ticket_ptr,
    inv_ptr, var_ptr, cov_ptr, total_ptr,
    P, N, D, tiles, whole, parts, length, blocks, found, sums_count, gamma, eps, w_inv, w_var, w_cov,
    VIEWS: tl.constexpr, DUAL: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows of one split tile, BLOCK_C parts at a time; the last one adds up the terms.

    found (whole + programs, 2), float64: sums of M^2 and, on the primal side, of the hinge.
    """
    STRIPS: tl.constexpr = BLOCK_M // BLOCK_R
    program = tl.program_id(0)
    split = (program // STRIPS).to(tl.int64)
    tile = whole + program // STRIPS
    problem = (tile // tiles).to(tl.int64)
    i, j = triangle(tile % tiles)
    r = (program % STRIPS) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_M)
    row = i * BLOCK_M + r
    column = j * BLOCK_M + c
    side = N if DUAL else D
    part = product_ptr + split * parts * BLOCK_M * BLOCK_M + (r[:, None] * BLOCK_M + c[None, :])[None, :, :]
    acc = tl.zeros((BLOCK_C, BLOCK_R, BLOCK_M), tl.float32)
    hinge = tl.full((), 0.0, tl.float64)
    if DUAL:
        for start in range(0, parts, BLOCK_C):
            k = start + tl.arange(0, BLOCK_C)
            acc += tl.load(
                part + (k * BLOCK_M * BLOCK_M)[:, None, None], mask=(k < parts)[:, None, None], other=0.0
            )
        M = tl.sum(acc, 0) / (N - 1)
        if i == j:
            M = with_diagonal(M, row, column, energy_ptr, problem, blocks, N, BLOCK_R)
    else:
        problems = tl.num_programs(0) // STRIPS // tiles
        base_r, mean_r = _column_mean(sums_ptr, problem, problems, row, D, N, length, parts, BLOCK_R, BLOCK_C)
        base_c, mean_c = _column_mean(
            sums_ptr, problem, problems, column, D, N, length, parts, BLOCK_M, BLOCK_C
        )
        square = tl.zeros((BLOCK_C, BLOCK_R), tl.float64)
        for start in range(0, parts, BLOCK_C):
            k = start + tl.arange(0, BLOCK_C)
            mask = (k < parts)[:, None, None]
            S = tl.load(part + (k * BLOCK_M * BLOCK_M)[:, None, None], mask=mask, other=0.0)
            n = tl.maximum(tl.minimum(length, N - k * length), 1).to(tl.float64)
            t_r, b_r, q = _chunk_means(sums_ptr, k, parts, problem, problems, row, D, n, base_r, mean_r)
            t_c, b_c, _ = _chunk_means(sums_ptr, k, parts, problem, problems, column, D, n, base_c, mean_c)
            between = b_r[:, :, None] * b_c[:, None, :] - t_r[:, :, None] * t_c[:, None, :]
            acc += S + (n[:, None, None] * between).to(tl.float32)
            square += q * q + n[:, None] * (b_r * b_r - t_r * t_r)
        M = tl.where(row[:, None] == column[None, :], 0.0, tl.sum(acc, 0) / (N - 1))
        if i == j:
            v = above_zero(tl.sum(square, 0)) / (N - 1)
            std = tl.sqrt(v)  # of float64, where it is exact
            if KEEP:
                at = moments_ptr + ((problem % P) * VIEWS + problem // P) * D + row
                rows = problems.to(tl.int64) * D
                hi = (base_r + mean_r).to(tl.float32)
                tl.store(at, hi, mask=row < D)
                tl.store(at + rows, (base_r - hi + mean_r).to(tl.float32), mask=row < D)
                tl.store(at + 2 * rows, std.to(tl.float32), mask=row < D)
            penalty = above_zero(gamma - (tl.sqrt(v + eps) if eps > 0 else std))
            hinge += tl.sum(tl.where(row < D, penalty, 0.0))
    at = found_ptr + (whole + program).to(tl.int64) * 2
    tl.store(at, finish_tile(M, row, column, i != j, side, problem, M_ptr, KEEP, ROUND))
    tl.store(at + 1, hinge)
    finish_terms(
        found_ptr, found, term_sums_ptr, sums_count, ticket_ptr, inv_ptr, var_ptr, cov_ptr, total_ptr,
        P, N, D, w_inv, w_var, w_cov, VIEWS, DUAL,
    )  # fmt: skip
