"""The gradient of VICRegL's per-image statistics on the dual side by matmuls of patches, not of matches.

    g = sum over match sets s of   n_s w_s (x - mean_s)                  w_s = f_var,s slope_s - f_cov,s vhat_s
      + sum over kinds k of        f_inv,k (n_k x - pairs_k y)
      + own (x - centre)           own = sum over s of f_cov,s P_s' G_s P_s

P_s: zeros and ones, which patch match k of set s is; n_s: how many matches a patch has in it; pairs_k: how often patches of x and
y are matched with each other.  L: the patches, all of a small image or those that have a match.  In vicregl.py's formula each
match has a row of its own; here those of all match sets are added up before they are multiplied: 3 L^2 D multiplications an
image and source, one row a patch instead of four a match, and no scatter.

Rows of G add up to zero, so that own's centre is arbitrary: the first set's mean.  With the same centre the first sum of a 16-bit
gradient is x' a - b, x' = x - centre, a = sum of n_s w_s and b = sum of n_s w_s (mean_s - centre), of one matmul each.
Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .numerics import divide, operand_of, round_to_format, widened
from .patch_matrices import (
    dot,
    kind_pairs,
    matmul_parts,
    matmul_selected,
    own_matrix,
    patches,
    store_list,
    store_parts,
    store_read_patches,
    top_half,
)
from .vicregl import gram_set_offset, match_sets_gradient
from .views import column_pointers, select_source


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
def _store_zeros(g_ptr, patch, L, D, BLOCK_D: tl.constexpr):
    """Zeros in the gradient of an image's patches that are not in the list ``patch``."""
    for first in range(0, L, 32):
        row = first + tl.arange(0, 32)
        listed = tl.sum((patch[:, None] == row[None, :]).to(tl.int32), 0) > 0
        free = (row < L) & ~listed
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            zeros = tl.zeros((32, BLOCK_D), g_ptr.dtype.element_ty)
            tl.store(g_ptr + (row[:, None] * D + d[None, :]), zeros, mask=free[:, None] & (d < D)[None, :])


@triton.jit
def _matmul_pairs(pairs, y, acc):
    """acc + pairs y, as the numbers are."""
    if y.dtype == tl.float32:
        return matmul_selected(pairs, y, acc, 3)
    else:
        return dot(pairs.to(y.dtype), y, acc)


@triton.jit
def _load_patches(source, row_ptr, b, d, D, EVEN: tl.constexpr):
    """A tile (patches, columns) of an image; row_ptr: the patches, which are indices."""
    columns = column_pointers(source, d) + b * source.stride_p
    rows = tl.load(row_ptr) * source.stride_i
    if EVEN:
        return tl.load(columns[None, :] + rows[:, None])
    return tl.load(columns[None, :] + rows[:, None], mask=(d < D)[None, :], other=0.0)


@triton.jit
def _load_column(ptr, d, D, EVEN: tl.constexpr):
    """Numbers of columns d."""
    if EVEN:
        return tl.load(ptr + d)
    return tl.load(ptr + d, mask=d < D, other=0.0)


