"""Gradients of the three terms over V views that share (P, N, D), in the notation of forward.py.

    dcov/dc  = 4 / (D (N-1)) * (o M / (s (N-1))             primal
                                M o / (s (N-1)) - o*vhat)   dual
    dvar/dc  = -[sqrt(v+eps) < gamma] * c / (D (N-1) sqrt(v+eps))
    dinv/dx  = 2 (x - y) / (N D) = -dinv/dy

The columns of each gradient sum to zero, so the gradient of the centring adds nothing.
Derivation: docs/how-it-works.md.  Letters: docs/notation.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import precision
from ...plan import Plan
from ...rows import Block, Rows
from ...scales import Normalisation
from ...sides import FEW_SAMPLES, uses_dual
from .blocks import blocks
from .forward import Statistics, gram_factor, recomputed_moments


class _Sum:
    """A sum of elementwise and matrix products.  The first one overwrites what ``values`` held."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.empty = True

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add a * b, which broadcast to the shape of the sum."""
        if self.empty:
            torch.mul(a, b, out=self.values)
        else:
            self.values.addcmul_(a, b)
        self.empty = False

    def add_matmul(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b, (p, n, k) and (p, k, d)."""
        self.values.baddbmm_(a, b, beta=0 if self.empty else 1)
        self.empty = False

    def result(self) -> Tensor:
        """The values; zeros if nothing was added."""
        return self.values.zero_() if self.empty else self.values


class _Columns(NamedTuple):
    """A block's centres and factors, (p, V, 1, d) each; a factor is None if it is zero everywhere."""

    hi: Tensor
    lo: Tensor
    factor: Tensor | None  # of c
    operand_factor: Tensor | None  # of o, besides M


