"""The gradient of all three terms, of all views in one launch.

    dual     g = a (M o - vhat o) + f c        a = u_cov w_cov 4 / (V P D (N-1))
    primal   g = a o M + f c                   f = -u_var w_var [sqrt(v + eps) < gamma] / (V P D (N-1) sqrt(v + eps))
             + b (z - other)                   b = u_inv w_inv 2 / (P N D)

z (P, N, D), any strides; M (V, P, S, S); moments (4, P, V, D) or (3, ...); operand (V, P, N, D), dual only; the
gradients are contiguous (P, N, D), in their views' types.  The upstream gradients u are read on the device.
6 N D S operations a view; reads z, the other view, M and the operand, writes g.
"""

import triton
import triton.language as tl

from .rows import rounded, row_offsets


@triton.jit(do_not_specialize=["P"])
def _gradient_kernel(
    x_ptr, y_ptr, index_ptr, operand_ptr, moments_ptr, M_ptr, x_grad_ptr, y_grad_ptr,
    u_inv_ptr, u_var_ptr, u_cov_ptr,
    P, N, D, gamma, eps, k_inv, k_var, k_cov,
    x_stride_p, x_stride_n, x_stride_i, x_stride_d,
    y_stride_p, y_stride_n, y_stride_i, y_stride_d,
    VIEWS: tl.constexpr, FIRST: tl.constexpr, DUAL: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr,
    HAS_INDEX: tl.constexpr, INV: tl.constexpr, VAR: tl.constexpr, COV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows and BLOCK_D columns of one problem of one view; views from FIRST on."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0)
    v = tl.program_id(1) // P + FIRST
    p = tl.program_id(1) % P
    P = P.to(tl.int64)
    n = (tile // tiles_d) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = (tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (n < N)[:, None] & (d < D)[None, :]
    z_ptr = x_ptr
    stride_p, stride_n, stride_i, stride_d = x_stride_p, x_stride_n, x_stride_i, x_stride_d
    z_index = index_ptr
    if VIEWS == 2:
        if v == 1:
            z_ptr = y_ptr
            stride_p, stride_n, stride_i, stride_d = y_stride_p, y_stride_n, y_stride_i, y_stride_d
            if HAS_INDEX:
                z_index = index_ptr + P * N
    rows = row_offsets(p, n, N, z_index, stride_p, stride_n, stride_i, HAS_INDEX)
    columns = d.to(tl.int64) * stride_d
    z = tl.load(z_ptr + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    row = P * VIEWS * D
    at = moments_ptr + (p.to(tl.int64) * VIEWS + v) * D
    operand = operand_ptr + (v * P + p) * N * D
    if COV:
        a = tl.load(u_cov_ptr).to(tl.float32) * k_cov
        if DUAL:
            M = M_ptr + (v * P + p) * N * N + n.to(tl.int64)[:, None] * N
            for start in range(0, N, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                G = tl.load(M + k[None, :], mask=(n < N)[:, None] & (k < N)[None, :], other=0.0)
                o = tl.load(
                    operand + k.to(tl.int64)[:, None] * D + d[None, :],
                    mask=(k < N)[:, None] & (d < D)[None, :], other=0.0,
                ).to(tl.float32)  # fmt: skip
                g = tl.dot(rounded(G, ROUND), o, g, input_precision=PRECISION)
        else:
            M = M_ptr + (v * P + p) * D * D + d[None, :]
            for start in range(0, D, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                inside = (n < N)[:, None] & (k < D)[None, :]
                o = tl.load(z_ptr + rows[:, None] + k.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0)
                hi = tl.load(at + k, mask=k < D, other=0.0)
                lo = tl.load(at + row + k, mask=k < D, other=0.0)
                o = tl.where(inside, o.to(tl.float32) - hi[None, :] - lo[None, :], 0.0)
                C = tl.load(
                    M + k.to(tl.int64)[:, None] * D, mask=(k < D)[:, None] & (d < D)[None, :], other=0.0
                )
                g = tl.dot(rounded(o, ROUND), rounded(C, ROUND), g, input_precision=PRECISION)
        if DUAL:
            o = tl.load(operand + n.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
            g -= o * tl.load(at + 3 * row + d, mask=d < D, other=0.0)[None, :]
        g = g * a
    if VAR:
        hi = tl.load(at + d, mask=d < D, other=0.0)
        lo = tl.load(at + row + d, mask=d < D, other=0.0)
        std = tl.load(at + 2 * row + d, mask=d < D, other=0.0)
        if eps > 0:
            std = tl.sqrt_rn(std * std + eps)
        active = (std < gamma) & (std > 0.0)
        factor = tl.where(active, tl.load(u_var_ptr).to(tl.float32) * k_var / tl.where(active, std, 1.0), 0.0)
        g -= (z - hi[None, :] - lo[None, :]) * factor[None, :]
    if INV:
        other_ptr = y_ptr
        stride_p, stride_n, stride_i, stride_d = y_stride_p, y_stride_n, y_stride_i, y_stride_d
        if HAS_INDEX:
            z_index = index_ptr + P * N
        if v == 1:
            other_ptr = x_ptr
            stride_p, stride_n, stride_i, stride_d = x_stride_p, x_stride_n, x_stride_i, x_stride_d
            z_index = index_ptr
        rows = row_offsets(p, n, N, z_index, stride_p, stride_n, stride_i, HAS_INDEX)
        columns = d.to(tl.int64) * stride_d
        other = tl.load(other_ptr + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        g += (z - other) * (tl.load(u_inv_ptr).to(tl.float32) * k_inv)
    out = (p.to(tl.int64) * N + n)[:, None] * D + d[None, :]
    if v == 0:
        tl.store(x_grad_ptr + out, g, mask=mask)
    else:
        tl.store(y_grad_ptr + out, g, mask=mask)
