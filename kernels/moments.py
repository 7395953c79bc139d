"""Dual side: the moments of every column, the invariance, and one centred, rounded copy of every view.

    hi + lo = mean_n z_n          std = sqrt(sum_n (z_n - hi - lo)^2 / (N - 1))
    o = round(z - hi - lo)        vhat = sum_n o_n^2 / (N - 1)
    partial sums: (x - y)^2, relu(gamma - sqrt(std^2 + eps)), vhat^2

x, y: (P, N, D), any strides, rows by index if wanted.  Writes operand (V, P, N, D) in the product's type, moments
(4, P, V, D), three float64 sums a program, and every sample's squares, energy (V, P, programs, N), float64.  Reads a view once from memory and twice more from the cache; 2 bytes
moved a byte of input, about 10 operations an element.
"""

import triton
import triton.language as tl

from .rows import above_zero, rounded, row_offsets


@triton.jit
def _power_of_two(a):
    """The power of two at or below a > 0, by its exponent; 1 where there is none (zero, subnormal, infinite, NaN)."""
    bits = a.to(tl.uint32, bitcast=True) & 0x7F800000
    found = bits.to(tl.float32, bitcast=True)
    return tl.where((bits > 0) & (bits < 0x7F800000), found, 1.0)


@triton.jit
def _column_moments(
    z_ptr, index_ptr, p, d, N, D, stride_p, stride_n, stride_i, stride_d,
    HAS_INDEX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hi, lo and std of columns d (a vector).

    The first row is subtracted first, so that a constant column has its value for a mean, exactly.  Deviations are
    scaled by a power of two before they are squared: 1e-18 squared is no float32 that is worth anything.
    """
    columns = z_ptr + d.to(tl.int64) * stride_d
    first = row_offsets(p, tl.arange(0, 1), N, index_ptr, stride_p, stride_n, stride_i, HAS_INDEX)
    z0 = tl.load(columns[None, :] + first[:, None], mask=(d < D)[None, :], other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    largest = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for top in range(0, N, BLOCK_N):
        n = top + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & (d < D)[None, :]
        rows = row_offsets(p, n, N, index_ptr, stride_p, stride_n, stride_i, HAS_INDEX)
        z = tl.load(columns[None, :] + rows[:, None], mask=mask, other=0.0).to(tl.float32)
        e = tl.where(mask, z - z0, 0.0)
        total += e
        largest = tl.maximum(largest, tl.abs(e))
    z0 = tl.sum(z0, 0)
    hi = z0 + tl.sum(total, 0) / N
    # Deviations from the mean are at most twice those from the first row.
    scale = _power_of_two(tl.max(largest, 0))
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for top in range(0, N, BLOCK_N):
        n = top + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & (d < D)[None, :]
        rows = row_offsets(p, n, N, index_ptr, stride_p, stride_n, stride_i, HAS_INDEX)
        z = tl.load(columns[None, :] + rows[:, None], mask=mask, other=0.0).to(tl.float32)
        e = tl.where(mask, (z - hi[None, :]) / scale[None, :], 0.0)
        total += e
        squares += e * e
    lo = tl.sum(total, 0) / N
    # lo is of the size of the mean's rounding: what is taken off is nothing beside the squares.
    centred = above_zero(tl.sum(squares, 0) - N * lo * lo)
    return hi, lo * scale, tl.sqrt_rn(centred / (N - 1)) * scale


@triton.jit(do_not_specialize=["P"])
def _moments_forward_kernel(
    x_ptr, y_ptr, index_ptr, operand_ptr, moments_ptr, energy_ptr, partial_ptr, ticket_ptr,
    P, N, D, gamma, eps,
    x_stride_p, x_stride_n, x_stride_i, x_stride_d,
    y_stride_p, y_stride_n, y_stride_i, y_stride_d,
    VIEWS: tl.constexpr, ROUND: tl.constexpr, HAS_INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of every view of one problem."""
    block = tl.program_id(0)
    p = tl.program_id(1)
    if (block == 0) & (p == 0):
        tl.store(ticket_ptr, 0)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    P = P.to(tl.int64)
    row = P * VIEWS * D  # of moments (4, P, V, D)
    inv = 0.0
    hinge = 0.0
    square = 0.0
    for v in tl.static_range(VIEWS):
        z_ptr = x_ptr if v == 0 else y_ptr
        stride_p = x_stride_p if v == 0 else y_stride_p
        stride_n = x_stride_n if v == 0 else y_stride_n
        stride_i = x_stride_i if v == 0 else y_stride_i
        stride_d = x_stride_d if v == 0 else y_stride_d
        z_index = index_ptr + v * P * N if HAS_INDEX else index_ptr
        hi, lo, std = _column_moments(
            z_ptr, z_index, p, d, N, D, stride_p, stride_n, stride_i, stride_d, HAS_INDEX, BLOCK_N, BLOCK_D
        )
        operand_squares = tl.zeros((BLOCK_D,), tl.float64)
        differences = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        columns = z_ptr + d.to(tl.int64) * stride_d
        operand = operand_ptr + (v * P + p) * N * D + d
        for top in range(0, N, BLOCK_N):
            n = top + tl.arange(0, BLOCK_N)
            mask = (n < N)[:, None] & inside[None, :]
            rows = row_offsets(p, n, N, z_index, stride_p, stride_n, stride_i, HAS_INDEX)
            z = tl.load(columns[None, :] + rows[:, None], mask=mask, other=0.0).to(tl.float32)
            o = rounded(z - hi[None, :] - lo[None, :], ROUND)
            tl.store(operand[None, :] + n.to(tl.int64)[:, None] * D, o, mask=mask)
            o = tl.where(mask, o, 0.0)
            wide = o.to(tl.float64)  # float32 sums of one strong feature would show in what the dual subtracts
            operand_squares += tl.sum(wide * wide, 0)
            energy = energy_ptr + ((v * P + p) * tl.num_programs(0) + block) * N + n
            tl.store(energy, tl.sum(wide * wide, 1), mask=n < N)
            if v == 1:
                rows = row_offsets(p, n, N, index_ptr, x_stride_p, x_stride_n, x_stride_i, HAS_INDEX)
                x = x_ptr + d.to(tl.int64) * x_stride_d
                x = tl.load(x[None, :] + rows[:, None], mask=mask, other=0.0).to(tl.float32)
                differences += (x - z) * (x - z)
        operand_v = operand_squares / (N - 1)
        at = moments_ptr + (p * VIEWS + v).to(tl.int64) * D + d
        tl.store(at, hi, mask=inside)
        tl.store(at + row, lo, mask=inside)
        tl.store(at + 2 * row, std, mask=inside)
        tl.store(at + 3 * row, operand_v.to(tl.float32), mask=inside)
        penalty = above_zero(gamma - (tl.sqrt_rn(std * std + eps) if eps > 0 else std))
        hinge += tl.sum(tl.where(inside, penalty, 0.0).to(tl.float64))
        square += tl.sum(tl.where(inside, operand_v * operand_v, 0.0))
        inv += tl.sum(tl.sum(differences, 1).to(tl.float64))
    partial = partial_ptr + (p.to(tl.int64) * tl.num_programs(0) + block) * 3
    tl.store(partial, inv)
    tl.store(partial + 1, hinge)
    tl.store(partial + 2, square)
