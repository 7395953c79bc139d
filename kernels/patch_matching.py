"""Nearest neighbours among patches, both directions from one tile of distances, and the queries nearest to theirs.

    locations   d(q, c) = sum_a (q_a - c_a)^2                         up to three coordinates, added in order, no FMA
    features    d(q, c) = |q - s|^2 + |c - s|^2 - 2 (q - s).(c - s)   s: the mean of the tile's candidates

A common s cancels in the distance, and the matmul no longer subtracts two large numbers; each tile may have its own.
16-bit features are multiplied unchanged (s = 0): their products are exact in float32.

From x to y the queries are x's patches and the candidates y's; from y to x the other way round.  Row minima of a tile are
the nearest candidates of x's patches, column minima those of y's.  NaN is farther than any number, infinity included; equal
distances go to the lowest index.

x (B, P1, C), y (B, P2, C), locations (B, P1, A) and (B, P2, A), any strides.  Kinds of matches: by location (0) and by
feature (1); without locations, by feature (0).  Writes a flat index (views.py).  No matrix of distances is in memory:
2 P1 P2 C operations an image, and both maps are read once for each block of the other's patches.
In this file P is patches, C channels, q a query and c a candidate.  Buffers: docs/notation.md.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .views import match_set_offset, matches_of


class PatchMap(NamedTuple):
    """A map of patches, or their locations: its pointer and its strides, in elements."""

    ptr: Any
    stride_b: Any  # image
    stride_p: Any  # patch
    stride_c: Any  # channel, or coordinate


class Nearest(NamedTuple):
    """Pointers to every patch's nearest neighbour, (kinds, B, P1 + blocks * P2), for the selection.

    First x's patches; then, for each block of x's patches, y's patches and what is nearest to them in that block.
    Distances are kept as integers, _key_of().
    """

    key_ptr: Any
    index_ptr: Any


@triton.jit
def ordered(d):
    """Distances with NaN replaced by infinity, and infinity by the largest finite number: a total order."""
    largest: tl.constexpr = 3.4028234663852886e38 if d.dtype == tl.float32 else 1.7976931348623157e308
    return tl.where(d == d, tl.minimum(d, largest), float("inf"))


@triton.jit
def _or_infinity(a):
    """a, with NaN replaced by infinity."""
    return tl.where(a == a, a, float("inf"))


@triton.jit
def _rows_of(z, b, patch, P):
    """Pointers to the first channel of an image's patches; beyond the last patch, to the last one, so that no mask is needed."""
    return z.ptr + b * z.stride_b + tl.minimum(patch, P - 1).to(tl.int64) * z.stride_p


@triton.jit
def _load_channels(rows, k, C, stride_c, EVEN: tl.constexpr):
    """Channels k of rows.  EVEN: all of them are below C."""
    at = rows[:, None] + k.to(tl.int64)[None, :] * stride_c
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=(k < C)[None, :], other=0.0)


