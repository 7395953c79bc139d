"""Nearest neighbours among patches, both directions from one tile of distances, and the queries nearest to theirs.

    locations   d(q, c) = sum_a (q_a - c_a)^2                       up to three coordinates, added in order, nothing fused
    features    d(q, c) = |q - s|^2 + |c - s|^2 - 2 (q - s).(c - s)    s: the mean of the tile's candidates

A common s cancels in the distance, and the products no longer subtract two large numbers; each tile may have its own.
16-bit features are multiplied as they are (s = 0): their products are exact in float32.

Queries are x's patches, candidates y's, and the other way round: x (B, P1, C), y (B, P2, C), locations (B, P1, A) and
(B, P2, A), any strides.  Row minima of a tile are the nearest candidates of the queries; column minima, of the other
direction.  NaN is never nearer than a number, infinity included; equal distances go to the lowest number.

Matches are numbers, of each group (2, B, m1) from x to y and (2, B, m2) back, queries and then their candidates.  Groups:
locations (0) and features (1), or features alone (0).  No matrix of distances is in memory: 2 P1 P2 C operations an image; both maps
are read once for each block of the other's patches.
"""

import triton
import triton.language as tl

from .rows import match_numbers


@triton.jit
def ordered(d):
    """Distances with NaN at infinity and infinity below it: what is compared has an order."""
    largest: tl.constexpr = 3.4028234663852886e38 if d.dtype == tl.float32 else 1.7976931348623157e308
    return tl.where(d == d, tl.minimum(d, largest), float("inf"))


