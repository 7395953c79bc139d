"""The primal side: shifted second moments of the columns, in one pass over the views.

    S = sum (z - s)'(z - s)      t = sum (z - s)      q = sum (z - s)^2      over a chunk of rows

s is the mean of the chunk's first block: any constant will do, and one near the mean loses nothing (a single row would
lose everything where it is an outlier).  combine.py makes C, means and variances of them.

x, y: (P, N, D), any strides, rows by index if wanted.  S: tiles on or below the diagonal, (V * P * tiles, K, B, B); s, t
and the root of q: sums (K, V * P, 3, D); the invariance's sum of each program.  N D^2 operations a view.
"""

import triton
import triton.language as tl

from .rows import column_offsets, load_rows, rounded, row_offsets, stored, triangle, view_of


@triton.jit
def _provisional_centre(
    columns, n, end, N, p, index_ptr, stride_p, stride_n, stride_i, inside, HAS_INDEX: tl.constexpr
):  # fmt: skip
    """Mean of the rows n of the columns; the first of them is subtracted first: a constant column gives its value."""
    rows = row_offsets(p, n, N, index_ptr, stride_p, stride_n, stride_i, HAS_INDEX)
    mask = (n < end)[:, None] & inside[None, :]
    z = load_rows(columns, rows, mask)
    first = tl.sum(tl.where((tl.arange(0, n.shape[0]) == 0)[:, None], z, 0.0), 0)
    e = tl.where(mask, z - first[None, :], 0.0)
    return first + tl.sum(e, 0) / tl.minimum(end - tl.min(n, 0), n.shape[0])


@triton.jit
def _store_sums(sums_ptr, at, d, D, s, t, q):
    """s, t and the root of q of columns d, into row ``at`` of sums (K * V * P, 3, D)."""
    sums = sums_ptr + at * 3 * D + d
    tl.store(sums, s, mask=d < D)
    tl.store(sums + D, t, mask=d < D)
    tl.store(sums + 2 * D, tl.sqrt(q.to(tl.float64)).to(tl.float32), mask=d < D)


