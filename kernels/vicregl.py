"""VICRegL's per-image statistics: the terms of every image's matched patches, and their gradient, from the maps themselves.

    z = rows index[k] of a map, k < m      e = z - z_0      lo = mean(e)      c = e - lo      o = round(c)
    vhat = |o_d|^2 / (m - 1)
    dual    cov = (sum (o o')^2 / (m-1)^2 - sum vhat^2) / D      G = o o' / (m - 1)
    primal  cov = sum C0^2 / D                                   C0 = o'o / (m - 1), its diagonal zero
    g = f_inv (z - other) + f_var c + f_cov (G o - vhat o)       f_cov o C0 on the primal side

    f_cov and f_var are those of vicreg_backward.py divided by m - 1, f_inv by m.

Match sets: by location (kind 0) and by feature (kind 1), from x to y (direction 0) and from y to x (direction 1).  Each has
a query view (side 0) and a candidate view (side 1), and at most 64 matches.  x (B, L1, D), y (B, L2, D), any strides.  A
view's matched rows are gathered into registers and centred there.  Rows beyond m are copies of row 0, so that e is zero
there without a mask.

Forward, for each kind of an image: 6 m D elements are read (the queries twice, for the invariance), 8 m D sums over rows
written, and on the dual side 8 m^2 D operations done.  Backward: 4 m D elements are read for each kind and source of an
image, and each element of both gradients is written once.  What a column has once, and not once a row, is computed in the
forward pass, where each thread has columns of its own (finish_columns), and is read by the backward pass.
Letters and buffers: docs/notation.md; scales: vicreg_fast/scales.py.
"""

import triton
import triton.language as tl

from .epilogue import reduce_losses
from .numerics import (
    divide,
    operand_of,
    round_matrix,
    round_to_format,
    split_in_two,
    to_storage,
    undo_halves,
    variance_factor,
)
from .scatter_rows import add_rows
from .vicregl_columns import add_row_squares, centred_columns, column_squares, finish_columns, load_columns
from .views import match_set_offset, matches_of, select_source


@triton.jit
def gram_set_offset(kind, direction, B, m1, m2):
    """Offset of a match set in the flat Gram matrices, which are laid out as the index is."""
    m1 = m1.to(tl.int64)
    return 2 * B * (kind * (m1 * m1 + m2.to(tl.int64) * m2) + direction * m1 * m1)


@triton.jit
def _matched_rows(index_ptr, b, side, n, B, m, source):
    """Offsets of the matched rows n of image b, and of row 0, on the queries' (0) or the candidates' side (1) of a match set."""
    at = index_ptr + side * B * m + b * m
    offset = b * source.stride_p
    index = tl.load(at + tl.where(n < m, n, 0))
    return offset + index * source.stride_i, offset + tl.load(at) * source.stride_i