@triton.jit
def _location_tile(
    x_ptr, y_ptr, q, c, P1, P2,
    x_stride_p, x_stride_a, y_stride_p, y_stride_a,
    AXES: tl.constexpr, WIDE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Squared distances of locations q of x to locations c of y, from their differences."""
    d = tl.zeros((BLOCK_Q, BLOCK_C), WIDE)
    for axis in tl.static_range(AXES):
        a = tl.load(x_ptr + q.to(tl.int64) * x_stride_p + axis * x_stride_a, mask=q < P1, other=0.0).to(WIDE)
        b = tl.load(y_ptr + c.to(tl.int64) * y_stride_p + axis * y_stride_a, mask=c < P2, other=0.0).to(WIDE)
        difference = a[:, None] - b[None, :]
        d += difference * difference
    return d


@triton.jit
def _feature_tile(
    x_ptr, y_ptr, q, c, P1, P2, C,
    x_stride_p, x_stride_c, y_stride_p, y_stride_c,
    NATIVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Squared distances of patches q of x to patches c of y, from their products."""
    product = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    q_norm = tl.zeros((BLOCK_Q,), tl.float32)
    c_norm = tl.zeros((BLOCK_C,), tl.float32)
    count = tl.minimum(P2 - tl.min(c, 0), BLOCK_C)
    q_rows = x_ptr + q.to(tl.int64) * x_stride_p
    c_rows = y_ptr + c.to(tl.int64) * y_stride_p
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        q_mask = (q < P1)[:, None] & (k < C)[None, :]
        c_mask = (c < P2)[:, None] & (k < C)[None, :]
        a = tl.load(q_rows[:, None] + k.to(tl.int64)[None, :] * x_stride_c, mask=q_mask, other=0.0)
        b = tl.load(c_rows[:, None] + k.to(tl.int64)[None, :] * y_stride_c, mask=c_mask, other=0.0)
        wide_a = a.to(tl.float32)
        wide_b = b.to(tl.float32)
        if not NATIVE:
            s = tl.sum(wide_b, 0) / count
            s = tl.where(tl.abs(s) < float("inf"), s, 0.0)  # not finite: some candidate is not
            wide_a = tl.where(q_mask, wide_a - s[None, :], 0.0)
            wide_b = tl.where(c_mask, wide_b - s[None, :], 0.0)
            a = wide_a
            b = wide_b
        q_norm += tl.sum(wide_a * wide_a, 1)
        c_norm += tl.sum(wide_b * wide_b, 1)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    norms = q_norm[:, None] + c_norm[None, :]
    # A patch whose norm is not finite is at infinity from every other, or nowhere: its products would not say which.
    return tl.where(norms < float("inf"), norms - 2.0 * product, norms)


@triton.jit
def _before(value, number, values, numbers):
    """How many of (values, numbers) come before each of (value, number): nearer ones, of equal ones those of lower number."""
    nearer = values[None, :] < value[:, None]
    first = (values[None, :] == value[:, None]) & (numbers[None, :] < number[:, None])
    return tl.sum((nearer | first).to(tl.int32), 1)


@triton.jit
def _store_matches(
    numbers_ptr, place, chosen, number, nearest, b, B, m, ACROSS: tl.constexpr
):  # fmt: skip
    """Store the chosen queries and their candidates at their places; ACROSS: (m, B) in the place of (B, m)."""
    B = B.to(tl.int64)
    slots = numbers_ptr + (place * B + b if ACROSS else b * m + place)
    tl.store(slots, number.to(tl.int64), mask=chosen)
    tl.store(slots + B * m, nearest.to(tl.int64), mask=chosen)


@triton.jit
def _select_whole(
    numbers_ptr, value, nearest, P, b, B, m, PATCH: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The queries nearest to their candidates, where one program has all of an image's."""
    number = tl.arange(0, BLOCK)
    value = tl.where(number < P, value, float("inf"))
    place = _before(value, number, value, number)
    chosen = (place < m) & (number < P)
    if PATCH:
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    _store_matches(numbers_ptr, place, chosen, number, nearest, b, B, m, ACROSS)


@triton.jit(do_not_specialize=["B", "m1", "m2"])
def _match_forward_kernel(
    x_ptr, y_ptr, x_location_ptr, y_location_ptr, n00_ptr, n01_ptr, n10_ptr, n11_ptr,
    value_ptr, nearest_ptr, ticket_ptr,
    B, P1, P2, C, m1, m2,
    x_stride_b, x_stride_p, x_stride_c, y_stride_b, y_stride_p, y_stride_c,
    x_location_stride_b, x_location_stride_p, x_location_stride_a,
    y_location_stride_b, y_location_stride_p, y_location_stride_a,
    AXES: tl.constexpr, LOCATION_AXES: tl.constexpr, SCORE: tl.constexpr, NATIVE: tl.constexpr,
    PRECISION: tl.constexpr, BOTH: tl.constexpr, WHOLE: tl.constexpr, PATCH: tl.constexpr, ACROSS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of one group of one image against every candidate, BLOCK_C at a time.

    WHOLE: each side is one block, and the matches are chosen here.  Else the nearest are left to the selection: value and
    nearest, (groups, B, P1 + blocks * P2): of each query; then, block by block of x's patches, of each patch of y.
    AXES: channels where the maps have so few that they are compared as locations are, else 0; LOCATION_AXES: 0 where
    there are no locations.  SCORE: the type of distances.  BOTH: the other direction too.
    """
    if tl.program_id(0) == 0:
        tl.store(ticket_ptr, 0)
    blocks = tl.cdiv(P1, BLOCK_Q)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks % B).to(tl.int64)
    # Products take longest: features, the last group, go first.
    group = (1 if LOCATION_AXES > 0 else 0) - tl.program_id(0) // blocks // B
    q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    best = tl.full((BLOCK_Q,), float("inf"), SCORE)
    nearest = tl.zeros((BLOCK_Q,), tl.int32)
    left = value_ptr + (group * B + b) * (P1 + blocks * P2)
    left_nearest = nearest_ptr + (group * B + b) * (P1 + blocks * P2)
    for start in range(0, P2, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        d = tl.zeros((BLOCK_Q, BLOCK_C), SCORE)
        if LOCATION_AXES > 0 and group == 0:
            d += _location_tile(
                x_location_ptr + b * x_location_stride_b, y_location_ptr + b * y_location_stride_b, q, c, P1, P2,
                x_location_stride_p, x_location_stride_a, y_location_stride_p, y_location_stride_a,
                LOCATION_AXES, SCORE, BLOCK_Q, BLOCK_C,
            )  # fmt: skip
        elif AXES > 0:
            d += _location_tile(
                x_ptr + b * x_stride_b, y_ptr + b * y_stride_b, q, c, P1, P2,
                x_stride_p, x_stride_c, y_stride_p, y_stride_c, AXES, tl.float32, BLOCK_Q, BLOCK_C,
            )  # fmt: skip
        else:
            d += _feature_tile(
                x_ptr + b * x_stride_b, y_ptr + b * y_stride_b, q, c, P1, P2, C,
                x_stride_p, x_stride_c, y_stride_p, y_stride_c, NATIVE, PRECISION, BLOCK_Q, BLOCK_C, BLOCK_K,
            )  # fmt: skip
        d = ordered(d)
        d = tl.where((q < P1)[:, None] & (c < P2)[None, :], d, float("inf"))
        value, candidate = tl.min(d, 1, return_indices=True)
        nearest = tl.where(value < best, start + candidate, nearest)
        best = tl.where(value < best, value, best)
        if BOTH:
            value, query = tl.min(d, 0, return_indices=True)
            if WHOLE:
                numbers = match_numbers(group, 1, n00_ptr, n01_ptr, n10_ptr, n11_ptr)
                _select_whole(numbers, value, query, P2, b, B, m2, PATCH, ACROSS, BLOCK_C)
            else:
                at = P1 + block * P2 + c
                tl.store(left + at, value, mask=c < P2)
                tl.store(left_nearest + at, block * BLOCK_Q + query, mask=c < P2)
    if WHOLE:
        numbers = match_numbers(group, 0, n00_ptr, n01_ptr, n10_ptr, n11_ptr)
        _select_whole(numbers, best, nearest, P1, b, B, m1, PATCH, ACROSS, BLOCK_Q)
    else:
        tl.store(left + q, best, mask=q < P1)
        tl.store(left_nearest + q, nearest, mask=q < P1)


@triton.jit
def _nearest_of_blocks(value_ptr, nearest_ptr, number, P, blocks, PARTS: tl.constexpr):
    """Of the blocks' nearest, (blocks, P) each, the nearest, the first of equal ones; infinity beyond P.

    PARTS blocks at a time: one after the other each would wait for the one before.
    """
    best = tl.full(number.shape, float("inf"), value_ptr.dtype.element_ty)
    which = tl.zeros(number.shape, tl.int32)
    for first in range(0, blocks, PARTS):
        block = first + tl.arange(0, PARTS)
        mask = (block < blocks)[:, None] & (number < P)[None, :]
        values = tl.load(value_ptr + block[:, None] * P + number[None, :], mask=mask, other=float("inf"))
        value, part = tl.min(values, 0, return_indices=True)
        which = tl.where(value < best, first + part, which)
        best = tl.where(value < best, value, best)
    return best, tl.load(nearest_ptr + which * P + number, mask=number < P, other=0)


@triton.jit(do_not_specialize=["B", "m1", "m2", "blocks"])
def _select_forward_kernel(
    value_ptr, nearest_ptr, n00_ptr, n01_ptr, n10_ptr, n11_ptr, B, P1, P2, m1, m2, blocks,
    BOTH: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program: the places of BLOCK patches of one group, direction and image among all of them.

    A place is the number of patches that come before: nothing is sorted, and every program is alone.
    """
    blocks_1 = tl.cdiv(P1, BLOCK)
    programs = blocks_1
    if BOTH:
        programs += tl.cdiv(P2, BLOCK)
    which = tl.program_id(0) % programs
    image = tl.program_id(0) // programs
    at = image.to(tl.int64) * (P1 + blocks * P2)
    back = (which >= blocks_1).to(tl.int32)
    P = P1
    m = m1
    parts = 1
    if back == 1:
        which -= blocks_1
        at += P1
        P = P2
        m = m2
        parts = blocks
    number = which * BLOCK + tl.arange(0, BLOCK)
    value, nearest = _nearest_of_blocks(value_ptr + at, nearest_ptr + at, number, P, parts, PARTS)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, P, BLOCK):
        numbers = start + tl.arange(0, BLOCK)
        values, _ = _nearest_of_blocks(value_ptr + at, nearest_ptr + at, numbers, P, parts, PARTS)
        place += _before(value, number, values, numbers)
    chosen = (place < m) & (number < P)
    numbers_ptr = match_numbers(image // B, back, n00_ptr, n01_ptr, n10_ptr, n11_ptr)
    _store_matches(numbers_ptr, place, chosen, number, nearest, image.to(tl.int64) % B, B, m, ACROSS)


@triton.jit(do_not_specialize=["B", "m"])
def _distance_forward_kernel(
    x_ptr, y_ptr, index_ptr, distance_ptr, B, C, m,
    x_stride_b, x_stride_p, x_stride_c, y_stride_b, y_stride_p, y_stride_c,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Euclidean distances (B, m) of matches, index (2, B, m), from their differences.  One program: BLOCK_M of an image."""
    blocks = tl.cdiv(m, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    at = b * m + k
    query = tl.load(index_ptr + at, mask=k < m, other=0)
    candidate = tl.load(index_ptr + B.to(tl.int64) * m + at, mask=k < m, other=0)
    x_rows = x_ptr + b * x_stride_b + query * x_stride_p
    y_rows = y_ptr + b * y_stride_b + candidate * y_stride_p
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, C, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        mask = (k < m)[:, None] & (d < C)[None, :]
        x = tl.load(x_rows[:, None] + d.to(tl.int64)[None, :] * x_stride_c, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_rows[:, None] + d.to(tl.int64)[None, :] * y_stride_c, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum((x - y) * (x - y), 1)
    tl.store(distance_ptr + at, tl.sqrt_rn(squares), mask=k < m)