@triton.jit
def _load_columns_of_sets(pointers, d, D, EVEN: tl.constexpr):
    """Numbers of columns d (rows of the tile) in each match set."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _part(a, part, TYPE: tl.constexpr):
    """One of the three bfloat16 that add up to a float32, by number; 0 for the fourth."""
    high, a = top_half(a, TYPE)
    middle, low = top_half(a, TYPE)
    a = tl.where(part == 0, high, middle.to(TYPE))
    return tl.where(part < 2, a, tl.where(part == 2, low, 0.0).to(TYPE))


@triton.jit
def _columns_terms(of_image, f_var, f_cov, of_y, d, D, TYPE: tl.constexpr, EVEN: tl.constexpr):
    """(w_s, -w_s (mean_s - centre), centre) of columns d; centre: the mean of the first set, which cancels.

    The first two (columns, 16), for a matmul: column k has part k // 4 of match set k % 4.
    """
    k = tl.arange(0, 16)
    s = k % 4
    first_set = of_image + of_y * 4 * D
    centre = _load_column(first_set + 3 * D, d, D, EVEN) + _load_column(first_set, d, D, EVEN)
    of_set = (s * 2 + ((s % 2) ^ of_y)) * 4 * D
    at = of_set[:, None] + d[None, :]
    set_lo = _load_columns_of_sets(of_image + at, d, D, EVEN)
    operand_v = _load_columns_of_sets(of_image + (at + D), d, D, EVEN)
    slope = _load_columns_of_sets(of_image + (at + 2 * D), d, D, EVEN)
    set_z_0 = _load_columns_of_sets(of_image + (at + 3 * D), d, D, EVEN)
    f_v = tl.where(s > 1, f_var[1], f_var[0])
    f_c = tl.where(s > 1, f_cov[1], f_cov[0])
    w = tl.fma(operand_v, -f_c[:, None], slope * f_v[:, None])
    mean = (set_z_0 - centre[None, :]) + set_lo
    part = (k // 4)[:, None]
    return _part(w, part, TYPE), _part(-w * mean, part, TYPE), centre


@triton.jit
def _exact_columns_terms(
    x, of_image, own_numbers, f_var, f_cov, of_y, d, D, EVEN: tl.constexpr, BLOCK_L: tl.constexpr
):
    """Sum over match sets of n_s w_s (x - mean_s), each set's rows centred by themselves.

    A loop, not unrolled: all sets' pointers to columns would not fit the registers.
    """
    out = tl.zeros(x.shape, tl.float32)
    for s in range(4):
        of_set = of_image + (s * 2 + ((s % 2) ^ of_y)) * 4 * D
        lo = _load_column(of_set, d, D, EVEN)
        operand_v = _load_column(of_set + D, d, D, EVEN)
        slope = _load_column(of_set + 2 * D, d, D, EVEN)
        z_0 = _load_column(of_set + 3 * D, d, D, EVEN)
        w = tl.fma(operand_v, -tl.where(s > 1, f_cov[1], f_cov[0]), slope * tl.where(s > 1, f_var[1], f_var[0]))
        c = tl.fma(x - z_0[None, :], w[None, :], -(w * lo)[None, :])
        out = tl.fma(c, tl.load(own_numbers + s * BLOCK_L)[:, None], out)
    return out


@triton.jit
def _finite_image_gradient(
    views, gram_ptr, columns_ptr, own_numbers, matrices_ptr, g_ptr, inv, var, cov, of_y, b, B, L, D, m1, m2,
    LISTED: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr, PARTS: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the gradient of one image of a source.  own_numbers, matrices_ptr: this program's."""
    PART_TYPE: tl.constexpr = matrices_ptr.dtype.element_ty
    position = tl.arange(0, BLOCK_L)
    row_ptr = (own_numbers + 6 * BLOCK_L).to(tl.pointer_type(tl.int32))
    list_ptr = row_ptr + 2 * BLOCK_L
    g_ptr += b * L * D
    if LISTED:
        store_list(views, list_ptr, row_ptr, of_y, b, B, m1, m2, BLOCK_N)
        store_list(views, list_ptr + BLOCK_L, row_ptr + BLOCK_L, 1 - of_y, b, B, m1, m2, BLOCK_N)
        tl.debug_barrier()
        _store_zeros(g_ptr, patches(list_ptr, BLOCK_L, LISTED), L, D, 4 * BLOCK_D)
    own, matched = own_matrix(
        views, gram_ptr, own_numbers, cov, of_y, b, B, m1, m2, patches(list_ptr, BLOCK_L, LISTED),
        PART_TYPE, PARTS, BLOCK_N,
    )  # fmt: skip
    matrices_ptr += position[:, None] * BLOCK_L + position[None, :]
    own_ptr = matrices_ptr + 2 * BLOCK_L * BLOCK_L
    store_parts(own_ptr, round_to_format(own, FORMAT), PARTS)
    other_matches = tl.zeros((BLOCK_L,), tl.float32)
    for kind in tl.static_range(2):
        pairs = kind_pairs(views, kind, of_y, b, B, m1, m2, list_ptr, PART_TYPE, LISTED, BLOCK_L, BLOCK_N)
        tl.store(matrices_ptr + kind * BLOCK_L * BLOCK_L, -pairs)
        other_matches += tl.sum(pairs, 0)
    if not LISTED:
        store_read_patches(views, row_ptr, position, matched, of_y, b, B, m1)
        store_read_patches(views, row_ptr + BLOCK_L, position, other_matches > 0, 1 - of_y, b, B, m1)
    tl.debug_barrier()
    source = select_source(views, of_y)
    other_source = select_source(views, 1 - of_y)
    inverse_degrees = divide(1.0, m1 - 1)
    f_inv = (divide(inv[0], m1), divide(inv[1], m1))
    f_var = (var[0] * inverse_degrees, var[1] * inverse_degrees)
    f_cov = (cov[0] * inverse_degrees, cov[1] * inverse_degrees)
    columns_ptr += b * 32 * D
    own_numbers += position
    row_ptr += position
    set_of = tl.arange(0, 16) % 4
    counts = tl.load(own_numbers[:, None] + (set_of * BLOCK_L)[None, :]).to(PART_TYPE)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = widened(_load_patches(source, row_ptr, b, d, D, EVEN), PTX)
        zero = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
        # Where a match set's column is nearly constant, its w is large, and c w - b loses digits that a 16-bit gradient lacks.
        if g_ptr.dtype.element_ty == tl.float32:
            first_set = columns_ptr + of_y * 4 * D
            centre = _load_column(first_set + 3 * D, d, D, EVEN) + _load_column(first_set, d, D, EVEN)
            c = x - centre[None, :]
            out = _exact_columns_terms(x, columns_ptr, own_numbers, f_var, f_cov, of_y, d, D, EVEN, BLOCK_L)
        else:
            w, of_means, centre = _columns_terms(columns_ptr, f_var, f_cov, of_y, d, D, PART_TYPE, EVEN)
            c = x - centre[None, :]
            out = dot(counts, of_means, c * dot(counts, w, zero))
        stored, o = operand_of(c, FORMAT, PTX)
        out = matmul_parts(own_ptr, stored if PARTS == 1 else o, out, PARTS)
        y = _load_patches(other_source, row_ptr + BLOCK_L, b, d, D, EVEN)
        for k in range(2):
            of_kind = tl.load(matrices_ptr + k * BLOCK_L * BLOCK_L)
            partners = _matmul_pairs(of_kind, y, zero)
            count = tl.load(own_numbers + (4 + k) * BLOCK_L)
            difference = tl.fma(x, count[:, None], partners)
            out = tl.fma(difference, tl.where(k == 1, f_inv[1], f_inv[0]), out)
        stored = position
        inside = position < L
        if LISTED:
            stored = tl.load(row_ptr)
            inside = tl.load(own_numbers + 4 * BLOCK_L) + tl.load(own_numbers + 5 * BLOCK_L) > 0
        mask = inside[:, None] if EVEN else inside[:, None] & (d < D)[None, :]
        tl.store(g_ptr + (stored[:, None] * D + d[None, :]), out, mask=mask)


