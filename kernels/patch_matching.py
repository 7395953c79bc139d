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
    """

    distance_ptr: Any
    index_ptr: Any


@triton.jit
def ordered(d):
    """Distances with NaN replaced by infinity, and infinity by the largest finite number: a total order."""
    largest: tl.constexpr = 3.4028234663852886e38 if d.dtype == tl.float32 else 1.7976931348623157e308
    return tl.where(d == d, tl.minimum(d, largest), float("inf"))


@triton.jit
def _location_tile(
    x, y, b, q, c, P1, P2, AXES: tl.constexpr, DISTANCE_TYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Squared distances of locations q of x to locations c of y, from their differences."""
    d = tl.zeros((BLOCK_Q, BLOCK_C), DISTANCE_TYPE)
    x_rows = x.ptr + b * x.stride_b + q.to(tl.int64) * x.stride_p
    y_rows = y.ptr + b * y.stride_b + c.to(tl.int64) * y.stride_p
    for axis in tl.static_range(AXES):
        q_a = tl.load(x_rows + axis * x.stride_c, mask=q < P1, other=0.0).to(DISTANCE_TYPE)
        c_a = tl.load(y_rows + axis * y.stride_c, mask=c < P2, other=0.0).to(DISTANCE_TYPE)
        difference = q_a[:, None] - c_a[None, :]
        d += difference * difference
    return d


