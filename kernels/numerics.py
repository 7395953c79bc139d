"""Arithmetic that kernels share: number formats of operands, NaN-propagating relu, powers of two, triangular tiles.

An operand is what a matmul multiplies.  FORMAT names its number format: "fp32", "tf32", "bf16", "fp16", or "bf16_bits": bf16
rounded by integer arithmetic and kept as float32, for the interpreter, whose own conversions truncate.  On the dual side also
"scaled_fp16", as accurate as TF32, and "scaled_fp16_pair", as accurate as float32: columns are divided by a power of two, and
an element is one float16 or the sum of two.  float16 matmuls are twice as fast as TF32 ones.

Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl


@triton.jit
def round_to_format(c, FORMAT: tl.constexpr):
    """float32 rounded to the nearest value of the format, as float32; NaN stays NaN.

    TF32: half of the last kept bit is added to the magnitude, and the 13 dropped bits are cleared.  On the bits of a GPU's
    NaN, 0x7fffffff, that would give -0.  float16: c / 2 is rounded, which float16 holds for any centred float16 input.
    """
    if FORMAT == "tf32":
        bits = c.to(tl.uint32, bitcast=True)
        bits = (bits + 0x1000) & 0xFFFFE000
        return tl.where(tl.abs(c) < float("inf"), bits.to(tl.float32, bitcast=True), c)
    if FORMAT == "bf16":
        return c.to(tl.bfloat16).to(tl.float32)
    if FORMAT == "bf16_bits":
        bits = c.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(tl.abs(c) < float("inf"), bits.to(tl.float32, bitcast=True), c)
    if FORMAT == "fp16":
        return (c * 0.5).to(tl.float16).to(tl.float32) * 2.0
    return c


@triton.jit
def split_in_two(a):
    """(high, low), high + low = a: high is a rounded to TF32.  Of NaN or infinity low is NaN.

    Three TF32 matmuls of the parts, of which the smallest is left out, are accurate to float32: error 2^-22 of a product.  Triton
    does the same for "tf32x3", but splits operands after the threads of a matmul have read them, each several times.
    """
    bits = (a.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    high = bits.to(tl.float32, bitcast=True)
    return high, a - high


@triton.jit
def float16_pair(a):
    """(high, low) in float16: high + 2^-11 low = a for |a| < 2^16, with an error of 2^-23 |a| or 2^-36.

    Without the factor 2^11 low would be subnormal, and lose digits, for |a| < 2^-3.
    """
    high = a.to(tl.float16)
    return high, ((a - high.to(tl.float32)) * 2048.0).to(tl.float16)


@triton.jit
def join_pair(high, low):
    """high + 2^-11 low in float32: of float16_pair()'s parts, or of the sums of their matmuls."""
    return tl.fma(low.to(tl.float32), 1.0 / 2048, high.to(tl.float32))


# Scales of columns are powers of 2^16.
SCALE_STEP = tl.constexpr(16)


@triton.jit
def float16_scale(largest):
    """(s, 1 / s) of columns of which no element exceeds 2 largest: the power of 2^16 with largest / s in [2^-4, 2^12).

    Coarse, so that columns of embeddings have the same, 1: columns of one scale are multiplied together.  float16 keeps its
    digits down to 2^-14, and loses them one by one down to 2^-24.
    """
    exponent = (largest.to(tl.uint32, bitcast=True) >> 23).to(tl.int32) & 0xFF
    steps = (exponent - 127 + 4 + 10 * SCALE_STEP) // SCALE_STEP - 10  # rounded down, of no negative number
    steps = tl.minimum(tl.maximum(steps, -7), 7)  # both powers are normal
    steps = tl.where((exponent > 0) & (exponent < 0xFF), steps, 0)
    return power_of_two(steps * SCALE_STEP), power_of_two(-steps * SCALE_STEP)


