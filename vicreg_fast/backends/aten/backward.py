"""Gradients of the three terms over V views that share (P, N, D), in the notation of terms.py.

    dcov/dc  = 4 / (D (N-1)) * (o M / (s (N-1))             primal
                                M o / (s (N-1)) - o*vhat)   dual
    dvar/dc  = -[sqrt(v+eps) < gamma] * c / (D (N-1) sqrt(v+eps))
    dinv/dx  = 2 (x - y) / (N D) = -dinv/dy

The columns of each sum to zero, so nothing passes through the centring.
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
from .forward import Statistics, gram_scale, recomputed_moments


class _Sum:
    """A sum of products; the first one overwrites what ``values`` held."""

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
        """Add the matrix products a @ b, (p, n, k) and (p, k, d)."""
        self.values.baddbmm_(a, b, beta=0 if self.empty else 1)
        self.empty = False

    def result(self) -> Tensor:
        """The values: zeros where nothing was added."""
        return self.values.zero_() if self.empty else self.values


class _Columns(NamedTuple):
    """A block's centres, (p, V, 1, d) each, and what c and o are multiplied with besides M (None: nothing)."""

    hi: Tensor
    lo: Tensor
    factor: Tensor | None
    operand_factor: Tensor | None


def gradient(
    views: Sequence[Rows],
    plan: Plan,
    product: str,
    spare: int,
    statistics: Statistics,
    upstream: Sequence[Tensor | None],
    totals: Sequence[Tensor | None],
    *,
    add: bool,
) -> None:
    """Store the gradient of ``upstream`` times the weighted terms in ``totals``, one a view, None: not needed.

    With ``add``, totals may be shared between views and start from zero.  What an absent upstream gradient would
    multiply is not computed: no product is formed in vain, and an infinite term that nobody asked for spoils
    nothing.
    """
    V = len(views)
    P, N, D = views[0].shape
    dtype = statistics.moments.dtype
    dual = uses_dual(P, N, D)
    rounds = product != "ieee"
    inv_up, var_up, cov_up = upstream
    needed = {view: total for view, total in enumerate(totals) if total is not None}
    in_place = {view: not add and total.dtype == dtype for view, total in needed.items()}

    pairs = plan.pair_list if inv_up is not None else []
    gram_factor = gram_scale(N) * (N - 1)
    scales = Normalisation(V, len(plan.pair_list), P, N, D).gradients(plan.weights, gram_factor)
    if inv_up is not None and pairs:
        factor = inv_up * scales.inv
        factors = factor, -factor
    slope = None if var_up is None else var_up * scales.var
    # Of the product with M.
    scale = None
    if cov_up is not None and plan.covariance:
        scale = cov_up * scales.cov
    # Either factor of the product may bear its scale.  A scaled copy of a small M costs nothing; one of a large M would
    # be the largest tensor of the backward pass, and fresh memory costs more than a pass over a block in the cache.
    scales_M = scale is not None and 4 * statistics.M[0, 0].numel() <= N * D
    # The primal's M has a zero diagonal: the variance's factor rides on it.
    rides = scales_M and not dual and not rounds

    def columns(block: Block) -> _Columns:
        if statistics.moments.numel():
            moments = block.of_columns(statistics.moments)
        else:
            moments = recomputed_moments(views, block, dtype, product)
        hi, lo, deviation, *operand_v = moments.unbind(0)
        factor = operand_factor = None
        if slope is not None:
            std = (deviation.square() + plan.eps).sqrt() if plan.eps else deviation
            factor = torch.where((std < plan.gamma) & (std > 0), slope / std, 0.0)
        if scale is not None and dual:
            operand_factor = (operand_v[0] if operand_v else deviation.square()) * (
                scale * -gram_factor
            )
            if not rounds:  # o is c: one factor
                factor = operand_factor if factor is None else operand_factor.add_(factor)
                operand_factor = None
        return _Columns(hi, lo, factor, operand_factor)

    def products(group: slice, shared: _Columns) -> dict[int, Tensor]:
        """What each needed view's operand is multiplied with, (p, M, M)."""
        if scale is None:
            return {}
        A = statistics.M[group]
        if scales_M:
            A = A * scale
        if rides and shared.factor is not None:
            A.diagonal(dim1=-2, dim2=-1).copy_(shared.factor.squeeze(2))
        return {view: A[:, view] for view in needed}

    def add_differences(z: dict[int, Tensor], sums: dict[int, _Sum]) -> None:
        for pair in pairs:
            d = z[pair[0]] - z[pair[1]]
            for view, signed in zip(pair, factors, strict=True):
                if view in sums:
                    sums[view].add(d, signed)

    def add_statistics(z: Tensor, view: int, shared: _Columns, A: Tensor | None, summed: _Sum) -> None:
        c = z - shared.hi[:, view]
        c -= shared.lo[:, view]
        if shared.factor is not None and not rides:
            summed.add(c, shared.factor[:, view])
        if A is not None:
            o = precision.round_operand(c, product)
            if shared.operand_factor is not None:
                summed.add(o, shared.operand_factor[:, view])
            if scale is not None and not scales_M:
                o *= scale
            summed.add_matmul(*((A, o) if dual else (o, A)))

    def differentiate(block: Block, shared: _Columns, A: dict[int, Tensor]) -> None:
        z = {view: views[view].read(block).to(dtype) for view in (range(V) if pairs else needed)}
        sums = {
            view: _Sum(
                views[view].of(total, block) if in_place[view] else total.new_empty(z[view].shape, dtype=dtype)
            )
            for view, total in needed.items()
        }
        add_differences(z, sums)
        for view, summed in sums.items():
            if shared.factor is not None or scale is not None:
                add_statistics(z.pop(view), view, shared, A.get(view), summed)
            values = summed.result()
            if add:
                views[view].add(needed[view], block, values)
            elif not in_place[view]:
                views[view].of(needed[view], block).copy_(values)

    # Plain views are read in place: a pair's difference and one centred view.  Else all rows, all sums and one more.
    plain = all(in_place.values()) and all(view.source.dtype == dtype for view in views)
    # Where samples are few, the columns' statistics are as large as the rows.
    buffers = (2 if plain else 2 * V + 1) + rounds + (6 * V if N < FEW_SAMPLES else 0)
    if scales_M:
        spare -= statistics.M.numel()
    for group, parts in blocks(P, N, D, buffers, spare):
        shared = columns(parts[0])
        A = products(group, shared)
        for block in parts:
            # On the dual side each block has columns of its own.
            differentiate(block, columns(block) if dual and block is not parts[0] else shared, A)
