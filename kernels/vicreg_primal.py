"""The primal side of VICReg's forward pass: shifted second moments of the columns, in one pass over the views.

    S = sum (z - s)'(z - s)      t = sum (z - s)      q = sum (z - s)^2      over a chunk of rows

s is the mean of the chunk's first block.  Any constant is right, and one near the mean loses no digits; a single row would
lose all of them if it is an outlier.  vicreg_splitk.py combines the chunks into C, means and variances.  The hinge, which
needs the variance of complete columns, is computed there too.

x, y: (P, N, D), any strides.  Writes the tiles of S on and below the diagonal, the chunks' s, t and sqrt(q), and each
program's sum of (x - y)^2.  N D^2 operations a view.  Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .numerics import divide, operand_of, tril_tile, undo_halves
from .views import (
    block_of_rows,
    column_pointers,
    load_rows,
    load_tile,
    row_offsets,
    select_source,
    zero_outside,
)


@triton.jit
def _provisional_centre(columns, rows, n, end, inside):
    """Mean of the rows n of the columns.  The first row is subtracted first: a constant column gives its value."""
    mask = (n < end)[:, None] & inside[None, :]
    z = load_rows(columns, rows, mask)
    first = tl.sum(tl.where((tl.arange(0, n.shape[0]) == 0)[:, None], z, 0.0), 0)
    e = tl.where(mask, z - first[None, :], 0.0)
    return first + divide(tl.sum(e, 0), tl.minimum(end - tl.min(n, 0), n.shape[0]))


@triton.jit
def _store_chunk(chunk_sums_ptr, at, d, D, s, t, q):
    """s, t and the root of q of columns d, into row ``at`` of chunk_sums (K * V * P, 3, D)."""
    sums = chunk_sums_ptr + at * 3 * D + d
    tl.store(sums, s, mask=d < D)
    tl.store(sums + D, t, mask=d < D)
    tl.store(sums + 2 * D, tl.sqrt(q.to(tl.float64)).to(tl.float32), mask=d < D)


@triton.jit
def _chunk_sums(
    views, source, columns, v, p, d, start, end, s, P, N, D,
    VIEWS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """t, q and, element by element, (x - y)^2 of columns d.  A pair's second view reads the first."""
    difference = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    t = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    q = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    other_source = select_source(views, v ^ 1)
    other_columns = column_pointers(other_source, d)
    n = tl.arange(0, BLOCK_K)
    for top in range(start, end, BLOCK_K):
        mask = (top + n < end)[:, None] & (d < D)[None, :]
        at, rows = block_of_rows(source, columns, views.index_ptr, v, p, top, n, P, N)
        z = load_tile(at[None, :] + rows[:, None], mask, EVEN).to(tl.float32)
        e = zero_outside(z - s[None, :], mask, EVEN)
        t += e
        q = tl.fma(e, e, q)
        if VIEWS > 1:
            if v % 2 == 1:
                at, rows = block_of_rows(other_source, other_columns, views.index_ptr, v ^ 1, p, top, n, P, N)
                e = load_tile(at[None, :] + rows[:, None], mask, EVEN).to(tl.float32) - z
                difference = tl.fma(e, e, difference)
    return tl.sum(t, 0), tl.sum(q, 0), difference


