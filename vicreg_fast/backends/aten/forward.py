"""Values of the three terms over V views that share (P, N, D).

    M        = s o'o   primal, (D, D), its diagonal set to zero
             = s o o'  dual,   (N, N)
    cov      = (sum(M^2) / (s (N-1))^2 - [dual] sum_d vhat_d^2) / D

c is the centred view, o the operand that the product really uses (c itself unless a faster product rounds it),
vhat = sum_n o^2 / (N-1).  Each term is the mean over problems, then over pairs or views, times its weight.
s is a power of two near 1 / (N-1): a product applies its factor to one operand first, and any other would round it.

The dual subtracts two sums that are nearly equal when features are decorrelated, and then its M is nearly diagonal.
A product adds in sequence and loses many weak features after a few strong ones, so the diagonal is summed apart,
pairwise (error at 40x1500 with 40 strong features: 30 u of ||M||^2 without, see tests/data.py).

The centre of a column is kept as two numbers, hi + lo: hi is the rounded mean, lo the mean of what is left after
subtracting it.  A constant column then centres to exactly zero, and a mean of 1000 standard deviations costs no
digits.  Long columns are cut: each chunk is centred by itself, and chunks are joined by Chan's formula in float64.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import precision
from ...plan import Plan
from ...rows import Block, Rows
from ...scales import Normalisation
from ...sides import FEW_SAMPLES, keeps_moments, keeps_operand_variance, uses_dual
from .blocks import blocks

# Elements whose squares are summed at once, at least and at most: their float64 copy stays in the cache.
_SLICE = 1 << 15, 1 << 17


def _slice_elements(tensor: Tensor) -> int:
    """How many elements of a tensor to copy into float64 at once: a quarter, which takes half of its memory."""
    least, most = _SLICE
    return max(least, min(most, tensor.numel() // 4))


def gram_scale(N: int) -> float:
    """s of the formula: the power of two at or below 1 / (N-1)."""
    return 2.0 ** -math.ceil(math.log2(N - 1))


class Statistics(NamedTuple):
    """What a group's forward pass leaves for its backward pass."""

    # (3, P, V, 1, D): hi, lo and the standard deviation; a fourth row, vhat, where products may round their operands.
    # (0,) where few samples of the dual side leave none: they would take more memory than the blocks.
    moments: Tensor
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


