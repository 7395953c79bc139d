"""The primal side of VICReg's forward pass: shifted second moments of the columns, in one pass over the views.

    S = sum (z - s)'(z - s)      t = sum (z - s)      q = sum (z - s)^2      over a chunk of rows

s is about the mean of the chunk's first rows.  Any constant is right, and one near the mean loses no digits; a single row would
lose all of them if it is an outlier.  vicreg_splitk.py combines the chunks into C, means and variances.  The hinge, which
needs the variance of complete columns, is computed there too.

x, y: (P, N, D), any strides.  Writes the tiles of S on and below the diagonal, the chunks' s, t and sqrt(q), and each
program's sum of (x - y)^2.  N D^2 operations a view.  Letters and buffers: docs/notation.md.
"""

import triton
import triton.language as tl

from .numerics import operand_of, tril_tile, undo_halves
from .views import (
    block_of_rows,
    column_pointers,
    load_tile,
    row_offsets,
    select_source,
    zero_outside,
)


@triton.jit
def _rows(source, columns, index_ptr, v, p, n, P, N):
    """Pointers to rows n of the columns, (rows, columns)."""
    return columns[None, :] + row_offsets(source, index_ptr, v, p, n, P, N)[:, None]


@triton.jit
def _provisional_centre(
    views, source, columns, v, p, start, end, inside, P, N, FULL: tl.constexpr, ROWS: tl.constexpr
):
    """About the mean of the columns' first rows; of fewer than ROWS it lies nearer the first.  FULL: there are as many.

    The first row is subtracted before: a constant column gives its value, whatever the rounding.
    """
    index_ptr = views.index_ptr
    first = columns + row_offsets(source, index_ptr, v, p, start, P, N)
    first = tl.load(first) if FULL else tl.load(first, mask=inside, other=0.0)
    first = first.to(tl.float32)
    n = start + tl.arange(0, ROWS)
    mask = (n < end)[:, None] & inside[None, :]
    z = load_tile(_rows(source, columns, index_ptr, v, p, n, P, N), mask, FULL).to(tl.float32)
    e = zero_outside(z - first[None, :], mask, FULL)
    return first + tl.sum(e, 0) * (1.0 / ROWS)


@triton.jit
def _centred_operand(z, s, FORMAT: tl.constexpr):
    """What is multiplied for z - s.  bfloat16 subtracts without a conversion: s is of z's type, and the difference is rounded once."""
    if FORMAT == "bf16" and z.dtype == tl.bfloat16:
        return z - s.to(tl.bfloat16)
    o, _ = operand_of(z.to(tl.float32) - s, FORMAT)
    return o


@triton.jit
def _store_chunk(chunk_sums_ptr, at, d, D, s, t, q):
    """s, t and the root of q of columns d, into row ``at`` of chunk_sums (K * V * P, 3, D)."""
    sums = chunk_sums_ptr + at * 3 * D + d
    tl.store(sums, s, mask=d < D)
    tl.store(sums + D, t, mask=d < D)
    tl.store(sums + 2 * D, tl.sqrt(q.to(tl.float64)).to(tl.float32), mask=d < D)


