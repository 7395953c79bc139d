"""Values of the three terms over V views that share (P, N, D).

    M        = o'o / (N-1)   primal, (D, D), its diagonal set to zero
             = o o' / (N-1)  dual,   (N, N)
    cov      = (sum(M^2) - [dual] sum_d vhat_d^2) / D

c is the centred view, o the operand that the product really uses (c itself unless a faster product rounds it),
vhat = sum_n o^2 / (N-1).  Each term is the mean over problems, then over pairs or views, times its weight.

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
from ...multiview import Plan
from ...rows import Block, Rows, keeps_operand_variance, uses_dual
from .blocks import blocks

# Chunk of a flattened matrix whose squares are summed at once: the float64 copy stays in the cache.
_NORM_CHUNK = 1 << 17


class Statistics(NamedTuple):
    """What a group's forward pass leaves for its backward pass."""

    moments: (
        Tensor  # (3, V, P, 1, D): hi, lo and the variance v; a fourth row, vhat, where operands are rounded
    )
    M: Tensor  # (V, P, M, M); (0,) where no covariance was asked for


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


def _sum(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of the parts, in ``dtype`` where there is something to add."""
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts)).to(dtype).sum(0)


def _strip(side: int) -> int:
    """Rows of M that are computed at once: an eighth of a large M, all of a small one.

    Eight strips on and below the diagonal are 9/16 of the work.  Against M computed whole they take 0.58 of the time
    at 2048x2048 (four strips 0.62, sixteen 0.58), 0.61 at 1024x8192 and, as four strips of 64, 0.71 at 256x8192.
    """
    return side if side < 256 else max(64, -(-side // 8))


def _add_gram(M: Tensor, o: Tensor, dual: bool, scale: float) -> None:
    """Add scale * o o' (dual) or scale * o'o to M (p, M, M); large ones on and below the diagonal only."""
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

    flat = M.reshape(-1)
    return (
        of(flat)
        if flat.numel() <= _NORM_CHUNK
        else _sum([of(p) for p in torch.split(flat, _NORM_CHUNK)], dtype)
    )


def _join_chunks(counts: list[int], chunks: list[Tensor], into: Tensor, m: Tensor | None) -> None:
    """Chan's formula: store in ``into`` hi, lo and the sum of squared deviations of joined chunks.

    ``into`` and the chunks are (3, p, V, 1, D); m (p * V, D, D) gets what lies between chunks.
    """
    wide = precision.scalar_dtype(into.device)
    means = torch.stack([chunk[0].to(wide) + chunk[1] for chunk in chunks])  # (K, p, V, 1, D)
    n = torch.tensor(counts, dtype=wide, device=into.device)[:, None, None, None, None]
    total = sum(counts)
    # Relative to the first chunk, so that equal means stay exactly equal.
    offsets = means - means[0]
    offset = (offsets * n).sum(0) / total
    between = (offsets - offset) * n.sqrt()
    center = means[0] + offset
    hi, lo, square = into.unbind(0)
    hi.copy_(center)
    lo.copy_(center - hi)
    square.copy_(torch.stack([chunk[2] for chunk in chunks]).to(wide).sum(0) + between.square().sum(0))
    if m is not None:
        b = between.squeeze(3).movedim(0, 2).flatten(0, 1).to(m.dtype)  # (p * V, K, D)
        _add_gram(m, b, dual=False, scale=1 / (total - 1))


def _reduce(
    z: Tensor, moments: Tensor, m: Tensor | None, energy: Tensor | None, product: str, scale: float
) -> None:
    """Centre one block z (p, V, n, d) in place, twice, store its moments, add ``scale`` times its product to m.

    z ends as its squares, which then need no buffer of their own.  The moments (3, p, V, 1, d) are hi, lo, the sum of squared deviations and, in a fourth row, that of the operand.
    ``energy`` (p, V, n), on the dual side only, gets the squares of each sample's operand.
    """
    hi, lo, square, *operand_square = moments.unbind(0)
    z -= torch.mean(z, 2, keepdim=True, out=hi)
    z -= torch.mean(z, 2, keepdim=True, out=lo)
    if m is not None:
        o = precision.round_operand(z, product)
        _add_gram(m, o.flatten(0, 1), energy is not None, scale)
    torch.sum(z.mul_(z), 2, keepdim=True, out=square)
    if m is not None and operand_square:
        if product != "ieee":  # else z holds them already
            torch.mul(o, o, out=z)
        torch.sum(z, 2, keepdim=True, out=operand_square[0])
    if energy is not None:
        energy += z.sum(3)


def terms(views: Sequence[Rows], plan: Plan, product: str) -> tuple[list[Tensor], Statistics]:
    """Weighted invariance, variance and covariance of a group and their sum, and what the gradient needs.

    Reads each view once; works in one block of one view, its squares, and M.
    """
    V = len(views)
    P, N, D = views[0].shape
    device = views[0].source.device
    dtype = precision.accumulation_dtype([view.source.dtype for view in views])
    wide = precision.scalar_dtype(device)
    dual = uses_dual(N, D)
    side = N if dual else D
    kept = 4 if keeps_operand_variance(N, D, plan.covariance, device, product) else 3
    moments = torch.empty(kept, P, V, 1, D, dtype=dtype, device=device)
    M = energy = None
    if plan.covariance:
        M = torch.zeros(P, V, side, side, dtype=dtype, device=device)
        if dual:
            energy = torch.zeros(P, V, N, dtype=wide, device=device)
    pairs = plan.pair_list
    differences: list[Tensor] = []
    hinges: list[Tensor] = []
    operand_squares: list[Tensor] = []

    def reduce(block: Block, group: slice, into: Tensor) -> None:
        z = _read(views, block, dtype)
        for i, j in pairs:
            d = z[:, i] - z[:, j]
            differences.append(d.mul_(d).sum())  # mse_loss takes a third longer
        m = None if M is None else M[group].flatten(0, 1)  # a view: both dimensions are contiguous
        _reduce(z, into, m, None if energy is None else energy[group], product, 1 / (N - 1))

    def finish(columns: Tensor) -> None:
        """Make variances of sums of squares; what needs them is added up while they are in the cache."""
        columns[2:].div_(N - 1)
        v = columns[2]
        std = (v + plan.eps if plan.eps else v).sqrt()
        hinges.append((plan.gamma - std).relu_().sum())
        if energy is not None:
            operand_squares.append(_sum_of_squares(columns[-1], wide))

    for group, parts in blocks(V, P, N, D):
        if dual or len(parts) == 1:
            for block in parts:
                into = block.of_columns(moments)
                reduce(block, group, into)
                finish(into)
        else:
            chunks = [moments.new_empty(kept, len(range(P)[group]), V, 1, D) for _ in parts]
            for block, chunk in zip(parts, chunks, strict=True):
                reduce(block, group, chunk)
            counts = [len(range(N)[block.rows]) for block in parts]
            _join_chunks(counts, chunks, moments[:, group], None if M is None else M[group].flatten(0, 1))
            finish(moments[:, group])

    w_inv, w_var, w_cov = plan.weights
    var = (_sum(hinges, wide) * (w_var / (V * P * D))).to(dtype)
    if pairs:
        inv = (_sum(differences, wide) * (w_inv / (len(pairs) * P * N * D))).to(dtype)
    else:
        inv = torch.zeros_like(var)
    if M is None:
        return [inv, var, torch.zeros_like(var), inv + var], Statistics(moments, var.new_empty(0))
    _mirror(M)
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    if energy is None:
        diagonal.zero_()
        norm = _sum_of_squares(M, wide)
    else:
        diagonal.copy_(energy.div_(N - 1))
        norm = (_sum_of_squares(M, wide) - _sum(operand_squares, wide)).clamp_min_(0)
    cov = (norm * (w_cov / (V * P * D))).to(dtype)
    return [inv, var, cov, inv + var + cov], Statistics(moments, M)
