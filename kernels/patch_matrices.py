"""Matrices of an image's patches for vicregl_backward.py: own and pairs, the patches that have a match, and matmuls of them.

    own = sum over match sets s of f_cov,s P_s' G_s P_s        pairs_k = sum over the sets s of kind k of P_s' P_s of the other source

P_s: zeros and ones, which patch match n of set s is, of all patches or of a list of those that have a match.  The matmuls take
bfloat16: of float32 as parts of 8 bits each.  pairs and P are small integers, exact in bfloat16.
Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .numerics import divide
from .vicregl import gram_set_offset
from .views import match_set_offset, matches_of


@triton.jit
def top_half(a, TYPE: tl.constexpr):
    """(the upper 16 bits of a float32, which are a bfloat16, what is left): exact.  TYPE float32: for the interpreter."""
    bits = a.to(tl.uint32, bitcast=True)
    high = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    if tl.float32 == TYPE:
        return high, a - high
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), a - high


@triton.jit
def dot(a, b, acc):
    """acc + a b; float32 only in the interpreter."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def matmul_selected(ones, b, acc, PARTS: tl.constexpr):
    """acc + ones b; exact for a b of as many parts of 8 bits."""
    for _ in tl.static_range(PARTS):
        part, b = top_half(b, ones.dtype)
        acc = dot(ones, part, acc)
    return acc


@triton.jit
def _matmul_integers(a, integers, acc, PARTS: tl.constexpr):
    """acc + a integers; exact products for an ``a`` of as many parts of 8 bits, and integers up to 256."""
    for _ in tl.static_range(PARTS):
        part, a = top_half(a, integers.dtype)
        acc = dot(part, integers, acc)
    return acc


@triton.jit
def store_parts(ptr, a, PARTS: tl.constexpr):
    """Store the parts of float32 numbers: one, rounded to bfloat16, or two or three of 8 bits, which add up to them."""
    SIZE: tl.constexpr = a.shape[0] * a.shape[1]
    if PARTS == 1:
        tl.store(ptr, a.to(ptr.dtype.element_ty))
    else:
        for part in tl.static_range(PARTS):
            high, a = top_half(a, ptr.dtype.element_ty)
            tl.store(ptr + part * SIZE, high)


@triton.jit
def matmul_parts(ptr, b, acc, PARTS: tl.constexpr):
    """acc + a b of float32 numbers, from store_parts() of a: as bfloat16 (PARTS 1), exact for TF32 (2), accurate to float32 (3)."""
    TYPE: tl.constexpr = ptr.dtype.element_ty
    SIZE: tl.constexpr = ptr.shape[0] * ptr.shape[1]
    if PARTS == 1:
        return dot(tl.load(ptr), b.to(TYPE), acc)
    else:
        high, b = top_half(b, TYPE)
        middle, b = top_half(b, TYPE)
        a_high = tl.load(ptr)
        a_middle = tl.load(ptr + SIZE)
        if PARTS > 2:
            low, _ = top_half(b, TYPE)
            acc = dot(tl.load(ptr + 2 * SIZE), high, acc)
            acc = dot(a_high, low, acc)
        acc = dot(a_middle, middle, acc)
        acc = dot(a_middle, high, acc)
        acc = dot(a_high, middle, acc)
        return dot(a_high, high, acc)


@triton.jit
def _match_set(views, kind, direction, of_y, b, B, m1, m2, n):
    """(m, the patches of this source and of the other in matches n of a match set; -2 from m on)."""
    m = matches_of(direction, m1, m2)
    index_ptr = views.index_ptr + match_set_offset(kind, direction, B, m1, m2) + b * m + n
    side = direction ^ of_y
    index = tl.load(index_ptr + side * B * m, mask=n < m, other=-2).to(tl.int32)
    other_index = tl.load(index_ptr + (1 - side) * B * m, mask=n < m, other=-2).to(tl.int32)
    return m, index, other_index


