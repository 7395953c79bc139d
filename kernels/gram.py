"""The smaller side: M = o'o / (N-1) (primal, D x D) or o o' / (N-1) (dual, N x N), and all that is summed from it.

    dual     S = o o'  of the copies that moments.py wrote, their diagonal by the energy that it summed
    primal   S = sum over chunks of rows of (z - s)'(z - s), s the mean of the chunk's first block, with
             q = sum (z - s)^2 and t = sum (z - s): one pass over the views
    combine  dual     M = sum_k S_k / (N-1)
             primal   M = sum_k [S_k - t_k t_k' / n_k + n_k (m_k - m)(m_k - m)'] / (N-1), zero diagonal,
                      m_k = s_k + t_k / n_k (Chan), and the columns' mean and standard deviation by the same formula
             cov = (sum M^2 - [dual] sum vhat^2) / D, the other terms, their weights and their sum

Only tiles on or below the diagonal are multiplied; their inner dimension is split where tiles are few.  Partial
products (K, V * P, tiles, B, B) are added in the order of k; the last program to finish adds up what all have found,
in a fixed order, so two runs agree bit for bit.
"""

import triton
import triton.language as tl

from .rows import above_zero, rounded, row_offsets, triangle


@triton.jit
def _gram_forward_kernel(
    operand_ptr, product_ptr,
    N, D, inner,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Dual: one program multiplies ``inner`` features of one tile of o o', of operand (V * P, N, D)."""
    i, j = triangle(tl.program_id(0))
    k = tl.program_id(1)
    problem = tl.program_id(2).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    rows_i = i * BLOCK_M + m
    rows_j = j * BLOCK_M + m
    a_ptr = operand_ptr + problem * N * D + rows_i.to(tl.int64) * D
    b_ptr = operand_ptr + problem * N * D + rows_j.to(tl.int64) * D
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    end = tl.minimum((k + 1) * inner, D)
    for start in range(k * inner, end, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr[:, None] + d[None, :], mask=(rows_i < N)[:, None] & (d < end)[None, :], other=0.0)
        b = tl.load(b_ptr[None, :] + d[:, None], mask=(rows_j < N)[None, :] & (d < end)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tile = (k.to(tl.int64) * tl.num_programs(2) + problem) * tl.num_programs(0) + tl.program_id(0)
    tl.store(product_ptr + tile * BLOCK_M * BLOCK_M + m[:, None] * BLOCK_M + m[None, :], acc)


@triton.jit
def _provisional_centre(
    columns, n, end, N, p, index_ptr, stride_p, stride_n, stride_i, inside, HAS_INDEX: tl.constexpr
):  # fmt: skip
    """Mean of the rows n of the columns; the first of them is subtracted first: a constant column gives its value."""
    rows = row_offsets(p, n, N, index_ptr, stride_p, stride_n, stride_i, HAS_INDEX)
    z = tl.load(columns[None, :] + rows[:, None], mask=(n < end)[:, None] & inside[None, :], other=0.0).to(
        tl.float32
    )
    first = tl.sum(tl.where((tl.arange(0, n.shape[0]) == 0)[:, None], z, 0.0), 0)
    e = tl.where((n < end)[:, None] & inside[None, :], z - first[None, :], 0.0)
    return first + tl.sum(e, 0) / tl.minimum(end - tl.min(n, 0), n.shape[0])


@triton.jit(do_not_specialize=["P"])
def _second_moment_forward_kernel(
    x_ptr, y_ptr, index_ptr, product_ptr, sums_ptr, partial_ptr, ticket_ptr,
    P, N, D, chunk,
    x_stride_p, x_stride_n, x_stride_i, x_stride_d,
    y_stride_p, y_stride_n, y_stride_i, y_stride_d,
    VIEWS: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr, HAS_INDEX: tl.constexpr,
    FEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Primal: one program multiplies ``chunk`` rows of one tile of z'z, shifted.

    sums (K, V * P, 3, D): s, t and the root of q of every chunk and column.  partial (K, P, tiles): the invariance's
    sums.  FEW: so few samples may be so near to each other that float32 has no squares for their distances.
    """
    tile = tl.program_id(0)
    k = tl.program_id(1)
    problem = tl.program_id(2)
    if (tile == 0) & (k == 0) & (problem == 0):
        tl.store(ticket_ptr, 0)
    i, j = triangle(tile)
    v = problem // P
    p = problem % P
    z_ptr = x_ptr
    stride_p, stride_n, stride_i, stride_d = x_stride_p, x_stride_n, x_stride_i, x_stride_d
    if VIEWS == 2:
        if v == 1:
            z_ptr = y_ptr
            stride_p, stride_n, stride_i, stride_d = y_stride_p, y_stride_n, y_stride_i, y_stride_d
    z_index = index_ptr
    if HAS_INDEX:
        z_index = index_ptr + v.to(tl.int64) * P * N
    m = tl.arange(0, BLOCK_M)
    d_i = i * BLOCK_M + m
    d_j = j * BLOCK_M + m
    columns_i = z_ptr + d_i.to(tl.int64) * stride_d
    columns_j = z_ptr + d_j.to(tl.int64) * stride_d
    start = k * chunk
    end = tl.minimum(start + chunk, N)
    n = start + tl.arange(0, BLOCK_K)
    s_i = _provisional_centre(
        columns_i, n, end, N, p, z_index, stride_p, stride_n, stride_i, d_i < D, HAS_INDEX
    )
    s_j = _provisional_centre(
        columns_j, n, end, N, p, z_index, stride_p, stride_n, stride_i, d_j < D, HAS_INDEX
    )
    acc = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    t = tl.zeros((BLOCK_M,), tl.float32)
    q = tl.zeros((BLOCK_M,), tl.float64 if FEW else tl.float32)
    difference = tl.zeros((BLOCK_M,), tl.float32)
    for top in range(start, end, BLOCK_K):
        n = top + tl.arange(0, BLOCK_K)
        rows = row_offsets(p, n, N, z_index, stride_p, stride_n, stride_i, HAS_INDEX)
        mask_i = (d_i < D)[:, None] & (n < end)[None, :]
        mask_j = (d_j < D)[None, :] & (n < end)[:, None]
        z = tl.load(columns_i[:, None] + rows[None, :], mask=mask_i, other=0.0).to(tl.float32)
        a = tl.where(mask_i, z - s_i[:, None], 0.0)
        b = tl.load(columns_j[None, :] + rows[:, None], mask=mask_j, other=0.0).to(tl.float32)
        b = tl.where(mask_j, b - s_j[None, :], 0.0)
        if i == j:
            t += tl.sum(a, 1)
            wide = a.to(tl.float64 if FEW else tl.float32)
            q += tl.sum(wide * wide, 1)
            if VIEWS == 2:
                if v == 1:
                    rows = row_offsets(p, n, N, index_ptr, x_stride_p, x_stride_n, x_stride_i, HAS_INDEX)
                    x = x_ptr + d_i.to(tl.int64) * x_stride_d
                    x = tl.load(x[:, None] + rows[None, :], mask=mask_i, other=0.0).to(tl.float32)
                    difference += tl.sum((x - z) * (x - z), 1)
        acc = tl.dot(rounded(a, ROUND), rounded(b, ROUND), acc, input_precision=PRECISION)
    part = (k.to(tl.int64) * tl.num_programs(2) + problem) * tl.num_programs(0) + tile
    tl.store(product_ptr + part * BLOCK_M * BLOCK_M + m[:, None] * BLOCK_M + m[None, :], acc)
    if i == j:
        sums = sums_ptr + (k.to(tl.int64) * tl.num_programs(2) + problem) * 3 * D + d_i
        tl.store(sums, s_i, mask=d_i < D)
        tl.store(sums + D, t, mask=d_i < D)
        tl.store(sums + 2 * D, tl.sqrt(q.to(tl.float64)).to(tl.float32), mask=d_i < D)
    if VIEWS == 2:
        if v == 1:
            at = (k.to(tl.int64) * P + p) * tl.num_programs(0) + tile
            tl.store(partial_ptr + at, tl.sum(difference.to(tl.float64)))


@triton.jit
def _column_mean(sums_ptr, problem, problems, d, D, N, chunk, chunks):
    """Mean of columns d less the first chunk's centre, which is returned too: both float64."""
    inside = d < D
    base = tl.load(sums_ptr + problem * 3 * D + d, mask=inside, other=0.0).to(tl.float64)
    offset = tl.zeros_like(base)
    for k in range(0, chunks):
        sums = sums_ptr + (k * problems + problem) * 3 * D + d
        s = tl.load(sums, mask=inside, other=0.0).to(tl.float64)
        t = tl.load(sums + D, mask=inside, other=0.0).to(tl.float64)
        n = tl.minimum(chunk, N - k * chunk)
        offset += (s - base) * n + t
    return base, offset / N


@triton.jit
def _sum_of(ptr, count, stride, BLOCK: tl.constexpr):
    """Sum of ``count`` float64 numbers, in a fixed order."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + at.to(tl.int64) * stride, mask=at < count, other=0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["P", "chunks", "partials", "energies"])
def _combine_forward_kernel(
    product_ptr, sums_ptr, energy_ptr, moments_ptr, M_ptr, found_ptr, partial_ptr, ticket_ptr,
    inv_ptr, var_ptr, cov_ptr, total_ptr,
    P, N, D, chunk, chunks, partials, energies, gamma, eps, w_inv, w_var, w_cov,
    VIEWS: tl.constexpr, DUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows of one tile of M, over all chunks; the last one to finish adds up the terms.

    found (V * P, tiles, strips, 2), float64: sums of M^2 and, on the primal side, of the hinge.  partial: what the first
    kernel found, (partials, 3) dual: invariance, hinge, vhat^2; (partials,) primal: invariance.  energy (V * P, energies,
    N), dual.
    """
    STRIPS: tl.constexpr = BLOCK_M // BLOCK_R
    strip = tl.program_id(0) % STRIPS
    tile = tl.program_id(0) // STRIPS
    tiles = tl.num_programs(0) // STRIPS
    problems = tl.num_programs(1)
    problem = tl.program_id(1).to(tl.int64)
    i, j = triangle(tile)
    side = N if DUAL else D
    r = strip * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_M)
    row = i * BLOCK_M + r
    column = j * BLOCK_M + c
    acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    hinge = tl.full((), 0.0, tl.float64)
    if DUAL:
        for k in range(0, chunks):
            part = (k * problems + problem) * tiles + tile
            acc += tl.load(product_ptr + part * BLOCK_M * BLOCK_M + r[:, None] * BLOCK_M + c[None, :])
        M = acc / (N - 1)
        if i == j:
            # A product adds in sequence; what the sum of vhat^2 is taken from must be as exact as that is.
            energy = tl.zeros((BLOCK_R,), tl.float64)
            for k in range(0, energies):
                energy += tl.load(energy_ptr + (problem * energies + k) * N + row, mask=row < N, other=0.0)
            M = tl.where(row[:, None] == column[None, :], (energy / (N - 1)).to(tl.float32)[:, None], M)
    else:
        base_r, mean_r = _column_mean(sums_ptr, problem, problems, row, D, N, chunk, chunks)
        base_c, mean_c = _column_mean(sums_ptr, problem, problems, column, D, N, chunk, chunks)
        square = tl.zeros((BLOCK_R,), tl.float64)
        for k in range(0, chunks):
            part = (k * problems + problem) * tiles + tile
            S = tl.load(product_ptr + part * BLOCK_M * BLOCK_M + r[:, None] * BLOCK_M + c[None, :])
            sums = sums_ptr + (k * problems + problem) * 3 * D
            n = tl.minimum(chunk, N - k * chunk)
            t_r = tl.load(sums + D + row, mask=row < D, other=0.0).to(tl.float64) / n
            t_c = tl.load(sums + D + column, mask=column < D, other=0.0).to(tl.float64) / n
            q = tl.load(sums + 2 * D + row, mask=row < D, other=0.0).to(tl.float64)
            # The chunk's mean less the whole one.
            b_r = tl.load(sums + row, mask=row < D, other=0.0).to(tl.float64) - base_r + t_r - mean_r
            b_c = tl.load(sums + column, mask=column < D, other=0.0).to(tl.float64) - base_c + t_c - mean_c
            between = n * (b_r[:, None] * b_c[None, :] - t_r[:, None] * t_c[None, :])
            acc += S + between.to(tl.float32)
            square += q * q + n * (b_r * b_r - t_r * t_r)
        M = tl.where(row[:, None] == column[None, :], 0.0, acc / (N - 1))
        if i == j:
            v = above_zero(square) / (N - 1)
            std = tl.sqrt(v)  # of float64, where it is exact
            at = moments_ptr + ((problem % P) * VIEWS + problem // P) * D + row
            rows = problems.to(tl.int64) * D
            hi = (base_r + mean_r).to(tl.float32)
            tl.store(at, hi, mask=row < D)
            tl.store(at + rows, (base_r - hi + mean_r).to(tl.float32), mask=row < D)
            tl.store(at + 2 * rows, std.to(tl.float32), mask=row < D)
            penalty = above_zero(gamma - (tl.sqrt(v + eps) if eps > 0 else std))
            hinge += tl.sum(tl.where(row < D, penalty, 0.0))
    inside = (row < side)[:, None] & (column < side)[None, :]
    M = tl.where(inside, M, 0.0)
    at = M_ptr + problem * side * side
    tl.store(at + row.to(tl.int64)[:, None] * side + column[None, :], M, mask=inside)
    wide = M.to(tl.float64)
    squares = tl.sum(tl.sum(wide * wide, 1), 0)
    if i != j:
        tl.store(at + column.to(tl.int64)[None, :] * side + row[:, None], M, mask=inside)
        squares = 2.0 * squares
    found = found_ptr + (problem * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(found, squares)
    tl.store(found + 1, hinge)

    tl.debug_barrier()  # all threads have stored before the ticket says so
    programs = tl.num_programs(0) * tl.num_programs(1)
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == programs - 1:
        norm = _sum_of(found_ptr, programs, 2, 1024)
        if DUAL:
            inv = _sum_of(partial_ptr, partials, 3, 1024)
            hinges = _sum_of(partial_ptr + 1, partials, 3, 1024)
            norm = above_zero(norm - _sum_of(partial_ptr + 2, partials, 3, 1024))
        else:
            inv = _sum_of(partial_ptr, partials, 1, 1024)
            hinges = _sum_of(found_ptr + 1, programs, 2, 1024)
        count = P.to(tl.float64) * D
        inv = (inv * w_inv / (count * N)).to(tl.float32)
        var = (hinges * w_var / (count * VIEWS)).to(tl.float32)
        cov = (norm * w_cov / (count * VIEWS)).to(tl.float32)
        tl.store(inv_ptr, inv)
        tl.store(var_ptr, var)
        tl.store(cov_ptr, cov)
        tl.store(total_ptr, inv + var + cov)