@triton.jit
def power_of_two(exponent):
    """2 to an integer from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_storage(operand, FORMAT: tl.constexpr):
    """What is stored and multiplied for a rounded operand: float16 holds half of it, see round_to_format()."""
    return operand * 0.5 if FORMAT == "fp16" else operand


@triton.jit
def widened(z, PTX: tl.constexpr):
    """z as float32.  PTX: of two bfloat16, which share a register, the second needs no shift; compilers shift it twice."""
    if PTX and tl.bfloat16 == z.dtype:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [z], tl.float32, is_pure=True, pack=2
        )
    else:
        return z.to(tl.float32)


@triton.jit
def operand_of(c, FORMAT: tl.constexpr, PTX: tl.constexpr = False):
    """(what is stored and multiplied for c, the operand as float32): to_storage() and round_to_format() with one conversion.

    PTX: two elements are rounded to bfloat16 by one instruction, which compilers do not find.
    """
    if PTX and FORMAT == "bf16":
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
            "=&r,=&r,=r,r,r", [c], (tl.bfloat16, tl.float32), is_pure=True, pack=2,
        )  # fmt: skip
    elif FORMAT == "bf16":
        stored = c.to(tl.bfloat16)
        return stored, stored.to(tl.float32)
    elif FORMAT == "fp16":
        stored = (c * 0.5).to(tl.float16)
        return stored, stored.to(tl.float32) * 2.0
    else:
        o = round_to_format(c, FORMAT)
        return o, o


@triton.jit
def undo_halves(acc, FORMAT: tl.constexpr):
    """A matmul of stored operands as one of operands: float16 stores halves."""
    return acc * 4.0 if FORMAT == "fp16" else acc


@triton.jit
def round_matrix(M, FORMAT: tl.constexpr):
    """M rounded for the backward matmul.  float16 lacks the range for it; TF32 has float16's mantissa."""
    return round_to_format(M, "tf32" if FORMAT == "fp16" else FORMAT)


@triton.jit
def divide(a, b):
    """a / b in float32, rounded to nearest: ``/`` compiles to an approximation, up to two units in the last place away.

    For whatever decides a value.  An error that all elements of a matrix but its diagonal share does not average out.
    """
    return tl.div_rn(a, b.to(tl.float32))


@triton.jit
def relu_propagating_nan(t):
    """relu that keeps NaN; tl.maximum(NaN, 0) on a GPU is 0."""
    return tl.where(t < 0.0, 0.0, t)


@triton.jit
def with_eps(std, eps):
    """sqrt(std^2 + eps)."""
    if eps > 0:
        std = tl.sqrt_rn(std * std + eps)
    return std


@triton.jit
def hinge_and_slope(std, gamma, eps):
    """(relu(gamma - s), 1 / s where 0 < s < gamma, else 0) of each column; s = sqrt(std^2 + eps).

    The gradient of the hinge is c times the slope, which the forward pass stores: once a column, not once a program.  It is
    at most the largest float32, which 1 / s of a subnormal s exceeds.
    """
    std = with_eps(std, eps)
    active = (std < gamma) & (std > 0.0)
    slope = divide(1.0, tl.where(active, std, 1.0).to(tl.float32))
    slope = tl.where(active, tl.minimum(slope, 3.4028234663852886e38), 0.0)
    return relu_propagating_nan(gamma - std), slope


@triton.jit
def variance_factor(slope, u):
    """slope * u for the upstream gradient u, zero where the slope is, even if u is infinite."""
    return tl.where(slope > 0.0, slope * u, 0.0)


@triton.jit
def exponent_scale(a):
    """(s, 1 / s): the power of two at or below a > 0, from its exponent; 1 if a is zero, subnormal or infinite."""
    bits = a.to(tl.uint32, bitcast=True) & 0x7F800000
    bits = tl.where((bits > 0) & (bits < 0x7F800000), bits, 0x3F800000)
    bits = tl.minimum(bits, 0x7E800000)  # 2^126: the inverse of 2^127 is not normal
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def tril_tile(t):
    """Row and column of tile t among the tiles on and below the diagonal, counted row by row.

    The square root is approximate and float32, so the row is corrected both ways.
    """
    row = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > t, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= t, row + 1, row)
    return row, t - row * (row + 1) // 2
