"""Dual side: the moments of every column, the invariance, and one centred, rounded copy of every view.

Rows that are chosen by number are not copied: the product takes them from where they are.

    hi + lo = mean_n z_n          std = sqrt(sum_n (z_n - hi - lo)^2 / (N - 1))
    o = round(z - hi - lo)        vhat = sum_n o_n^2 / (N - 1)
    sums: (x - y)^2, relu(gamma - sqrt(std^2 + eps)), vhat^2

x, y: (P, N, D), any strides, rows by index if wanted.  Writes operand (V, P, N, D) in the product's type, moments
(4, P, V, D), three float64 sums a program, and each sample's squares over each program's columns, energy (V * P, blocks,
N).  Reads a view once from memory and twice more from the cache; 2 bytes moved a byte of input, about 10 operations an
element.
"""

import triton
import triton.language as tl

from .rows import above_zero, column_offsets, load_rows, power_of_two, rounded, row_offsets, stored, view_of


@triton.jit
def _column_moments(
    z_ptr, index_ptr, p, d, N, D, stride_p, stride_n, stride_i, stride_d,
    HAS_INDEX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hi, lo and std of columns d (a vector).

    The first row is subtracted first, so that a constant column has its value for a mean, exactly.  Deviations are
    scaled by a power of two before they are squared: 1e-18 squared is no float32 that is worth anything.
    """
    columns = z_ptr + column_offsets(d, stride_d)
    first = row_offsets(p, tl.arange(0, 1), N, index_ptr, stride_p, stride_n, stride_i, HAS_INDEX)
    z0 = load_rows(columns, first, (d < D)[None, :])
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    largest = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for top in range(0, N, BLOCK_N):
        n = top + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & (d < D)[None, :]
        rows = row_offsets(p, n, N, index_ptr, stride_p, stride_n, stride_i, HAS_INDEX)
        z = load_rows(columns, rows, mask)
        e = tl.where(mask, z - z0, 0.0)
        total += e
        largest = tl.maximum(largest, tl.abs(e))
    hi = tl.sum(z0, 0) + tl.sum(total, 0) / N
    # Deviations from the mean are at most twice those from the first row.
    scale, inverse = power_of_two(tl.max(largest, 0))
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for top in range(0, N, BLOCK_N):
        n = top + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & (d < D)[None, :]
        rows = row_offsets(p, n, N, index_ptr, stride_p, stride_n, stride_i, HAS_INDEX)
        z = load_rows(columns, rows, mask)
        e = tl.where(mask, (z - hi[None, :]) * inverse[None, :], 0.0)
        total += e
        squares += e * e
    lo = tl.sum(total, 0) / N
    # lo is of the size of the mean's rounding: what is taken off is nothing beside the squares.
    centred = above_zero(tl.sum(squares, 0) - N * lo * lo)
    return hi, lo * scale, tl.sqrt_rn(centred / (N - 1)) * scale


@triton.jit(do_not_specialize=["P"])
def _moments_forward_kernel(
    x_ptr, y_ptr, index_ptr, operand_ptr, moments_ptr, energy_ptr, sums_ptr, ticket_ptr,
    P, N, D, gamma, eps,
    x_stride_p, x_stride_n, x_stride_i, x_stride_d, y_stride_p, y_stride_n, y_stride_i, y_stride_d,
    VIEWS: tl.constexpr, HAS_INDEX: tl.constexpr, KEEP: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of one problem of one view.  The second view of a pair reads the first for the invariance.

    A block's views are neighbours: what one reads is in the cache for the other.
    """
    program = tl.program_id(0)
    if program == 0:
        tl.store(ticket_ptr, 0)
    blocks = tl.cdiv(D, BLOCK_D)
    v = program % VIEWS
    block = (program // VIEWS) % blocks
    p = program // VIEWS // blocks
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    P = P.to(tl.int64)
    z_ptr, z_index, stride_p, stride_n, stride_i, stride_d = view_of(
        v, P, N, x_ptr, y_ptr, index_ptr, x_stride_p, x_stride_n, x_stride_i, x_stride_d,
        y_stride_p, y_stride_n, y_stride_i, y_stride_d, HAS_INDEX,
    )  # fmt: skip
    hi, lo, std = _column_moments(
        z_ptr, z_index, p, d, N, D, stride_p, stride_n, stride_i, stride_d, HAS_INDEX, BLOCK_N, BLOCK_D
    )
    o_ptr, o_index, o_stride_p, o_stride_n, o_stride_i, o_stride_d = view_of(
        v ^ 1, P, N, x_ptr, y_ptr, index_ptr, x_stride_p, x_stride_n, x_stride_i, x_stride_d,
        y_stride_p, y_stride_n, y_stride_i, y_stride_d, HAS_INDEX and VIEWS > 1,
    )  # fmt: skip
    columns = z_ptr + column_offsets(d, stride_d)
    others = o_ptr + column_offsets(d, o_stride_d)
    operand = operand_ptr + (v * P + p) * N * D + d
    energy = energy_ptr + ((v * P + p) * blocks + block) * N
    # float32 sums of one strong feature would show in what the float32-accurate dual subtracts.
    WIDE: tl.constexpr = tl.float64 if ROUND == "none" else tl.float32
    operand_squares = tl.zeros((BLOCK_D,), WIDE)
    differences = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for top in range(0, N, BLOCK_N):
        n = top + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & inside[None, :]
        rows = row_offsets(p, n, N, z_index, stride_p, stride_n, stride_i, HAS_INDEX)
        z = load_rows(columns, rows, mask)
        o = tl.where(mask, rounded(z - hi[None, :] - lo[None, :], ROUND), 0.0)
        if not HAS_INDEX:
            tl.store(operand[None, :] + n.to(tl.int64)[:, None] * D, stored(o, ROUND), mask=mask)
        wide = o.to(WIDE)
        operand_squares += tl.sum(wide * wide, 0)
        tl.store(energy + n, tl.sum(wide * wide, 1), mask=n < N)
        if VIEWS > 1:
            if v % 2 == 1:
                rows = row_offsets(p, n, N, o_index, o_stride_p, o_stride_n, o_stride_i, HAS_INDEX)
                other = load_rows(others, rows, mask)
                differences += (other - z) * (other - z)
    operand_v = operand_squares.to(tl.float64) / (N - 1)
    if KEEP:
        at = moments_ptr + (p * VIEWS + v).to(tl.int64) * D + d
        row = P * VIEWS * D  # of moments (4, P, V, D)
        tl.store(at, hi, mask=inside)
        tl.store(at + row, lo, mask=inside)
        tl.store(at + 2 * row, std, mask=inside)
        tl.store(at + 3 * row, operand_v.to(tl.float32), mask=inside)
    penalty = above_zero(gamma - (tl.sqrt_rn(std * std + eps) if eps > 0 else std))
    sums = sums_ptr + program.to(tl.int64) * 3
    tl.store(sums, tl.sum(tl.sum(differences, 1).to(tl.float64)))
    tl.store(sums + 1, tl.sum(tl.where(inside, penalty, 0.0).to(tl.float64)))
    tl.store(sums + 2, tl.sum(tl.where(inside, operand_v * operand_v, 0.0)))
