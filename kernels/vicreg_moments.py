"""The dual side's moments, and its operand: the first launch of VICReg's forward pass where M is N x N.

    hi + lo = mean_n z_n          std = sqrt(sum_n (z_n - hi - lo)^2 / (N - 1))
    o = round(z - hi - lo)        vhat = sum_n o_n^2 / (N - 1)
    scaled formats: o = s (high + 2^-11 low), of a pair; s a power of two, one a column

Reads each view once from memory and once more from the cache, in rare cases twice more.  Writes the moments, the operand
(unless rows are gathered by index), the squared row norms of o, the partial sums of (x - y)^2,
relu(gamma - sqrt(std^2 + eps)) and vhat^2, and the largest vhat.

x, y: (P, N, D), any strides.  Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .numerics import (
    divide,
    exponent_scale,
    float16_pair,
    float16_scale,
    hinge_and_slope,
    join_pair,
    operand_of,
    relu_propagating_nan,
    round_to_format,
)
from .views import (
    block_of_rows,
    column_pointers,
    load_rows,
    load_tile,
    select_source,
    store_rows,
    zero_outside,
)


@triton.jit
def _load_block(source, columns, index_ptr, v, p, top, n, d, P, N, D, EVEN: tl.constexpr):
    """Rows top + n and columns d of a view, as float32, 0 where they are not inside.  EVEN: all of them are."""
    columns, rows = block_of_rows(source, columns, index_ptr, v, p, top, n, P, N)
    mask = (top + n < N)[:, None] & (d < D)[None, :]
    return load_tile(columns[None, :] + rows[:, None], mask, EVEN).to(tl.float32)


@triton.jit
def _inside(e, top, n, d, N, D, EVEN: tl.constexpr):
    """e with zeros in the rows and columns of a block that are not inside."""
    return zero_outside(e, (top + n < N)[:, None] & (d < D)[None, :], EVEN)


@triton.jit
def _scaled_moments(hi, total, squares, scale, N):
    """lo and std of columns from sums over their rows of (z - hi) / scale and of its square."""
    lo = total * divide(1.0, N)
    # lo is as small as the rounding of the mean, so N lo^2 is negligible beside the squares and subtracting it is safe.
    centred = relu_propagating_nan(squares - N * lo * lo)
    return lo * scale, tl.sqrt_rn(centred * divide(1.0, N - 1)) * scale


@triton.jit
def _kept_moments(z, n, d, N, D, EVEN: tl.constexpr):
    """hi, lo and std of columns d, of which z has all rows, and the largest distance from the first row.

    The first row is subtracted first, so that the mean of a constant column is its value, exactly.  Deviations are scaled
    by a power of two before they are squared: squares of deviations below 1.1e-19 are subnormal.
    """
    z0 = tl.sum(tl.where((n == 0)[:, None], z, 0.0), 0)
    e = _inside(z - z0[None, :], 0, n, d, N, D, EVEN)
    largest = tl.max(tl.abs(e), 0)
    hi = z0 + tl.sum(e, 0) * divide(1.0, N)
    # Deviations from the mean are at most twice those from the first row.
    scale, inverse = exponent_scale(largest)
    e = _inside((z - hi[None, :]) * inverse[None, :], 0, n, d, N, D, EVEN)
    lo, std = _scaled_moments(hi, tl.sum(e, 0), tl.sum(e * e, 0), scale, N)
    return hi, lo, std, largest


@triton.jit
def _second_pass(
    source, columns, index_ptr, v, p, n, d, P, N, D, hi, largest,
    EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lo and std by a pass over the rows around their mean, scaled as in _kept_moments()."""
    scale, inverse = exponent_scale(largest)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for top in range(0, N, BLOCK_N):
        z = _load_block(source, columns, index_ptr, v, p, top, n, d, P, N, D, EVEN)
        e = _inside((z - hi[None, :]) * inverse[None, :], top, n, d, N, D, EVEN)
        total += e
        squares = tl.fma(e, e, squares)
    return _scaled_moments(hi, tl.sum(total, 0), tl.sum(squares, 0), scale, N)


