"""Gradients of gathered rows, added up at the rows of the source that they were gathered from, in a fixed order.

    total[b, l] = sum of g[j, k, b] over views j and matches k with index[j, k, b] = l

g: gradients of an image's matches k < m, for each view of a source; total (B, L, D).  The sum is a matmul with zeros and
ones, 2 L m D operations an image and view, without atomics.  Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .numerics import split_in_two


@triton.jit
def add_rows(out, g, n, m, index_ptr, stride, patch, FORMAT: tl.constexpr, DOT_PRECISION: tl.constexpr):
    """out (patches, columns) with row k of g added to patch index[k * stride], for the rows k = n < m.

    g's rows from m on are ignored.  FORMAT: of the result's gradient, "bf16" or any other.  DOT_PRECISION: Triton's name of a
    matmul that is accurate to float32.  Zeros and ones need no rounding, so g in two parts is enough for that.
    0 * inf is NaN, so where a row is not finite the rows are added one by one, in a branch that is rarely taken.
    """
    # 32 bits: each thread holds many, in half the registers of int64.
    index = tl.load(index_ptr + n * stride, mask=n < m, other=-1).to(tl.int32)
    if tl.sum(tl.sum(g * 0.0, 1), 0) != 0.0:
        for k in range(tl.min(n, 0), tl.minimum(m, tl.max(n, 0) + 1)):
            row = tl.sum(tl.where((n == k)[:, None], g, 0.0), 0)
            out += tl.where((patch == tl.load(index_ptr + k * stride))[:, None], row[None, :], 0.0)
        g = tl.zeros_like(g)
    chosen = patch[:, None] == index[None, :]
    if FORMAT == "bf16":
        high = g.to(tl.bfloat16)
        low = (g - high.to(tl.float32)).to(tl.bfloat16)
        ones = chosen.to(tl.bfloat16)
        return tl.dot(ones, low, tl.dot(ones, high, out))
    ones = chosen.to(tl.float32)
    if DOT_PRECISION == "tf32x3":
        high, low = split_in_two(g)
        out = tl.dot(ones, high, out, input_precision="tf32")
        return tl.dot(ones, low, out, input_precision="tf32")
    return tl.dot(ones, g, out, input_precision=DOT_PRECISION)


@triton.jit(do_not_specialize=["first_view", "view_step", "image_stride", "match_stride", "view_stride"])
def _scatter_backward_kernel(
    g_ptr, index_ptr, total_ptr, first_view, view_step, image_stride, match_stride, view_stride, m, L, D,
    VIEWS: tl.constexpr, ADD: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_L patches and BLOCK_D columns of an image.  ADD: to what ``total`` holds.

    The source's views are first_view, first_view + view_step, ... of the index.  Strides are those of matches, in rows.
    """
    columns = tl.cdiv(D, BLOCK_D)
    tiles = tl.cdiv(L, BLOCK_L)
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    patch = tl.program_id(0) // columns % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    b = (tl.program_id(0) // columns // tiles).to(tl.int64)
    view_stride = view_stride.to(tl.int64)
    inside = (patch < L)[:, None] & (d < D)[None, :]
    at = total_ptr + (b * L + patch)[:, None] * D + d[None, :]
    out = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    if ADD:
        out = tl.load(at, mask=inside, other=0.0)
    for j in range(VIEWS):
        first = b * image_stride
        index = index_ptr + first + (first_view + j * view_step) * view_stride
        for top in tl.range(0, m, BLOCK_K, num_stages=2):
            n = top + tl.arange(0, BLOCK_K)
            g_rows = (first + j * view_stride + n.to(tl.int64) * match_stride) * D
            mask = (n < m)[:, None] & (d < D)[None, :]
            g = tl.load(g_ptr + g_rows[:, None] + d[None, :], mask=mask, other=0.0)
            out = add_rows(out, g, n, m, index, match_stride, patch, "fp32", DOT_PRECISION)
    tl.store(at, out, mask=inside)
