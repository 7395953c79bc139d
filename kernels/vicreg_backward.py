"""VICReg's backward pass: the gradient of all three terms, of all views in one launch.

    dual     g = f_cov (M o - vhat o) + f_var c + f_inv (z - other)
    primal   g = f_cov o M            + f_var c + f_inv (z - other)

    f_cov = u_cov scales.cov      f_inv = u_inv scales.inv
    f_var = u_var scales.var / s where 0 < s < gamma, else 0      s = sqrt(std^2 + eps)      1 / s: hinge_slope()

u: upstream gradients, read on the device; None: that term's part is left out.  Scales: vicreg_fast/scales.py.
z (P, N, D), any strides; M (V * P, S, S), rounded to the operand's format.  Writes g once, in the type of its pointer.
2 N D S operations a view.  Letters and buffers: docs/notation.md; derivation: docs/how-it-works.md.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import exponent_scale, join_pair, round_to_format, to_storage, variance_factor
from .vicreg_moments import centred, load_operand, scaled_operand
from .vicreg_splitk import MEAN_COLUMNS
from .views import column_pointers, is_of_y, load_tile, row_offsets, select_source, zero_outside


class Upstream(NamedTuple):
    """Pointers to the upstream gradients of a loss's weighted terms; None: a term has none."""

    inv_ptr: Any
    var_ptr: Any
    cov_ptr: Any


@triton.jit
def needed_view(position, x_grad_ptr, y_grad_ptr):
    """The view that needs a gradient, by its position among all views, x's views (0 and 3), or y's (1 and 2)."""
    if y_grad_ptr is None:
        return 3 * position
    if x_grad_ptr is None:
        return 1 + position
    return position


