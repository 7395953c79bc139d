"""Values of the three terms over V views that share (P, N, D).

    M        = s o'o   primal, (D, D), its diagonal set to zero
             = s o o'  dual,   (N, N)
    cov      = (sum(M^2) / (s (N-1))^2 - [dual] sum_d vhat_d^2) / D

c is the centred view.  o is the operand of the matmul: c itself, unless a reduced precision rounds it.
vhat = sum_n o^2 / (N-1).  Each term is the mean over problems, then over pairs or views, times its weight.
s is a power of two near 1 / (N-1).  A matmul multiplies one operand by its factor first; any other factor would round it.
Derivation: docs/how-it-works.md.  Letters: docs/notation.md.

The dual side subtracts two sums.  They are nearly equal if features are decorrelated, and M is then nearly diagonal.
A matmul adds serially and loses many weak features after a few strong ones.  The diagonal is therefore summed separately,
pairwise (error at 40x1500 with 40 strong features: 30 u of ||M||^2 without, see tests/data.py).

The centre of a column is kept as two numbers, hi + lo.  hi is the rounded mean, lo the mean of the column minus hi.
A constant column is then centred to exactly zero, and a mean of 1000 standard deviations costs no digits.  Long columns
are cut into chunks.  Each chunk is centred separately, and Chan's formula joins the chunks in float64.
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
from ...sides import FEW_SAMPLES, keeps_moments, keeps_operand_variance, side_of, uses_dual
from .blocks import blocks

# Least and most elements whose squares are summed at once: their float64 copy stays in the cache.
_SLICE = 1 << 15, 1 << 17


def _slice_elements(tensor: Tensor) -> int:
    """How many elements of a tensor to copy into float64 at once: a quarter, which takes half of its memory."""
    least, most = _SLICE
    return max(least, min(most, tensor.numel() // 4))


def gram_factor(N: int) -> float:
    """f of scales.py: M is f times C0 or G."""
    return gram_scale(N) * (N - 1)


def gram_scale(N: int) -> float:
    """s of the formula: the power of two at or below 1 / (N-1)."""
    return 2.0 ** -math.ceil(math.log2(N - 1))


class Statistics(NamedTuple):
    """What a group's forward pass saves for its backward pass."""

    # (3, P, V, 1, D): hi, lo and the standard deviation; a fourth row, vhat, where matmuls may round their operands.
    # (0,) where the dual side has few samples: the moments would take more memory than the blocks.
    moments: Tensor
    M: Tensor  # (P, V, side, side); (0,) if the covariance term is not computed


def _read(views: Sequence[Rows], block: Block, dtype: torch.dtype) -> Tensor:
    """One block of every view: a new tensor (p, V, n, d)."""
    parts = [view.read(block) for view in views]
    if all(part.dtype == dtype for part in parts):
        return torch.stack(parts, dim=1)
    p, n, d = parts[0].shape
    z = parts[0].new_empty((p, len(parts), n, d), dtype=dtype)
    for into, part in zip(z.unbind(1), parts, strict=True):
        into.copy_(part)
    return z


