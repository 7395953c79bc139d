"""The gradient of VICRegL's per-image statistics on the dual side, for maps of up to 64 patches: matmuls of patches, not of matches.

    g = sum over match sets s of   n_s w_s (x - mean_s)                  w_s = f_var,s slope_s - f_cov,s vhat_s
      + sum over kinds k of        f_inv,k (n_k x - pairs_k y)
      + own (x - centre)           own = sum over s of f_cov,s P_s' G_s P_s

P_s: zeros and ones, which patch match k of set s is; n_s: how many matches a patch has in it; pairs_k: how often patches of
x and y are matched with each other.  In vicregl.py's formula each match has a row of its own; here those of all match sets
are added up before they are multiplied: 3 L^2 D multiplications an image and source instead of 4 (m^2 + m L) D, one row a patch
instead of four a match, and no scatter.  Rows of G add up to zero, so that own's centre is arbitrary: the first set's mean.

The matmuls take bfloat16: of float32 as three parts of 8 bits each.  pairs and P are small integers, exact in bfloat16.
Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .numerics import divide, round_to_format
from .vicregl import gram_set_offset, match_sets_gradient
from .views import column_pointers, match_set_offset, matches_of, select_source


@triton.jit
def _scaled(ptr, scale):
    """An upstream gradient times a scale; 0 without one."""
    factor = 0.0
    if ptr is not None:
        factor = tl.load(ptr).to(tl.float32) * scale
    return factor


@triton.jit
def _is_finite(gram_ptr, upstream_sum, b, B, m1, m2, BLOCK_N: tl.constexpr):
    """Whether the upstream gradients and all rows that an image's matches have are finite: their squared norms are."""
    v = tl.arange(0, 8)
    n = tl.arange(0, BLOCK_N)
    direction = v // 2 % 2
    m = tl.where(direction == 1, m2, m1)
    at = gram_set_offset((v // 4).to(tl.int64), direction, B, m1, m2) + ((v % 2) * B + b) * m * m
    norms = tl.load(
        gram_ptr + at[:, None] + n[None, :] * (m + 1)[:, None], mask=n[None, :] < m[:, None], other=0.0
    )
    return (tl.sum(tl.sum(tl.abs(norms.to(tl.float32)), 1), 0) + tl.abs(upstream_sum)) < float("inf")


@triton.jit
def _top_half(a, TYPE: tl.constexpr):
    """(the upper 16 bits of a float32, which are a bfloat16, what is left): exact.  TYPE float32: for the interpreter."""
    bits = a.to(tl.uint32, bitcast=True)
    high = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    if tl.float32 == TYPE:
        return high, a - high
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), a - high


@triton.jit
def _dot(a, b, acc):
    """acc + a b; float32 only in the interpreter."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _matmul_selected(ones, b, acc, PARTS: tl.constexpr):
    """acc + ones b; exact for a b of as many parts of 8 bits."""
    for _ in tl.static_range(PARTS):
        part, b = _top_half(b, ones.dtype)
        acc = _dot(ones, part, acc)
    return acc


@triton.jit
def _matmul_integers(a, integers, acc, PARTS: tl.constexpr):
    """acc + a integers; exact products for an ``a`` of as many parts of 8 bits, and integers up to 256."""
    for _ in tl.static_range(PARTS):
        part, a = _top_half(a, integers.dtype)
        acc = _dot(part, integers, acc)
    return acc


@triton.jit
def _matmul(a, b, acc, TYPE: tl.constexpr, PARTS: tl.constexpr):
    """acc + a b of float32 numbers: as bfloat16 (PARTS 1), exact for TF32 numbers (2), accurate to float32 (3)."""
    if PARTS == 1:
        return _dot(a.to(TYPE), b.to(TYPE), acc)
    a_high, a = _top_half(a, TYPE)
    a_middle, a = _top_half(a, TYPE)
    a_low, _ = _top_half(a, TYPE)
    b_high, b = _top_half(b, TYPE)
    b_middle, b = _top_half(b, TYPE)
    b_low, _ = _top_half(b, TYPE)
    if PARTS > 2:
        acc = _dot(a_low, b_high, acc)
        acc = _dot(a_high, b_low, acc)
    acc = _dot(a_middle, b_middle, acc)
    acc = _dot(a_middle, b_high, acc)
    acc = _dot(a_high, b_middle, acc)
    return _dot(a_high, b_high, acc)


@triton.jit
def _matrices(
    views, gram_ptr, counts_ptr, cov, of_y, b, B, m1, m2, patch,
    TYPE: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(own, (-pairs) of both kinds, whether each patch of this source and of the other has a match).

    counts_ptr: the matches of each patch are stored there, of the four match sets and of both kinds.
    """
    n = tl.arange(0, BLOCK_N)
    own = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    matches = tl.zeros((BLOCK_R,), tl.float32)
    other_matches = tl.zeros((BLOCK_R,), tl.float32)
    pairs = (own.to(TYPE), own.to(TYPE))
    for kind in tl.static_range(2):
        kind_pairs = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
        kind_count = tl.zeros((BLOCK_R,), tl.float32)
        for direction in range(2):
            m = matches_of(direction, m1, m2)
            side = direction ^ of_y
            index_ptr = views.index_ptr + match_set_offset(kind, direction, B, m1, m2) + b * m
            own_index = tl.load(index_ptr + side * B * m + n, mask=n < m, other=-1).to(tl.int32)
            other_index = tl.load(index_ptr + (1 - side) * B * m + n, mask=n < m, other=-1).to(tl.int32)
            G_ptr = gram_ptr + gram_set_offset(kind, direction, B, m1, m2) + (side * B + b) * m * m
            inside = (n < m)[:, None] & (n < m)[None, :]
            G = tl.load(G_ptr + n[:, None] * m + n[None, :], mask=inside, other=0.0).to(tl.float32)
            f_cov = divide(cov[kind], m - 1)
            chosen = (own_index[:, None] == patch[None, :]).to(TYPE)
            other_chosen = (other_index[:, None] == patch[None, :]).to(TYPE)
            rows = _matmul_integers(G, chosen, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), PARTS) * f_cov
            own = _matmul_selected(tl.trans(chosen), rows, own, PARTS)
            kind_pairs = _dot(tl.trans(other_chosen), chosen, kind_pairs)
            count = tl.sum(chosen.to(tl.float32), 0)
            tl.store(counts_ptr + (2 * kind + direction) * BLOCK_R + patch, count)
            kind_count += count
        tl.store(counts_ptr + (4 + kind) * BLOCK_R + patch, kind_count)
        matches += kind_count
        other_matches += tl.sum(kind_pairs, 1)
        pairs = ((-kind_pairs).to(TYPE), pairs[1]) if kind == 0 else (pairs[0], (-kind_pairs).to(TYPE))
    return own, pairs, matches > 0, other_matches > 0


