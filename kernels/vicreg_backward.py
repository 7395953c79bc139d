"""The gradient of all three terms, of all views in one launch.

    dual     g = a (M o - vhat o) + f c        a = u_cov w_cov 4 / (V P D (N-1))
    primal   g = a o M + f c                   f = -u_var w_var [sqrt(v + eps) < gamma] / (V P D (N-1) sqrt(v + eps))
             + b (z - other)                   b = u_inv w_inv 2 / (pairs P N D)

z (P, N, D), any strides, rows by index if wanted; M (V * P, S, S), on the operand's grid; moments (4, P, V, D) or (3, ...);
operand (V, P, N, D), dual only; of rows by number it is made here.  The gradients of a source's views are contiguous (views of the source, P, N, D), in the
type of their pointer.  The upstream gradients u are read on the device.
2 N D S operations a view; reads z, the other view, M and the operand, writes g.
"""

import triton
import triton.language as tl

from .rows import column_offsets, is_of_y, load_operand, load_rows, rounded, row_offsets, stored, view_of


@triton.jit
def _halves(g, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns of a tile."""
    return tl.split(tl.permute(tl.reshape(g, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["P", "first", "step"])
def _gradient_kernel(
    x_ptr, y_ptr, index_ptr, operand_ptr, moments_ptr, M_ptr, x_grad_ptr, y_grad_ptr,
    u_inv_ptr, u_var_ptr, u_cov_ptr,
    P, N, D, first, step, gamma, eps, k_inv, k_var, k_cov,
    x_stride_p, x_stride_n, x_stride_i, x_stride_d, y_stride_p, y_stride_n, y_stride_i, y_stride_d,
    VIEWS: tl.constexpr, HAS_INDEX: tl.constexpr, DUAL: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr,
    INV: tl.constexpr, VAR: tl.constexpr, COV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows and BLOCK_D columns of one problem of one of the views first, first + step, ...

    Programs that run together are GROUP tiles high: they share rows and columns, and find them in the cache.
    """
    # About as high as wide, on a chip with a hundred programs at a time.
    GROUP: tl.constexpr = 8
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_d = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0) % (tiles_n * tiles_d)
    problem = tl.program_id(0) // (tiles_n * tiles_d)
    v = first + (problem // P) * step
    p = problem % P
    group = tile // (GROUP * tiles_d)
    height = tl.minimum(tiles_n - group * GROUP, GROUP)
    in_group = tile % (GROUP * tiles_d)
    n = (group * GROUP + in_group % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    d0 = in_group // height * BLOCK_D
    P = P.to(tl.int64)
    d = d0 + tl.arange(0, BLOCK_D)
    z_ptr, z_index, stride_p, stride_n, stride_i, stride_d = view_of(
        v, P, N, x_ptr, y_ptr, index_ptr, x_stride_p, x_stride_n, x_stride_i, x_stride_d,
        y_stride_p, y_stride_n, y_stride_i, y_stride_d, HAS_INDEX,
    )  # fmt: skip
    rows = row_offsets(p, n, N, z_index, stride_p, stride_n, stride_i, HAS_INDEX)
    g = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    row = P * VIEWS * D  # of moments
    at = moments_ptr + (p.to(tl.int64) * VIEWS + v) * D
    if COV:
        a = tl.load(u_cov_ptr).to(tl.float32) * k_cov
        if DUAL:
            # float16 operands are halves, see rounded(), and their M is float32.
            SCALE: tl.constexpr = 2.0 if ROUND == "fp16" else 1.0
            operand = operand_ptr + (v * P + p) * N * D
            M = M_ptr + (v * P + p) * N * N + n.to(tl.int64)[:, None] * N
            for start in range(0, N, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                G = tl.load(M + k[None, :], mask=(n < N)[:, None] & (k < N)[None, :], other=0.0)
                if HAS_INDEX:
                    chosen = row_offsets(p, k, N, z_index, stride_p, stride_n, stride_i, True)
                    o = stored(load_operand(z_ptr, chosen, k, N, d, D, stride_d, at, at + row, ROUND), ROUND)
                else:
                    o = tl.load(
                        operand + k.to(tl.int64)[:, None] * D + d[None, :],
                        mask=(k < N)[:, None] & (d < D)[None, :], other=0.0,
                    )  # fmt: skip
                g = tl.dot(G, o.to(G.dtype), g, input_precision=PRECISION)
            g *= a * SCALE
        else:
            # C is symmetric: read along k, as TF32 products on compute capability 9.0 want it.
            M = M_ptr + (v * P + p) * D * D + d.to(tl.int64)[None, :] * D
            for start in range(0, D, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                o = load_operand(z_ptr, rows, n, N, k, D, stride_d, at, at + row, ROUND)
                C = tl.load(M + k[:, None], mask=(k < D)[:, None] & (d < D)[None, :], other=0.0)
                g = tl.dot(o.to(C.dtype), C, g, input_precision=PRECISION)
            g *= a
    o_ptr, o_index, o_stride_p, o_stride_n, o_stride_i, o_stride_d = view_of(
        v ^ 1, P, N, x_ptr, y_ptr, index_ptr, x_stride_p, x_stride_n, x_stride_i, x_stride_d,
        y_stride_p, y_stride_n, y_stride_i, y_stride_d, HAS_INDEX and INV,
    )  # fmt: skip
    o_rows = row_offsets(p, n, N, o_index, o_stride_p, o_stride_n, o_stride_i, HAS_INDEX and INV)
    g_ptr = x_grad_ptr
    if is_of_y(v):
        g_ptr = y_grad_ptr
    g_rows = ((v // 2 * P + p) * N + n) * D
    # A quarter of the columns at a time where a tile is large: it, z and the other view would not fit the registers.
    PIECES: tl.constexpr = 4 if BLOCK_N * BLOCK_D > 4096 else 1
    PIECE: tl.constexpr = BLOCK_D // PIECES
    if PIECES == 4:
        left, right = _halves(g, BLOCK_N, BLOCK_D)
        a0, a1 = _halves(left, BLOCK_N, BLOCK_D // 2)
        a2, a3 = _halves(right, BLOCK_N, BLOCK_D // 2)
    for piece in tl.static_range(PIECES):
        h = g if PIECES == 1 else a0 if piece == 0 else a1 if piece == 1 else a2 if piece == 2 else a3
        d = d0 + piece * PIECE + tl.arange(0, PIECE)
        mask = (n < N)[:, None] & (d < D)[None, :]
        z = load_rows(z_ptr + column_offsets(d, stride_d), rows, mask)
        if VAR or (COV and DUAL):
            hi = tl.load(at + d, mask=d < D, other=0.0)
            lo = tl.load(at + row + d, mask=d < D, other=0.0)
            c = z - hi[None, :] - lo[None, :]
        if COV and DUAL:
            # The operand again, from what it was made of: cheaper than reading it.
            h -= rounded(c, ROUND) * (a * tl.load(at + 3 * row + d, mask=d < D, other=0.0))[None, :]
        if VAR:
            std = tl.load(at + 2 * row + d, mask=d < D, other=0.0)
            if eps > 0:
                std = tl.sqrt_rn(std * std + eps)
            active = (std < gamma) & (std > 0.0)
            u = tl.load(u_var_ptr).to(tl.float32) * k_var
            h -= c * tl.where(active, u / tl.where(active, std, 1.0), 0.0)[None, :]
        if INV:
            other = load_rows(o_ptr + column_offsets(d, o_stride_d), o_rows, mask)
            h += (z - other) * (tl.load(u_inv_ptr).to(tl.float32) * k_inv)
        tl.store(g_ptr + g_rows[:, None] + d[None, :], h, mask=mask)