def _sum(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of the parts, in ``dtype``; a single part is returned unchanged."""
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts)).to(dtype).sum(0)


def _sums_of_squares(z: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of z^2 over the rows and over the columns of z (p, V, n, d), in float64: (p, V, 1, d) and (p, V, n, 1).

    The dual side subtracts them.  If one feature outweighs the others, the result shows every rounding error: in float32
    a spike at 256x512 costs 15 u of ||M||^2 / D.  z is copied slice by slice, because a copy of a block is new memory.
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
    """Rows of M that are computed at once: an eighth of a large M, all rows of a small one.

    Eight strips on and below the diagonal are 9/16 of the work.  Relative to the full M they take 0.58 of the time at
    2048x2048 (four strips 0.62, sixteen 0.58), 0.61 at 1024x8192 and, as four strips of 64, 0.71 at 256x8192.
    """
    return side if side < 256 else max(64, -(-side // 8))


# Multiplications in two matmuls up to which they are separate calls.  One batched call is faster on an idle machine (8x16:
# 3.4 us against 7.6; 33x31: 5.0 against 11.5), but it wakes another thread.  Beside two compilers on two cores a pair of
# 8x16 took 8 ms, for a step of 0.6 ms.  At 33x31, 2^16 multiplications, this was not seen.
_ONE_BY_ONE = 1 << 15


def _add_gram(M: Tensor, o: Tensor, dual: bool, scale: float) -> None:
    """Add scale * o o' (dual) or scale * o'o to M (p, side, side); of a large M only strips on and below the diagonal."""
    left = o if dual else o.mT
    side = M.shape[-1]
    strip = _strip(side)
    if strip == side and (len(M) > 2 or left.numel() * strip > _ONE_BY_ONE):
        M.baddbmm_(left, left.mT, alpha=scale)
    elif strip == side:
        for m, a in zip(M.unbind(), left.unbind(), strict=True):
            m.addmm_(a, a.t(), alpha=scale)
    else:
        for m, a in zip(M.unbind(), left.unbind(), strict=True):
            for top in range(0, side, strip):
                bottom = min(top + strip, side)
                m[top:bottom, :bottom].addmm_(a[top:bottom], a[:bottom].t(), alpha=scale)


def _mirror(M: Tensor) -> None:
    """Fill the strips of a large M that :func:`_add_gram` leaves out, above the diagonal."""
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


def _join_chunks(sizes: list[int], chunks: list[Tensor], moments: Tensor, M: Tensor | None) -> Tensor:
    """Chan's formula: stores the centre of the joined chunks in ``moments`` and returns their variance, (p, V, 1, D).

    ``moments`` and the chunks are (3, p, V, 1, D).  The third row of a chunk is its share of the variance: sum(c^2) over
    its rows, divided by N - 1.  The matrix of the differences between the chunks' means is added to M (p * V, D, D).
    """
    wide = precision.scalar_dtype(moments.device)
    means = torch.stack([chunk[0].to(wide) + chunk[1] for chunk in chunks])  # (chunks, p, V, 1, D)
    # Filled on the device.  A copy from the host would wait for the device.
    rows = means.new_full((len(sizes), 1, 1, 1, 1), sizes[0])
    rows[-1] = sizes[-1]
    N = sum(sizes)
    # Relative to the first chunk, so that equal means stay exactly equal.
    offsets = means - means[0]
    offset = (offsets * rows).sum(0) / N
    between = (offsets - offset) * rows.sqrt()
    center = means[0] + offset
    moments[0].copy_(center)
    moments[1].copy_(center - moments[0])
    if M is not None:
        o = between.squeeze(3).movedim(0, 2).flatten(0, 1).to(M.dtype)  # (p * V, chunks, D)
        _add_gram(M, o, dual=False, scale=gram_scale(N))
    within = torch.stack([chunk[2] for chunk in chunks]).to(wide).sum(0)
    return (within + between.square().sum(0) / (N - 1)).to(moments.dtype)


def _reduce_block(
    z: Tensor,
    N: int,
    moments: Tensor | None,
    M: Tensor | None,
    row_sq_norms: Tensor | None,
    matmul_precision: str,
    dual: bool,
) -> tuple[Tensor, Tensor]:
    """Centre one block z (p, V, n, d) of problems with N samples in place, twice, and add its o'o or o o' to M.

    Returns v and vhat, (p, V, 1, d) each, and stores hi and lo in ``moments`` (3, p, V, 1, d).  The dual side adds the
    squared norms of the operand's rows to ``row_sq_norms`` (p, V, n, 1).
    """
    hi, lo = (None, None) if moments is None else (moments[0], moments[1])
    z -= torch.mean(z, 2, keepdim=True, out=hi)
    z -= torch.mean(z, 2, keepdim=True, out=lo)
    o = precision.round_operand(z, matmul_precision)
    wide = precision.scalar_dtype(z.device)
    # A few samples may lie so close together that the squares of their distances underflow in float32: scales of 1e-18.
    few = N < FEW_SAMPLES
    if M is not None and dual and few:
        o_wide = o.flatten(0, 1).to(wide)
        M.add_(torch.bmm(o_wide, o_wide.mT), alpha=gram_scale(N))
    elif M is not None:
        _add_gram(M, o.flatten(0, 1), dual, gram_scale(N))
    if not dual:
        # In place: the squares need no buffer of their own.
        squares = z.to(wide).square_() if few else z.mul_(z)
        v = squares.sum(2, keepdim=True).div_(N - 1)
        return v, v
    columns, rows = _sums_of_squares(z)
    operand_v = v = columns.div_(N - 1)
    if matmul_precision != "ieee":
        columns, rows = _sums_of_squares(o)
        operand_v = columns.div_(N - 1)
    if row_sq_norms is not None:
        row_sq_norms += rows
    return v, operand_v


def recomputed_moments(
    views: Sequence[Rows], block: Block, dtype: torch.dtype, matmul_precision: str
) -> Tensor:
    """The moments of a block of the dual side whose forward pass saved none."""
    P, N, D = views[0].shape
    z = _read(views, block, dtype)
    p, V, _, d = z.shape
    rows = 4 if keeps_operand_variance(P, N, D, z.device, matmul_precision) else 3
    moments = z.new_empty(rows, p, V, 1, d)
    v, operand_v = _reduce_block(z, N, moments, None, None, matmul_precision, dual=True)
    torch.sqrt(v, out=moments[2])
    if rows > 3:
        moments[3].copy_(operand_v)
    return moments


class _ForwardPass:
    """The forward pass of one group: the sums of its blocks, and what is saved of them."""

    def __init__(self, views: Sequence[Rows], plan: Plan, matmul_precision: str) -> None:
        self.views = views
        self.plan = plan
        self.matmul_precision = matmul_precision
        P, N, D = self.shape = views[0].shape
        V = len(views)
        device = views[0].source.device
        self.dtype = precision.accumulation_dtype([view.source.dtype for view in views])
        self.wide = precision.scalar_dtype(device)
        self.dual = uses_dual(P, N, D)
        self.keeps = keeps_moments(P, N, D)
        self.pairs = plan.pair_list
        keeps_vhat = plan.covariance and keeps_operand_variance(P, N, D, device, matmul_precision)
        self.moments = torch.empty(
            (4 if keeps_vhat else 3, P, V, 1, D) if self.keeps else (0,), dtype=self.dtype, device=device
        )
        self.keeps_vhat = keeps_vhat
        self.M: Tensor | None = None
        self.row_sq_norms: Tensor | None = None
        if plan.covariance:
            side = side_of(P, N, D)
            self.M = torch.zeros(P, V, side, side, dtype=self.dtype, device=device)
            if self.dual:
                self.row_sq_norms = torch.zeros(P, V, N, 1, dtype=self.wide, device=device)
        # Partial sums, one a block.
        self.sq_differences: list[Tensor] = []
        self.hinges: list[Tensor] = []
        self.operand_v_sq_norms: list[Tensor] = []

    def read(self, workspace: int) -> None:
        """Read every block once."""
        P, N, D = self.shape
        for group, parts in blocks(P, N, D, self._buffers(), workspace):
            if not self.dual and len(parts) > 1:
                self._read_chunks(group, parts)
                continue
            for block in parts:
                moments = block.of_columns(self.moments) if self.keeps else None
                self._finish_columns(*self._reduce(block, group, moments), moments)

    def _buffers(self) -> int:
        """How many buffers of a block's size exist at once."""
        V = len(self.views)
        # The stacked rows.  The same again for gathered rows, and for the float64 squares and sums of the dual side; else
        # the difference of one pair.
        buffers = V + (V if self.dual or self.views[0].patch is not None else 1)
        # If samples are few, the statistics of the columns are as large as the rows.
        return buffers + (6 * V if self.shape[1] < FEW_SAMPLES else 0)

    def _read_chunks(self, group: slice, parts: list[Block]) -> None:
        """Read problems of the primal side whose columns are cut into several blocks."""
        P, N, D = self.shape
        # Allocated before the blocks.  A tensor that is allocated within a block and outlives it takes the place of the next
        # block's buffers.
        chunks = [self.moments.new_empty(3, len(range(P)[group]), len(self.views), 1, D) for _ in parts]
        for block, chunk in zip(parts, chunks, strict=True):
            chunk[2].copy_(self._reduce(block, group, chunk)[0])
        sizes = [len(range(N)[block.rows]) for block in parts]
        moments = self.moments[:, group]
        v = _join_chunks(sizes, chunks, moments, self._matrices(group))
        self._finish_columns(v, v, moments)

    def _matrices(self, group: slice) -> Tensor | None:
        """M of a group of problems, (p * V, side, side): a view, because both dimensions are contiguous."""
        return None if self.M is None else self.M[group].flatten(0, 1)

    def _reduce(self, block: Block, group: slice, moments: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add the sums of one block; returns v and vhat of its columns."""
        z = _read(self.views, block, self.dtype)
        for i, j in self.pairs:
            difference = z[:, i] - z[:, j]
            self.sq_differences.append(difference.mul_(difference).sum())  # mse_loss takes a third longer
        row_sq_norms = None if self.row_sq_norms is None else self.row_sq_norms[group]
        M = self._matrices(group)
        return _reduce_block(z, self.shape[1], moments, M, row_sq_norms, self.matmul_precision, self.dual)

    def _finish_columns(self, v: Tensor, operand_v: Tensor, moments: Tensor | None) -> None:
        """Add the sums over the variances of complete columns, while they are in the cache."""
        eps = self.plan.eps
        # The root of v is saved: it underflows later than v.
        std = torch.sqrt(v, out=None if moments is None else moments[2])
        self.hinges.append((self.plan.gamma - ((v + eps).sqrt() if eps else std)).relu_().sum())
        if self.row_sq_norms is not None:
            self.operand_v_sq_norms.append(_sum_of_squares(operand_v, self.wide))
        if moments is not None and self.keeps_vhat:
            moments[3].copy_(operand_v)

    def outputs(self) -> list[Tensor]:
        """Weighted invariance, variance and covariance, and their sum."""
        P, N, D = self.shape
        factor = gram_factor(N)
        normalisation = Normalisation(len(self.views), len(self.pairs), P, N, D)
        scales = normalisation.terms(self.plan.weights, factor)
        var = (_sum(self.hinges, self.wide) * scales.var).to(self.dtype)
        inv = self._invariance(scales.inv) if self.pairs else torch.zeros_like(var)
        if self.M is None:
            return [inv, var, torch.zeros_like(var), inv + var]
        cov = (self._off_diagonal_sum_of_squares(self.M, factor) * scales.cov).to(self.dtype)
        return [inv, var, cov, inv + var + cov]

    def _invariance(self, scale: float) -> Tensor:
        return (_sum(self.sq_differences, self.wide) * scale).to(self.dtype)

    def _off_diagonal_sum_of_squares(self, M: Tensor, factor: float) -> Tensor:
        """Complete M, and sum its squares: factor^2 times the sum of the squared off-diagonal covariances."""
        _mirror(M)
        diagonal = M.diagonal(dim1=-2, dim2=-1)
        if self.row_sq_norms is None:
            diagonal.zero_()
            return _sum_of_squares(M, self.wide)
        diagonal.copy_(self.row_sq_norms.squeeze(3).mul_(gram_scale(self.shape[1])))
        # Clamped, so that infinite covariances give inf, and inf - inf is not NaN.
        subtracted = _sum(self.operand_v_sq_norms, self.wide).clamp_max_(torch.finfo(self.wide).max)
        return torch.sub(_sum_of_squares(M, self.wide), subtracted, alpha=factor**2).clamp_min_(0)


def terms(
    views: Sequence[Rows], plan: Plan, matmul_precision: str, workspace: int
) -> tuple[list[Tensor], Statistics]:
    """Weighted invariance, variance and covariance of a group, their sum, and what the backward pass needs.

    Each view is read once.  Working memory is M and the buffers of one block of every view; ``workspace``: see blocks.py.
    """
    forward = _ForwardPass(views, plan, matmul_precision)
    forward.read(workspace)
    outputs = forward.outputs()
    M = forward.moments.new_empty(0) if forward.M is None else forward.M
    return outputs, Statistics(forward.moments, M)
