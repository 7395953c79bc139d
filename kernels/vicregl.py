"""VICRegL's per-image statistics: the terms of every image's matched patches, and their gradient, from the maps themselves.

    z = rows index[k] of a map, k < m      c = z - mean(z)      o = round(c)      vhat = |o_d|^2 / (m - 1)
    dual    cov = (sum (o o')^2 / (m-1)^2 - sum vhat^2) / D      G = o o' / (m - 1)
    primal  cov = sum C0^2 / D                                   C0 = o'o / (m - 1), its diagonal zero
    g = f_cov (G o - vhat o) + f_var c + f_inv (z - other)       f_cov o C0 on the primal side

    f_cov and f_var are those of vicreg_backward.py divided by m - 1, f_inv by m.

Match sets: by location (kind 0) and by feature (kind 1), from x to y (direction 0) and from y to x (direction 1).  Each has
a query view (side 0) and a candidate view (side 1), and at most 64 matches.  x (B, L1, D), y (B, L2, D), any strides.  A
view's matched rows are gathered into registers and centred there; no moments are stored.

Forward, for each kind of an image: 6 m D elements are read (the queries twice, for the invariance), and on the dual side
8 m^2 D operations done.  Backward: 4 m D elements are read for each kind and source of an image, and each element of both
gradients is written once.
Letters and buffers: docs/notation.md; scales: vicreg_fast/scales.py.
"""

import triton
import triton.language as tl

from .epilogue import reduce_losses
from .numerics import (
    divide,
    exponent_scale,
    hinge_of,
    hinge_slope,
    round_matrix,
    round_to_format,
    to_storage,
    undo_halves,
)
from .scatter_rows import add_rows
from .views import column_pointers, load_rows, match_set_offset, matches_of, select_source


@triton.jit
def _gram_set_offset(kind, direction, B, m1, m2):
    """Offset of a match set in the flat Gram matrices, which are laid out as the index is."""
    m1 = m1.to(tl.int64)
    return 2 * B * (kind * (m1 * m1 + m2.to(tl.int64) * m2) + direction * m1 * m1)


@triton.jit
def _centred(z, n, m):
    """Rows n < m of z (rows, columns) minus their mean; other rows are zero.

    The first row is subtracted first, so that a constant column is zero, exactly.
    """
    mask = (n < m)[:, None]
    first = tl.sum(tl.where((n == 0)[:, None], z, 0.0), 0)
    e = tl.where(mask, z - first[None, :], 0.0)
    return e - tl.where(mask, divide(tl.sum(e, 0), m)[None, :], 0.0)


@triton.jit
def _standard_deviation(c, m):
    """Standard deviations of centred columns, which are scaled before they are squared."""
    scale, inverse = exponent_scale(tl.max(tl.abs(c), 0))
    e = c * inverse[None, :]
    return tl.sqrt_rn(divide(tl.sum(e * e, 0), m - 1)) * scale


@triton.jit
def _matched_rows(index_ptr, b, side, n, B, m, source):
    """Offsets of the matched rows n of image b, on the queries' (0) or the candidates' side (1) of a match set."""
    index = tl.load(index_ptr + side * B * m + b * m + n, mask=n < m, other=0)
    return b * source.stride_p + index * source.stride_i


