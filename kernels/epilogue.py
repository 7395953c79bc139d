"""What becomes of a tile of the smaller side M, and of the sums once every program has left its own.

tile     M and its mirror image into memory, on the operand's grid, for the backward pass; its share of sum M^2
terms    cov = (sum M^2 - [dual] sum vhat^2) / D, inv, var, their weights and their sum, by the last program alone
"""

import triton
import triton.language as tl

from .rows import above_zero, rounded


@triton.jit
def finish_tile(M, row, column, off_diagonal, side, problem, M_ptr, KEEP: tl.constexpr, ROUND: tl.constexpr):
    """Store rows ``row`` and columns ``column`` of M (problems, side, side); their share of sum M^2, float64."""
    inside = (row < side)[:, None] & (column < side)[None, :]
    M = tl.where(inside, M, 0.0)
    wide = M.to(tl.float64)
    squares = tl.sum(tl.sum(wide * wide, 1), 0)
    if KEEP:
        # float16 has not the range for M: TF32 has its mantissa.
        kept = rounded(M, "tf32" if ROUND == "fp16" else ROUND)
        at = M_ptr + problem * side * side
        tl.store(at + row.to(tl.int64)[:, None] * side + column[None, :], kept, mask=inside)
        if off_diagonal:
            tl.store(at + column.to(tl.int64)[None, :] * side + row[:, None], kept, mask=inside)
    return tl.where(off_diagonal, 2.0 * squares, squares)


@triton.jit
def _sums_of(ptr, count, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the first columns, three at most, of (count, COLUMNS) float64 numbers, in a fixed order."""
    a = tl.zeros((BLOCK,), tl.float64)
    b = tl.zeros((BLOCK,), tl.float64)
    c = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = ptr + at.to(tl.int64) * COLUMNS
        a += tl.load(row, mask=at < count, other=0.0)
        if COLUMNS > 1:
            b += tl.load(row + 1, mask=at < count, other=0.0)
        if COLUMNS > 2:
            c += tl.load(row + 2, mask=at < count, other=0.0)
    return tl.sum(a), tl.sum(b), tl.sum(c)


@triton.jit
def _store_terms(inv, var, cov, inv_ptr, var_ptr, cov_ptr, sum_ptr, k_inv, k_var, k_cov):
    """Store sums times their factors, and their sum, which comes back."""
    inv = (inv * k_inv).to(tl.float32)
    var = (var * k_var).to(tl.float32)
    cov = (above_zero(cov) * k_cov).to(tl.float32)
    tl.store(inv_ptr, inv)
    tl.store(var_ptr, var)
    tl.store(cov_ptr, cov)
    tl.store(sum_ptr, inv + var + cov)
    return inv + var + cov


@triton.jit
def finish_terms(
    found_ptr, found, sums_ptr, sums, ticket_ptr, inv_ptr, var_ptr, cov_ptr, total_ptr,
    P, N, D, w_inv, w_var, w_cov, VIEWS: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """Take a ticket; who takes the last one has every program's sums to add up.

    found_ptr (found, 2): sums of M^2 and, primal, of the hinge.  sums_ptr: dual (sums, 3) invariance, hinge and vhat^2;
    primal (sums, 1) invariance.  All float64, added in a fixed order, so that two runs agree bit for bit.

    A program's sums are scalars, which the thread that takes the ticket has stored itself; the matrix is not read here.
    The barrier would not do for more: on AMD's devices it does not wait for other threads' stores.
    """
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        norm, hinge, _ = _sums_of(found_ptr, found, 2, 1024)
        if DUAL:
            inv, hinge, square = _sums_of(sums_ptr, sums, 3, 1024)
            norm -= square
        else:
            inv, _, _ = _sums_of(sums_ptr, sums, 1, 1024)
        count = P.to(tl.float64) * D
        pairs = (VIEWS + 1) // 2
        _store_terms(
            inv, hinge, norm, inv_ptr, var_ptr, cov_ptr, total_ptr,
            w_inv / (count * N * pairs), w_var / (count * VIEWS), w_cov / (count * VIEWS),
        )  # fmt: skip


@triton.jit
def finish_losses(
    sums_ptr, count, ticket_ptr, inv0_ptr, var0_ptr, cov0_ptr, sum0_ptr,
    inv1_ptr, var1_ptr, cov1_ptr, sum1_ptr, total_ptr, k_inv, k_var, k_cov,
):  # fmt: skip
    """As finish_terms, of two losses and their total; sums_ptr (2, count, 3): of invariance, hinge and covariance.

    The ticket is zero again when this is done.
    """
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        inv0, var0, cov0 = _sums_of(sums_ptr, count, 3, 1024)
        inv1, var1, cov1 = _sums_of(sums_ptr + 3 * count, count, 3, 1024)
        total = 0.0
        total += _store_terms(inv0, var0, cov0, inv0_ptr, var0_ptr, cov0_ptr, sum0_ptr, k_inv, k_var, k_cov)
        total += _store_terms(inv1, var1, cov1, inv1_ptr, var1_ptr, cov1_ptr, sum1_ptr, k_inv, k_var, k_cov)
        tl.store(total_ptr, total)
        tl.store(ticket_ptr, 0)