@triton.jit
def _chunk_sums(
    views, source, v, p, d, start, end, s, P, N, D,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """t and q of columns d."""
    columns = column_pointers(source, d)
    t = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    q = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    n = tl.arange(0, BLOCK_K)
    for top in range(start, end, BLOCK_K):
        mask = (top + n < end)[:, None] & (d < D)[None, :]
        at, rows = block_of_rows(source, columns, views.index_ptr, v, p, top, n, P, N)
        z = load_tile(at[None, :] + rows[:, None], mask, EVEN).to(tl.float32)
        e = zero_outside(z - s[None, :], mask, EVEN)
        t += e
        q = tl.fma(e, e, q)
    return tl.sum(t, 0), tl.sum(q, 0)


@triton.jit
def _squared_difference(
    views, source, v, p, d, start, end, P, N, D,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum of (x - y)^2 over columns d, float64: every other block of rows.  A pair's second view has those between."""
    columns = column_pointers(source, d)
    other_source = select_source(views, v ^ 1)
    other_columns = column_pointers(other_source, d)
    total = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    n = tl.arange(0, BLOCK_K)
    for top in range(start + v % 2 * BLOCK_K, end, 2 * BLOCK_K):
        mask = (top + n < end)[:, None] & (d < D)[None, :]
        at, rows = block_of_rows(source, columns, views.index_ptr, v, p, top, n, P, N)
        z = load_tile(at[None, :] + rows[:, None], mask, EVEN).to(tl.float32)
        at, rows = block_of_rows(other_source, other_columns, views.index_ptr, v ^ 1, p, top, n, P, N)
        e = load_tile(at[None, :] + rows[:, None], mask, EVEN).to(tl.float32) - z
        total = tl.fma(e, e, total)
    return tl.sum(tl.sum(total, 1).to(tl.float64))


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
    v = tl.full((), 0, tl.int32)  # problem // P, without a division: there are four views at most
    for _ in tl.static_range(1, VIEWS):
        v += (problem >= (v + 1) * P).to(tl.int32)
    p = problem - v * P
    source = select_source(views, v)
    m = tl.arange(0, BLOCK_M)
    d_i = i * BLOCK_M + m
    d_j = j * BLOCK_M + m
    columns_i = column_pointers(source, d_i)
    columns_j = column_pointers(source, d_j)
    start = k * split_length
    end = tl.minimum(start + split_length, N)
    # As many that a thread has 16 bytes: otherwise the compiler shares out the rows of the loop below in smaller pieces too.
    ROWS: tl.constexpr = 16 if BLOCK_K > 32 else 32
    FULL: tl.constexpr = EVEN and BLOCK_K >= ROWS
    s_i = _provisional_centre(views, source, columns_i, v, p, start, end, d_i < D, P, N, FULL, ROWS)
    s_j = _provisional_centre(views, source, columns_j, v, p, start, end, d_j < D, P, N, FULL, ROWS)
    # Of the views' type, so that _centred_operand() and _chunk_sums() subtract the same.
    s_i = s_i.to(columns_i.dtype.element_ty).to(tl.float32)
    s_j = s_j.to(columns_j.dtype.element_ty).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    n = tl.arange(0, BLOCK_K)
    index_ptr = views.index_ptr
    at_i = tl.trans(_rows(source, columns_i, index_ptr, v, p, start + n, P, N))
    at_j = _rows(source, columns_j, index_ptr, v, p, start + n, P, N)
    for top in range(start, end, BLOCK_K):
        if index_ptr is not None:
            at_i = tl.trans(_rows(source, columns_i, index_ptr, v, p, top + n, P, N))
            at_j = _rows(source, columns_j, index_ptr, v, p, top + n, P, N)
        mask_i = (d_i < D)[:, None] & (top + n < end)[None, :]
        mask_j = (d_j < D)[None, :] & (top + n < end)[:, None]
        a = load_tile(at_i, mask_i, EVEN)
        b = load_tile(at_j, mask_j, EVEN)
        if index_ptr is None:
            at_i += BLOCK_K * source.stride_n
            at_j += BLOCK_K * source.stride_n
        a = zero_outside(_centred_operand(a, s_i[:, None], FORMAT), mask_i, EVEN)
        b = zero_outside(_centred_operand(b, s_j[None, :], FORMAT), mask_j, EVEN)
        acc = tl.dot(a, b, acc, input_precision=DOT_PRECISION)
    acc = undo_halves(acc, FORMAT)
    at = ((problem.to(tl.int64) * tiles + program % tiles) * splits + k) * BLOCK_M * BLOCK_M
    tl.store(split_tiles_ptr + at + m[:, None] * BLOCK_M + m[None, :], acc)

    # The columns are read again, from the cache: their sums would take registers from the matmul.  Programs of tiles on the
    # diagonal have t and q, the others the differences, of one block of columns each unless they are fewer than blocks.
    difference = tl.full((), 0.0, tl.float64)
    if i == j:
        t, q = _chunk_sums(views, source, v, p, d_i, start, end, s_i, P, N, D, EVEN, BLOCK_M, BLOCK_K)
        problems = tl.num_programs(0) // tiles // splits
        _store_chunk(chunk_sums_ptr, k.to(tl.int64) * problems + problem, d_i, D, s_i, t, q)
    elif VIEWS > 1:
        blocks = tl.cdiv(D, BLOCK_M)
        for block in range(i * (i - 1) // 2 + j, blocks, tiles - blocks):
            difference += _squared_difference(
                views, source, v, p, block * BLOCK_M + m, start, end, P, N, D, EVEN, BLOCK_M, BLOCK_K
            )
    if VIEWS > 1:
        tl.store(partials.column_ptr + program, difference)


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
    first_s = _provisional_centre(views, first, first_columns, v, p, start, end, d < D, P, N, EVEN, BLOCK_K)
    first_acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    first_t = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    first_q = tl.zeros((BLOCK_M,), tl.float64) if FP64_SQUARES else tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    if VIEWS > 1:
        second_s = _provisional_centre(
            views, second, second_columns, v + 1, p, start, end, d < D, P, N, EVEN, BLOCK_K
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