@triton.jit
def _off_diagonal(
    source, rows, f, o, d, n, m, D,
    FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns f of the operand, as they are multiplied, and C0 in rows f and columns d; ``o``: columns d of the operand."""
    z = load_rows(column_pointers(source, f), rows, (n < m)[:, None] & (f < D)[None, :])
    o_f = to_storage(round_to_format(_centred(z, n, m), FORMAT), FORMAT).to(OPERAND_TYPE)
    C = tl.dot(tl.trans(o_f), to_storage(o, FORMAT).to(OPERAND_TYPE), input_precision=DOT_PRECISION)
    C = divide(undo_halves(C, FORMAT), m - 1)
    return o_f, tl.where(f[:, None] == d[None, :], 0.0, C)


@triton.jit
def _accumulate(
    source, rows, n, m, d, D, z, gamma, eps, hinge, norm, gram, row_sq_norms,
    DUAL: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """(hinge, norm, gram, row_sq_norms) with the columns d added; hinge and norm are kept by column.

    Dual: ``norm`` is -(m - 1)^2 vhat^2.  The division is left to the end, where it is one float64 division, not one a column.
    """
    c = _centred(z, n, m)
    std = _standard_deviation(c, m)
    hinge += tl.where(d < D, hinge_of(std, gamma, eps), 0.0).to(tl.float64)
    o = round_to_format(c, FORMAT)
    if DUAL:
        operand = to_storage(o, FORMAT).to(OPERAND_TYPE)
        gram = tl.dot(operand, tl.trans(operand), gram, input_precision=DOT_PRECISION)
        wide = o.to(row_sq_norms.dtype)
        squares = wide * wide
        row_sq_norms += tl.sum(squares, 1)
        operand_v = tl.sum(squares, 0).to(tl.float64)  # (m - 1) vhat
        norm -= operand_v * operand_v
    else:
        for first in range(0, D, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)
            _, C = _off_diagonal(source, rows, f, o, d, n, m, D, FORMAT, OPERAND_TYPE, DOT_PRECISION)
            wide = C.to(tl.float64)
            norm += tl.sum(wide * wide, 0)
    return hinge, norm, gram, row_sq_norms


@triton.jit
def _finish_gram(gram, row_sq_norms, n, m, gram_ptr, FORMAT: tl.constexpr):
    """Sum of G^2, float64.  G is stored for the backward pass, rounded, unless gram_ptr is None."""
    G = divide(undo_halves(gram, FORMAT), m - 1)
    diagonal = (row_sq_norms.to(tl.float64) / (m - 1)).to(tl.float32)
    G = tl.where(n[:, None] == n[None, :], diagonal[:, None], G)
    if gram_ptr is not None:
        inside = (n < m)[:, None] & (n < m)[None, :]
        tl.store(gram_ptr + n[:, None] * m + n[None, :], round_matrix(G, FORMAT), mask=inside)
    wide = G.to(tl.float64)
    return tl.sum(tl.sum(wide * wide, 1), 0)


@triton.jit(do_not_specialize=["B", "m1", "m2"])
def _vicregl_forward_kernel(
    views, gram_ptr, partials_ptr, arrival_counter_ptr, location, feature, total_ptr, scales, B, D, m1, m2, gamma, eps,
    DUAL: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: one view of one match set of one image.  The candidates' program computes the invariance too."""
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
    rows = _matched_rows(index_ptr, b, side, n, B, m, source)
    query_rows = _matched_rows(index_ptr, b, 0, n, B, m, query_source)
    # With float32 sums the rounding of one strong feature would show in what the float32-accurate dual side subtracts.
    WIDE: tl.constexpr = tl.float64 if FORMAT == "fp32" else tl.float32
    differences = tl.zeros((BLOCK_N,), tl.float32)
    hinge = tl.zeros((BLOCK_D,), tl.float64)
    norm = tl.zeros((BLOCK_D,), tl.float64)
    gram = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    row_sq_norms = tl.zeros((BLOCK_N,), WIDE)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = (n < m)[:, None] & (d < D)[None, :]
        z = load_rows(column_pointers(source, d), rows, mask)
        if side == 1:
            q = load_rows(column_pointers(query_source, d), query_rows, mask)
            differences += tl.sum((q - z) * (q - z), 1)
        hinge, norm, gram, row_sq_norms = _accumulate(
            source, rows, n, m, d, D, z, gamma, eps, hinge, norm, gram, row_sq_norms,
            DUAL, FORMAT, OPERAND_TYPE, DOT_PRECISION, BLOCK_F,
        )  # fmt: skip
    cov = tl.sum(norm)
    if DUAL:
        G_ptr = gram_ptr
        if gram_ptr is not None:
            G_ptr = gram_ptr + _gram_set_offset(kind, direction, B, m1, m2) + (side * B + b) * m * m
        degrees = m.to(tl.float64) - 1
        cov = cov / (degrees * degrees) + _finish_gram(gram, row_sq_norms, n, m, G_ptr, FORMAT)
    at = partials_ptr + (kind * 4 * B + program // 8 * 4 + direction * 2 + side) * 3
    tl.store(at, tl.sum(differences.to(tl.float64)) / m)
    tl.store(at + 1, tl.sum(hinge))
    tl.store(at + 2, cov)
    reduce_losses(partials_ptr, 4 * B, arrival_counter_ptr, location, feature, total_ptr, scales)


@triton.jit
def _match_set_gradient(
    views, index_ptr, gram_ptr, upstream, scales, direction, of_y, b, n, d, B, D, m, gamma, eps,
    DUAL: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Of one source's rows in one match set, rows n and columns d: (gradient, pointer to the indices of the rows).

    index_ptr, gram_ptr: those of the match set.
    """
    # Beside a float32 M, as float16 has it, the operand is float32 too.
    LEFT: tl.constexpr = tl.float32 if FORMAT == "fp16" else OPERAND_TYPE
    WIDE: tl.constexpr = tl.float64 if FORMAT == "fp32" else tl.float32
    side = direction ^ of_y  # 0: this source's rows are the queries
    source = select_source(views, 2 * direction + side)
    mask = (n < m)[:, None] & (d < D)[None, :]
    rows = _matched_rows(index_ptr, b, side, n, B, m, source)
    z = load_rows(column_pointers(source, d), rows, mask)
    c = _centred(z, n, m)
    g = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if upstream.cov_ptr is not None:
        o = round_to_format(c, FORMAT)
        f_cov = divide(tl.load(upstream.cov_ptr).to(tl.float32) * scales.cov, m - 1)
        if DUAL:
            inside = (n < m)[:, None] & (n < m)[None, :]
            G_ptr = gram_ptr + (side * B + b) * m * m
            G = tl.load(G_ptr + n[:, None] * m + n[None, :], mask=inside, other=0.0)
            wide = o.to(WIDE)
            squares = tl.sum(wide * wide, 0)
            operand_v = divide(squares, m - 1) if tl.float32 == WIDE else (squares / (m - 1)).to(tl.float32)
            g = tl.dot(G, o.to(LEFT), input_precision=DOT_PRECISION) - o * operand_v[None, :]
        else:
            for first in range(0, D, BLOCK_F):
                f = first + tl.arange(0, BLOCK_F)
                o_f, C = _off_diagonal(source, rows, f, o, d, n, m, D, FORMAT, OPERAND_TYPE, DOT_PRECISION)
                C = round_matrix(C, FORMAT)
                g = tl.dot(o_f.to(LEFT), C.to(LEFT), g, input_precision=DOT_PRECISION)
            if FORMAT == "fp16":
                g *= 2.0  # of a half
        g *= f_cov
    if upstream.var_ptr is not None:
        std = _standard_deviation(c, m)
        u = divide(tl.load(upstream.var_ptr).to(tl.float32) * scales.var, m - 1)
        g += c * hinge_slope(std, gamma, eps, u)[None, :]
    if upstream.inv_ptr is not None:
        other_source = select_source(views, 2 * direction + (1 - side))
        other_rows = _matched_rows(index_ptr, b, 1 - side, n, B, m, other_source)
        other = load_rows(column_pointers(other_source, d), other_rows, mask)
        g += (z - other) * divide(tl.load(upstream.inv_ptr).to(tl.float32) * scales.inv, m)
    return g, index_ptr + side * B * m + b * m


@triton.jit(do_not_specialize=["B", "m1", "m2"])
def _vicregl_gradient_kernel(
    views, gram_ptr, x_grad_ptr, y_grad_ptr, location, feature, scales, B, L1, L2, D, m1, m2, gamma, eps,
    DUAL: tl.constexpr, FORMAT: tl.constexpr, OPERAND_TYPE: tl.constexpr, DOT_PRECISION: tl.constexpr,
    EXACT_PRECISION: tl.constexpr,
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
    patch = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    n = tl.arange(0, BLOCK_N)
    out = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for kind in tl.static_range(2):
        upstream = location if kind == 0 else feature
        if upstream.inv_ptr is not None or upstream.var_ptr is not None or upstream.cov_ptr is not None:
            index_ptr = views.index_ptr + match_set_offset(kind, 0, B, m1, m2)
            G_ptr = gram_ptr
            if gram_ptr is not None:
                G_ptr = gram_ptr + _gram_set_offset(kind, 0, B, m1, m2)
            for direction in range(2):
                m = matches_of(direction, m1, m2)
                g, own_index_ptr = _match_set_gradient(
                    views, index_ptr, G_ptr, upstream, scales, direction, of_y, b, n, d, B, D, m, gamma, eps,
                    DUAL, FORMAT, OPERAND_TYPE, DOT_PRECISION, BLOCK_N, BLOCK_D, BLOCK_F,
                )  # fmt: skip
                out = add_rows(out, g, n, m, own_index_ptr, 1, patch, EXACT_PRECISION)
                # From the match set x to y to that of y to x.
                index_ptr += 2 * B * m1
                if gram_ptr is not None:
                    G_ptr += 2 * B * m1 * m1
    at = g_ptr + (b * L + patch)[:, None] * D + d[None, :]
    tl.store(at, out, mask=(patch < L)[:, None] & (d < D)[None, :])