@triton.jit(do_not_specialize=["P", "tiles", "splits"])
def _second_moment_forward_kernel(
    views, split_tiles_ptr, chunk_sums_ptr, partials, P, N, D, tiles, splits, split_length,
    VIEWS: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: ``split_length`` rows of one tile of one problem of one view.  EVEN: all blocks are full."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(partials.arrival_counter_ptr, 0)
    i, j = tril_tile(program % tiles)
    k = (program // tiles) % splits
    problem = program // tiles // splits
    v = problem // P
    p = problem % P
    source = select_source(views, v)
    m = tl.arange(0, BLOCK_M)
    d_i = i * BLOCK_M + m
    d_j = j * BLOCK_M + m
    columns_i = column_pointers(source, d_i)
    columns_j = column_pointers(source, d_j)
    start = k * split_length
    end = tl.minimum(start + split_length, N)
    n = start + tl.arange(0, BLOCK_K)
    rows = row_offsets(source, views.index_ptr, v, p, n, P, N)
    s_i = _provisional_centre(columns_i, rows, n, end, d_i < D)
    s_j = _provisional_centre(columns_j, rows, n, end, d_j < D)
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    n = tl.arange(0, BLOCK_K)
    for top in range(start, end, BLOCK_K):
        at_i, rows = block_of_rows(source, columns_i, views.index_ptr, v, p, top, n, P, N)
        at_j, _ = block_of_rows(source, columns_j, views.index_ptr, v, p, top, n, P, N)
        mask_i = (d_i < D)[:, None] & (top + n < end)[None, :]
        mask_j = (d_j < D)[None, :] & (top + n < end)[:, None]
        a = load_tile(at_i[:, None] + rows[None, :], mask_i, EVEN).to(tl.float32)
        b = load_tile(at_j[None, :] + rows[:, None], mask_j, EVEN).to(tl.float32)
        a, _ = operand_of(zero_outside(a - s_i[:, None], mask_i, EVEN), FORMAT)
        b, _ = operand_of(zero_outside(b - s_j[None, :], mask_j, EVEN), FORMAT)
        acc = tl.dot(a, b, acc, input_precision=DOT_PRECISION)
    acc = undo_halves(acc, FORMAT)
    at = ((problem.to(tl.int64) * tiles + program % tiles) * splits + k) * BLOCK_M * BLOCK_M
    tl.store(split_tiles_ptr + at + m[:, None] * BLOCK_M + m[None, :], acc)

    # The columns are read again, from the cache: their sums would take registers from the matmul.
    difference = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    if i == j:
        t, q, difference = _chunk_sums(
            views, source, columns_i, v, p, d_i, start, end, s_i, P, N, D, VIEWS, EVEN, BLOCK_M, BLOCK_K
        )
        problems = tl.num_programs(0) // tiles // splits
        _store_chunk(chunk_sums_ptr, k.to(tl.int64) * problems + problem, d_i, D, s_i, t, q)
    if VIEWS > 1:
        tl.store(partials.column_ptr + program, tl.sum(tl.sum(difference, 1).to(tl.float64)))


@triton.jit
def _accumulate(
    z, s, mask, acc, t, q,
    EVEN: tl.constexpr, FORMAT: tl.constexpr, DOT_PRECISION: tl.constexpr, FP64_SQUARES: tl.constexpr,
):  # fmt: skip
    """(acc, t, q) with the rows z (BLOCK_K, BLOCK_M) added.  t, and q unless FP64_SQUARES, is summed over rows at the end."""
    e = zero_outside(z - s[None, :], mask, EVEN)
    if FP64_SQUARES:
        wide = e.to(tl.float64)
        q += tl.sum(wide * wide, 0)
    else:
        q = tl.fma(e, e, q)
    o, _ = operand_of(e, FORMAT)
    return tl.dot(tl.trans(o), o, acc, input_precision=DOT_PRECISION), t + e, q


@triton.jit(do_not_specialize=["P", "splits"])
def _narrow_second_moment_forward_kernel(
    views, split_tiles_ptr, chunk_sums_ptr, partials, P, N, D, splits, split_length,
    VIEWS: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr, DOT_PRECISION: tl.constexpr,
    FP64_SQUARES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: ``split_length`` rows of both views of a pair, where all features fit one tile.

    Each element is read once, because long columns of few features are bound by bytes.  FP64_SQUARES: with few samples,
    which may be so close together that float32 squares of their distances underflow.
    """
    program = tl.program_id(0)
    if program == 0:
        tl.store(partials.arrival_counter_ptr, 0)
    k = program % splits
    p = (program // splits) % P
    v = 2 * (program // splits // P)
    index_ptr = views.index_ptr
    first = select_source(views, v)
    second = select_source(views, v + 1)
    d = tl.arange(0, BLOCK_M)
    first_columns = column_pointers(first, d)
    second_columns = column_pointers(second, d)
    start = k * split_length
    end = tl.minimum(start + split_length, N)
    n = start + tl.arange(0, BLOCK_K)
    first_s = _provisional_centre(first_columns, row_offsets(first, index_ptr, v, p, n, P, N), n, end, d < D)
    first_acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    first_t = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    first_q = tl.zeros((BLOCK_M,), tl.float64) if FP64_SQUARES else tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    if VIEWS > 1:
        second_s = _provisional_centre(
            second_columns, row_offsets(second, index_ptr, v + 1, p, n, P, N), n, end, d < D
        )
        second_acc = tl.zeros_like(first_acc)
        second_t = tl.zeros_like(first_t)
        second_q = tl.zeros_like(first_q)
        difference = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    n = tl.arange(0, BLOCK_K)
    for top in range(start, end, BLOCK_K):
        mask = (top + n < end)[:, None] & (d < D)[None, :]
        at, rows = block_of_rows(first, first_columns, index_ptr, v, p, top, n, P, N)
        z = load_tile(at[None, :] + rows[:, None], mask, EVEN).to(tl.float32)
        first_acc, first_t, first_q = _accumulate(
            z, first_s, mask, first_acc, first_t, first_q, EVEN, FORMAT, DOT_PRECISION, FP64_SQUARES
        )
        if VIEWS > 1:
            at, rows = block_of_rows(second, second_columns, index_ptr, v + 1, p, top, n, P, N)
            other = load_tile(at[None, :] + rows[:, None], mask, EVEN).to(tl.float32)
            difference = tl.fma(other - z, other - z, difference)
            second_acc, second_t, second_q = _accumulate(
                other, second_s, mask, second_acc, second_t, second_q,
                EVEN, FORMAT, DOT_PRECISION, FP64_SQUARES,
            )  # fmt: skip
    square = tl.arange(0, BLOCK_M)[:, None] * BLOCK_M + d[None, :]
    problems = tl.num_programs(0) // splits * (2 if VIEWS > 1 else 1)
    problem = (v * P + p).to(tl.int64)
    tl.store(
        split_tiles_ptr + (problem * splits + k) * BLOCK_M * BLOCK_M + square, undo_halves(first_acc, FORMAT)
    )
    at = k.to(tl.int64) * problems + problem
    first_q = first_q if FP64_SQUARES else tl.sum(first_q, 0)
    _store_chunk(chunk_sums_ptr, at, d, D, first_s, tl.sum(first_t, 0), first_q)
    if VIEWS > 1:
        problem += P
        tl.store(
            split_tiles_ptr + (problem * splits + k) * BLOCK_M * BLOCK_M + square,
            undo_halves(second_acc, FORMAT),
        )
        second_q = second_q if FP64_SQUARES else tl.sum(second_q, 0)
        _store_chunk(chunk_sums_ptr, at + P, d, D, second_s, tl.sum(second_t, 0), second_q)
        tl.store(partials.column_ptr + program, tl.sum(tl.sum(difference, 1).to(tl.float64)))
