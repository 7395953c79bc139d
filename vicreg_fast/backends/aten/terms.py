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
from ...rows import Block, Rows, uses_dual
from .blocks import STRIP, blocks

# Chunk of a flattened matrix whose squares are summed at once: the float64 copy stays in the cache.
_NORM_CHUNK = 1 << 17


class Statistics(NamedTuple):
    """What a group's forward pass leaves for its backward pass; problems first, so that a block is a slice."""

    hi: Tensor  # (P, V, D) column means, rounded
    lo: Tensor  # (P, V, D) means of what hi leaves
    v: Tensor  # (P, V, D) variances
    vhat: Tensor  # (P, V, D) variances of the product's operand: v itself unless a faster product rounds it
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


class _Moments(NamedTuple):
    mean: Tensor  # (p, V, d) rounded
    rest: Tensor  # (p, V, d) what the rounding left
    square: Tensor  # (p, V, d) sum of squared deviations of each feature
    energy: Tensor  # (p, V, n) sum of squared deviations of each sample


def _center(z: Tensor) -> _Moments:
    """Centre (p, V, n, d) in place, twice."""
    mean = z.mean(dim=2)
    z -= mean[:, :, None]
    rest = z.mean(dim=2)
    z -= rest[:, :, None]
    squares = z * z
    return _Moments(mean, rest, squares.sum(dim=2), squares.sum(dim=3))


def _add_gram(M: Tensor, o: Tensor, dual: bool, scale: float) -> None:
    """Add scale * o o' (dual) or scale * o'o to M (B, M, M); large ones on and below the diagonal only."""
    left = o if dual else o.mT
    side = M.shape[-1]
    if side < 2 * STRIP:
        M.baddbmm_(left, left.mT, alpha=scale)
        return
    for m, a in zip(M.unbind(0), left.unbind(0), strict=True):
        for top in range(0, side, STRIP):
            bottom = min(top + STRIP, side)
            m[top:bottom, :bottom].addmm_(a[top:bottom], a[:bottom].t(), alpha=scale)


def _mirror(M: Tensor) -> None:
    """Fill what :func:`_add_gram` leaves out: the strips above the diagonal of a large M."""
    side = M.shape[-1]
    if side >= 2 * STRIP:
        for top in range(STRIP, side, STRIP):
            bottom = min(top + STRIP, side)
            M[..., :top, top:bottom] = M[..., top:bottom, :top].mT


