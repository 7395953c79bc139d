"""What every kernel shares: where rows lie, how operands are rounded, which tiles a symmetric product has.

Element (p, n, d) of a view lies at

    ptr + p * stride_p + n * stride_n + index[p, n] * stride_i + d * stride_d

in 64 bits throughout: 2.6 million rows of 1024 features pass 2^31.

Views come in pairs: 0 and 1, 2 and 3.  There are two sources, x and y: views 0 and 3 are rows of x, 1 and 2 rows of y,
as VICRegL's matches go from x to y and from y to x.  One view alone is a row of x.

An operand is what a product multiplies.  ROUND names its grid: "none" (float32), "tf32", "bf16", "fp16", or "bf16_bits",
which is "bf16" by integer arithmetic, for the interpreter, whose conversions truncate.
"""

import triton
import triton.language as tl


@triton.jit
def is_of_y(v):
    """Whether view v is made of rows of y."""
    return ((v ^ (v >> 1)) & 1) == 1


@triton.jit
def view_of(
    v, P, N, x_ptr, y_ptr, index_ptr,
    x_stride_p, x_stride_n, x_stride_i, x_stride_d, y_stride_p, y_stride_n, y_stride_i, y_stride_d,
    HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """Of view v: its pointer, its row numbers (P, N), and its strides of problem, row, patch and feature.

    Triton types a stride by its size: the views' may differ, and only in 64 bits are they sure to be alike.
    """
    z_ptr = x_ptr
    stride_p = tl.full((), x_stride_p, tl.int64)
    stride_n = tl.full((), x_stride_n, tl.int64)
    stride_i = tl.full((), x_stride_i, tl.int64)
    stride_d = x_stride_d
    if is_of_y(v):
        z_ptr = y_ptr
        stride_p = tl.full((), y_stride_p, tl.int64)
        stride_n = tl.full((), y_stride_n, tl.int64)
        stride_i = tl.full((), y_stride_i, tl.int64)
        stride_d = y_stride_d
    if HAS_INDEX:
        index_ptr += v.to(tl.int64) * P * N
    return z_ptr, index_ptr, stride_p, stride_n, stride_i, stride_d


@triton.jit
def row_offsets(p, n, N, index_ptr, stride_p, stride_n, stride_i, HAS_INDEX: tl.constexpr):
    """Offsets of rows n (a vector) of problem p; ``index`` is (P, N)."""
    p = p.to(tl.int64)
    n = n.to(tl.int64)
    offsets = p * stride_p + n * stride_n
    if HAS_INDEX:
        offsets += tl.load(index_ptr + p * N + n, mask=n < N, other=0) * stride_i
    return offsets


@triton.jit
def column_offsets(d, stride_d):
    """Offsets of features d (a vector)."""
    return d.to(tl.int64) * stride_d


@triton.jit
def load_rows(columns, rows, mask):
    """Elements (rows, columns) as float32, 0 where masked; pointers to columns, offsets of rows."""
    return tl.load(columns[None, :] + rows[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rounded(c, ROUND: tl.constexpr):
    """float32 to the nearest number of the operand's grid, as float32; NaN stays NaN.

    TF32: half of the last kept bit is added to the magnitude and the 13 dropped bits are cleared.  In the bits of a NaN,
    0x7fffffff on a GPU, that would give -0.  float16: of c / 2, which it holds for any float16 input, centred.
    """
    if ROUND == "tf32":
        bits = c.to(tl.uint32, bitcast=True)
        bits = (bits + 0x1000) & 0xFFFFE000
        return tl.where(tl.abs(c) < float("inf"), bits.to(tl.float32, bitcast=True), c)
    if ROUND == "bf16":
        return c.to(tl.bfloat16).to(tl.float32)
    if ROUND == "bf16_bits":
        bits = c.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(tl.abs(c) < float("inf"), bits.to(tl.float32, bitcast=True), c)
    if ROUND == "fp16":
        return (c * 0.5).to(tl.float16).to(tl.float32) * 2.0
    return c


@triton.jit
def load_operand(
    z_ptr, rows, n, N, d, D, stride_d, hi_ptr, lo_ptr, ROUND: tl.constexpr
):  # fmt: skip
    """Rows n < N and columns d < D of a view, centred and rounded; 0 elsewhere.  hi, lo: of all its columns."""
    mask = (n < N)[:, None] & (d < D)[None, :]
    z = load_rows(z_ptr + column_offsets(d, stride_d), rows, mask)
    hi = tl.load(hi_ptr + d, mask=d < D, other=0.0)
    lo = tl.load(lo_ptr + d, mask=d < D, other=0.0)
    return rounded(tl.where(mask, z - hi[None, :] - lo[None, :], 0.0), ROUND)


@triton.jit
def stored(o, ROUND: tl.constexpr):
    """What is multiplied for an operand on its grid: float16 holds half of it, see rounded()."""
    return o * 0.5 if ROUND == "fp16" else o


@triton.jit
def triangle(t):
    """Row and column of tile t of the tiles on and below the diagonal, counted row by row.

    The square root is approximate and float32, so the row is corrected both ways.
    """
    row = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > t, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= t, row + 1, row)
    return row, t - row * (row + 1) // 2


@triton.jit
def above_zero(t):
    """relu that lets NaN through, which maximum(NaN, 0) on a GPU does not."""
    return tl.where(t < 0.0, 0.0, t)


@triton.jit
def power_of_two(a):
    """(s, 1 / s): the power of two at or below a > 0, by its exponent; 1 where there is none (zero, subnormal, infinite)."""
    bits = a.to(tl.uint32, bitcast=True) & 0x7F800000
    bits = tl.where((bits > 0) & (bits < 0x7F800000), bits, 0x3F800000)
    bits = tl.minimum(bits, 0x7E800000)  # 2^126: the inverse of 2^127 is not normal
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def match_numbers(group, back, location_there, location_back, feature_there, feature_back):
    """Of four pointers, matches by location and by feature in either direction, that of a group and a direction."""
    ptr = location_there
    if group == 0 and back == 1:
        ptr = location_back
    elif group == 1:
        ptr = feature_there
        if back == 1:
            ptr = feature_back
    return ptr
