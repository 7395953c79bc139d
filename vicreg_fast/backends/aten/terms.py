"""Values and gradients of the three terms over V views that share (P, N, D).

    M        = o'o / (N-1)   primal, (D, D), its diagonal set to zero
             = o o' / (N-1)  dual,   (N, N)
    cov      = (sum(M^2) - [dual] sum_d vhat_d^2) / D
    dcov/dc  = 4 / (D (N-1)) * (o M             primal
                                M o - o*vhat)   dual
    dvar/dc  = -[sqrt(v+eps) < gamma] * c / (D (N-1) sqrt(v+eps))
    dinv/dx  = 2 (x - y) / (N D) = -dinv/dy

c is the centred view, o the operand that the product really uses (c itself unless a faster product rounds it),
vhat = sum_n o^2 / (N-1).  Each term is the mean over problems, then over pairs or views.

The dual subtracts two sums that are nearly equal when features are decorrelated, and then its M is nearly diagonal.
A product adds in sequence and loses many weak features after a few strong ones, so the diagonal is summed apart,
pairwise (error at 40x1500 with 40 strong features: 90 u of ||M||^2 without, see tests/data.py).

The centre of a column is kept as two numbers, hi + lo: hi is the rounded mean, lo the mean of what is left after
subtracting it.  A constant column then centres to exactly zero, and a mean of 1000 standard deviations costs no
digits.  Long columns are cut: each chunk is centred by itself, and chunks are joined by Chan's formula in float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import precision
from ...rows import WHOLE, Block, Rows, uses_dual
from .blocks import blocks

# Chunk of a flattened matrix whose squares are summed at once: the float64 copy stays in the cache.
_NORM_CHUNK = 1 << 17


class Statistics(NamedTuple):
    """What a group's forward pass leaves for its backward pass; problems first, so that a block is a slice."""

    hi: Tensor  # (P, V, 1, D) column means, rounded
    lo: Tensor  # (P, V, 1, D) means of what hi leaves
    v: Tensor  # (P, V, 1, D) variances
    vhat: Tensor  # (P, V, 1, D) variances of the product's operand: v itself unless a faster product rounds it
    M: Tensor  # (P, V, M, M); (0,) where no covariance was asked for


def _read(views: Sequence[Rows], block: Block, dtype: torch.dtype) -> Tensor:
    """One block of every view: a fresh tensor (p, V, n, d)."""
    parts = [view.read(block) for view in views]
    if all(part.dtype == dtype for part in parts):
        return torch.stack(parts, dim=1)
    p, n, d = parts[0].shape
    z = parts[0].new_empty((p, len(parts), n, d), dtype=dtype)
    for into, part in zip(z.unbind(1), parts, strict=True):
        into.copy_(part)
    return z


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=dim)