class _BackwardPass:
    """The backward pass of one group: what multiplies its views, and the blocks of their gradients."""

    def __init__(
        self,
        views: Sequence[Rows],
        plan: Plan,
        matmul_precision: str,
        statistics: Statistics,
        upstream: Sequence[Tensor | None],
        totals: Sequence[Tensor | None],
        add: bool,
    ) -> None:
        self.views = views
        self.plan = plan
        self.matmul_precision = matmul_precision
        self.statistics = statistics
        self.add = add
        P, N, D = self.shape = views[0].shape
        self.dtype = statistics.moments.dtype
        self.dual = uses_dual(P, N, D)
        self.rounds = matmul_precision != "ieee"  # o is c if it does not
        self.needed = {view: total for view, total in enumerate(totals) if total is not None}
        self.in_place = {view: not add and total.dtype == self.dtype for view, total in self.needed.items()}

        inv_up, var_up, cov_up = upstream
        self.gram_factor = gram_factor(N)
        normalisation = Normalisation(len(views), len(plan.pair_list), P, N, D)
        scales = normalisation.gradients(plan.weights, self.gram_factor)
        self.pairs = plan.pair_list if inv_up is not None else []
        if inv_up is not None and self.pairs:
            factor = inv_up * scales.inv
            self.difference_factors = factor, -factor
        self.var_scale = None if var_up is None else var_up * scales.var
        self.cov_scale = cov_up * scales.cov if cov_up is not None and plan.covariance else None
        # cov_scale multiplies M or the operand.  A scaled copy of a small M costs nothing.  One of a large M would be the
        # largest tensor of the backward pass, and new memory costs more than a pass over a block in the cache.
        self.scales_M = self.cov_scale is not None and 4 * statistics.M[0, 0].numel() <= N * D
        # M of the primal side has a zero diagonal.  If o is c, the variance factor is folded into it.
        self.folds_variance = self.scales_M and not self.dual and not self.rounds

    def run(self, workspace: int) -> None:
        """Compute every block of the gradients."""
        P, N, D = self.shape
        if self.scales_M:
            workspace -= self.statistics.M.numel()
        for group, parts in blocks(P, N, D, self._buffers(), workspace):
            shared = self._columns(parts[0])
            matrices = self._matrices(group, shared)
            for block in parts:
                # A block of the dual side has all rows of some columns; one of the primal side some rows of all columns.
                columns = self._columns(block) if self.dual and block is not parts[0] else shared
                self._differentiate(block, columns, matrices)

    def _buffers(self) -> int:
        """How many buffers of a block's size exist at once."""
        V = len(self.views)
        # Sources of the accumulation type whose gradients are written in place are read without a copy.  The buffers are
        # then the difference of one pair and one centred view; else the rows and the sums of all views, and one more.
        plain = all(self.in_place.values()) and all(view.source.dtype == self.dtype for view in self.views)
        buffers = (2 if plain else 2 * V + 1) + self.rounds
        # If samples are few, the statistics of the columns are as large as the rows.
        return buffers + (6 * V if self.shape[1] < FEW_SAMPLES else 0)

    def _columns(self, block: Block) -> _Columns:
        """Centres of a block's columns, and the factors that the columns have besides M."""
        if self.statistics.moments.numel():
            moments = block.of_columns(self.statistics.moments)
        else:
            moments = recomputed_moments(self.views, block, self.dtype, self.matmul_precision)
        hi, lo, deviation, *operand_v = moments.unbind(0)
        factor = operand_factor = None
        if self.var_scale is not None:
            eps = self.plan.eps
            std = (deviation.square() + eps).sqrt() if eps else deviation
            factor = torch.where((std < self.plan.gamma) & (std > 0), self.var_scale / std, 0.0)
        if self.cov_scale is not None and self.dual:
            v = operand_v[0] if operand_v else deviation.square()
            operand_factor = v * (self.cov_scale * -self.gram_factor)
            if not self.rounds:  # o is c, so that one factor is enough
                factor = operand_factor if factor is None else operand_factor.add_(factor)
                operand_factor = None
        return _Columns(hi, lo, factor, operand_factor)

    def _matrices(self, group: slice, columns: _Columns) -> dict[int, Tensor]:
        """What the operand of each needed view is multiplied with, (p, side, side): M, scaled if ``scales_M``."""
        if self.cov_scale is None:
            return {}
        M = self.statistics.M[group]
        if self.scales_M:
            M = M * self.cov_scale
        if self.folds_variance and columns.factor is not None:
            M.diagonal(dim1=-2, dim2=-1).copy_(columns.factor.squeeze(2))
        return {view: M[:, view] for view in self.needed}

    def _differentiate(self, block: Block, columns: _Columns, matrices: dict[int, Tensor]) -> None:
        """Compute one block of the gradients and store it in the totals."""
        views, dtype = self.views, self.dtype
        z = {
            view: views[view].read(block).to(dtype)
            for view in (range(len(views)) if self.pairs else self.needed)
        }
        sums = {
            view: _Sum(
                views[view].of(total, block)
                if self.in_place[view]
                else total.new_empty(z[view].shape, dtype=dtype)
            )
            for view, total in self.needed.items()
        }
        self._add_differences(z, sums)
        for view, summed in sums.items():
            if columns.factor is not None or self.cov_scale is not None:
                self._add_statistics(z.pop(view), view, columns, matrices.get(view), summed)
            values = summed.result()
            if self.add:
                views[view].add(self.needed[view], block, values)
            elif not self.in_place[view]:
                views[view].of(self.needed[view], block).copy_(values)

    def _add_differences(self, z: dict[int, Tensor], sums: dict[int, _Sum]) -> None:
        """Add the gradient of the invariance."""
        for pair in self.pairs:
            difference = z[pair[0]] - z[pair[1]]
            for view, factor in zip(pair, self.difference_factors, strict=True):
                if view in sums:
                    sums[view].add(difference, factor)

    def _add_statistics(self, z: Tensor, view: int, columns: _Columns, M: Tensor | None, summed: _Sum) -> None:
        """Add the gradients of variance and covariance of one view's rows z."""
        c = z - columns.hi[:, view]
        c -= columns.lo[:, view]
        if columns.factor is not None and not self.folds_variance:
            summed.add(c, columns.factor[:, view])
        if M is not None:
            o = precision.round_operand(c, self.matmul_precision)
            if columns.operand_factor is not None:
                summed.add(o, columns.operand_factor[:, view])
            if self.cov_scale is not None and not self.scales_M:
                o *= self.cov_scale
            summed.add_matmul(*((M, o) if self.dual else (o, M)))


def gradient(
    views: Sequence[Rows],
    plan: Plan,
    matmul_precision: str,
    workspace: int,
    statistics: Statistics,
    upstream: Sequence[Tensor | None],
    totals: Sequence[Tensor | None],
    *,
    add: bool,
) -> None:
    """Store the gradient of ``upstream`` times the weighted terms in ``totals``: one a view, None if it is not needed.

    With ``add``, views may share totals, which start from zero.  A term without upstream gradient (None) is not
    differentiated: its matmul is saved, and an infinite value of it cannot turn the gradient into NaN.
    """
    _BackwardPass(views, plan, matmul_precision, statistics, upstream, totals, add).run(workspace)
