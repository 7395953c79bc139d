"""How kernels address the rows of views.

Element (p, n, d) of view v lies at

    ptr + p * stride_p + n * stride_n + index[v, p, n] * stride_i + d * stride_d

Offsets are 64-bit throughout: 2.6 million rows of 1024 features exceed 2^31 elements.

Views come in pairs: 0 and 1, 2 and 3.  There are two sources, x and y.  Views 0 and 3 are rows of x, views 1 and 2 rows of y:
VICRegL's matches go from x to y and from y to x.  A single view is a row of x.

Letters and buffers: docs/notation.md.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Source(NamedTuple):
    """A tensor that views take rows from: its pointer and its strides, in elements."""

    ptr: Any
    stride_p: Any  # problem; 0 where a problem's rows are given by the index alone
    stride_n: Any  # row
    stride_i: Any  # index; 0 without an index
    stride_d: Any  # feature


class Views(NamedTuple):
    """One view, one pair or two pairs of views: the sources x and y, each as Source has it, and the index.

    Not two Sources: Triton 3.6 loses the compile-time members of a NamedTuple within another.
    """

    x_ptr: Any
    x_stride_p: Any
    x_stride_n: Any
    x_stride_i: Any
    x_stride_d: Any
    y_ptr: Any
    y_stride_p: Any
    y_stride_n: Any
    y_stride_i: Any
    y_stride_d: Any
    index_ptr: Any  # int64 (V, P, N), or None: every row is a sample


@triton.jit
def is_of_y(v):
    """Whether view v consists of rows of y."""
    return ((v ^ (v >> 1)) & 1) == 1


@triton.jit
def _select(condition, a, b):
    """a or b, 64-bit."""
    return tl.where(condition, tl.full((), a, tl.int64), tl.full((), b, tl.int64))


@triton.jit
def select_source(views, v):
    """The source of view v.

    Selects, not a branch: behind a branch Triton 3.6 no longer knows which pointers and strides are multiples of 16, and
    loads element by element.  Triton types an integer argument i32 or i64 by its value, so both sides are cast to 64 bits.
    A feature stride of 1 in both sources stays a constant, or loads are not vectorised.
    """
    of_y = is_of_y(v)
    ptr = tl.where(of_y, views.y_ptr, views.x_ptr)
    stride_p = _select(of_y, views.y_stride_p, views.x_stride_p)
    stride_n = _select(of_y, views.y_stride_n, views.x_stride_n)
    stride_i = _select(of_y, views.y_stride_i, views.x_stride_i)
    stride_d = views.x_stride_d
    if isinstance(views.x_stride_d, tl.tensor) or isinstance(views.y_stride_d, tl.tensor):
        stride_d = _select(of_y, views.y_stride_d, views.x_stride_d)
    return Source(ptr, stride_p, stride_n, stride_i, stride_d)


@triton.jit
def row_offsets(source, index_ptr, v, p, n, P, N):
    """Offsets of rows n (a vector) of problem p of view v."""
    p = p.to(tl.int64)
    n = n.to(tl.int64)
    offsets = p * source.stride_p + n * source.stride_n
    if index_ptr is not None:
        index = index_ptr + (v.to(tl.int64) * P + p) * N
        offsets += tl.load(index + n, mask=n < N, other=0) * source.stride_i
    return offsets


@triton.jit
def column_pointers(source, d):
    """Pointers to features d (a vector) of a source's first row."""
    return source.ptr + d.to(tl.int64) * source.stride_d


@triton.jit
def block_of_rows(source, columns, index_ptr, v, p, top, n, P, N):
    """(pointers to columns, offsets) of rows top + n of problem p of view v; ``columns``: of the first row.

    Without an index a loop over ``top`` moves the pointers to columns, and the offsets stay as they are.
    """
    if index_ptr is None:
        return columns + top * source.stride_n, row_offsets(source, index_ptr, v, p, n, P, N)
    else:
        return columns, row_offsets(source, index_ptr, v, p, top + n, P, N)


@triton.jit
def zero_outside(e, mask, EVEN: tl.constexpr):
    """e, 0 where masked.  EVEN: nothing is masked."""
    if EVEN:
        return e
    return tl.where(mask, e, 0.0)


@triton.jit
def load_tile(pointers, mask, EVEN: tl.constexpr):
    """A tile, 0 where masked.  EVEN: nothing is masked, and no mask is computed."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(pointers, tile, mask, EVEN: tl.constexpr):
    """Store a tile where the mask holds.  EVEN: all of it, and no mask is computed."""
    if EVEN:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=mask)


@triton.jit
def load_rows(columns, rows, mask):
    """Elements (rows, columns) as float32, 0 where masked; from pointers to columns and offsets of rows."""
    return tl.load(columns[None, :] + rows[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def matches_of(direction, m1, m2):
    """Matches of an image in a direction: m1 from x to y (0), m2 from y to x (1)."""
    m = m1
    if direction == 1:
        m = m2
    return m


@triton.jit
def match_set_offset(kind, direction, B, m1, m2):
    """Offset of a match set in the flat index: by kind (location, feature), direction, side (queries, candidates), image."""
    return 2 * B.to(tl.int64) * (kind * (m1 + m2) + direction * m1)