@triton.jit
def _column_moments(
    source, columns, index_ptr, v, p, z, n, d, P, N, D,
    EVEN: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hi, lo and std of columns d, of which z has the first BLOCK_N rows, and their largest distance from a value among them.

    One pass over the others, around the mean of the first ones, which are subtracted from it as in _kept_moments().  A
    second one is for columns whose squares leave float32's range, or whose first rows are far from the mean.
    """
    z0 = tl.sum(tl.where((n == 0)[:, None], z, 0.0), 0)
    s = z0 + tl.sum((z - z0[None, :]) * (1.0 / BLOCK_N), 0)
    total = _inside(z - s[None, :], 0, n, d, N, D, EVEN)
    squares = total * total
    largest = tl.abs(total)
    for top in tl.range(BLOCK_N, N, BLOCK_N, num_stages=STAGES):
        z = _load_block(source, columns, index_ptr, v, p, top, n, d, P, N, D, EVEN)
        e = _inside(z - s[None, :], top, n, d, N, D, EVEN)
        total += e
        squares = tl.fma(e, e, squares)
        largest = tl.maximum(largest, tl.abs(e))
    largest = tl.max(largest, 0)
    squares = tl.sum(squares, 0)
    offset = tl.sum(total * divide(1.0, N), 0)
    # lo is what the mean is more than hi, whatever the roundings of hi.
    hi = s + offset
    lo = (s - hi) + offset
    v = relu_propagating_nan(squares - N * offset * offset)
    std = tl.sqrt_rn(v * divide(1.0, N - 1))
    in_range = (largest == 0.0) | ((largest > 1e-15) & (largest < 1e15))
    if tl.max(tl.where(in_range & (8.0 * v >= squares), 0, 1), 0) > 0:
        lo, std = _second_pass(
            source, columns, index_ptr, v, p, n, d, P, N, D, hi, largest, EVEN, BLOCK_N, BLOCK_D
        )
    return hi, lo, std, largest


@triton.jit
def centred(z, hi, lo, TYPE: tl.constexpr, FORMAT: tl.constexpr):
    """z - hi - lo, of z loaded from TYPE; without lo, at most 2^-25 of the mean, if TYPE and c are rounded to bfloat16.

    Of such z |m| is rarely more than 2^8 deviations, which z could not tell apart.
    """
    c = z - hi[None, :]
    return c if tl.bfloat16 == TYPE and (FORMAT == "bf16" or FORMAT == "bf16_bits") else c - lo[None, :]


@triton.jit
def scaled_operand(c, s, inverse, FORMAT: tl.constexpr):
    """(high, low, o): the float16 parts of c times ``inverse``, of one part twice, and s times their sum in float32."""
    if FORMAT == "scaled_fp16_pair":
        high, low = float16_pair(c * inverse[None, :])
        return high, low, join_pair(high, low) * s[None, :]
    else:
        high = (c * inverse[None, :]).to(tl.float16)
        return high, high, high.to(tl.float32) * s[None, :]


@triton.jit
def load_operand(source, rows, n, N, d, D, hi_ptr, lo_ptr, FORMAT: tl.constexpr):
    """Rows n < N and columns d < D of a view, centred and rounded, 0 elsewhere; hi, lo: of all its columns."""
    mask = (n < N)[:, None] & (d < D)[None, :]
    z = load_rows(column_pointers(source, d), rows, mask)
    hi = tl.load(hi_ptr + d, mask=d < D, other=0.0)
    lo = tl.load(lo_ptr + d, mask=d < D, other=0.0)
    return round_to_format(tl.where(mask, z - hi[None, :] - lo[None, :], 0.0), FORMAT)


@triton.jit
def _store_moments(at, step, inside, hi, lo, slope, operand_v, scale, SCALED: tl.constexpr):
    """Into moments (4 or 5, P, V, D); ``step``: between two of them."""
    tl.store(at, hi, mask=inside)
    tl.store(at + step, lo, mask=inside)
    tl.store(at + 2 * step, slope, mask=inside)
    tl.store(at + 3 * step, operand_v.to(tl.float32), mask=inside)
    if SCALED:
        tl.store(at + 4 * step, scale, mask=inside)


@triton.jit(do_not_specialize=["P"])
def _moments_forward_kernel(
    views, operand_ptr, moments_ptr, row_sq_norms_ptr, partials, P, N, D, gamma, eps,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr, ONE_BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of one problem of one view.  A pair's second view reads the first for the invariance.

    EVEN: all blocks are full.  ONE_BLOCK: N <= BLOCK_N, and z is read once.
    Programs of the views of one block are neighbours: what one reads is in the cache for the other.
    """
    PAIR: tl.constexpr = FORMAT == "scaled_fp16_pair"
    SCALED: tl.constexpr = PAIR or FORMAT == "scaled_fp16"
    program = tl.program_id(0)
    if program == 0:
        tl.store(partials.arrival_counter_ptr, 0)
    blocks = tl.cdiv(D, BLOCK_D)
    v = program % VIEWS
    block = (program // VIEWS) % blocks
    p = program // VIEWS // blocks
    n = tl.arange(0, BLOCK_N)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    P = P.to(tl.int64)
    source = select_source(views, v)
    columns = column_pointers(source, d)
    z = _load_block(source, columns, views.index_ptr, v, p, 0, n, d, P, N, D, EVEN)
    if ONE_BLOCK:
        hi, lo, std, largest = _kept_moments(z, n, d, N, D, EVEN)
    else:
        hi, lo, std, largest = _column_moments(
            source, columns, views.index_ptr, v, p, z, n, d, P, N, D, EVEN, STAGES, BLOCK_N, BLOCK_D
        )
    scale, inverse = float16_scale(largest)
    other_source = select_source(views, v ^ 1)
    other_columns = column_pointers(other_source, d)
    row_sq_norms = row_sq_norms_ptr + ((v * P + p) * blocks + block) * N
    # With float32 sums the rounding of one strong feature would show in what the float32-accurate dual side subtracts.
    ACCURATE: tl.constexpr = PAIR or FORMAT == "fp32"
    WIDE: tl.constexpr = tl.float64 if ACCURATE else tl.float32
    # Summed over rows at the end; float64 ones would take too many registers.
    operand_squares = tl.zeros((BLOCK_D,), WIDE) if ACCURATE else tl.zeros((BLOCK_N, BLOCK_D), WIDE)
    differences = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for top in tl.range(0, BLOCK_N if ONE_BLOCK else N, BLOCK_N, num_stages=STAGES):
        if not ONE_BLOCK:
            z = _load_block(source, columns, views.index_ptr, v, p, top, n, d, P, N, D, EVEN)
        c = _inside(centred(z, hi, lo, views.x_ptr.dtype.element_ty, FORMAT), top, n, d, N, D, EVEN)
        if SCALED:
            high, low, o = scaled_operand(c, scale, inverse, FORMAT)
        else:
            high, o = operand_of(c, FORMAT)
        if operand_ptr is not None:
            at = operand_ptr + ((v * P + p) * N + top) * D + n.to(tl.int64)[:, None] * D + d[None, :]
            mask = (top + n < N)[:, None] & inside[None, :]
            store_rows(at, high, mask, EVEN)
            if PAIR:
                store_rows(at + VIEWS * P * N * D, low, mask, EVEN)
        wide = o.to(WIDE)
        squares = wide * wide
        operand_squares += tl.sum(squares, 0) if ACCURATE else squares
        tl.store(row_sq_norms + top + n, tl.sum(squares, 1), mask=top + n < N)
        if VIEWS > 1:
            if v % 2 == 1:
                e = z - _load_block(
                    other_source, other_columns, views.index_ptr, v ^ 1, p, top, n, d, P, N, D, EVEN
                )
                differences = tl.fma(e, e, differences)
    if not ACCURATE:
        operand_squares = tl.sum(operand_squares, 0)
    operand_v = operand_squares.to(tl.float64) * (1.0 / (N.to(tl.float64) - 1))
    hinge, slope = hinge_and_slope(std, gamma, eps)
    if moments_ptr is not None:
        at = moments_ptr + (p * VIEWS + v).to(tl.int64) * D + d
        _store_moments(at, P * VIEWS * D, inside, hi, lo, slope, operand_v, scale, SCALED)
    at = partials.column_ptr + program.to(tl.int64) * 4
    tl.store(at, tl.sum(tl.sum(differences, 0).to(tl.float64)))
    tl.store(at + 1, tl.sum(tl.where(inside, hinge, 0.0).to(tl.float64)))
    tl.store(at + 2, tl.sum(tl.where(inside, operand_v * operand_v, 0.0)))
    tl.store(at + 3, tl.max(tl.where(inside, operand_v, 0.0), 0))
