"""Epilogues: what is done with a finished tile of M, and how the last program turns partial sums into the terms.

    tile     M and its mirror image are stored, rounded, for the backward pass; the tile's share of sum M^2 is returned
    terms    inv = scale * sum (x - y)^2, var = scale * sum of the hinge, cov = scale * (sum M^2 - [dual] sum vhat^2);
             then their sum

Letters and buffers: docs/notation.md.  Scales: vicreg_fast/scales.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import float16_pair, relu_propagating_nan, round_matrix


class Terms(NamedTuple):
    """Pointers to the four scalars of a loss: its weighted terms and their sum."""

    inv_ptr: Any
    var_ptr: Any
    cov_ptr: Any
    total_ptr: Any


class Partials(NamedTuple):
    """Pointers to a VICReg forward pass's partial sums, float64, and to the counter of programs that have stored theirs."""

    tile_ptr: Any  # (tiles, 2)
    column_ptr: Any  # dual (column programs, 4), primal (row programs,); None: primal, one view
    arrival_counter_ptr: Any


@triton.jit
def _store_both(M_ptr, row, column, side, tile, off_diagonal):
    """Store rows ``row`` and columns ``column`` of one M and, off the diagonal, their mirror image."""
    mask = (row < side)[:, None] & (column < side)[None, :]
    tl.store(M_ptr + row.to(tl.int64)[:, None] * side + column[None, :], tile, mask=mask)
    if off_diagonal:
        tl.store(M_ptr + column.to(tl.int64)[None, :] * side + row[:, None], tile, mask=mask)


@triton.jit
def store_tile(
    M, row, column, off_diagonal, side, problem, problems, M_ptr, inverse_scale, FORMAT: tl.constexpr
):
    """Store rows ``row`` and columns ``column`` of M (problems, side, side); return their share of sum M^2, float64.

    M_ptr None: no backward pass follows, and nothing is stored.  float16 formats: M times ``inverse_scale``; of a pair the low
    parts follow those of all problems.
    """
    inside = (row < side)[:, None] & (column < side)[None, :]
    M = tl.where(inside, M, 0.0)
    wide = M.to(tl.float64)
    squares = tl.sum(tl.sum(wide * wide, 1), 0)
    if M_ptr is not None:
        M_ptr += problem * side * side
        if FORMAT == "scaled_fp16_pair":
            high, low = float16_pair(M * inverse_scale)
            _store_both(M_ptr, row, column, side, high, off_diagonal)
            _store_both(M_ptr + problems.to(tl.int64) * side * side, row, column, side, low, off_diagonal)
        elif FORMAT == "scaled_fp16":
            _store_both(M_ptr, row, column, side, (M * inverse_scale).to(tl.float16), off_diagonal)
        else:
            _store_both(M_ptr, row, column, side, round_matrix(M, FORMAT), off_diagonal)
    return tl.where(off_diagonal, 2.0 * squares, squares)


@triton.jit
def _sum_partials(ptr, count, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the first three columns (or fewer) of float64 partials (count, COLUMNS), in a fixed order."""
    first = tl.zeros((BLOCK,), tl.float64)
    second = tl.zeros((BLOCK,), tl.float64)
    third = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = ptr + at.to(tl.int64) * COLUMNS
        first += tl.load(row, mask=at < count, other=0.0)
        if COLUMNS > 1:
            second += tl.load(row + 1, mask=at < count, other=0.0)
        if COLUMNS > 2:
            third += tl.load(row + 2, mask=at < count, other=0.0)
    return tl.sum(first), tl.sum(second), tl.sum(third)


@triton.jit
def _store_terms(inv, var, cov, terms, scales):
    """Store the sums times their scales, and the total, which is returned."""
    inv = (inv * scales.inv).to(tl.float32)
    var = (var * scales.var).to(tl.float32)
    cov = (relu_propagating_nan(cov) * scales.cov).to(tl.float32)
    tl.store(terms.inv_ptr, inv)
    tl.store(terms.var_ptr, var)
    tl.store(terms.cov_ptr, cov)
    tl.store(terms.total_ptr, inv + var + cov)
    return inv + var + cov


@triton.jit
def _arrives_last(counter_ptr):
    """Whether all other programs have stored their partial sums: the last-block pattern.

    The barrier orders only this thread's stores on AMD GPUs.  So before it a program may store only scalars, which the
    counting thread stores itself, and the last program may read only those.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def reduce_terms(partials, tile_partials, column_partials, terms, scales, DUAL: tl.constexpr):
    """In the last program: add the partial sums, in a fixed order, so that two runs agree bit for bit.

    tile_ptr (tile_partials, 2): sums of M^2 and, primal, of the hinge.  column_ptr: dual (column_partials, 4), sums of
    (x - y)^2, hinge and vhat^2, and the largest vhat; primal (column_partials,), of (x - y)^2.
    """
    if _arrives_last(partials.arrival_counter_ptr):
        norm, hinge, _ = _sum_partials(partials.tile_ptr, tile_partials, 2, 1024)
        inv = tl.full((), 0.0, tl.float64)
        if DUAL:
            inv, hinge, squares = _sum_partials(partials.column_ptr, column_partials, 4, 1024)
            norm -= squares
        elif partials.column_ptr is not None:
            inv, _, _ = _sum_partials(partials.column_ptr, column_partials, 1, 1024)
        _store_terms(inv, hinge, norm, terms, scales)


@triton.jit
def reduce_losses(partials_ptr, count, counter_ptr, location, feature, total_ptr, scales):
    """In the last program: two losses and their total, from partials (2, count, 3) of invariance, hinge and covariance."""
    if _arrives_last(counter_ptr):
        # 256 at a time: in a program of one warp 1024 spilled.
        inv, hinge, norm = _sum_partials(partials_ptr, count, 3, 256)
        total = _store_terms(inv, hinge, norm, location, scales)
        inv, hinge, norm = _sum_partials(partials_ptr + 3 * count, count, 3, 256)
        total += _store_terms(inv, hinge, norm, feature, scales)
        tl.store(total_ptr, total)
        tl.store(counter_ptr, 0)  # a search for configurations launches again
