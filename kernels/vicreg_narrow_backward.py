"""VICReg's backward pass where all features fit one tile: long columns, which are bound by bytes.

    g = f_cov o C0 + f_var c + f_inv (z - other)

Factors and letters as in vicreg_backward.py, primal side.  A program keeps C0 and the columns' factors of one view, and walks
down its rows.  Each gradient is written once; z and the other view are read once by the programs of either view, which are
neighbours: one of the two reads comes from the cache.  Both views in one program would not fit its registers.
x, y: (P, N, D), any strides, no index.  2 N D^2 operations a view.  Buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .numerics import round_to_format, variance_factor
from .vicreg_backward import needed_view
from .views import column_pointers, load_rows, row_offsets, select_source


@triton.jit(do_not_specialize=["P", "chunks", "chunk_length"])
def _narrow_gradient_kernel(
    views, moments_ptr, M_ptr, x_grad_ptr, y_grad_ptr, upstream, scales, P, N, D, chunks, chunk_length,
    VIEWS: tl.constexpr, FORMAT: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: ``chunk_length`` rows of one problem of one view that needs a gradient, BLOCK_N at a time.

    x_grad_ptr, y_grad_ptr: (P, N, D), contiguous; None: the source needs none.
    """
    NEEDED: tl.constexpr = (0 if x_grad_ptr is None else 1) + (0 if y_grad_ptr is None else 1)
    v = needed_view(tl.program_id(0) % NEEDED, x_grad_ptr, y_grad_ptr)
    chunk = tl.program_id(0) // NEEDED % chunks
    p = tl.program_id(0) // NEEDED // chunks
    start = chunk * chunk_length
    end = tl.minimum(start + chunk_length, N)
    d = tl.arange(0, BLOCK_D)
    source = select_source(views, v)
    other_source = select_source(views, v ^ 1)
    columns = column_pointers(source, d)
    other_columns = column_pointers(other_source, d)
    # Of moments: hi, lo and slope, (P, V, D) each.
    at = moments_ptr + (p.to(tl.int64) * VIEWS + v) * D + d
    step = P.to(tl.int64) * VIEWS * D
    hi = tl.load(at, mask=d < D, other=0.0)
    lo = tl.load(at + step, mask=d < D, other=0.0)
    f_var = tl.zeros_like(hi)
    if upstream.var_ptr is not None:
        slope = tl.load(at + 2 * step, mask=d < D, other=0.0)
        f_var = variance_factor(slope, tl.load(upstream.var_ptr).to(tl.float32) * scales.var)
    f_inv = 0.0
    if upstream.inv_ptr is not None:
        f_inv = tl.load(upstream.inv_ptr).to(tl.float32) * scales.inv
    if upstream.cov_ptr is not None:
        f_cov = tl.load(upstream.cov_ptr).to(tl.float32) * scales.cov
        # C0 is symmetric: read along k, as TF32 matmuls on compute capability 9.0 want it.
        M = M_ptr + (v * P + p).to(tl.int64) * D * D + d[None, :] * D + d[:, None]
        C = tl.load(M, mask=(d < D)[:, None] & (d < D)[None, :], other=0.0)
    g_ptr = y_grad_ptr if x_grad_ptr is None else x_grad_ptr
    if NEEDED == 2:
        g_ptr = tl.where(v == 1, y_grad_ptr, x_grad_ptr)
    g_ptr += (p.to(tl.int64) * N + start) * D
    for top in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        n = top + tl.arange(0, BLOCK_N)
        mask = (n < end)[:, None] & (d < D)[None, :]
        z = load_rows(columns, row_offsets(source, None, v, p, n, P, N), mask)
        c = z - hi[None, :] - lo[None, :]
        g = c * f_var[None, :]
        if upstream.cov_ptr is not None:
            g += tl.dot(round_to_format(c, FORMAT).to(C.dtype), C, input_precision=DOT_PRECISION) * f_cov
        if upstream.inv_ptr is not None:
            other = load_rows(other_columns, row_offsets(other_source, None, v, p, n, P, N), mask)
            g += (z - other) * f_inv
        tl.store(g_ptr + (n - start)[:, None] * D + d[None, :], g, mask=mask)