def _sum(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of the parts, in ``dtype`` where there is something to add."""
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts)).to(dtype).sum(0)


class _Moments(NamedTuple):
    mean: Tensor  # (p, V, 1, d) rounded
    rest: Tensor  # (p, V, 1, d) what the rounding left
    square: Tensor  # (p, V, 1, d) sum of squared deviations of each feature
    energy: Tensor | None  # (p, V, n) sum of squared deviations of each sample; dual only


def _center(z: Tensor, dual: bool) -> _Moments:
    """Centre (p, V, n, d) in place, twice."""
    mean = z.mean(dim=2, keepdim=True)
    z -= mean
    rest = z.mean(dim=2, keepdim=True)
    z -= rest
    squares = z * z
    energy = squares.sum(dim=3) if dual else None
    return _Moments(mean, rest, squares.sum(dim=2, keepdim=True), energy)


def _strip(side: int) -> int:
    """Rows of M that are computed at once: a quarter of a large M, all of a small one.

    Four strips on and below the diagonal are 5/8 of the work.  128 rows is the smallest strip that was tried: it
    gained 6 % at 256x2048 over computing M whole.
    """
    return side if side < 256 else max(128, -(-side // 4))


def _add_gram(M: Tensor, o: Tensor, dual: bool, scale: float) -> None:
    """Add scale * o o' (dual) or scale * o'o to M (B, M, M); large ones on and below the diagonal only."""
    left = o if dual else o.mT
    strip = _strip(M.shape[-1])
    if strip == M.shape[-1]:
        M.baddbmm_(left, left.mT, alpha=scale)
        return
    for m, a in zip(M.unbind(0), left.unbind(0), strict=True):
        for top in range(0, M.shape[-1], strip):
            bottom = min(top + strip, M.shape[-1])
            m[top:bottom, :bottom].addmm_(a[top:bottom], a[:bottom].t(), alpha=scale)


def _mirror(M: Tensor) -> None:
    """Fill what :func:`_add_gram` leaves out: the strips above the diagonal of a large M."""
    side = M.shape[-1]
    strip = _strip(side)
    for top in range(strip, side, strip):
        bottom = min(top + strip, side)
        M[..., :top, top:bottom] = M[..., top:bottom, :top].mT


def _sum_of_squares(M: Tensor, dtype: torch.dtype) -> Tensor:
    def of(part: Tensor) -> Tensor:
        wide = part.to(dtype)
        return torch.dot(wide, wide)

    flat = M.view(-1)
    return (
        of(flat)
        if flat.numel() <= _NORM_CHUNK
        else _sum([of(p) for p in torch.split(flat, _NORM_CHUNK)], dtype)
    )


def _join_chunks(
    counts: list[int], means: list[Tensor], squares: list[Tensor], m: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Chan's formula: mean and sum of squared deviations of joined chunks; m gets what lies between chunks.

    means and squares are (p, V, 1, D) each, in the type of scalars; m is (p*V, D, D).
    """
    if len(counts) == 1:
        return means[0], squares[0]
    n = torch.tensor(counts, dtype=means[0].dtype, device=means[0].device)[:, None, None, None, None]
    total = sum(counts)
    # Relative to the first chunk, so that equal means stay exactly equal.
    offsets = torch.stack(means) - means[0]
    offset = (offsets * n).sum(0) / total
    between = (offsets - offset) * n.sqrt()  # (K, p, V, 1, D)
    if m is not None:
        b = between.squeeze(3).movedim(0, 2).flatten(0, 1).to(m.dtype)
        m.baddbmm_(b.mT, b, alpha=1 / (total - 1))
    return means[0] + offset, torch.stack(squares).sum(0) + between.square().sum(0)


def terms(
    views: Sequence[Rows],
    pairs: Sequence[tuple[int, int]],
    *,
    gamma: float,
    eps: float,
    product: str,
    covariance: bool,
) -> tuple[list[Tensor], Statistics]:
    """[inv, var, cov], unweighted scalars, and what the gradient needs.

    Reads each view once; works in one block of every view, its squares, and M.
    """
    V = len(views)
    P, N, D = views[0].shape
    device = views[0].source.device
    dtype = precision.accumulation_dtype([view.source.dtype for view in views])
    wide = precision.scalar_dtype(device)
    dual = uses_dual(N, D)
    side = N if dual else D
    rounds = dual and covariance and product != "ieee"
    M = torch.zeros(P, V, side, side, dtype=dtype, device=device) if covariance else torch.empty(0, dtype=dtype)
    differences: list[Tensor] = []
    operand_squares: list[Tensor] = []

    def reduce(block: Block, m: Tensor | None) -> tuple[_Moments, int]:
        """Moments of one block, whose product is added to m."""
        z = _read(views, block, dtype)
        for i, j in pairs:
            d = z[:, i] - z[:, j]
            differences.append(d.mul_(d).sum())
        moments = _center(z, dual)
        if m is not None:
            o = precision.round_operand(z, product)
            if rounds:
                squares = o * o
                operand_squares.append(squares.sum(dim=2, keepdim=True))
                moments = moments._replace(energy=squares.sum(dim=3))
            _add_gram(m, o.flatten(0, 1), dual, 1 / (N - 1))
        return moments, z.shape[2]

    groups: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # hi, lo, v, vhat
    for group, parts in blocks(V, P, N, D):
        m = M[group].flatten(0, 1) if covariance else None  # a view: both dimensions are contiguous
        operand_squares.clear()
        reduced = [reduce(block, m) for block in parts]
        moments = [each for each, _ in reduced]
        if dual or len(parts) == 1:
            hi = _join([each.mean for each in moments], dim=3)
            lo = _join([each.rest for each in moments], dim=3)
            v = _join([each.square for each in moments], dim=3) / (N - 1)
            vhat = _join(operand_squares, dim=3) / (N - 1) if rounds else v
        else:
            center, square = _join_chunks(
                [count for _, count in reduced],
                [each.mean.to(wide) + each.rest for each in moments],
                [each.square.to(wide) for each in moments],
                m,
            )
            hi = center.to(dtype)
            lo = (center - hi).to(dtype)
            v = vhat = (square / (N - 1)).to(dtype)
        groups.append((hi, lo, v, vhat))
        if m is not None:
            _mirror(m)
            diagonal = m.diagonal(dim1=-2, dim2=-1)
            if dual:
                energies = [each.energy for each in moments if each.energy is not None]
                diagonal.copy_((_sum(energies, wide) / (N - 1)).flatten(0, 1))
            else:
                diagonal.zero_()

    hi, lo, v = (_join([group[k] for group in groups], dim=0) for k in range(3))
    vhat = _join([group[3] for group in groups], dim=0) if rounds else v
    var = (gamma - (v + eps if eps else v).sqrt()).relu_().mean()
    cov = torch.zeros_like(var)
    if covariance:
        norm = _sum_of_squares(M, wide)
        if dual:
            norm = (norm - _sum_of_squares(vhat, wide)).clamp_min_(0)
        cov = norm / (P * V * D)
    inv = _sum(differences, wide) / (len(pairs) * P * N * D) if pairs else torch.zeros_like(var)
    return [inv.to(dtype), var, cov.to(dtype)], Statistics(hi, lo, v, vhat, M)


def _copy_negative(into: Tensor, d: Tensor) -> Tensor:
    return torch.neg(d, out=into)


def gradient(
    views: Sequence[Rows],
    pairs: Sequence[tuple[int, int]],
    statistics: Statistics,
    upstream: Sequence[Tensor | None],
    totals: Sequence[Tensor | None],
    *,
    gamma: float,
    eps: float,
    product: str,
    add: bool,
) -> None:
    """Store the gradient of ``upstream`` times (inv, var, cov) in ``totals``, one a view, None: not needed.

    With ``add``, totals may be shared between views and start from zero.  What an absent upstream gradient would
    multiply is not computed: no product is formed in vain, and an infinite term that nobody asked for spoils
    nothing.
    """
    V = len(views)
    P, N, D = views[0].shape
    inv_up, var_up, cov_up = upstream
    active = [view for view in range(V) if totals[view] is not None]
    every = len(active) == V
    dtype = statistics.hi.dtype
    dual = uses_dual(N, D)
    rounds = product != "ieee"

    def chosen(t: Tensor) -> Tensor:
        return t if every else t[:, active]

    # What c_nd is multiplied with besides M, for the variance and, on the dual side, for the operand.
    column: Tensor | None = None
    operand_column: Tensor | None = None
    if var_up is not None:
        std = (statistics.v + eps if eps else statistics.v).sqrt()
        slope = var_up * (-1 / (P * V * D * (N - 1))) / std
        column = torch.where((std < gamma) & (std > 0), slope, 0.0)
    scale = None if cov_up is None else cov_up * (4 / (P * V * D * (N - 1)))
    if scale is not None and dual:
        operand_column = statistics.vhat * -scale
    if not rounds:  # the operand is c itself: one factor
        column = (
            operand_column if column is None else column if operand_column is None else column + operand_column
        )
        operand_column = None

    def of(t: Tensor, block: Block) -> Tensor:
        return chosen(t if block is WHOLE else t[block.problems, :, :, block.features])

    def differences(z: Tensor, up: Tensor) -> Tensor:
        """The invariance's gradient for the active views of one block."""
        g = torch.empty_like(z) if every else z.new_empty((z.shape[0], len(active), *z.shape[2:]))
        into = dict(zip(active, g.unbind(1), strict=True))
        fresh = set(active)
        factor = up * (2 / (len(pairs) * P * N * D))
        for i, j in pairs:
            d = (z[:, i] - z[:, j]).mul_(factor)
            for view, write, accumulate in ((i, Tensor.copy_, Tensor.add_), (j, _copy_negative, Tensor.sub_)):
                if view in into:
                    (write if view in fresh else accumulate)(into[view], d)
                    fresh.discard(view)
        for view in fresh:
            into[view].zero_()
        return g

    def differentiate(block: Block, A: Tensor | None) -> None:
        """Store the gradient of one block; A is what its operand is multiplied with."""
        z = _read(views, block, dtype)
        g = differences(z, inv_up) if inv_up is not None and pairs else torch.zeros_like(chosen(z))
        c = chosen(z)
        if var_up is not None or A is not None:
            c = c.sub_(of(statistics.hi, block)).sub_(of(statistics.lo, block))
            if column is not None and (dual or rounds or A is None):
                g.addcmul_(c, of(column, block))
        if A is not None:
            o = precision.round_operand(c, product)
            if operand_column is not None:
                g.addcmul_(o, of(operand_column, block))
            o = o.flatten(0, 1)
            g.flatten(0, 1).baddbmm_(*((A, o) if dual else (o, A)))
        for view, values in zip(active, g.unbind(1), strict=True):
            total = totals[view]
            assert total is not None
            views[view].store(total, block, values, add)

    for group, group_blocks in blocks(V, P, N, D):
        A = None
        if scale is not None:
            A = (chosen(statistics.M[group]) * scale).flatten(0, 1)
            if not dual and not rounds and column is not None:
                # The primal's M has a zero diagonal: the variance's factor rides on it.
                A.diagonal(dim1=-2, dim2=-1).copy_(chosen(column[group]).flatten(0, 2))
        for block in group_blocks:
            differentiate(block, A)