@triton.jit(do_not_specialize=["P", "tiles", "parts"])
def _second_moment_forward_kernel(
    x_ptr, y_ptr, index_ptr, product_ptr, sums_ptr, inv_sums_ptr, ticket_ptr,
    P, N, D, tiles, parts, length,
    x_stride_p, x_stride_n, x_stride_i, x_stride_d, y_stride_p, y_stride_n, y_stride_i, y_stride_d,
    VIEWS: tl.constexpr, HAS_INDEX: tl.constexpr, ROUND: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: ``length`` rows of one tile of one problem of one view."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(ticket_ptr, 0)
    i, j = triangle(program % tiles)
    k = (program // tiles) % parts
    problem = program // tiles // parts
    v = problem // P
    p = problem % P
    z_ptr, z_index, stride_p, stride_n, stride_i, stride_d = view_of(
        v, P, N, x_ptr, y_ptr, index_ptr, x_stride_p, x_stride_n, x_stride_i, x_stride_d,
        y_stride_p, y_stride_n, y_stride_i, y_stride_d, HAS_INDEX,
    )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    d_i = i * BLOCK_M + m
    d_j = j * BLOCK_M + m
    columns_i = z_ptr + column_offsets(d_i, stride_d)
    columns_j = z_ptr + column_offsets(d_j, stride_d)
    start = k * length
    end = tl.minimum(start + length, N)
    n = start + tl.arange(0, BLOCK_K)
    s_i = _provisional_centre(
        columns_i, n, end, N, p, z_index, stride_p, stride_n, stride_i, d_i < D, HAS_INDEX
    )
    s_j = _provisional_centre(
        columns_j, n, end, N, p, z_index, stride_p, stride_n, stride_i, d_j < D, HAS_INDEX
    )
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for top in range(start, end, BLOCK_K):
        n = top + tl.arange(0, BLOCK_K)
        rows = row_offsets(p, n, N, z_index, stride_p, stride_n, stride_i, HAS_INDEX)
        mask_i = (d_i < D)[:, None] & (n < end)[None, :]
        mask_j = (d_j < D)[None, :] & (n < end)[:, None]
        a = tl.load(columns_i[:, None] + rows[None, :], mask=mask_i, other=0.0).to(tl.float32)
        a = rounded(tl.where(mask_i, a - s_i[:, None], 0.0), ROUND)
        b = load_rows(columns_j, rows, mask_j)
        b = rounded(tl.where(mask_j, b - s_j[None, :], 0.0), ROUND)
        acc = tl.dot(stored(a, ROUND).to(TYPE), stored(b, ROUND).to(TYPE), acc, input_precision=PRECISION)
    if ROUND == "fp16":
        acc *= 4.0  # of halves, see rounded()
    at = ((problem.to(tl.int64) * tiles + program % tiles) * parts + k) * BLOCK_M * BLOCK_M
    tl.store(product_ptr + at + m[:, None] * BLOCK_M + m[None, :], acc)

    # A second time through the columns, which are in the cache: their sums would be in the product's way.
    difference = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    if i == j:
        t = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        q = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        o_ptr, o_index, o_stride_p, o_stride_n, o_stride_i, o_stride_d = view_of(
            v ^ 1, P, N, x_ptr, y_ptr, index_ptr, x_stride_p, x_stride_n, x_stride_i, x_stride_d,
            y_stride_p, y_stride_n, y_stride_i, y_stride_d, HAS_INDEX and VIEWS > 1,
        )  # fmt: skip
        others = o_ptr + column_offsets(d_i, o_stride_d)
        for top in range(start, end, BLOCK_K):
            n = top + tl.arange(0, BLOCK_K)
            rows = row_offsets(p, n, N, z_index, stride_p, stride_n, stride_i, HAS_INDEX)
            mask = (n < end)[:, None] & (d_i < D)[None, :]
            z = load_rows(columns_i, rows, mask)
            e = tl.where(mask, z - s_i[None, :], 0.0)
            t += e
            q += e * e
            if VIEWS > 1:
                if v % 2 == 1:
                    rows = row_offsets(p, n, N, o_index, o_stride_p, o_stride_n, o_stride_i, HAS_INDEX)
                    other = load_rows(others, rows, mask)
                    difference += (other - z) * (other - z)
        problems = tl.num_programs(0) // tiles // parts
        _store_sums(sums_ptr, k.to(tl.int64) * problems + problem, d_i, D, s_i, tl.sum(t, 0), tl.sum(q, 0))
    if VIEWS > 1:
        tl.store(inv_sums_ptr + program, tl.sum(tl.sum(difference, 1).to(tl.float64)))


@triton.jit
def _accumulate(
    z, s, mask, acc, t, q, ROUND: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, FEW: tl.constexpr
):  # fmt: skip
    """(acc, t, q) with the rows z (BLOCK_K, BLOCK_M) added; t, and q but of few rows, is summed over rows at the end."""
    a = tl.where(mask, z - s[None, :], 0.0)
    if FEW:
        wide = a.to(tl.float64)
        q += tl.sum(wide * wide, 0)
    else:
        q += a * a
    o = stored(rounded(a, ROUND), ROUND).to(TYPE)
    return tl.dot(tl.trans(o), o, acc, input_precision=PRECISION), t + a, q


@triton.jit(do_not_specialize=["P", "parts"])
def _narrow_second_moment_forward_kernel(
    x_ptr, y_ptr, index_ptr, product_ptr, sums_ptr, inv_sums_ptr, ticket_ptr,
    P, N, D, parts, length,
    x_stride_p, x_stride_n, x_stride_i, x_stride_d, y_stride_p, y_stride_n, y_stride_i, y_stride_d,
    VIEWS: tl.constexpr, HAS_INDEX: tl.constexpr, ROUND: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr, FEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: ``length`` rows of both views of a pair, where all features fit one tile.

    Each element is read once: long columns of few features are bound by bytes.  FEW: so few samples may be so near to
    each other that float32 has no squares for their distances.  (With so few, more features are dual.)
    """
    program = tl.program_id(0)
    if program == 0:
        tl.store(ticket_ptr, 0)
    k = program % parts
    p = (program // parts) % P
    pair = program // parts // P
    v = 2 * pair
    first_ptr, first_index, first_p, first_n, first_i, first_d = view_of(
        v, P, N, x_ptr, y_ptr, index_ptr, x_stride_p, x_stride_n, x_stride_i, x_stride_d,
        y_stride_p, y_stride_n, y_stride_i, y_stride_d, HAS_INDEX,
    )  # fmt: skip
    second_ptr, second_index, second_p, second_n, second_i, second_d = view_of(
        v + 1, P, N, x_ptr, y_ptr, index_ptr, x_stride_p, x_stride_n, x_stride_i, x_stride_d,
        y_stride_p, y_stride_n, y_stride_i, y_stride_d, HAS_INDEX and VIEWS > 1,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_M)
    first_columns = first_ptr + column_offsets(d, first_d)
    second_columns = second_ptr + column_offsets(d, second_d)
    start = k * length
    end = tl.minimum(start + length, N)
    n = start + tl.arange(0, BLOCK_K)
    first_s = _provisional_centre(
        first_columns, n, end, N, p, first_index, first_p, first_n, first_i, d < D, HAS_INDEX
    )
    first_acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    first_t = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    first_q = tl.zeros((BLOCK_M,), tl.float64) if FEW else tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    if VIEWS > 1:
        second_s = _provisional_centre(
            second_columns, n, end, N, p, second_index, second_p, second_n, second_i, d < D, HAS_INDEX
        )
        second_acc = tl.zeros_like(first_acc)
        second_t = tl.zeros_like(first_t)
        second_q = tl.zeros_like(first_q)
        difference = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for top in range(start, end, BLOCK_K):
        n = top + tl.arange(0, BLOCK_K)
        mask = (n < end)[:, None] & (d < D)[None, :]
        rows = row_offsets(p, n, N, first_index, first_p, first_n, first_i, HAS_INDEX)
        z = load_rows(first_columns, rows, mask)
        first_acc, first_t, first_q = _accumulate(
            z, first_s, mask, first_acc, first_t, first_q, ROUND, TYPE, PRECISION, FEW
        )
        if VIEWS > 1:
            rows = row_offsets(p, n, N, second_index, second_p, second_n, second_i, HAS_INDEX)
            other = load_rows(second_columns, rows, mask)
            difference += (other - z) * (other - z)
            second_acc, second_t, second_q = _accumulate(
                other, second_s, mask, second_acc, second_t, second_q, ROUND, TYPE, PRECISION, FEW
            )
    scale = 4.0 if ROUND == "fp16" else 1.0  # of halves, see rounded()
    square = tl.arange(0, BLOCK_M)[:, None] * BLOCK_M + d[None, :]
    problems = tl.num_programs(0) // parts * (2 if VIEWS > 1 else 1)
    problem = (v * P + p).to(tl.int64)
    tl.store(product_ptr + (problem * parts + k) * BLOCK_M * BLOCK_M + square, first_acc * scale)
    at = k.to(tl.int64) * problems + problem
    _store_sums(sums_ptr, at, d, D, first_s, tl.sum(first_t, 0), first_q if FEW else tl.sum(first_q, 0))
    if VIEWS > 1:
        problem += P
        tl.store(product_ptr + (problem * parts + k) * BLOCK_M * BLOCK_M + square, second_acc * scale)
        _store_sums(
            sums_ptr, at + P, d, D, second_s, tl.sum(second_t, 0), second_q if FEW else tl.sum(second_q, 0)
        )
        tl.store(inv_sums_ptr + program, tl.sum(tl.sum(difference, 1).to(tl.float64)))