@triton.jit
def _matmul_pairs(y, pairs, acc, TYPE: tl.constexpr):
    """acc + y pairs, as the numbers are."""
    if y.dtype == tl.float32:
        return _matmul_integers(y, pairs, acc, 3)
    else:
        return _dot(y, pairs.to(y.dtype), acc)


@triton.jit
def _load_patches(source, row_ptr, b, d, D, EVEN: tl.constexpr):
    """A tile (columns, patches) of an image; row_ptr: the patches, which are indices."""
    columns = column_pointers(source, d) + b * source.stride_p
    rows = tl.load(row_ptr).to(tl.int32, bitcast=True) * source.stride_i
    if EVEN:
        return tl.load(columns[:, None] + rows[None, :])
    return tl.load(columns[:, None] + rows[None, :], mask=(d < D)[:, None], other=0.0)


@triton.jit
def _load_column(ptr, d, D, EVEN: tl.constexpr):
    """Numbers of columns d."""
    if EVEN:
        return tl.load(ptr + d)
    return tl.load(ptr + d, mask=d < D, other=0.0)


@triton.jit
def _add_columns_terms(
    out, x, of_image, own_rows, var, cov, inverse_degrees, of_y, d, D, EVEN: tl.constexpr, BLOCK_L: tl.constexpr
):
    """(out + sum over match sets of n_s w_s (x - mean_s), the mean of the first set).

    A loop, not unrolled: all sets' pointers to columns would not fit the registers.
    """
    first_set = of_image + of_y * 4 * D
    centre = _load_column(first_set + 3 * D, d, D, EVEN) + _load_column(first_set, d, D, EVEN)
    for s in range(4):
        of_set = of_image + (s * 2 + ((s % 2) ^ of_y)) * 4 * D
        lo = _load_column(of_set, d, D, EVEN)
        operand_v = _load_column(of_set + D, d, D, EVEN)
        slope = _load_column(of_set + 2 * D, d, D, EVEN)
        z_0 = _load_column(of_set + 3 * D, d, D, EVEN)
        f_v = tl.where(s > 1, var[1], var[0]) * inverse_degrees
        f_c = tl.where(s > 1, cov[1], cov[0]) * inverse_degrees
        w = tl.fma(operand_v, -f_c, slope * f_v)
        c = tl.fma(x - z_0[:, None], w[:, None], -(w * lo)[:, None])
        out = tl.fma(c, tl.load(own_rows + s * BLOCK_L)[None, :], out)
    return out, centre