@triton.jit
def _halves(g, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns of a tile."""
    return tl.split(tl.permute(tl.reshape(g, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _mean_product(parts_ptr, step, d, D):
    """m C0 in columns d, from its parts, ``step`` elements apart."""
    PARTS: tl.constexpr = 16  # at a time
    product = tl.zeros((PARTS, d.shape[0]), tl.float32)
    for start in range(0, D, PARTS * MEAN_COLUMNS):
        part = start // MEAN_COLUMNS + tl.arange(0, PARTS)
        mask = (part * MEAN_COLUMNS < D)[:, None] & (d < D)[None, :]
        product += tl.load(parts_ptr + part[:, None] * step + d[None, :], mask=mask, other=0.0)
    return tl.sum(product, 0)


@triton.jit
def _covariance_matmul(
    views, source, operand_ptr, hi_ptr, lo_ptr, M_ptr, v, p, rows, n, d, P, N, D,
    VIEWS: tl.constexpr, DUAL: tl.constexpr, EVEN: tl.constexpr, UNCHANGED: tl.constexpr, FORMAT: tl.constexpr,
    DOT_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """M o (dual), o M or, UNCHANGED, z M (primal) in rows n and columns d, as they are stored."""
    PAIR: tl.constexpr = FORMAT == "scaled_fp16_pair"
    g = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    g_low = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if DUAL:
        # float16 operands are halves, see round_to_format(), and their M is float32.
        SCALE: tl.constexpr = 2.0 if FORMAT == "fp16" else 1.0
        M = M_ptr + (v * P + p) * N * N + n.to(tl.int64)[:, None] * N
        for start in range(0, N, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            G = load_tile(M + k[None, :], (n < N)[:, None] & (k < N)[None, :], EVEN)
            if operand_ptr is None:
                k_rows = row_offsets(source, views.index_ptr, v, p, k, P, N)
                o = to_storage(load_operand(source, k_rows, k, N, d, D, hi_ptr, lo_ptr, FORMAT), FORMAT)
            else:
                at = operand_ptr + (v * P + p) * N * D + k.to(tl.int64)[:, None] * D + d[None, :]
                o = load_tile(at, (k < N)[:, None] & (d < D)[None, :], EVEN)
            g = tl.dot(G, o.to(G.dtype), g, input_precision=DOT_PRECISION)
            if PAIR:
                o_low = load_tile(at + VIEWS * P * N * D, (k < N)[:, None] & (d < D)[None, :], EVEN)
                g_low = tl.dot(G, o_low, g_low, input_precision=DOT_PRECISION)
                G_low = load_tile(M + VIEWS * P * N * N + k[None, :], (n < N)[:, None] & (k < N)[None, :], EVEN)
                g_low = tl.dot(G_low, o, g_low, input_precision=DOT_PRECISION)
        if PAIR:
            g = join_pair(g, g_low)
        g *= SCALE
    else:
        # C is symmetric: read along k, as TF32 matmuls on compute capability 9.0 want it.
        M = M_ptr + (v * P + p) * D * D + d.to(tl.int64)[None, :] * D
        # c C0 = z C0 - m C0.  bfloat16 rows are multiplied unchanged, straight from memory, which is more exact than c
        # rounded to bfloat16: |m| is rarely more than 2^8 deviations, which z could not tell apart, and sums are float32.
        # The forward pass has stored m C0.
        for start in range(0, D, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            C = load_tile(M + k[:, None], (k < D)[:, None] & (d < D)[None, :], EVEN)
            if UNCHANGED:
                z = load_tile(
                    column_pointers(source, k)[None, :] + rows[:, None],
                    (n < N)[:, None] & (k < D)[None, :],
                    EVEN,
                )
                g = tl.dot(z.to(C.dtype), C, g, input_precision=DOT_PRECISION)
            else:
                o = load_operand(source, rows, n, N, k, D, hi_ptr, lo_ptr, FORMAT)
                g = tl.dot(o.to(C.dtype), C, g, input_precision=DOT_PRECISION)
    return g


@triton.jit
def _complete(
    g, f_cov, source, rows, other_source, other_rows, n, d, N, D, moments, step, upstream, scales,
    DUAL: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """g, f_cov times the matmul, plus all other parts of the gradient, for rows n and columns d.

    moments: those of this view; step: between two of them.  A scaled operand's columns are still divided by their scale.
    """
    mask = (n < N)[:, None] & (d < D)[None, :]
    z = load_tile(column_pointers(source, d)[None, :] + rows[:, None], mask, EVEN).to(tl.float32)
    if upstream.var_ptr is not None or (upstream.cov_ptr is not None and DUAL):
        hi = tl.load(moments + d, mask=d < D, other=0.0)
        lo = tl.load(moments + step + d, mask=d < D, other=0.0)
        # Outside, where z is zero, c would be the mean, which may not fit float16.
        c = zero_outside(centred(z, hi, lo, source.ptr.dtype.element_ty, FORMAT), mask, EVEN)
    if upstream.cov_ptr is not None and DUAL:
        # The operand is recomputed from z: cheaper than reading it.
        operand_v = tl.load(moments + 3 * step + d, mask=d < D, other=0.0)
        if FORMAT == "scaled_fp16" or FORMAT == "scaled_fp16_pair":
            scale = tl.load(moments + 4 * step + d, mask=d < D, other=1.0)
            g *= scale[None, :]
        if FORMAT == "scaled_fp16":
            _, inverse = exponent_scale(scale)
            _, _, o = scaled_operand(c, scale, inverse, FORMAT)
        else:
            o = round_to_format(c, FORMAT)  # of a pair c itself, to 2^-23
        g -= o * (f_cov * operand_v)[None, :]
    if upstream.var_ptr is not None:
        slope = tl.load(moments + 2 * step + d, mask=d < D, other=0.0)
        u = tl.load(upstream.var_ptr).to(tl.float32) * scales.var
        g = tl.fma(c, variance_factor(slope, u)[None, :], g)
    if upstream.inv_ptr is not None:
        other = load_tile(column_pointers(other_source, d)[None, :] + other_rows[:, None], mask, EVEN).to(
            tl.float32
        )
        g = tl.fma(z - other, tl.load(upstream.inv_ptr).to(tl.float32) * scales.inv, g)
    return g


@triton.jit(do_not_specialize=["P"])
def _gradient_kernel(
    views, operand_ptr, moments_ptr, M_ptr, M_scale_ptr, x_grad_ptr, y_grad_ptr, upstream, scales, P, N, D,
    VIEWS: tl.constexpr, DUAL: tl.constexpr, EVEN: tl.constexpr, UNCHANGED: tl.constexpr, FORMAT: tl.constexpr,
    DOT_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows and BLOCK_D columns of one problem of one view that needs a gradient.

    x_grad_ptr, y_grad_ptr: (views of the source, P, N, D), contiguous; None: the source needs none.  So there are three
    variants: both sources, x alone, y alone.  EVEN: all blocks are full.  UNCHANGED: on the primal
    side rows are multiplied as they are.  Tiles are visited in groups GROUP rows high, so that programs that run
    together share rows and columns in the L2 cache.
    """
    # About as high as wide, on a device that runs a hundred programs at a time.
    GROUP: tl.constexpr = 8
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_d = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0) % (tiles_n * tiles_d)
    problem = tl.program_id(0) // (tiles_n * tiles_d)
    v = needed_view(problem // P, x_grad_ptr, y_grad_ptr)
    p = problem % P
    group = tile // (GROUP * tiles_d)
    height = tl.minimum(tiles_n - group * GROUP, GROUP)
    in_group = tile % (GROUP * tiles_d)
    n = (group * GROUP + in_group % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    d0 = in_group // height * BLOCK_D
    P = P.to(tl.int64)
    source = select_source(views, v)
    other_source = select_source(views, v ^ 1)
    rows = row_offsets(source, views.index_ptr, v, p, n, P, N)
    other_rows = rows
    if upstream.inv_ptr is not None:
        other_rows = row_offsets(other_source, views.index_ptr, v ^ 1, p, n, P, N)
    step = P * VIEWS * D  # of moments: one of its rows, (P, V, D)
    moments = moments_ptr + (p.to(tl.int64) * VIEWS + v) * D
    g = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    f_cov = 0.0
    if upstream.cov_ptr is not None:
        f_cov = tl.load(upstream.cov_ptr).to(tl.float32) * scales.cov
        g = _covariance_matmul(
            views, source, operand_ptr, moments, moments + step, M_ptr, v, p, rows, n,
            d0 + tl.arange(0, BLOCK_D), P, N, D, VIEWS, DUAL, EVEN, UNCHANGED, FORMAT, DOT_PRECISION, BLOCK_N, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        if UNCHANGED and not DUAL:
            d = d0 + tl.arange(0, BLOCK_D)
            g = tl.fma(g, f_cov, (_mean_product(moments + 3 * step, step, d, D) * -f_cov)[None, :])
        else:
            g *= f_cov if M_scale_ptr is None else f_cov * tl.load(M_scale_ptr + v * P + p)
    g_ptr = y_grad_ptr if x_grad_ptr is None else x_grad_ptr
    if x_grad_ptr is not None and y_grad_ptr is not None:
        if is_of_y(v):
            g_ptr = y_grad_ptr
    g_rows = ((v // 2 * P + p) * N + n) * D
    # A quarter of the columns at a time if a tile is large: it, z and the other view would not fit the registers.  An eighth
    # where operands pass through registers and the tile is even larger.
    QUARTERS: tl.constexpr = 4 if BLOCK_N * BLOCK_D > 4096 else 1
    HALVES: tl.constexpr = 2 if BLOCK_N * BLOCK_D > 16384 and not UNCHANGED else 1
    PIECE: tl.constexpr = BLOCK_D // (QUARTERS * HALVES)
    if QUARTERS == 4:
        left, right = _halves(g, BLOCK_N, BLOCK_D)
        g0, g1 = _halves(left, BLOCK_N, BLOCK_D // 2)
        g2, g3 = _halves(right, BLOCK_N, BLOCK_D // 2)
    for piece in tl.static_range(QUARTERS * HALVES):
        h = g
        if QUARTERS == 4:
            h = g0 if piece < HALVES else g1 if piece < 2 * HALVES else g2 if piece < 3 * HALVES else g3
        if HALVES == 2:
            left, right = _halves(h, BLOCK_N, BLOCK_D // 4)
            h = left if piece % 2 == 0 else right
        d = d0 + piece * PIECE + tl.arange(0, PIECE)
        h = _complete(
            h, f_cov, source, rows, other_source, other_rows, n, d, N, D, moments, step, upstream, scales,
            DUAL, EVEN, FORMAT,
        )  # fmt: skip
        at = g_ptr + g_rows[:, None] + d[None, :]
        if EVEN:
            tl.store(at, h)
        else:
            tl.store(at, h, mask=(n < N)[:, None] & (d < D)[None, :])
