"""Gradients of chosen rows, added up where the rows were chosen from, in a fixed order.

    total[b, l] = sum of g[j, k, b] over views j and matches k with number[j, k, b] = l

g: of each view of a source, an image's rows k < m; number: the same without features; total (B, L, D).  Adding is a product
with ones and zeros, 2 L m D operations an image: no atomics.
"""

import triton
import triton.language as tl


@triton.jit
def add_rows(out, g, n, m, number_ptr, stride, patch, PRECISION: tl.constexpr):
    """out (patches, columns) with row k of g added to patch number[k * stride], for rows k = n < m.

    Zero times infinity is not zero: rows that are not finite are added one by one, in a branch that is rarely taken.
    """
    # Many in each thread, as 32 bits in half the registers.
    number = tl.load(number_ptr + n * stride, mask=n < m, other=0).to(tl.int32)
    chosen = (patch[:, None] == number[None, :]) & (n < m)[None, :]
    finite = tl.abs(g) < float("inf")
    out = tl.dot(chosen.to(tl.float32), tl.where(finite, g, 0.0), out, input_precision=PRECISION)
    if tl.sum(tl.sum((~finite).to(tl.int32), 1), 0) > 0:
        for k in range(tl.min(n, 0), tl.minimum(m, tl.max(n, 0) + 1)):
            row = tl.sum(tl.where((n == k)[:, None] & ~finite, g, 0.0), 0)
            out += tl.where((patch == tl.load(number_ptr + k * stride))[:, None], row[None, :], 0.0)
    return out


@triton.jit(do_not_specialize=["first", "step", "image_stride", "match_stride", "view_stride"])
def _scatter_backward_kernel(
    g_ptr, index_ptr, total_ptr, m, L, D, first, step, image_stride, match_stride, view_stride,
    VIEWS: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P patches and BLOCK_D columns of an image.  ADD: to what ``total`` holds.

    Of ``index`` the views first, first + step, ...; of ``g`` all.  Strides are of rows.
    """
    columns = tl.cdiv(D, BLOCK_D)
    tiles = tl.cdiv(L, BLOCK_P)
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    patch = tl.program_id(0) // columns % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (tl.program_id(0) // columns // tiles).to(tl.int64)
    view_stride = view_stride.to(tl.int64)
    inside = (patch < L)[:, None] & (d < D)[None, :]
    at = total_ptr + (b * L + patch)[:, None] * D + d[None, :]
    out = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    if ADD:
        out = tl.load(at, mask=inside, other=0.0)
    for j in range(VIEWS):
        rows = b * image_stride + j * view_stride
        numbers = index_ptr + b * image_stride + (first + j * step) * view_stride
        for top in range(0, m, BLOCK_K):
            n = top + tl.arange(0, BLOCK_K)
            g_rows = (rows + n.to(tl.int64) * match_stride) * D
            g = tl.load(
                g_ptr + g_rows[:, None] + d[None, :], mask=(n < m)[:, None] & (d < D)[None, :], other=0.0
            )
            out = add_rows(out, g, n, m, numbers, match_stride, patch, PRECISION)
    tl.store(at, out, mask=inside)
