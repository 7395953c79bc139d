"""VICRegL's per-image statistics: the terms of every image's matched patches, taken from the maps themselves.

    z = rows number[k] of a map, k < m      c = z - mean(z)      o = round(c)      v = |c_d|^2 / (m - 1)
    dual    cov = (sum (o o')^2 / (m-1)^2 - sum vhat^2) / D      G = o o' / (m - 1)
    primal  cov = sum C0^2 / D                                   C0 = o'o / (m - 1), its diagonal zero
    g = a (G o - vhat o) + f c + b (z - other)                   a o C0 on the primal side; f and b as in gradient.py

Match sets: by location (group 0) and by feature (1), from x to y (direction 0) and back; each has a query view and a
candidate view, and at most 64 matches.  x (B, P1, D), y (B, P2, D), any strides; numbers (2, B, m) a set, queries and then
candidates; G (2, B, m, m) a set, on the operand's grid, dual only.

A set's rows go from the maps into registers, all at once, and are centred there: no moments are kept and none is read
again.  Forward: 6 m D elements are read for each group of an image, the queries for the invariance once more, and 4 m^2 D
operations done.  Backward: 4 m D elements, and both gradients are written, each element once.
"""

import triton
import triton.language as tl

from .finish import finish_losses
from .rows import above_zero, column_offsets, load_rows, match_numbers, power_of_two, rounded, stored, view_of
from .scatter import add_rows


@triton.jit
def _centred(z, n, N):
    """Rows n < N of z (rows, columns) minus their mean; others zero.

    The first row is subtracted first, so that a constant column is zero, exactly.
    """
    mask = (n < N)[:, None]
    first = tl.sum(tl.where((n == 0)[:, None], z, 0.0), 0)
    e = tl.where(mask, z - first[None, :], 0.0)
    return e - tl.where(mask, tl.sum(e, 0)[None, :] / N, 0.0)


@triton.jit
def _deviation(c, N):
    """Standard deviations of centred columns, scaled before they are squared."""
    scale, inverse = power_of_two(tl.max(tl.abs(c), 0))
    e = c * inverse[None, :]
    return tl.sqrt_rn(tl.sum(e * e, 0) / (N - 1)) * scale