def _sum_of_squares(M: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros((), dtype=dtype, device=M.device)
    for chunk in torch.split(M.view(-1), _NORM_CHUNK):
        wide = chunk.to(dtype)
        total = total + torch.dot(wide, wide)
    return total


def _join_chunks(
    counts: list[int], means: list[Tensor], squares: list[Tensor], m: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Chan's formula: mean and sum of squared deviations of joined chunks; m gets what lies between chunks.

    means and squares are (p, V, D) each, in the type of scalars; m is (p*V, D, D).
    """
    if len(counts) == 1:
        return means[0], squares[0]
    n = torch.tensor(counts, dtype=means[0].dtype, device=means[0].device)[:, None, None, None]
    total = sum(counts)
    # Relative to the first chunk, so that equal means stay exactly equal.
    offsets = torch.stack(means) - means[0]
    offset = (offsets * n).sum(0) / total
    between = (offsets - offset) * n.sqrt()  # (K, p, V, D)
    if m is not None:
        b = between.movedim(0, 2).flatten(0, 1).to(m.dtype)
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
) -> tuple[Tensor, Statistics]:
    """(inv, var, cov) as one tensor (3,), unweighted, and what the gradient needs.

    Reads each view once; works in one block of every view, its squares, and M.
    """
    V = len(views)
    P, N, D = views[0].shape
    device = views[0].source.device
    dtype = precision.accumulation_dtype([view.source.dtype for view in views])
    wide = precision.scalar_dtype(device)
    dual = uses_dual(N, D)
    side = N if dual else D
    hi, lo, v = (torch.empty(P, V, D, dtype=dtype, device=device) for _ in range(3))
    rounds = dual and covariance and product != "ieee"
    vhat = torch.empty_like(v) if rounds else v
    M = torch.zeros(P, V, side, side, dtype=dtype, device=device) if covariance else v.new_empty(0)
    inv = torch.zeros((), dtype=wide, device=device)

    def reduce(block: Block, m: Tensor | None) -> tuple[Tensor, _Moments, int]:
        """Sum of squared differences and moments of one block, whose product is added to m."""
        z = _read(views, block, dtype)
        differences = inv.new_zeros(())
        for i, j in pairs:
            d = z[:, i] - z[:, j]
            differences = differences + d.mul_(d).sum().to(wide)
        moments = _center(z)
        if m is not None:
            o = precision.round_operand(z, product)
            if rounds:
                squares = o * o
                vhat[block.problems, :, block.features] = squares.sum(dim=2) / (N - 1)
                moments = moments._replace(energy=squares.sum(dim=3))
            _add_gram(m, o.flatten(0, 1), dual, 1 / (N - 1))
        return differences, moments, z.shape[2]

    for group, parts in blocks(V, P, N, D):
        m = M[group].flatten(0, 1) if covariance else None  # a view: both dimensions are contiguous
        counts, means, squares, energies = [], [], [], []
        for block in parts:
            differences, moments, count = reduce(block, m)
            inv = inv + differences
            if dual:
                at = (group, slice(None), block.features)
                hi[at], lo[at] = moments.mean, moments.rest
                v[at] = moments.square / (N - 1)
                energies.append(moments.energy.to(wide))
            else:
                counts.append(count)
                means.append(moments.mean.to(wide) + moments.rest)
                squares.append(moments.square.to(wide))
        if not dual:
            center, square = _join_chunks(counts, means, squares, m)
            hi[group] = center.to(dtype)
            lo[group] = (center - hi[group]).to(dtype)
            v[group] = (square / (N - 1)).to(dtype)
        if m is not None:
            _mirror(m)
            diagonal = m.diagonal(dim1=-2, dim2=-1)
            if dual:
                diagonal.copy_((torch.stack(energies).sum(0) / (N - 1)).flatten(0, 1))
            else:
                diagonal.zero_()

    var = (gamma - (v.to(wide) + eps).sqrt()).relu().mean()
    cov = torch.zeros_like(var)
    if covariance:
        norm = _sum_of_squares(M, wide)
        if dual:
            norm = (norm - _sum_of_squares(vhat, wide)).clamp_min(0)
        cov = norm / (P * V * D)
    inv = inv / (max(1, len(pairs)) * P * N * D)
    return torch.stack((inv, var, cov)).to(dtype), Statistics(hi, lo, v, vhat, M)


def gradient(
    views: Sequence[Rows],
    pairs: Sequence[tuple[int, int]],
    statistics: Statistics,
    upstream: Tensor,
    totals: Sequence[Tensor | None],
    *,
    gamma: float,
    eps: float,
    product: str,
    wanted: Sequence[bool],
    add: bool,
) -> None:
    """Store the gradient of ``upstream`` (3,) times (inv, var, cov) in ``totals``, one a view, None: not needed.

    With ``add``, totals may be shared between views and start from zero.  ``wanted`` says which terms have an upstream gradient at all; a product that nobody asked for is not formed,
    and an infinite term that nobody asked for spoils nothing.
    """
    V = len(views)
    P, N, D = views[0].shape
    wants_inv, wants_var, wants_cov = wanted
    active = [view for view in range(V) if totals[view] is not None]
    every = len(active) == V
    dtype = statistics.hi.dtype
    dual = uses_dual(N, D)
    inv_up, var_up, cov_up = upstream.to(dtype).unbind()

    scale = cov_up * (4 / (P * V * D * (N - 1)))
    column = torch.zeros_like(statistics.v)  # the factor of c_nd that does not depend on n
    if wants_var:
        std = (statistics.v + eps).sqrt()
        column = torch.where((std < gamma) & (std > 0), -var_up / (P * V * D * (N - 1) * std), column)
    rounds = product != "ieee"
    operand_column = torch.zeros_like(column) if rounds else column
    if wants_cov and dual:
        operand_column -= scale * statistics.vhat

    def chosen(t: Tensor) -> Tensor:
        return t if every else t[:, active]

    def differentiate(block: Block, A: Tensor | None) -> None:
        """Store the gradient of one block; A is what its operand is multiplied with."""
        z = _read(views, block, dtype)
        g = torch.zeros_like(chosen(z))
        if wants_inv:
            for i, j in pairs:
                d = (z[:, i] - z[:, j]).mul_(inv_up * (2 / (len(pairs) * P * N * D)))
                if i in active:
                    g[:, active.index(i)] += d
                if j in active:
                    g[:, active.index(j)] -= d
        if wants_var or wants_cov:
            at = (block.problems, slice(None), None, block.features)
            c = chosen(z).sub_(chosen(statistics.hi[at])).sub_(chosen(statistics.lo[at]))
            o = precision.round_operand(c, product)
            if rounds:
                g.addcmul_(c, chosen(column[at]))
            if dual or rounds or A is None:
                g.addcmul_(o, chosen(operand_column[at]))
            if A is not None:
                o = o.flatten(0, 1)
                g.flatten(0, 1).baddbmm_(*((A, o) if dual else (o, A)))
        for view, values in zip(active, g.unbind(1), strict=True):
            total = totals[view]
            assert total is not None
            views[view].store(total, block, values, add)

    for group, parts in blocks(V, P, N, D):
        A = None
        if wants_cov:
            A = (chosen(statistics.M[group]) * scale).flatten(0, 1)
            if not dual and not rounds:
                A.diagonal(dim1=-2, dim2=-1).copy_(chosen(column[group]).flatten(0, 1))
        for block in parts:
            differentiate(block, A)