def _sum(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of the parts, in ``dtype`` where there is something to add."""
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts)).to(dtype).sum(0)


def _squares(z: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of z^2 over the rows and over the columns of z (p, V, n, d), in float64: (p, V, 1, d) and (p, V, n, 1).

    The dual subtracts them, and where one feature outweighs the others every rounding shows: in float32 a spike at
    256x512 costs 15 u of ||M||^2 / D.  In slices, because the copy of a block would be fresh memory.
    """
    wide = precision.scalar_dtype(z.device)
    step = max(1, _slice_elements(z) // z[..., 0].numel())
    columns, rows = [], []
    for part in [z] if step >= z.shape[3] else torch.split(z, step, 3):
        squares = part.to(wide, copy=True)
        squares.mul_(squares)
        columns.append(squares.sum(2, keepdim=True))
        rows.append(squares.sum(3, keepdim=True))
    if len(rows) == 1:
        return columns[0], rows[0]
    return torch.cat(columns, 3), torch.stack(rows).sum(0)


def _strip(side: int) -> int:
    """Rows of M that are computed at once: an eighth of a large M, all of a small one.

    Eight strips on and below the diagonal are 9/16 of the work.  Against M computed whole they take 0.58 of the time
    at 2048x2048 (four strips 0.62, sixteen 0.58), 0.61 at 1024x8192 and, as four strips of 64, 0.71 at 256x8192.
    """
    return side if side < 256 else max(64, -(-side // 8))


# Multiplications of two products up to which they are done one by one.  Together they are faster on an idle machine (8x16:
# 3.4 us against 7.6; 33x31: 5.0 against 11.5), but wake another thread: beside two compilers on two cores a pair of 8x16
# took 8 ms, for a step of 0.6 ms.  At 33x31, 2^16, that was not seen.
_ONE_BY_ONE = 1 << 15


def _add_gram(M: Tensor, o: Tensor, dual: bool, scale: float) -> None:
    """Add scale * o o' (dual) or scale * o'o to M (p, M, M); large ones on and below the diagonal only."""
    left = o if dual else o.mT
    strip = _strip(M.shape[-1])
    if strip == M.shape[-1] and (len(M) > 2 or left.numel() * strip > _ONE_BY_ONE):
        M.baddbmm_(left, left.mT, alpha=scale)
    elif strip == M.shape[-1]:
        for m, a in zip(M.unbind(), left.unbind(), strict=True):
            m.addmm_(a, a.t(), alpha=scale)
    else:
        for m, a in zip(M.unbind(), left.unbind(), strict=True):
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
    flat = M.reshape(-1)
    size = _slice_elements(flat)
    squares = []
    for part in [flat] if flat.numel() <= size else torch.split(flat, size):
        wide = part.to(dtype)
        squares.append(torch.dot(wide, wide))
    return _sum(squares, dtype)


def _join(counts: list[int], chunks: list[Tensor], into: Tensor, m: Tensor | None) -> Tensor:
    """Chan's formula: store the centre of joined chunks in ``into`` and return their variance, (p, V, 1, D).

    ``into`` and the chunks are (3, p, V, 1, D).  A chunk's third row is its share of the variance, sum(c^2) over its
    own rows, over N - 1.  m (p * V, D, D) gets what lies between chunks.
    """
    wide = precision.scalar_dtype(into.device)
    means = torch.stack([chunk[0].to(wide) + chunk[1] for chunk in chunks])  # (K, p, V, 1, D)
    n = means.new_full((len(counts), 1, 1, 1, 1), counts[0])  # without waiting for the device, as a copy would
    n[-1] = counts[-1]
    total = sum(counts)
    # Relative to the first chunk, so that equal means stay exactly equal.
    offsets = means - means[0]
    offset = (offsets * n).sum(0) / total
    between = (offsets - offset) * n.sqrt()
    center = means[0] + offset
    into[0].copy_(center)
    into[1].copy_(center - into[0])
    if m is not None:
        b = between.squeeze(3).movedim(0, 2).flatten(0, 1).to(m.dtype)  # (p * V, K, D)
        _add_gram(m, b, dual=False, scale=gram_scale(total))
    within = torch.stack([chunk[2] for chunk in chunks]).to(wide).sum(0)
    return (within + between.square().sum(0) / (total - 1)).to(into.dtype)


def _reduce(
    z: Tensor, N: int, into: Tensor | None, m: Tensor | None, energy: Tensor | None, product: str, dual: bool
) -> tuple[Tensor, Tensor]:
    """Centre one block z (p, V, n, d) of problems with N samples in place, twice, and add its product to m.

    Returns v and vhat, (p, V, 1, d) each, and stores hi and lo in ``into`` (3, p, V, 1, d).  ``energy`` (p, V, n, 1), on
    the dual side, gets the squares of each sample's operand.
    """
    hi, lo = (None, None) if into is None else (into[0], into[1])
    z -= torch.mean(z, 2, keepdim=True, out=hi)
    z -= torch.mean(z, 2, keepdim=True, out=lo)
    o = precision.round_operand(z, product)
    wide = precision.scalar_dtype(z.device)
    # A few samples may be so near to each other that float32 has no squares for their distances: scales of 1e-18.
    few = N < FEW_SAMPLES
    if m is not None and dual and few:
        w = o.flatten(0, 1).to(wide)
        m.add_(torch.bmm(w, w.mT), alpha=gram_scale(N))
    elif m is not None:
        _add_gram(m, o.flatten(0, 1), dual, gram_scale(N))
    if not dual:
        squares = z.to(wide).square_() if few else z.mul_(z)  # in place: they need no buffer of their own
        v = squares.sum(2, keepdim=True).div_(N - 1)
        return v, v
    columns, rows = _squares(z)
    operand_v = v = columns.div_(N - 1)
    if product != "ieee":
        columns, rows = _squares(o)
        operand_v = columns.div_(N - 1)
    if energy is not None:
        energy += rows
    return v, operand_v


def recomputed_moments(views: Sequence[Rows], block: Block, dtype: torch.dtype, product: str) -> Tensor:
    """The moments of a block of the dual side, where the forward pass kept none."""
    P, N, D = views[0].shape
    z = _read(views, block, dtype)
    p, V, _, d = z.shape
    into = z.new_empty(4 if keeps_operand_variance(P, N, D, z.device, product) else 3, p, V, 1, d)
    v, operand_v = _reduce(z, N, into, None, None, product, dual=True)
    torch.sqrt(v, out=into[2])
    if into.shape[0] > 3:
        into[3].copy_(operand_v)
    return into


def terms(views: Sequence[Rows], plan: Plan, product: str, spare: int) -> tuple[list[Tensor], Statistics]:
    """Weighted invariance, variance and covariance of a group and their sum, and what the gradient needs.

    Reads each view once; works in M and in the buffers of one block of every view (``spare``: see blocks.py).
    """
    V = len(views)
    P, N, D = views[0].shape
    device = views[0].source.device
    dtype = precision.accumulation_dtype([view.source.dtype for view in views])
    wide = precision.scalar_dtype(device)
    dual = uses_dual(P, N, D)
    keeps = keeps_moments(P, N, D)
    rows = 4 if plan.covariance and keeps_operand_variance(P, N, D, device, product) else 3
    moments = torch.empty((rows, P, V, 1, D) if keeps else (0,), dtype=dtype, device=device)
    M = energy = None
    if plan.covariance:
        side = N if dual else D
        M = torch.zeros(P, V, side, side, dtype=dtype, device=device)
        if dual:
            energy = torch.zeros(P, V, N, 1, dtype=wide, device=device)
    pairs = plan.pair_list
    differences: list[Tensor] = []
    hinges: list[Tensor] = []
    operand_squares: list[Tensor] = []

    def reduce(block: Block, group: slice, into: Tensor | None) -> tuple[Tensor, Tensor]:
        z = _read(views, block, dtype)
        for i, j in pairs:
            d = z[:, i] - z[:, j]
            differences.append(d.mul_(d).sum())  # mse_loss takes a third longer
        m = None if M is None else M[group].flatten(0, 1)  # a view: both dimensions are contiguous
        return _reduce(z, N, into, m, None if energy is None else energy[group], product, dual)

    def finish(v: Tensor, operand_v: Tensor, into: Tensor | None) -> None:
        """Add up what needs the variances of whole columns, while they are in the cache."""
        # What is kept is the root of v, which reaches farther down than v does.
        std = torch.sqrt(v, out=None if into is None else into[2])
        hinges.append((plan.gamma - ((v + plan.eps).sqrt() if plan.eps else std)).relu_().sum())
        if energy is not None:
            operand_squares.append(_sum_of_squares(operand_v, wide))
        if into is not None and rows > 3:
            into[3].copy_(operand_v)

    # Rows that are stacked; where they are gathered first, once more, and as much for the dual's float64 squares and sums;
    # else the difference of a pair.  Where samples are few, the columns' statistics are as large as the rows.
    buffers = V + (V if dual or views[0].patch is not None else 1) + (6 * V if N < FEW_SAMPLES else 0)
    for group, parts in blocks(P, N, D, buffers, spare):
        if dual or len(parts) == 1:
            for block in parts:
                into = block.of_columns(moments) if keeps else None
                finish(*reduce(block, group, into), into)
        else:
            # Before the blocks: what outlives a block and is made within it takes the place of the next one's buffers.
            chunks = [moments.new_empty(3, len(range(P)[group]), V, 1, D) for _ in parts]
            for block, chunk in zip(parts, chunks, strict=True):
                chunk[2].copy_(reduce(block, group, chunk)[0])
            counts = [len(range(N)[block.rows]) for block in parts]
            into = moments[:, group]
            v = _join(counts, chunks, into, None if M is None else M[group].flatten(0, 1))
            finish(v, v, into)

    factor = gram_scale(N) * (N - 1)
    scales = Normalisation(V, len(pairs), P, N, D).terms(plan.weights, factor)
    var = (_sum(hinges, wide) * scales.var).to(dtype)
    if pairs:
        inv = (_sum(differences, wide) * scales.inv).to(dtype)
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
        diagonal.copy_(energy.squeeze(3).mul_(gram_scale(N)))
        # What is taken off stays finite: infinite covariances are infinite, not nowhere.
        taken_off = _sum(operand_squares, wide).clamp_max_(torch.finfo(wide).max)
        norm = torch.sub(_sum_of_squares(M, wide), taken_off, alpha=factor**2).clamp_min_(0)
    cov = (norm * scales.cov).to(dtype)
    return [inv, var, cov, inv + var + cov], Statistics(moments, M)