@triton.jit
def _off_diagonal(
    source, rows, row_0, f, o, d, weight, m, D,
    EVEN: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns f of the operand, as they are multiplied, and C0 in rows f and columns d; ``o``: columns d of the operand."""
    z, z_0 = load_columns(source, row_0, rows, f, D, EVEN)
    c, _ = centred_columns(z, z_0, weight, divide(1.0, m))
    o_f, _ = operand_of(c, FORMAT)
    C = tl.dot(tl.trans(o_f), to_storage(o, FORMAT).to(OPERAND_TYPE), input_precision=DOT_PRECISION)
    C = undo_halves(C, FORMAT) * divide(1.0, m - 1)
    return o_f, tl.where(f[:, None] == d[None, :], 0.0, C)


@triton.jit
def _off_diagonal_norms(
    source, rows, row_0, o, d, weight, m, D, EVEN: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Sums of C0^2 over all rows, of columns d, float64."""
    norms = tl.zeros((d.shape[0],), tl.float64)
    for first in range(0, D, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        _, C = _off_diagonal(
            source, rows, row_0, f, o, d, weight, m, D, EVEN, FORMAT, OPERAND_TYPE, DOT_PRECISION
        )
        wide = C.to(tl.float64)
        norms += tl.sum(wide * wide, 0)
    return norms


@triton.jit
def _add_to_gram(gram, operand, DOT_PRECISION: tl.constexpr):
    """gram + o o'; in two TF32 parts h and l, o = h + l: gram + h h' + 2 h l', which _finish_gram() makes symmetric."""
    if DOT_PRECISION == "tf32x3":
        high, low = split_in_two(operand)
        gram = tl.dot(high, tl.trans(high), gram, input_precision="tf32")
        return tl.dot(high, tl.trans(low + low), gram, input_precision="tf32")
    else:
        return tl.dot(operand, tl.trans(operand), gram, input_precision=DOT_PRECISION)


@triton.jit
def _finish_gram(gram, row_sq_norms, n, m, gram_ptr, FORMAT: tl.constexpr, DOT_PRECISION: tl.constexpr):
    """Sum of (o o')^2, float64, of which the row norms are the diagonal.  G is stored, rounded, unless gram_ptr is None."""
    if DOT_PRECISION == "tf32x3":
        gram = (gram + tl.trans(gram)) * 0.5
    wide = undo_halves(gram, FORMAT).to(tl.float64)
    wide = tl.where(n[:, None] == n[None, :], row_sq_norms.to(tl.float64)[:, None], wide)
    if gram_ptr is not None:
        inside = (n < m)[:, None] & (n < m)[None, :]
        G = wide.to(tl.float32) * divide(1.0, m - 1)
        tl.store(gram_ptr + n[:, None] * m + n[None, :], round_matrix(G, FORMAT), mask=inside)
    return tl.sum(tl.sum(wide * wide, 1), 0)


@triton.jit(do_not_specialize=["B", "m1", "m2"])
def _vicregl_forward_kernel(
    views, gram_ptr, columns_ptr, squares_ptr, partials_ptr, arrival_counter_ptr, location, feature, total_ptr, scales,
    B, D, m1, m2, gamma, eps,
    DUAL: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, COLUMN_ROWS: tl.constexpr,
    DOT_PRECISION: tl.constexpr, PTX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: one view of one match set of one image.  The candidates' program computes the invariance too.

    BLOCK_D columns at a time, and at the end, where each has one value, BLOCK_S.
    """
    program = tl.program_id(0)
    side = program % 2
    direction = program // 2 % 2
    kind = program // 4 % 2
    b = (program // 8).to(tl.int64)
    B = B.to(tl.int64)
    m = matches_of(direction, m1, m2)
    index_ptr = views.index_ptr + match_set_offset(kind, direction, B, m1, m2)
    source = select_source(views, 2 * direction + side)
    query_source = select_source(views, 2 * direction)
    n = tl.arange(0, BLOCK_N)
    weight = (n < m).to(tl.float32)
    rows, row_0 = _matched_rows(index_ptr, b, side, n, B, m, source)
    query_rows, query_row_0 = _matched_rows(index_ptr, b, 0, n, B, m, query_source)
    columns_ptr += program.to(tl.int64) * COLUMN_ROWS * D
    squares_ptr += program.to(tl.int64) * D
    # With float32 sums the rounding of one strong feature would show in what the float32-accurate dual side subtracts.
    ACCURATE: tl.constexpr = FORMAT == "fp32"
    WIDE: tl.constexpr = tl.float64 if ACCURATE else tl.float32
    # Columns that are neighbours in memory, which one thread reads, are added at once.
    PARTS: tl.constexpr = 16 * 8 // views.x_ptr.dtype.element_ty.primitive_bitwidth
    differences = tl.zeros((BLOCK_N, BLOCK_D // PARTS), tl.float32)
    norm = tl.zeros((BLOCK_D,), tl.float64)
    gram = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    row_sq_norms = tl.zeros((BLOCK_N, BLOCK_D // PARTS), WIDE)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        z, z_0 = load_columns(source, row_0, rows, d, D, EVEN, PTX)
        if side == 1:
            q, _ = load_columns(query_source, query_row_0, query_rows, d, D, EVEN, PTX)
            differences = add_row_squares(differences, q - z)
        c, lo = centred_columns(z, z_0, weight, divide(1.0, m))
        stored, o = operand_of(c, FORMAT, PTX)
        inside = d < D
        tl.store(columns_ptr + d, lo, mask=inside)
        if COLUMN_ROWS == 4:
            tl.store(columns_ptr + 3 * D + d, z_0, mask=inside)
        if DUAL and ACCURATE:
            # Float64 squares beside the matmul's operands would take too many registers.
            gram = _add_to_gram(gram, stored, DOT_PRECISION)
        tl.store(squares_ptr + d, column_squares(c.to(WIDE)), mask=inside)
        if DUAL:
            row_sq_norms = add_row_squares(row_sq_norms, o.to(WIDE))
            if not ACCURATE:
                tl.store(columns_ptr + D + d, column_squares(o), mask=inside)
                gram = _add_to_gram(gram, stored, DOT_PRECISION)
        else:
            norm += _off_diagonal_norms(
                source, rows, row_0, o, d, weight, m, D, EVEN, FORMAT, OPERAND_TYPE, DOT_PRECISION, BLOCK_F
            )
    at = partials_ptr + (kind * 4 * B + program // 8 * 4 + direction * 2 + side) * 3
    # Zero in the rows from m on, even if row 0 is infinite.
    differences = tl.where(n < m, tl.sum(differences, 1), 0.0).to(tl.float64)
    tl.store(at, tl.sum(differences) / m)
    if DUAL:
        G_ptr = gram_ptr
        if gram_ptr is not None:
            G_ptr = gram_ptr + gram_set_offset(kind, direction, B, m1, m2) + (side * B + b) * m * m
        cov = _finish_gram(gram, tl.sum(row_sq_norms, 1), n, m, G_ptr, FORMAT, DOT_PRECISION)
    else:
        cov = tl.sum(norm)
    hinge, norm_v = finish_columns(
        source, rows, row_0, weight, squares_ptr, columns_ptr, m, D, gamma, eps, DUAL, FORMAT, BLOCK_S
    )
    if DUAL:
        cov = (cov - norm_v) / ((m.to(tl.float64) - 1) * (m - 1))
    tl.store(at + 1, hinge)
    tl.store(at + 2, cov)
    reduce_losses(partials_ptr, 4 * B, arrival_counter_ptr, location, feature, total_ptr, scales)


@triton.jit
def _match_set_gradient(
    views, index_ptr, gram_ptr, columns_ptr, upstream, scales, direction, of_y, b, n, d, B, D, m,
    DUAL: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    COLUMN_ROWS: tl.constexpr,
):  # fmt: skip
    """Of one source's rows in one match set, rows n and columns d: (gradient, pointer to the indices of the rows).

    Rows from m on are not the gradient of anything.  index_ptr, gram_ptr: those of the match set; columns_ptr: of its queries.
    """
    # Beside a float32 M, as float16 has it, the operand is float32 too.
    LEFT: tl.constexpr = tl.float32 if FORMAT == "fp16" else OPERAND_TYPE
    side = direction ^ of_y  # 0: this source's rows are the queries
    source = select_source(views, 2 * direction + side)
    rows, row_0 = _matched_rows(index_ptr, b, side, n, B, m, source)
    z, z_0 = load_columns(source, row_0, rows, d, D, EVEN)
    columns_ptr += side * COLUMN_ROWS * D
    inverse_degrees = divide(1.0, m - 1)
    lo = tl.load(columns_ptr + d, mask=d < D, other=0.0)
    weight = (n < m).to(tl.float32)
    c = tl.fma(-weight[:, None], lo[None, :], z - z_0[None, :])
    g = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if upstream.inv_ptr is not None:
        other_source = select_source(views, 2 * direction + (1 - side))
        other_rows, other_row_0 = _matched_rows(index_ptr, b, 1 - side, n, B, m, other_source)
        other, _ = load_columns(other_source, other_row_0, other_rows, d, D, EVEN)
        g = (z - other) * divide(tl.load(upstream.inv_ptr).to(tl.float32) * scales.inv, m)
    if upstream.var_ptr is not None:
        u = tl.load(upstream.var_ptr).to(tl.float32) * scales.var * inverse_degrees
        slope = tl.load(columns_ptr + 2 * D + d, mask=d < D, other=0.0)
        g = tl.fma(c, variance_factor(slope, u)[None, :], g)
    if upstream.cov_ptr is not None:
        o = round_to_format(c, FORMAT)
        f_cov = tl.load(upstream.cov_ptr).to(tl.float32) * scales.cov * inverse_degrees
        if DUAL:
            inside = (n < m)[:, None] & (n < m)[None, :]
            G_ptr = gram_ptr + (side * B + b) * m * m
            G = tl.load(G_ptr + n[:, None] * m + n[None, :], mask=inside, other=0.0)
            operand_v = tl.load(columns_ptr + D + d, mask=d < D, other=0.0)
            product = tl.dot(G, o.to(LEFT), o * -operand_v[None, :], input_precision=DOT_PRECISION)
        else:
            product = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            for first in range(0, D, BLOCK_F):
                f = first + tl.arange(0, BLOCK_F)
                o_f, C = _off_diagonal(
                    source, rows, row_0, f, o, d, weight, m, D, EVEN, FORMAT, OPERAND_TYPE, DOT_PRECISION
                )
                C = round_matrix(C, FORMAT)
                product = tl.dot(o_f.to(LEFT), C.to(LEFT), product, input_precision=DOT_PRECISION)
            if FORMAT == "fp16":
                product *= 2.0  # of a half
        g = tl.fma(product, f_cov, g)
    return g, index_ptr + side * B * m + b * m


@triton.jit
def match_sets_gradient(
    views, gram_ptr, columns_ptr, location, feature, scales, of_y, b, patch, d, B, D, m1, m2,
    DUAL: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    EXACT_PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
    COLUMN_ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of patches and columns d of image b of a source: that of every match set, row by row, added up.

    ROWS: the FORMAT of add_rows().  COLUMN_ROWS: of columns_ptr (8 B, COLUMN_ROWS, D).
    """
    n = tl.arange(0, BLOCK_N)
    out = tl.zeros((patch.shape[0], d.shape[0]), tl.float32)
    for kind in tl.static_range(2):
        upstream = location if kind == 0 else feature
        if upstream.inv_ptr is not None or upstream.var_ptr is not None or upstream.cov_ptr is not None:
            index_ptr = views.index_ptr + match_set_offset(kind, 0, B, m1, m2)
            G_ptr = gram_ptr
            if gram_ptr is not None:
                G_ptr = gram_ptr + gram_set_offset(kind, 0, B, m1, m2)
            for direction in range(2):
                m = matches_of(direction, m1, m2)
                of_queries = columns_ptr + (b * 8 + kind * 4 + direction * 2) * COLUMN_ROWS * D
                g, own_index_ptr = _match_set_gradient(
                    views, index_ptr, G_ptr, of_queries, upstream, scales, direction, of_y, b, n, d, B, D, m,
                    DUAL, EVEN, FORMAT, OPERAND_TYPE, DOT_PRECISION, BLOCK_N, d.shape[0], BLOCK_F, COLUMN_ROWS,
                )  # fmt: skip
                out = add_rows(out, g, n, m, own_index_ptr, 1, patch, ROWS, EXACT_PRECISION)
                # From the match set x to y to that of y to x.
                index_ptr += 2 * B * m1
                if gram_ptr is not None:
                    G_ptr += 2 * B * m1 * m1
    return out


@triton.jit(do_not_specialize=["B", "m1", "m2"])
def _vicregl_gradient_kernel(
    views, gram_ptr, columns_ptr, x_grad_ptr, y_grad_ptr, location, feature, scales, B, L1, L2, D, m1, m2,
    DUAL: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr, EXACT_PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_L patches and BLOCK_D columns of the gradient of one image of x or of y.

    x_grad_ptr, y_grad_ptr None: the source needs no gradient.  location, feature: Upstream of vicreg_backward.py.
    """
    columns = tl.cdiv(D, BLOCK_D)
    x_tiles = 0 if x_grad_ptr is None else tl.cdiv(L1, BLOCK_L)
    tiles = x_tiles + (0 if y_grad_ptr is None else tl.cdiv(L2, BLOCK_L))
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = tl.program_id(0) // columns % tiles
    b = (tl.program_id(0) // columns // tiles).to(tl.int64)
    B = B.to(tl.int64)
    of_y = (tile >= x_tiles).to(tl.int32)
    L = L2 if x_grad_ptr is None else L1
    g_ptr = y_grad_ptr if x_grad_ptr is None else x_grad_ptr
    if x_grad_ptr is not None and y_grad_ptr is not None:
        if of_y == 1:
            tile -= x_tiles
            L = L2
            g_ptr = y_grad_ptr
    # Of a float32 gradient, two bfloat16 parts of a row would lose six bits.
    ROWS: tl.constexpr = FORMAT if g_ptr.dtype.element_ty == tl.bfloat16 else "fp32"
    patch = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    out = match_sets_gradient(
        views, gram_ptr, columns_ptr, location, feature, scales, of_y, b, patch, d, B, D, m1, m2,
        DUAL, EVEN, FORMAT, OPERAND_TYPE, DOT_PRECISION, EXACT_PRECISION, ROWS, BLOCK_N, BLOCK_F, 3,
    )  # fmt: skip
    at = g_ptr + (b * L + patch)[:, None] * D + d[None, :]
    tl.store(at, out, mask=(patch < L)[:, None] & (d < D)[None, :])