@triton.jit
def own_matrix(
    views, gram_ptr, counts_ptr, cov, of_y, b, B, m1, m2, patch,
    TYPE: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(own, whether each patch has a match).  ``patch``: the patches of rows and columns; below zero there is none.

    counts_ptr: the matches of each patch are stored there, of the four match sets and of both kinds.
    """
    BLOCK_R: tl.constexpr = patch.shape[0]
    position = tl.arange(0, BLOCK_R)
    n = tl.arange(0, BLOCK_N)
    own = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    matches = tl.zeros((BLOCK_R,), tl.float32)
    for kind in tl.static_range(2):
        kind_count = tl.zeros((BLOCK_R,), tl.float32)
        for direction in range(2):
            m, index, _ = _match_set(views, kind, direction, of_y, b, B, m1, m2, n)
            side = direction ^ of_y
            G_ptr = gram_ptr + gram_set_offset(kind, direction, B, m1, m2) + (side * B + b) * m * m
            inside = (n < m)[:, None] & (n < m)[None, :]
            G = tl.load(G_ptr + n[:, None] * m + n[None, :], mask=inside, other=0.0).to(tl.float32)
            chosen = (index[:, None] == patch[None, :]).to(TYPE)
            rows = _matmul_integers(G, chosen, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), PARTS)
            own = matmul_selected(tl.trans(chosen), rows * divide(cov[kind], m - 1), own, PARTS)
            count = tl.sum(chosen.to(tl.float32), 0)
            tl.store(counts_ptr + (2 * kind + direction) * BLOCK_R + position, count)
            kind_count += count
        tl.store(counts_ptr + (4 + kind) * BLOCK_R + position, kind_count)
        matches += kind_count
    return own, matches > 0


@triton.jit
def kind_pairs(
    views, kind, of_y, b, B, m1, m2, list_ptr,
    TYPE: tl.constexpr, LISTED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """pairs_k: rows are patches of this source, columns of the other."""
    n = tl.arange(0, BLOCK_N)
    patch = patches(list_ptr, BLOCK_L, LISTED)
    other_patch = patches(list_ptr + BLOCK_L, BLOCK_L, LISTED)
    pairs = tl.zeros((BLOCK_L, BLOCK_L), tl.float32)
    for direction in range(2):
        _, index, other_index = _match_set(views, kind, direction, of_y, b, B, m1, m2, n)
        chosen = (index[:, None] == patch[None, :]).to(TYPE)
        other_chosen = (other_index[:, None] == other_patch[None, :]).to(TYPE)
        pairs = dot(tl.trans(chosen), other_chosen, pairs)
    return pairs


@triton.jit
def store_list(views, list_ptr, row_ptr, of_y, b, B, m1, m2, BLOCK_N: tl.constexpr):
    """Store the patches of a source that have a match, each once: BLOCK_N places for every match set, -1 in the others.

    row_ptr: the same with a patch in all places.
    """
    position = tl.arange(0, 4 * BLOCK_N)
    n = position % BLOCK_N
    direction = position // BLOCK_N % 2
    at = match_set_offset((position // (2 * BLOCK_N)).to(tl.int64), direction, B, m1, m2)
    at += (direction ^ of_y) * B * m1 + b * m1 + n
    patch = tl.load(views.index_ptr + at, mask=n < m1, other=-1).to(tl.int32)
    earlier = (patch[:, None] == patch[None, :]) & (position[:, None] < position[None, :])
    patch = tl.where(tl.sum(earlier.to(tl.int32), 0) > 0, -1, patch)
    tl.store(list_ptr + position, patch)
    store_read_patches(views, row_ptr, patch, patch >= 0, of_y, b, B, m1)


@triton.jit
def store_read_patches(views, row_ptr, patch, matched, of_y, b, B, m1):
    """Store the patches that are read.

    Those that no match has count for nothing; they may not be finite, and a matched one takes their place.
    """
    first = tl.load(views.index_ptr + of_y * B * m1 + b * m1).to(tl.int32)
    tl.store(row_ptr + tl.arange(0, patch.shape[0]), tl.where(matched, patch, first))


@triton.jit
def patches(list_ptr, BLOCK_L: tl.constexpr, LISTED: tl.constexpr):
    """The patches of the places of a program; where there is none, below zero or beyond the last one."""
    position = tl.arange(0, BLOCK_L)
    if LISTED:
        return tl.load(list_ptr + position)
    else:
        return position