@triton.jit
def _location_tile(
    x, y, b, q, c, P1, P2, AXES: tl.constexpr, DISTANCE_TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Squared distances of locations q of x to locations c of y, from their differences, in ordered()'s order."""
    d = tl.zeros((BLOCK_Q, BLOCK_C), DISTANCE_TYPE)
    x_rows = _rows_of(x, b, q, P1)
    y_rows = _rows_of(y, b, c, P2)
    for axis in tl.static_range(AXES):
        q_a = tl.load(x_rows + axis * x.stride_c).to(DISTANCE_TYPE)
        c_a = tl.load(y_rows + axis * y.stride_c).to(DISTANCE_TYPE)
        difference = q_a[:, None] - c_a[None, :]
        d += difference * difference
    return tl.where((q < P1)[:, None] & (c < P2)[None, :], ordered(d), float("inf"))


@triton.jit
def _norms_of(x, b, q, P1, C, EVEN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Squared norms of patches q."""
    rows = _rows_of(x, b, q, P1)
    squares = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for start in tl.range(0, C, BLOCK_K, num_stages=2):
        q_k = _load_channels(rows, start + tl.arange(0, BLOCK_K), C, x.stride_c, EVEN).to(tl.float32)
        squares = tl.fma(q_k, q_k, squares)
    return tl.sum(squares, 1)


@triton.jit
def _feature_tile(
    x, y, b, q, c, q_norm, P1, P2, C,
    EVEN: tl.constexpr, NATIVE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Squared distances of patches q of x to patches c of y, from a matmul, in ordered()'s order.

    NATIVE: 16-bit, multiplied unchanged.  q_norm: squared norms of q, or None if they are computed here.
    Norms are summed over blocks of channels in registers, and across threads once.
    """
    product = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    q_squares = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    c_squares = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    q_rows = _rows_of(x, b, q, P1)
    c_rows = _rows_of(y, b, c, P2)
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        q_k = _load_channels(q_rows, k, C, x.stride_c, EVEN)
        c_k = _load_channels(c_rows, k, C, y.stride_c, EVEN)
        wide_c = c_k.to(tl.float32)
        if q_norm is None:
            wide_q = q_k.to(tl.float32)
            if not NATIVE:
                s = tl.sum(wide_c, 0) * (
                    1.0 / BLOCK_C
                )  # beyond the last candidate it counts again: any s is right
                s = tl.where(tl.abs(s) < float("inf"), s, 0.0)  # not finite: a candidate is not finite
                wide_q -= s[None, :]
                wide_c -= s[None, :]
                q_k = wide_q
                c_k = wide_c
            q_squares = tl.fma(wide_q, wide_q, q_squares)
        c_squares = tl.fma(wide_c, wide_c, c_squares)
        product = tl.dot(q_k, tl.trans(c_k), product, input_precision=DOT_PRECISION)
    if q_norm is None:
        q_norm = tl.sum(q_squares, 1)
    c_norm = tl.sum(c_squares, 1)
    q_far = tl.where(q < P1, q_norm, float("inf"))
    c_far = tl.where(c < P2, c_norm, float("inf"))
    d = tl.fma(product, -2.0, q_far[:, None] + c_far[None, :])
    finite = tl.max(_or_infinity(q_norm), 0) + tl.max(_or_infinity(c_norm), 0) < float("inf")
    if not finite:
        # A patch whose squared norm is infinite or NaN has that distance to every patch.  The matmul could turn infinity into NaN.
        norms = q_norm[:, None] + c_norm[None, :]
        d = ordered(tl.where(norms < float("inf"), d, norms))
        d = tl.where((q < P1)[:, None] & (c < P2)[None, :], d, float("inf"))
    return d


@triton.jit
def _map_tile(
    x, y, b, q, c, q_norm, P1, P2, C,
    AXES: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Squared distances of the maps' patches.  AXES > 0: so few channels that they are compared as locations are."""
    if AXES > 0:
        return _location_tile(x, y, b, q, c, P1, P2, AXES, tl.float32, BLOCK_Q, BLOCK_C)
    else:
        return _feature_tile(
            x, y, b, q, c, q_norm, P1, P2, C, EVEN, NATIVE, DOT_PRECISION, BLOCK_Q, BLOCK_C, BLOCK_K
        )


@triton.jit
def _count_before(distance, index, distances, indices):
    """How many of (distances, indices) come before each (distance, index): smaller, or equal with a lower index."""
    nearer = distances[None, :] < distance[:, None]
    first = (distances[None, :] == distance[:, None]) & (indices[None, :] < index[:, None])
    return tl.sum((nearer | first).to(tl.int32), 1)


@triton.jit
def _store_matches(match_index_ptr, rank, chosen, query, candidate, b, B, m, PER_SLOT: tl.constexpr):
    """Store the chosen queries and their candidates at their ranks: (2, B, m), or (2, m, B) with PER_SLOT."""
    B = B.to(tl.int64)
    slots = match_index_ptr + (rank * B + b if PER_SLOT else b * m + rank)
    tl.store(slots, query.to(tl.int64), mask=chosen)
    tl.store(slots + B * m, candidate.to(tl.int64), mask=chosen)


@triton.jit
def _select_in_tile(
    match_index_ptr, distance, nearest, P, b, B, m,
    PATCH_ORDER: tl.constexpr, PER_SLOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose the m queries nearest to their candidates, in the program that has all patches of an image."""
    query = tl.arange(0, BLOCK)
    distance = tl.where(query < P, distance, float("inf"))
    rank = _count_before(distance, query, distance, query)
    chosen = (rank < m) & (query < P)
    if PATCH_ORDER:
        rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
    _store_matches(match_index_ptr, rank, chosen, query, nearest, b, B, m, PER_SLOT)


@triton.jit
def _key_of(d):
    """Integers in the order of distances, which are no NaN; k - 1 < t is k <= t."""
    d += 0.0  # -0 is equal to 0
    if d.dtype == tl.float32:
        bits = d.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        bits = d.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=["B", "m1", "m2"])
def _match_forward_kernel(
    x, y, x_location, y_location, match_index_ptr, nearest, arrival_counter_ptr, B, P1, P2, C, m1, m2,
    AXES: tl.constexpr, LOCATION_AXES: tl.constexpr, DISTANCE_TYPE: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
    DOT_PRECISION: tl.constexpr, BOTH: tl.constexpr, PATCH_ORDER: tl.constexpr, PER_SLOT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of one kind of one image against every candidate, BLOCK_C at a time.

    nearest None: each map is one block, and the matches are chosen here; else the selection kernel chooses them.
    LOCATION_AXES 0: no locations.  DISTANCE_TYPE: float64 for float64 locations.  BOTH: the direction from y to x too.
    """
    if tl.program_id(0) == 0:
        tl.store(arrival_counter_ptr, 0)
    SINGLE_TILE: tl.constexpr = nearest is None
    blocks = tl.cdiv(P1, BLOCK_Q)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks % B).to(tl.int64)
    # Matmuls take longest: features, the last kind, go first.
    kind = (1 if LOCATION_AXES > 0 else 0) - tl.program_id(0) // blocks // B
    q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    best = tl.full((BLOCK_Q,), float("inf"), DISTANCE_TYPE)
    candidate = tl.zeros((BLOCK_Q,), tl.int32)
    at = (kind * B + b) * (P1 + blocks * P2)
    q_norm = None
    if NATIVE and AXES == 0 and not SINGLE_TILE:  # the same beside all candidates
        q_norm = _norms_of(x, b, q, P1, C, EVEN, BLOCK_Q, BLOCK_K)
    for start in range(0, P2, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        # _map_tile() stands here twice: Triton compiles both sides of a condition that only a program knows.
        if LOCATION_AXES > 0:
            if kind == 0:
                d = _location_tile(
                    x_location, y_location, b, q, c, P1, P2, LOCATION_AXES, DISTANCE_TYPE, BLOCK_Q, BLOCK_C
                )
            else:
                d = _map_tile(
                    x,
                    y,
                    b,
                    q,
                    c,
                    q_norm,
                    P1,
                    P2,
                    C,
                    AXES,
                    EVEN,
                    NATIVE,
                    DOT_PRECISION,
                    BLOCK_Q,
                    BLOCK_C,
                    BLOCK_K,
                ).to(DISTANCE_TYPE)
        else:
            d = _map_tile(
                x, y, b, q, c, q_norm, P1, P2, C, AXES, EVEN, NATIVE, DOT_PRECISION, BLOCK_Q, BLOCK_C, BLOCK_K
            ).to(DISTANCE_TYPE)
        distance, in_tile = tl.min(d, 1, return_indices=True)
        candidate = tl.where(distance < best, start + in_tile, candidate)
        best = tl.where(distance < best, distance, best)
        if BOTH:
            distance, query = tl.min(d, 0, return_indices=True)
            if SINGLE_TILE:
                y_to_x = match_index_ptr + match_set_offset(kind, 1, B, m1, m2)
                _select_in_tile(y_to_x, distance, query, P2, b, B, m2, PATCH_ORDER, PER_SLOT, BLOCK_C)
            else:
                at_c = at + P1 + block * P2 + c
                tl.store(nearest.key_ptr + at_c, _key_of(distance), mask=c < P2)
                tl.store(nearest.index_ptr + at_c, block * BLOCK_Q + query, mask=c < P2)
    if SINGLE_TILE:
        x_to_y = match_index_ptr + match_set_offset(kind, 0, B, m1, m2)
        _select_in_tile(x_to_y, best, candidate, P1, b, B, m1, PATCH_ORDER, PER_SLOT, BLOCK_Q)
    else:
        tl.store(nearest.key_ptr + at + q, _key_of(best), mask=q < P1)
        tl.store(nearest.index_ptr + at + q, candidate, mask=q < P1)


@triton.jit
def _nearest_of_blocks(key_ptr, patch, P, blocks, BLOCKS_AT_ONCE: tl.constexpr):
    """Each patch's smallest key over all blocks, from (blocks, P), and the first block that has it.

    Beyond P the largest integer.  Several blocks are read at a time: one after the other, each would wait for the one before.
    """
    LARGEST: tl.constexpr = 0x7FFFFFFF if key_ptr.dtype.element_ty == tl.int32 else 0x7FFFFFFFFFFFFFFF
    best_block = tl.zeros(patch.shape, tl.int32)
    if blocks == 1:
        best = tl.load(key_ptr + patch, mask=patch < P, other=LARGEST)
    else:
        best = tl.full(patch.shape, LARGEST, key_ptr.dtype.element_ty)
        for first in range(0, blocks, BLOCKS_AT_ONCE):
            block = first + tl.arange(0, BLOCKS_AT_ONCE)
            mask = (block < blocks)[:, None] & (patch < P)[None, :]
            keys = tl.load(key_ptr + block[:, None] * P + patch[None, :], mask=mask, other=LARGEST)
            key, offset = tl.min(keys, 0, return_indices=True)
            best_block = tl.where(key < best, first + offset, best_block)
            best = tl.where(key < best, key, best)
    return best, best_block


@triton.jit(do_not_specialize=["B", "m1", "m2", "blocks"])
def _select_forward_kernel(
    nearest, match_index_ptr, B, P1, P2, m1, m2, blocks,
    BOTH: tl.constexpr, PER_SLOT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_COMPARED: tl.constexpr,
    BLOCKS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program: the ranks of BLOCK patches of one kind, direction and image among all of them.

    A rank is the number of patches that come before.  Nothing is sorted, and programs do not depend on each other.
    """
    blocks_1 = tl.cdiv(P1, BLOCK)
    programs = blocks_1
    if BOTH:
        programs += tl.cdiv(P2, BLOCK)
    own_block = tl.program_id(0) % programs
    image = tl.program_id(0) // programs
    at = image.to(tl.int64) * (P1 + blocks * P2)
    direction = (own_block >= blocks_1).to(tl.int32)
    P = P1
    count = 1
    if direction == 1:
        own_block -= blocks_1
        at += P1
        P = P2
        count = blocks
    m = matches_of(direction, m1, m2)
    key_ptr = nearest.key_ptr + at
    own_start = own_block * BLOCK
    query = own_start + tl.arange(0, BLOCK)
    key, block = _nearest_of_blocks(key_ptr, query, P, count, BLOCKS_AT_ONCE)
    candidate = tl.load(nearest.index_ptr + at + block * P + query, mask=query < P, other=0)
    # Of equal keys those with a lower index come first: within the program's own block they are counted here, and those
    # of blocks before it are made smaller by one.
    ties = (key[:, None] == key[None, :]) & (query[:, None] < query[None, :])
    rank = tl.sum(ties.to(tl.int32), 0)
    for start in range(0, P, BLOCK_COMPARED):
        compared = start + tl.arange(0, BLOCK_COMPARED)
        keys, _ = _nearest_of_blocks(key_ptr, compared, P, count, BLOCKS_AT_ONCE)
        keys -= (compared < own_start).to(key.dtype)
        # Over the rows: each thread counts for patches of its own.
        rank += tl.sum((keys[:, None] < key[None, :]).to(tl.int32), 0)
    chosen = (rank < m) & (query < P)
    match_set_ptr = match_index_ptr + match_set_offset(image // B, direction, B, m1, m2)
    _store_matches(match_set_ptr, rank, chosen, query, candidate, image.to(tl.int64) % B, B, m, PER_SLOT)


@triton.jit(do_not_specialize=["B", "m"])
def _distance_forward_kernel(
    x, y, match_index_ptr, distance_ptr, B, C, m, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Euclidean distances (B, m) of matches (2, B, m), from their differences.  One program: BLOCK_M of an image."""
    blocks = tl.cdiv(m, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    at = b * m + slot
    query = tl.load(match_index_ptr + at, mask=slot < m, other=0)
    candidate = tl.load(match_index_ptr + B.to(tl.int64) * m + at, mask=slot < m, other=0)
    x_rows = x.ptr + b * x.stride_b + query * x.stride_p
    y_rows = y.ptr + b * y.stride_b + candidate * y.stride_p
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, C, BLOCK_K, num_stages=3):
        k = start + tl.arange(0, BLOCK_K)
        mask = (slot < m)[:, None] & (k < C)[None, :]
        q_k = tl.load(x_rows[:, None] + k.to(tl.int64)[None, :] * x.stride_c, mask=mask, other=0.0).to(
            tl.float32
        )
        c_k = tl.load(y_rows[:, None] + k.to(tl.int64)[None, :] * y.stride_c, mask=mask, other=0.0).to(
            tl.float32
        )
        squares += tl.sum((q_k - c_k) * (q_k - c_k), 1)
    tl.store(distance_ptr + at, tl.sqrt_rn(squares), mask=slot < m)