@triton.jit
def _off_diagonal(
    z_ptr, rows, f, o, d, n, N, D, stride_d, ROUND: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Columns f of the operand, as they are multiplied, and their C0 with columns d, which are ``o``."""
    z = load_rows(z_ptr + column_offsets(f, stride_d), rows, (n < N)[:, None] & (f < D)[None, :])
    others = stored(rounded(_centred(z, n, N), ROUND), ROUND).to(TYPE)
    C = tl.dot(tl.trans(others), stored(o, ROUND).to(TYPE), input_precision=PRECISION)
    C *= (4.0 if ROUND == "fp16" else 1.0) / (N - 1)  # of halves, see rounded()
    return others, tl.where(f[:, None] == d[None, :], 0.0, C)


@triton.jit
def _matched_rows(number_ptr, b, n, m, stride_b, stride_p):
    """Offsets of the matched rows n of image b; numbers (B, m)."""
    number = tl.load(number_ptr + b * m + n, mask=n < m, other=0)
    return b * stride_b + number * stride_p


@triton.jit
def _accumulate(
    z_ptr, rows, n, m, d, D, stride_d, z, gamma, eps, hinge, norm, gram, energy,
    DUAL: tl.constexpr, ROUND: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """(hinge, norm, gram, energy) with the columns d added: hinge and norm by column, energy of each row of o.

    Of the dual ``norm`` is (m - 1)^2 times what is subtracted: a division by column would be one of float64.
    """
    c = _centred(z, n, m)
    std = _deviation(c, m)
    penalty = above_zero(gamma - (tl.sqrt_rn(std * std + eps) if eps > 0 else std))
    hinge += tl.where(d < D, penalty, 0.0).to(tl.float64)
    o = rounded(c, ROUND)
    if DUAL:
        a = stored(o, ROUND).to(TYPE)
        gram = tl.dot(a, tl.trans(a), gram, input_precision=PRECISION)
        wide = o.to(energy.dtype)
        squares = wide * wide
        energy += tl.sum(squares, 1)
        operand_v = tl.sum(squares, 0).to(tl.float64)  # m - 1 times vhat
        norm -= operand_v * operand_v
    else:
        for first in range(0, D, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)
            _, C = _off_diagonal(z_ptr, rows, f, o, d, n, m, D, stride_d, ROUND, TYPE, PRECISION)
            wide = C.to(tl.float64)
            norm += tl.sum(wide * wide, 0)
    return hinge, norm, gram, energy


@triton.jit
def _finish_gram(gram, energy, n, m, G_ptr, KEEP: tl.constexpr, ROUND: tl.constexpr):
    """Sum of G^2, float64; G itself is stored on the operand's grid."""
    G = gram * ((4.0 if ROUND == "fp16" else 1.0) / (m - 1))  # of halves, see rounded()
    diagonal = (energy.to(tl.float64) / (m - 1)).to(tl.float32)
    G = tl.where(n[:, None] == n[None, :], diagonal[:, None], G)
    if KEEP:
        at = G_ptr + n[:, None] * m + n[None, :]
        inside = (n < m)[:, None] & (n < m)[None, :]
        tl.store(at, rounded(G, "tf32" if ROUND == "fp16" else ROUND), mask=inside)
    wide = G.to(tl.float64)
    return tl.sum(tl.sum(wide * wide, 1), 0)


@triton.jit(do_not_specialize=["B", "m1", "m2"])
def _local_forward_kernel(
    x_ptr, y_ptr, n00_ptr, n01_ptr, n10_ptr, n11_ptr, G00_ptr, G01_ptr, G10_ptr, G11_ptr, sums_ptr, ticket_ptr,
    inv0_ptr, var0_ptr, cov0_ptr, sum0_ptr, inv1_ptr, var1_ptr, cov1_ptr, sum1_ptr, total_ptr,
    B, D, m1, m2, gamma, eps, k_inv, k_var, k_cov,
    x_stride_b, x_stride_p, x_stride_d, y_stride_b, y_stride_p, y_stride_d,
    DUAL: tl.constexpr, KEEP: tl.constexpr, ROUND: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: one view of one match set of one image; the candidates' has the invariance too."""
    program = tl.program_id(0)
    role = program % 2
    back = program // 2 % 2
    group = program // 4 % 2
    b = (program // 8).to(tl.int64)
    B = B.to(tl.int64)
    m = m1
    if back == 1:
        m = m2
    numbers = match_numbers(group, back, n00_ptr, n01_ptr, n10_ptr, n11_ptr)
    z_ptr, _, stride_b, _, stride_p, stride_d = view_of(
        2 * back + role, B, m, x_ptr, y_ptr, n00_ptr, x_stride_b, 0, x_stride_p, x_stride_d,
        y_stride_b, 0, y_stride_p, y_stride_d, False,
    )  # fmt: skip
    q_ptr, _, q_stride_b, _, q_stride_p, q_stride_d = view_of(
        2 * back, B, m, x_ptr, y_ptr, n00_ptr, x_stride_b, 0, x_stride_p, x_stride_d,
        y_stride_b, 0, y_stride_p, y_stride_d, False,
    )  # fmt: skip
    n = tl.arange(0, BLOCK_N)
    rows = _matched_rows(numbers + role * B * m, b, n, m, stride_b, stride_p)
    q_rows = _matched_rows(numbers, b, n, m, q_stride_b, q_stride_p)
    # float32 sums of one strong feature would show in what the float32-accurate dual subtracts.
    WIDE: tl.constexpr = tl.float64 if ROUND == "none" else tl.float32
    differences = tl.zeros((BLOCK_N,), tl.float32)
    hinge = tl.zeros((BLOCK_D,), tl.float64)
    norm = tl.zeros((BLOCK_D,), tl.float64)
    gram = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    energy = tl.zeros((BLOCK_N,), WIDE)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = (n < m)[:, None] & (d < D)[None, :]
        z = load_rows(z_ptr + column_offsets(d, stride_d), rows, mask)
        if role == 1:
            q = load_rows(q_ptr + column_offsets(d, q_stride_d), q_rows, mask)
            differences += tl.sum((q - z) * (q - z), 1)
        hinge, norm, gram, energy = _accumulate(
            z_ptr, rows, n, m, d, D, stride_d, z, gamma, eps, hinge, norm, gram, energy,
            DUAL, ROUND, TYPE, PRECISION, BLOCK_F,
        )  # fmt: skip
    cov = tl.sum(norm)
    if DUAL:
        G_ptr = match_numbers(group, back, G00_ptr, G01_ptr, G10_ptr, G11_ptr) + (role * B + b) * m * m
        scale = m.to(tl.float64) - 1
        cov = cov / (scale * scale) + _finish_gram(gram, energy, n, m, G_ptr, KEEP, ROUND)
    at = sums_ptr + (group * 4 * B + program // 8 * 4 + back * 2 + role) * 3
    tl.store(at, tl.sum(differences.to(tl.float64)) / m)
    tl.store(at + 1, tl.sum(hinge))
    tl.store(at + 2, cov)
    finish_losses(
        sums_ptr, 4 * B, ticket_ptr, inv0_ptr, var0_ptr, cov0_ptr, sum0_ptr,
        inv1_ptr, var1_ptr, cov1_ptr, sum1_ptr, total_ptr, k_inv, k_var, k_cov,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "m1", "m2"])
def _local_gradient_kernel(
    x_ptr, y_ptr, n00_ptr, n01_ptr, n10_ptr, n11_ptr, G00_ptr, G01_ptr, G10_ptr, G11_ptr, x_grad_ptr, y_grad_ptr,
    u_inv0_ptr, u_var0_ptr, u_cov0_ptr, u_inv1_ptr, u_var1_ptr, u_cov1_ptr,
    B, P1, P2, D, m1, m2, gamma, eps, k_inv, k_var, k_cov,
    x_stride_b, x_stride_p, x_stride_d, y_stride_b, y_stride_p, y_stride_d,
    X: tl.constexpr, Y: tl.constexpr, INV: tl.constexpr, VAR: tl.constexpr, COV: tl.constexpr,
    DUAL: tl.constexpr, ROUND: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P patches and BLOCK_D columns of the gradient of one image of x or of y.

    X, Y: which sources need one.  INV, VAR, COV: by group, as bits, which terms have an upstream gradient.
    """
    columns = tl.cdiv(D, BLOCK_D)
    x_tiles = tl.cdiv(P1, BLOCK_P) if X else 0
    tiles = x_tiles + (tl.cdiv(P2, BLOCK_P) if Y else 0)
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = tl.program_id(0) // columns % tiles
    b = (tl.program_id(0) // columns // tiles).to(tl.int64)
    B = B.to(tl.int64)
    of_y = (tile >= x_tiles).to(tl.int32)
    P = P1
    g_ptr = x_grad_ptr
    if of_y == 1:
        tile -= x_tiles
        P = P2
        g_ptr = y_grad_ptr
    patch = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    # Beside a float32 M, as float16 has it, the operand is float32 too.
    LEFT: tl.constexpr = tl.float32 if ROUND == "fp16" else TYPE
    WIDE: tl.constexpr = tl.float64 if ROUND == "none" else tl.float32
    out = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for group in tl.static_range(2):
        if ((INV | VAR | COV) >> group) & 1:
            for back in range(2):
                m = m1
                if back == 1:
                    m = m2
                role = back ^ of_y  # 0: this source's rows are the queries
                numbers = match_numbers(group, back, n00_ptr, n01_ptr, n10_ptr, n11_ptr)
                own = numbers + role * B * m
                z_ptr, _, stride_b, _, stride_p, stride_d = view_of(
                    2 * back + role, B, m, x_ptr, y_ptr, n00_ptr, x_stride_b, 0, x_stride_p, x_stride_d,
                    y_stride_b, 0, y_stride_p, y_stride_d, False,
                )  # fmt: skip
                mask = (n < m)[:, None] & (d < D)[None, :]
                rows = _matched_rows(own, b, n, m, stride_b, stride_p)
                z = load_rows(z_ptr + column_offsets(d, stride_d), rows, mask)
                c = _centred(z, n, m)
                g = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
                if (COV >> group) & 1:
                    o = rounded(c, ROUND)
                    u_cov = tl.load(u_cov1_ptr if group == 1 else u_cov0_ptr).to(tl.float32)
                    a = u_cov * k_cov / (m - 1)
                    if DUAL:
                        G_ptr = (
                            match_numbers(group, back, G00_ptr, G01_ptr, G10_ptr, G11_ptr)
                            + (role * B + b) * m * m
                        )
                        inside = (n < m)[:, None] & (n < m)[None, :]
                        G = tl.load(G_ptr + n[:, None] * m + n[None, :], mask=inside, other=0.0)
                        wide = o.to(WIDE)
                        operand_v = (tl.sum(wide * wide, 0) / (m - 1)).to(tl.float32)
                        g = tl.dot(G, o.to(LEFT), input_precision=PRECISION) - o * operand_v[None, :]
                    else:
                        for first_column in range(0, D, BLOCK_F):
                            f = first_column + tl.arange(0, BLOCK_F)
                            others, C = _off_diagonal(
                                z_ptr, rows, f, o, d, n, m, D, stride_d, ROUND, TYPE, PRECISION
                            )
                            C = rounded(C, "tf32" if ROUND == "fp16" else ROUND)
                            g = tl.dot(others.to(LEFT), C.to(LEFT), g, input_precision=PRECISION)
                        if ROUND == "fp16":
                            g *= 2.0  # of a half
                    g *= a
                if (VAR >> group) & 1:
                    std = _deviation(c, m)
                    if eps > 0:
                        std = tl.sqrt_rn(std * std + eps)
                    active = (std < gamma) & (std > 0.0)
                    u = tl.load(u_var1_ptr if group == 1 else u_var0_ptr).to(tl.float32) * k_var / (m - 1)
                    g -= c * tl.where(active, u / tl.where(active, std, 1.0), 0.0)[None, :]
                if (INV >> group) & 1:
                    o_ptr, _, o_stride_b, _, o_stride_p, o_stride_d = view_of(
                        2 * back + (1 - role), B, m, x_ptr, y_ptr, n00_ptr, x_stride_b, 0, x_stride_p, x_stride_d,
                        y_stride_b, 0, y_stride_p, y_stride_d, False,
                    )  # fmt: skip
                    o_rows = _matched_rows(numbers + (1 - role) * B * m, b, n, m, o_stride_b, o_stride_p)
                    other = load_rows(o_ptr + column_offsets(d, o_stride_d), o_rows, mask)
                    u = tl.load(u_inv1_ptr if group == 1 else u_inv0_ptr).to(tl.float32)
                    g += (z - other) * (u * k_inv / m)
                out = add_rows(out, g, n, m, own + b * m, 1, patch, EXACT)
    at = g_ptr + (b * P + patch)[:, None] * D + d[None, :]
    tl.store(at, out, mask=(patch < P)[:, None] & (d < D)[None, :])