@triton.jit(do_not_specialize=["B", "m1", "m2"])
def _vicregl_image_gradient_kernel(
    views, gram_ptr, columns_ptr, patch_numbers_ptr, matrices_ptr, x_grad_ptr, y_grad_ptr,
    location, feature, scales, B, L1, L2, D, m1, m2,
    EVEN: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    EXACT_PRECISION: tl.constexpr, LISTED: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of one image of x or of y, BLOCK_D columns at a time.  Both directions have m1 = m2 matches.

    LISTED: BLOCK_L is four times BLOCK_N, and patches without a match get zeros by themselves; else BLOCK_L is no less than L.
    x_grad_ptr, y_grad_ptr None: the source needs no gradient.  location, feature: Upstream of vicreg_backward.py.
    patch_numbers_ptr (programs, 10, BLOCK_L), matrices_ptr (programs, 2 + PARTS, BLOCK_L, BLOCK_L): what a program writes for itself;
    registers would not hold it.
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
    inv = (_scaled(location.inv_ptr, scales.inv), _scaled(feature.inv_ptr, scales.inv))
    var = (_scaled(location.var_ptr, scales.var), _scaled(feature.var_ptr, scales.var))
    cov = (_scaled(location.cov_ptr, scales.cov), _scaled(feature.cov_ptr, scales.cov))
    total = tl.abs(inv[0]) + tl.abs(inv[1]) + tl.abs(var[0]) + tl.abs(var[1]) + tl.abs(cov[0]) + tl.abs(cov[1])
    finite = _is_finite(gram_ptr, total, b, B, m1, m2, BLOCK_N)
    own_numbers = patch_numbers_ptr + program.to(tl.int64) * 10 * BLOCK_L
    matrices_ptr += program.to(tl.int64) * (2 + PARTS) * BLOCK_L * BLOCK_L
    if finite:
        _finite_image_gradient(
            views, gram_ptr, columns_ptr, own_numbers, matrices_ptr, g_ptr, inv, var, cov, of_y, b, B, L, D, m1, m2,
            LISTED, EVEN, FORMAT, PARTS, PTX, BLOCK_L, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        ROWS: tl.constexpr = FORMAT if g_ptr.dtype.element_ty == tl.bfloat16 else "fp32"
        for first in range(0, L, BLOCK_L):
            patch = first + tl.arange(0, BLOCK_L)
            for start in range(0, D, 16):
                d = start + tl.arange(0, 16)
                out = match_sets_gradient(
                    views, gram_ptr, columns_ptr, location, feature, scales, of_y, b, patch, d, B, D, m1, m2,
                    True, EVEN, FORMAT, OPERAND_TYPE, DOT_PRECISION, EXACT_PRECISION, ROWS, BLOCK_N, 16, 4,
                )  # fmt: skip
                at = g_ptr + b * L * D + (patch[:, None] * D + d[None, :])
                tl.store(at, out, mask=(patch < L)[:, None] & (d < D)[None, :])
