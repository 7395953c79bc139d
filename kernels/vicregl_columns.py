"""Columns of a match set's rows: loaded, centred, their sums of squares, and what a column has once.

    z = rows index[k] of a map, k < m      e = z - z_0      lo = mean(e)      c = e - lo
    std = sqrt(sum c^2 / (m - 1) + eps)    slope = 1 / std where std < gamma, else 0

Part of vicregl.py, whose letters these are.
"""

import triton
import triton.language as tl

from .numerics import divide, exponent_scale, hinge_and_slope, widened, with_eps
from .views import column_pointers


@triton.jit
def load_columns(source, row_0, rows, d, D, EVEN: tl.constexpr, PTX: tl.constexpr = False):
    """(z, z_0): columns d of the matched rows and of the first of them, float32.  EVEN: all d are below D."""
    columns = column_pointers(source, d)
    if EVEN:
        z = tl.load(columns[None, :] + rows[:, None])
        z_0 = tl.load(columns + row_0)
    else:
        z = tl.load(columns[None, :] + rows[:, None], mask=(d < D)[None, :], other=0.0)
        z_0 = tl.load(columns + row_0, mask=d < D, other=0.0)
    return widened(z, PTX), widened(z_0, PTX)


@triton.jit
def centred_columns(z, z_0, weight, inverse_m):
    """(c, lo); ``weight``: of each row, 1 below m, else 0.

    The first row is subtracted first, so that a constant column is zero, exactly.
    """
    e = z - z_0[None, :]
    lo = tl.sum(e, 0) * inverse_m
    return tl.fma(-weight[:, None], lo[None, :], e), lo


@triton.jit
def add_row_squares(sums, a):
    """sums (N, D / 2^k) + the sums of squares of 2^k neighbours in a (N, D): a thread's own, so that none waits for another."""
    if a.shape[1] == sums.shape[1]:
        return tl.fma(a, a, sums)
    else:
        even, odd = tl.split(tl.reshape(a, (a.shape[0], a.shape[1] // 2, 2)))
        return add_row_squares(add_row_squares(sums, even), odd)


@triton.jit
def _add_column_squares(sums, a):
    """sums (N / 2^k, D) + the sums of squares of 2^k rows of a (N, D), a thread's own."""
    if a.shape[0] == sums.shape[0]:
        return tl.fma(a, a, sums)
    else:
        halves = tl.reshape(a, (2, a.shape[0] // 2, a.shape[1]))
        first, second = tl.split(tl.permute(halves, (1, 2, 0)))
        return _add_column_squares(_add_column_squares(sums, first), second)


@triton.jit
def column_squares(a):
    """Sums over rows of a^2.  Of up to 32 rows a thread has at least four, of eight threads of a column at the most."""
    K: tl.constexpr = 8 if a.shape[0] <= 32 else a.shape[0]
    return tl.sum(_add_column_squares(tl.zeros((K, a.shape[1]), a.dtype), a), 0)


@triton.jit
def _root(a):
    """sqrt(a) of a float64, as float32.  Scaled by a power of two, because a may leave float32's range."""
    large = a > 1.0e30
    small = a < 1.0e-30
    scale = tl.where(large, 1.0 / (1 << 70), tl.where(small, 1.0 * (1 << 100), 1.0))
    inverse = tl.where(large, 1.0 * (1 << 70), tl.where(small, 1.0 / (1 << 100), 1.0))
    wide = scale.to(tl.float64)
    return tl.sqrt_rn((a * wide * wide).to(tl.float32)) * inverse


@triton.jit
def _scaled_std(std, in_range, source, rows, row_0, weight, columns_ptr, m, d, D, eps):
    """std of columns d, whose c are scaled by a power of two before they are squared; as given, if they are in range or constant."""
    z, z_0 = load_columns(source, row_0, rows, d, D, False)
    e = z - z_0[None, :]
    if tl.max(tl.where(in_range, 0.0, tl.max(tl.abs(e), 0)), 0) > 0.0:
        lo = tl.load(columns_ptr + d, mask=d < D, other=0.0)
        c = tl.fma(-weight[:, None], lo[None, :], e)
        scale, inverse = exponent_scale(tl.max(tl.abs(c), 0))
        c *= inverse[None, :]
        # Through memory: each thread then has columns of its own again.
        scaled = tl.sqrt_rn(tl.sum(c * c, 0) * divide(1.0, m - 1)) * scale
        tl.store(columns_ptr + 2 * D + d, with_eps(scaled, eps), mask=d < D)
        tl.debug_barrier()
        std = tl.load(columns_ptr + 2 * D + d, mask=d < D, other=0.0)
    return std


@triton.jit
def finish_columns(
    source, rows, row_0, weight, squares_ptr, columns_ptr, m, D, gamma, eps,
    DUAL: tl.constexpr, FORMAT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(sum of the hinge, dual: sum of ((m - 1) vhat)^2) over columns; vhat and the hinge's slopes are stored in ``columns``.

    squares_ptr: sums over rows of c^2, which this program has stored, and in the second row of ``columns`` those of o^2.
    """
    tl.debug_barrier()
    hinge = tl.zeros((BLOCK_S,), tl.float64)
    norm = tl.zeros((BLOCK_S,), tl.float64)
    inverse = 1.0 / (m.to(tl.float64) - 1)
    for start in range(0, D, BLOCK_S):
        d = start + tl.arange(0, BLOCK_S)
        squares = tl.load(squares_ptr + d, mask=d < D, other=0.0)
        if DUAL:
            # The float32 operand is c.
            operand_v = squares if FORMAT == "fp32" else tl.load(columns_ptr + D + d, mask=d < D, other=0.0)
            wide = operand_v.to(tl.float64)
            norm = tl.fma(wide, wide, norm)
            tl.store(columns_ptr + D + d, operand_v.to(tl.float32) * divide(1.0, m - 1), mask=d < D)
        v = (squares.to(tl.float64) * inverse + eps).to(tl.float32)
        std = tl.sqrt_rn(v)
        in_range = (v > 1e-28) & (v < 1e37)
        if tl.max(tl.where(in_range | (d >= D), 0, 1), 0) > 0:
            if FORMAT == "fp32":
                std = with_eps(_root(squares * inverse), eps)
            else:
                std = _scaled_std(std, in_range, source, rows, row_0, weight, columns_ptr, m, d, D, eps)
        of_columns, slope = hinge_and_slope(std, gamma, 0.0)
        hinge += tl.where(d < D, of_columns, 0.0).to(tl.float64)
        tl.store(columns_ptr + 2 * D + d, slope, mask=d < D)
    return tl.sum(hinge), tl.sum(norm) if DUAL else 0.0
