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

The centre of a column is kept as two numbers, hi + lo: hi is the rounded mean, lo the mean of what is left after
subtracting it.  A constant column then centres to exactly zero, and a mean of 1000 standard deviations costs no
digits.  Long columns are cut: each chunk is centred by itself, and chunks are joined by Chan's formula in float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import precision
from ...rows import Block, Rows
from .blocks import MIN_INNER, blocks, uses_dual

# Chunk of a flattened matrix whose squares are summed at once: the float64 copy stays in the cache.
_NORM_CHUNK = 1 << 17


class Statistics(NamedTuple):
    """What a group's forward pass leaves for its backward pass: V views, P problems."""

    hi: Tensor  # (V, P, D) column means, rounded
    lo: Tensor  # (V, P, D) means of what hi leaves
    v: Tensor  # (V, P, D) variances
    vhat: Tensor  # (V, P, D) variances of the product's operand; dual only, else (0,)
    M: Tensor  # (V, P, M, M); (0,) where no covariance was asked for


def _read(views: Sequence[Rows], block: Block, dtype: torch.dtype) -> Tensor:
    """One block of every view: a fresh tensor (V, p, n, d)."""
    parts = [view.read(block) for view in views]
    if all(part.dtype == dtype for part in parts):
        return torch.stack(parts)
    z = parts[0].new_empty((len(parts), *parts[0].shape), dtype=dtype)
    for into, part in zip(z.unbind(0), parts, strict=True):
        into.copy_(part)
    return z


def _add_gram(M: Tensor, o: Tensor, dual: bool, scale: float) -> None:
    """Add scale * o o' (dual) or scale * o'o to M (B, M, M); large ones on and below the diagonal only."""
    left = o if dual else o.mT
    side = M.shape[-1]
    if side < 2 * MIN_INNER:
        M.baddbmm_(left, left.mT, alpha=scale)
        return
    for m, a in zip(M.unbind(0), left.unbind(0), strict=True):
        for top in range(0, side, MIN_INNER):
            bottom = min(top + MIN_INNER, side)
            m[top:bottom, :bottom].addmm_(a[top:bottom], a[:bottom].t(), alpha=scale)


def _mirror(M: Tensor) -> None:
    """Fill what :func:`_add_gram` leaves out: the strips above the diagonal of a large M."""
    side = M.shape[-1]
    if side >= 2 * MIN_INNER:
        for top in range(MIN_INNER, side, MIN_INNER):
            bottom = min(top + MIN_INNER, side)
            M[..., :top, top:bottom] = M[..., top:bottom, :top].mT


def _sum_of_squares(M: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros((), dtype=dtype, device=M.device)
    for chunk in M.view(-1).split(_NORM_CHUNK):
        wide = chunk.to(dtype)
        total = total + torch.dot(wide, wide)
    return total


def _join_chunks(
    counts: list[int], means: list[Tensor], squares: list[Tensor], M: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Chan's formula: mean and sum of squared deviations of joined chunks; M gets what lies between chunks.

    means and squares are (V, p, D) each, in the type of scalars.
    """
    if len(counts) == 1:
        return means[0], squares[0]
    n = torch.tensor(counts, dtype=means[0].dtype, device=means[0].device)[:, None, None, None]
    total = sum(counts)
    # Relative to the first chunk, so that equal means stay exactly equal.
    offsets = torch.stack(means) - means[0]
    offset = (offsets * n).sum(0) / total
    between = (offsets - offset) * n.sqrt()  # (K, V, p, D)
    if M is not None:
        b = between.movedim(0, 2).flatten(0, 1).to(M.dtype)
        M.baddbmm_(b.mT, b, alpha=1 / (total - 1))
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

    Reads each view once.  12 to 20 launches a block; memory: one block per view, its squares, and M.
    """
    V = len(views)
    P, N, D = views[0].shape
    device = views[0].source.device
    dtype = precision.accumulation_dtype([view.source.dtype for view in views])
    wide = precision.scalar_dtype(device)
    dual = uses_dual(N, D)
    side = N if dual else D
    hi, lo, v = (torch.empty(V, P, D, dtype=dtype, device=device) for _ in range(3))
    rounds = dual and covariance and product != "ieee"
    vhat = torch.empty_like(v) if rounds else v
    M = torch.zeros(V, P, side, side, dtype=dtype, device=device) if covariance else v.new_empty(0)
    inv = torch.zeros((), dtype=wide, device=device)

    for group, parts in blocks(V, P, N, D):
        m = M[:, group].flatten(0, 1) if covariance else None  # a copy where it is not a view: see below
        counts, means, squares = [], [], []
        for block in parts:
            z = _read(views, block, dtype)
            for i, j in pairs:
                d = z[i] - z[j]
                inv = inv + d.mul_(d).sum().to(wide)
            mean = z.mean(dim=2)
            z -= mean[:, :, None]
            rest = z.mean(dim=2)
            z -= rest[:, :, None]
            square = (z * z).sum(dim=2)
            at = (slice(None), group, block.features)
            if dual:
                hi[at], lo[at] = mean, rest
                v[at] = square / (N - 1)
            else:
                counts.append(z.shape[2])
                means.append(mean.to(wide) + rest)
                squares.append(square.to(wide))
            if m is not None:
                o = precision.round_operand(z, product)
                if rounds:
                    vhat[at] = (o * o).sum(dim=2) / (N - 1)
                _add_gram(m, o.flatten(0, 1), dual, 1 / (N - 1))
        if not dual:
            mean, square = _join_chunks(counts, means, squares, m)
            hi[:, group] = mean.to(dtype)
            lo[:, group] = (mean - hi[:, group]).to(dtype)
            v[:, group] = (square / (N - 1)).to(dtype)
        if m is not None:
            _mirror(m)
            if not dual:
                m.diagonal(dim1=-2, dim2=-1).zero_()
            M[:, group] = m.unflatten(0, (V, -1))

    var = (gamma - (v.to(wide) + eps).sqrt()).relu().mean()
    if covariance:
        norm = _sum_of_squares(M, wide)
        if dual:
            norm = (norm - _sum_of_squares(vhat, wide)).clamp_min(0)
        cov = norm / (V * P * D)
    else:
        cov = torch.zeros_like(var)
    inv = inv / (max(1, len(pairs)) * P * N * D)
    return torch.stack((inv, var, cov)).to(dtype), Statistics(hi, lo, v, vhat, M)
