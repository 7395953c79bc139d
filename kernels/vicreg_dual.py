"""The dual side of VICReg's forward pass: moments of the columns, then G = o o' / (N - 1), N x N.

    hi + lo = mean_n z_n          std = sqrt(sum_n (z_n - hi - lo)^2 / (N - 1))
    o = round(z - hi - lo)        vhat = sum_n o_n^2 / (N - 1)
    cov = (sum G^2 - sum vhat^2) / D

1. _moments_forward_kernel reads each view once from memory and twice more from the cache.  It writes the moments, the
   operand o (unless rows are gathered by index), the squared row norms of o, and the partial sums of (x - y)^2,
   relu(gamma - sqrt(std^2 + eps)) and vhat^2.  2 bytes moved a byte of input, about 10 operations an element.
2. _gram_forward_kernel multiplies the tiles on and below G's diagonal: N^2 D operations a view.  Most tiles are computed
   by one program each.  The last ones, which would leave most of the device idle, are split along the features, and
   vicreg_splitk.py adds the splits.  Gathered rows are centred and rounded here.

x, y: (P, N, D), any strides.  Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .epilogue import reduce_terms, store_tile
from .numerics import (
    divide,
    exponent_scale,
    float16_pair,
    float16_scale,
    hinge_of,
    hinge_slope,
    operand_of,
    power_of_two,
    relu_propagating_nan,
    round_to_format,
    to_storage,
    tril_tile,
    undo_halves,
)
from .views import (
    block_of_rows,
    column_pointers,
    load_rows,
    load_tile,
    row_offsets,
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
    s = z0 + tl.sum(z - z0[None, :], 0) * (1.0 / BLOCK_N)
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
    total = tl.sum(total, 0)
    squares = tl.sum(squares, 0)
    offset = total * divide(1.0, N)
    # lo is what the mean is more than hi, whatever the roundings of hi.
    hi = s + offset
    lo = (s - hi) + offset
    centred = relu_propagating_nan(squares - total * offset)
    std = tl.sqrt_rn(centred * divide(1.0, N - 1))
    in_range = (largest == 0.0) | ((largest > 1e-15) & (largest < 1e18))
    if tl.max(tl.where(in_range & (8.0 * centred >= squares), 0, 1), 0) > 0:
        lo, std = _second_pass(
            source, columns, index_ptr, v, p, n, d, P, N, D, hi, largest, EVEN, BLOCK_N, BLOCK_D
        )
    return hi, lo, std, largest


@triton.jit
def centred(z, hi, lo, FORMAT: tl.constexpr):
    """z - hi - lo; without lo, which is at most 2^-25 of the mean, if c is rounded to bfloat16: |m| is rarely more than 2^8 std."""
    c = z - hi[None, :]
    return c if FORMAT == "bf16" else c - lo[None, :]


@triton.jit
def scaled_operand(c, s, inverse, FORMAT: tl.constexpr):
    """(high, low, o): the float16 parts of c times ``inverse``, of one part twice, and s times their sum in float32."""
    if FORMAT == "scaled_fp16_pair":
        high, low = float16_pair(c * inverse[None, :])
        return high, low, tl.fma(low.to(tl.float32), 1.0 / 2048, high.to(tl.float32)) * s[None, :]
    else:
        high = (c * inverse[None, :]).to(tl.float16)
        return high, high, high.to(tl.float32) * s[None, :]


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
    if SCALED:
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
        c = _inside(centred(z, hi, lo, FORMAT), top, n, d, N, D, EVEN)
        if SCALED:
            high, low, o = scaled_operand(c, scale, inverse, FORMAT)
        else:
            high, o = operand_of(c, FORMAT)
        if operand_ptr is not None:
            at = operand_ptr + ((v * P + p) * N + top) * D
            at = at + n.to(tl.int64)[:, None] * D + d[None, :]
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
                other = _load_block(
                    other_source, other_columns, views.index_ptr, v ^ 1, p, top, n, d, P, N, D, EVEN
                )
                difference = other - z
                differences = tl.fma(difference, difference, differences)
    if not ACCURATE:
        operand_squares = tl.sum(operand_squares, 0)
    operand_v = operand_squares.to(tl.float64) * (1.0 / (N.to(tl.float64) - 1))
    if moments_ptr is not None:
        at = moments_ptr + (p * VIEWS + v).to(tl.int64) * D + d
        step = P * VIEWS * D  # of moments (4 or 5, P, V, D)
        tl.store(at, hi, mask=inside)
        tl.store(at + step, lo, mask=inside)
        tl.store(at + 2 * step, hinge_slope(std, gamma, eps), mask=inside)
        tl.store(at + 3 * step, operand_v.to(tl.float32), mask=inside)
        if SCALED:
            tl.store(at + 4 * step, scale, mask=inside)
    hinge = hinge_of(std, gamma, eps)
    at = partials.column_ptr + program.to(tl.int64) * 4
    tl.store(at, tl.sum(tl.sum(differences, 0).to(tl.float64)))
    tl.store(at + 1, tl.sum(tl.where(inside, hinge, 0.0).to(tl.float64)))
    tl.store(at + 2, tl.sum(tl.where(inside, operand_v * operand_v, 0.0)))
    tl.store(at + 3, tl.max(tl.where(inside, operand_v, 0.0), 0))


@triton.jit
def gram_scale(partials, problem, P, N, D, column_blocks, VIEWS: tl.constexpr):
    """(s, 1 / s): the power of two by which G is divided before it is rounded to float16.

    |G| is at most the largest |o_n|^2 / (N - 1), so at most sum vhat and D times the largest vhat, which is between 2^14 and
    2^15 times s.
    """
    BLOCK: tl.constexpr = 512
    largest = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, column_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        program = ((problem % P) * column_blocks + block) * VIEWS + problem // P
        largest = tl.maximum(
            largest, tl.load(partials.column_ptr + program * 4 + 3, mask=block < column_blocks, other=0.0)
        )
    bound = tl.max(largest, 0) * D
    # From 2^-110 to 2^126: both powers are normal.
    exponent = (bound.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1023
    exponent = tl.minimum(tl.maximum(exponent, -110), 126) - 14
    return power_of_two(exponent), power_of_two(-exponent)


@triton.jit
def replace_diagonal(G, row, column, row_sq_norms_ptr, problem, column_blocks, N, BLOCK_R: tl.constexpr):
    """G with the diagonal that the moments kernel summed apart: row_sq_norms (V * P, column blocks, N).

    tl.dot accumulates serially.  sum vhat^2 is subtracted from sum G^2, so G's own diagonal would amplify its error.
    """
    # Blocks at a time: one by one, each would wait for memory.
    BLOCK_E: tl.constexpr = min(128, 2048 // BLOCK_R)
    norms = tl.zeros((BLOCK_E, BLOCK_R), tl.float64)
    for start in range(0, column_blocks, BLOCK_E):
        block = start + tl.arange(0, BLOCK_E)
        at = row_sq_norms_ptr + (problem * column_blocks + block)[:, None] * N + row[None, :]
        mask = (block < column_blocks)[:, None] & (row < N)[None, :]
        norms += tl.load(at, mask=mask, other=0.0).to(tl.float64)
    diagonal = (tl.sum(norms, 0) / (N - 1)).to(tl.float32)
    return tl.where(row[:, None] == column[None, :], diagonal[:, None], G)


@triton.jit
def load_operand(source, rows, n, N, d, D, hi_ptr, lo_ptr, FORMAT: tl.constexpr):
    """Rows n < N and columns d < D of a view, centred and rounded, 0 elsewhere; hi, lo: of all its columns."""
    mask = (n < N)[:, None] & (d < D)[None, :]
    z = load_rows(column_pointers(source, d), rows, mask)
    hi = tl.load(hi_ptr + d, mask=d < D, other=0.0)
    lo = tl.load(lo_ptr + d, mask=d < D, other=0.0)
    return round_to_format(tl.where(mask, z - hi[None, :] - lo[None, :], 0.0), FORMAT)


@triton.jit
def _operand_tile(rows, step, at, mask):
    """A tile of the stored operand or of its low parts, ``step`` further; 0 where masked."""
    return tl.load(rows + step + at, mask=mask, other=0.0)


@triton.jit
def _add_low(acc, acc_low, PAIR: tl.constexpr):
    """The sum of the matmuls of high parts and of those of which one part is low, see float16_pair()."""
    return tl.fma(acc_low, 1.0 / 2048, acc) if PAIR else acc


@triton.jit
def _operand_matmul(
    a_rows, b_rows, of_low, row, column, begin, end, N,
    PAIR: tl.constexpr, DOT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows ``row`` times rows ``column`` of the stored operand over the features begin <= d < end.

    a_rows, b_rows: pointers to the rows, (rows, 1) and (1, rows); of_low: from there to the low parts.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    acc_low = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for start in range(begin, end, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        a_mask = (row < N)[:, None] & (d < end)[None, :]
        b_mask = (column < N)[None, :] & (d < end)[:, None]
        a = _operand_tile(a_rows, 0, d[None, :], a_mask)
        b = _operand_tile(b_rows, 0, d[:, None], b_mask)
        acc = tl.dot(a, b, acc, input_precision=DOT_PRECISION)
        if PAIR:
            acc_low = tl.dot(a, _operand_tile(b_rows, of_low, d[:, None], b_mask), acc_low)
            acc_low = tl.dot(_operand_tile(a_rows, of_low, d[None, :], a_mask), b, acc_low)
    return _add_low(acc, acc_low, PAIR)


@triton.jit
def _weighted_matmul(
    a_rows, b_rows, of_low, scale_ptr, inverse, row, column, begin, end, N,
    PAIR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As _operand_matmul(), for columns of different scales: each times its weight, (scale inverse)^2, a power of two up to 1."""
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    acc_low = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for start in range(begin, end, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        a_mask = (row < N)[:, None] & (d < end)[None, :]
        b_mask = (column < N)[None, :] & (d < end)[:, None]
        weights = tl.load(scale_ptr + d, mask=d < end, other=0.0) * inverse
        weights = (weights * weights)[None, :]
        a = _operand_tile(a_rows, 0, d[None, :], a_mask)
        a = (a.to(tl.float32) * weights).to(tl.float16)
        b = _operand_tile(b_rows, 0, d[:, None], b_mask)
        acc = tl.dot(a, b, acc)
        if PAIR:
            acc_low = tl.dot(a, _operand_tile(b_rows, of_low, d[:, None], b_mask), acc_low)
            a_low = _operand_tile(a_rows, of_low, d[None, :], a_mask)
            acc_low = tl.dot((a_low.to(tl.float32) * weights).to(tl.float16), b, acc_low)
    return _add_low(acc, acc_low, PAIR)


@triton.jit
def _extreme_scales(scale_ptr, begin, end):
    """The smallest and the largest scale of the columns begin <= d < end."""
    BLOCK: tl.constexpr = 1024
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        d = start + tl.arange(0, BLOCK)
        least = tl.minimum(least, tl.load(scale_ptr + d, mask=d < end, other=float("inf")))
        most = tl.maximum(most, tl.load(scale_ptr + d, mask=d < end, other=0.0))
    return tl.min(least, 0), tl.max(most, 0)


@triton.jit
def _tile_of_operand(
    operand_ptr, moments_ptr, problem, row, column, begin, end, P, N, D,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, DOT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(N - 1) G in rows ``row`` and columns ``column``, from the features begin <= d < end of the stored operand."""
    PAIR: tl.constexpr = FORMAT == "scaled_fp16_pair"
    a_rows = (operand_ptr + problem * N * D + row.to(tl.int64) * D)[:, None]
    b_rows = (operand_ptr + problem * N * D + column.to(tl.int64) * D)[None, :]
    of_low = P.to(tl.int64) * VIEWS * N * D
    if PAIR or FORMAT == "scaled_fp16":
        scale_ptr = moments_ptr + ((4 * P.to(tl.int64) + problem % P) * VIEWS + problem // P) * D
        least, most = _extreme_scales(scale_ptr, begin, end)
        if least == most:
            acc = _operand_matmul(
                a_rows, b_rows, of_low, row, column, begin, end, N, PAIR, DOT_PRECISION, BLOCK_M, BLOCK_K
            )
        else:
            _, inverse = exponent_scale(most)
            acc = _weighted_matmul(
                a_rows, b_rows, of_low, scale_ptr, inverse, row, column, begin, end, N, PAIR, BLOCK_M, BLOCK_K
            )
        acc = acc * most * most
    else:
        acc = _operand_matmul(
            a_rows, b_rows, of_low, row, column, begin, end, N, PAIR, DOT_PRECISION, BLOCK_M, BLOCK_K
        )
    return acc


@triton.jit
def _tile_of_gathered_rows(
    views, moments_ptr, problem, row, column, begin, end, P, N, D,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As _tile_of_operand(), from the views: rows are centred and rounded here."""
    v = problem // P
    p = problem % P
    source = select_source(views, v)
    a_rows = row_offsets(source, views.index_ptr, v, p, row, P, N)
    b_rows = row_offsets(source, views.index_ptr, v, p, column, P, N)
    hi_ptr = moments_ptr + (p * VIEWS + v) * D
    lo_ptr = hi_ptr + P.to(tl.int64) * VIEWS * D
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for start in range(begin, end, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        a = load_operand(source, a_rows, row, N, d, end, hi_ptr, lo_ptr, FORMAT)
        b = load_operand(source, b_rows, column, N, d, end, hi_ptr, lo_ptr, FORMAT)
        a = to_storage(a, FORMAT).to(OPERAND_TYPE)
        b = tl.trans(to_storage(b, FORMAT).to(OPERAND_TYPE))
        acc = tl.dot(a, b, acc, input_precision=DOT_PRECISION)
    return undo_halves(acc, FORMAT)


@triton.jit
def finish_gram_tile(
    G, row, column, i, j, problem, P, N, D, row_sq_norms_ptr, column_blocks, M_ptr, M_scale_ptr, partials,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Replace the diagonal of rows ``row`` of tile (i, j), and store them, for which see store_tile(); their share of sum G^2."""
    if i == j:
        G = replace_diagonal(G, row, column, row_sq_norms_ptr, problem, column_blocks, N, BLOCK_R)
    inverse = None
    if M_scale_ptr is not None:
        s, inverse = gram_scale(partials, problem, P, N, D, column_blocks, VIEWS)
        if i == 0:
            tl.store(M_scale_ptr + problem, s)
    return store_tile(G, row, column, i != j, N, problem, P * VIEWS, M_ptr, inverse, FORMAT)


@triton.jit(do_not_specialize=["P", "tiles", "full_tiles", "splits", "tile_partials", "column_partials"])
def _gram_forward_kernel(
    views, operand_ptr, moments_ptr, row_sq_norms_ptr, split_tiles_ptr, M_ptr, M_scale_ptr, partials, terms, scales,
    P, N, D, tiles, full_tiles, splits, split_length, column_blocks, tile_partials, column_partials,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one of the first ``full_tiles`` tiles; or ``split_length`` features of a later one, which has ``splits``.

    tiles: of one G.  views None: the operand is read instead.  split_tiles_ptr None: no tile is split, and this kernel reduces the terms too.
    """
    program = tl.program_id(0)
    is_full = program < full_tiles
    split = program - full_tiles
    tile = tl.where(is_full, program, full_tiles + split // splits)
    begin = tl.where(is_full, 0, (split % splits) * split_length)
    end = tl.where(is_full, D, tl.minimum(begin + split_length, D))
    problem = (tile // tiles).to(tl.int64)
    i, j = tril_tile(tile % tiles)
    m = tl.arange(0, BLOCK_M)
    row = i * BLOCK_M + m
    column = j * BLOCK_M + m
    if operand_ptr is not None:
        acc = _tile_of_operand(
            operand_ptr, moments_ptr, problem, row, column, begin, end, P, N, D,
            VIEWS, FORMAT, DOT_PRECISION, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    else:
        acc = _tile_of_gathered_rows(
            views, moments_ptr, problem, row, column, begin, end, P, N, D,
            VIEWS, FORMAT, OPERAND_TYPE, DOT_PRECISION, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    if is_full:
        squares = finish_gram_tile(
            divide(acc, N - 1), row, column, i, j, problem, P, N, D, row_sq_norms_ptr, column_blocks,
            M_ptr, M_scale_ptr, partials, VIEWS, FORMAT, BLOCK_M,
        )  # fmt: skip
        tl.store(partials.tile_ptr + tile.to(tl.int64) * 2, squares)
    elif split_tiles_ptr is not None:
        at = split_tiles_ptr + split.to(tl.int64) * BLOCK_M * BLOCK_M
        tl.store(at + m[:, None] * BLOCK_M + m[None, :], acc)
    if split_tiles_ptr is None:
        reduce_terms(partials, tile_partials, column_partials, terms, scales, True)