@triton.jit
def _feature_tile(
    x, y, b, q, c, P1, P2, C,
    NATIVE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Squared distances of patches q of x to patches c of y, from a matmul.  NATIVE: 16-bit, multiplied unchanged."""
    product = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    q_norm = tl.zeros((BLOCK_Q,), tl.float32)
    c_norm = tl.zeros((BLOCK_C,), tl.float32)
    count = tl.minimum(P2 - tl.min(c, 0), BLOCK_C)
    q_rows = x.ptr + b * x.stride_b + q.to(tl.int64) * x.stride_p
    c_rows = y.ptr + b * y.stride_b + c.to(tl.int64) * y.stride_p
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        q_mask = (q < P1)[:, None] & (k < C)[None, :]
        c_mask = (c < P2)[:, None] & (k < C)[None, :]
        q_k = tl.load(q_rows[:, None] + k.to(tl.int64)[None, :] * x.stride_c, mask=q_mask, other=0.0)
        c_k = tl.load(c_rows[:, None] + k.to(tl.int64)[None, :] * y.stride_c, mask=c_mask, other=0.0)
        wide_q = q_k.to(tl.float32)
        wide_c = c_k.to(tl.float32)
        if not NATIVE:
            s = tl.sum(wide_c, 0) / count
            s = tl.where(tl.abs(s) < float("inf"), s, 0.0)  # not finite: a candidate is not finite
            wide_q = tl.where(q_mask, wide_q - s[None, :], 0.0)
            wide_c = tl.where(c_mask, wide_c - s[None, :], 0.0)
            q_k = wide_q
            c_k = wide_c
        q_norm += tl.sum(wide_q * wide_q, 1)
        c_norm += tl.sum(wide_c * wide_c, 1)
        product = tl.dot(q_k, tl.trans(c_k), product, input_precision=DOT_PRECISION)
    norms = q_norm[:, None] + c_norm[None, :]
    # A patch whose squared norm is infinite or NaN has that distance to every patch.  The matmul could turn infinity into NaN.
    return tl.where(norms < float("inf"), norms - 2.0 * product, norms)


@triton.jit
def _map_tile(
    x, y, b, q, c, P1, P2, C,
    AXES: tl.constexpr, NATIVE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Squared distances of the maps' patches.  AXES > 0: so few channels that they are compared as locations are."""
    if AXES > 0:
        return _location_tile(x, y, b, q, c, P1, P2, AXES, tl.float32, BLOCK_Q, BLOCK_C)
    else:
        return _feature_tile(x, y, b, q, c, P1, P2, C, NATIVE, DOT_PRECISION, BLOCK_Q, BLOCK_C, BLOCK_K)


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


@triton.jit(do_not_specialize=["B", "m1", "m2"])
def _match_forward_kernel(
    x, y, x_location, y_location, match_index_ptr, nearest, arrival_counter_ptr, B, P1, P2, C, m1, m2,
    AXES: tl.constexpr, LOCATION_AXES: tl.constexpr, DISTANCE_TYPE: tl.constexpr, NATIVE: tl.constexpr,
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
    for start in range(0, P2, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        d = tl.zeros((BLOCK_Q, BLOCK_C), DISTANCE_TYPE)
        # _map_tile() stands here twice: Triton compiles both sides of a condition that only a program knows.
        if LOCATION_AXES > 0:
            if kind == 0:
                d += _location_tile(
                    x_location, y_location, b, q, c, P1, P2, LOCATION_AXES, DISTANCE_TYPE, BLOCK_Q, BLOCK_C
                )
            else:
                d += _map_tile(x, y, b, q, c, P1, P2, C, AXES, NATIVE, DOT_PRECISION, BLOCK_Q, BLOCK_C, BLOCK_K)
        else:
            d += _map_tile(x, y, b, q, c, P1, P2, C, AXES, NATIVE, DOT_PRECISION, BLOCK_Q, BLOCK_C, BLOCK_K)
        d = ordered(d)
        d = tl.where((q < P1)[:, None] & (c < P2)[None, :], d, float("inf"))
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
                tl.store(nearest.distance_ptr + at_c, distance, mask=c < P2)
                tl.store(nearest.index_ptr + at_c, block * BLOCK_Q + query, mask=c < P2)
    if SINGLE_TILE:
        x_to_y = match_index_ptr + match_set_offset(kind, 0, B, m1, m2)
        _select_in_tile(x_to_y, best, candidate, P1, b, B, m1, PATCH_ORDER, PER_SLOT, BLOCK_Q)
    else:
        tl.store(nearest.distance_ptr + at + q, best, mask=q < P1)
        tl.store(nearest.index_ptr + at + q, candidate, mask=q < P1)


@triton.jit
def _nearest_of_blocks(distance_ptr, index_ptr, patch, P, blocks, BLOCKS_AT_ONCE: tl.constexpr):
    """Each patch's nearest neighbour over all blocks, from (blocks, P); the first of equal ones; infinity beyond P.

    Several blocks are read at a time: one after the other, each would wait for the one before.
    """
    best = tl.full(patch.shape, float("inf"), distance_ptr.dtype.element_ty)
    best_block = tl.zeros(patch.shape, tl.int32)
    for first in range(0, blocks, BLOCKS_AT_ONCE):
        block = first + tl.arange(0, BLOCKS_AT_ONCE)
        mask = (block < blocks)[:, None] & (patch < P)[None, :]
        distances = tl.load(distance_ptr + block[:, None] * P + patch[None, :], mask=mask, other=float("inf"))
        distance, offset = tl.min(distances, 0, return_indices=True)
        best_block = tl.where(distance < best, first + offset, best_block)
        best = tl.where(distance < best, distance, best)
    return best, tl.load(index_ptr + best_block * P + patch, mask=patch < P, other=0)


@triton.jit(do_not_specialize=["B", "m1", "m2", "blocks"])
def _select_forward_kernel(
    nearest, match_index_ptr, B, P1, P2, m1, m2, blocks,
    BOTH: tl.constexpr, PER_SLOT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_AT_ONCE: tl.constexpr,
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
    distance_ptr = nearest.distance_ptr + at
    index_ptr = nearest.index_ptr + at
    query = own_block * BLOCK + tl.arange(0, BLOCK)
    distance, candidate = _nearest_of_blocks(distance_ptr, index_ptr, query, P, count, BLOCKS_AT_ONCE)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, P, BLOCK):
        compared = start + tl.arange(0, BLOCK)
        distances, _ = _nearest_of_blocks(distance_ptr, index_ptr, compared, P, count, BLOCKS_AT_ONCE)
        rank += _count_before(distance, query, distances, compared)
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