@triton.jit
def _finite_image_gradient(
    views, gram_ptr, columns_ptr, own_rows, g_ptr, inv, var, cov, of_y, b, B, L, D, m1, m2,
    EVEN: tl.constexpr, FORMAT: tl.constexpr, PART_TYPE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the gradient of one image of a source.  own_rows (8, BLOCK_L): rows_ptr of the kernel, for this program."""
    patch = tl.arange(0, BLOCK_L)
    PARTS: tl.constexpr = 1 if FORMAT == "bf16" else 3 if FORMAT == "fp32" else 2
    own, pairs, matched, other_matched = _matrices(
        views, gram_ptr, own_rows, cov, of_y, b, B, m1, m2, patch, PART_TYPE, PARTS, BLOCK_L, BLOCK_N
    )
    own = round_to_format(own, FORMAT)
    source = select_source(views, of_y)
    other_source = select_source(views, 1 - of_y)
    inverse_degrees = divide(1.0, m1 - 1)
    f_inv = (divide(inv[0], m1), divide(inv[1], m1))
    # Rows that no match has count for nothing; they may not be finite, and a matched one takes their place.
    matches = views.index_ptr + b * m1
    row = tl.where(matched, patch, tl.load(matches + of_y * B * m1))
    tl.store(own_rows + 6 * BLOCK_L + patch, row.to(tl.int32).to(tl.float32, bitcast=True))
    other_row = tl.where(other_matched, patch, tl.load(matches + (1 - of_y) * B * m1))
    tl.store(own_rows + 7 * BLOCK_L + patch, other_row.to(tl.int32).to(tl.float32, bitcast=True))
    own_rows += patch
    tl.debug_barrier()
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        y = _load_patches(other_source, own_rows + 7 * BLOCK_L, b, d, D, EVEN)
        zero = tl.zeros((BLOCK_D, BLOCK_L), tl.float32)
        partners = (
            _matmul_pairs(y, pairs[0], zero, PART_TYPE),
            _matmul_pairs(y, pairs[1], zero, PART_TYPE),
        )
        x = _load_patches(source, own_rows + 6 * BLOCK_L, b, d, D, EVEN).to(tl.float32)
        out = zero
        for kind in tl.static_range(2):
            count = tl.load(own_rows + (4 + kind) * BLOCK_L)
            difference = tl.fma(x, count[None, :], partners[kind])
            out = tl.fma(difference, f_inv[kind], out)
        out, centre = _add_columns_terms(
            out, x, columns_ptr + b * 32 * D, own_rows, var, cov, inverse_degrees, of_y, d, D, EVEN, BLOCK_L
        )
        o = round_to_format(x - centre[:, None], FORMAT)
        out = _matmul(o, own, out, PART_TYPE, PARTS)
        tl.store(
            g_ptr + b * L * D + (patch[None, :] * D + d[:, None]),
            out,
            mask=(patch < L)[None, :] & (d < D)[:, None],
        )


@triton.jit(do_not_specialize=["B", "m1", "m2"])
def _vicregl_image_gradient_kernel(
    views, gram_ptr, columns_ptr, rows_ptr, x_grad_ptr, y_grad_ptr, location, feature, scales, B, L1, L2, D, m1, m2,
    EVEN: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr, EXACT_PRECISION: tl.constexpr, PART_TYPE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of one image of x or of y, BLOCK_D columns at a time.  Both directions have m1 = m2 matches.

    x_grad_ptr, y_grad_ptr None: the source needs no gradient.  location, feature: Upstream of vicreg_backward.py.
    rows_ptr (programs, 8, BLOCK_L): what this program knows of each patch, for itself; registers would not hold it all.
    An image with a match that is not finite is left to match_sets_gradient(): zero times infinity would be NaN here.
    """
    program = tl.program_id(0)
    B = B.to(tl.int64)
    if x_grad_ptr is not None and y_grad_ptr is not None:
        of_y = program % 2
        b = (program // 2).to(tl.int64)
        g_ptr = tl.where(of_y == 1, y_grad_ptr, x_grad_ptr)
    else:
        of_y = tl.full((), 1 if x_grad_ptr is None else 0, tl.int32)
        b = program.to(tl.int64)
        g_ptr = y_grad_ptr if x_grad_ptr is None else x_grad_ptr
    L = tl.where(of_y == 1, L2, L1)
    patch = tl.arange(0, BLOCK_L)
    inv = (_scaled(location.inv_ptr, scales.inv), _scaled(feature.inv_ptr, scales.inv))
    var = (_scaled(location.var_ptr, scales.var), _scaled(feature.var_ptr, scales.var))
    cov = (_scaled(location.cov_ptr, scales.cov), _scaled(feature.cov_ptr, scales.cov))
    total = tl.abs(inv[0]) + tl.abs(inv[1]) + tl.abs(var[0]) + tl.abs(var[1]) + tl.abs(cov[0]) + tl.abs(cov[1])
    finite = _is_finite(gram_ptr, total, b, B, m1, m2, BLOCK_N)
    own_rows = rows_ptr + program.to(tl.int64) * 8 * BLOCK_L
    if finite:
        _finite_image_gradient(
            views, gram_ptr, columns_ptr, own_rows, g_ptr, inv, var, cov, of_y, b, B, L, D, m1, m2,
            EVEN, FORMAT, PART_TYPE, BLOCK_L, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        ROWS: tl.constexpr = FORMAT if g_ptr.dtype.element_ty == tl.bfloat16 else "fp32"
        for start in range(0, D, 16):
            d = start + tl.arange(0, 16)
            out = match_sets_gradient(
                views, gram_ptr, columns_ptr, location, feature, scales, of_y, b, patch, d, B, D, m1, m2,
                True, EVEN, FORMAT, OPERAND_TYPE, DOT_PRECISION, EXACT_PRECISION, ROWS, BLOCK_N, 16, 4,
            )  # fmt: skip
            at = g_ptr + b * L * D + (patch[:, None] * D + d[None, :])
            tl.store(at, out, mask=(patch < L)[:, None] & (d < D)[None, :])
