"""The gradient as one out-of-place function of the inputs, which autograd can differentiate again.

It serves every backend, and only for ``create_graph=True``.  The closed forms are those of the backends, recomputed from the
saved inputs in plain operators, without blocks.
Derivation: docs/how-it-works.md.  Letters: docs/notation.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import precision
from .plan import Plan, problems
from .rows import FULL_VIEW
from .scales import Normalisation
from .sides import FEW_SAMPLES, uses_dual


def _statistics_gradient(
    z: Tensor, var_scale: Tensor | None, cov_scale: Tensor | None, plan: Plan
) -> list[Tensor]:
    """Summands of the gradient of var_scale * sum_d relu(gamma - std_d) + cov_scale * sum(C0^2) / 2, one view (P, N, D).

    A term without upstream gradient (None) is not computed: if it were infinite, it would turn the sum into NaN.
    """
    P, N, D = z.shape
    c = z - z.mean(dim=1, keepdim=True)
    # Twice, because the rounded mean leaves a variance in a constant column.
    c = c - c.mean(dim=1, keepdim=True)
    # A few samples may lie so close together that the squares of their distances underflow in float32.
    wide = c.to(precision.scalar_dtype(c.device)) if N < FEW_SAMPLES else c
    v = wide.square().sum(dim=1, keepdim=True) / (N - 1)
    parts = []
    if var_scale is not None:
        active = ((v + plan.eps).sqrt() < plan.gamma) & (v + plan.eps > 0)
        std = torch.where(active, v + plan.eps, 1).sqrt().to(c.dtype)
        parts.append(torch.where(active, c / std, 0) * (-var_scale / (N - 1)))
    if cov_scale is not None and plan.covariance:
        if uses_dual(P, N, D):
            # The diagonal by itself, as in the backends: a matmul loses weak features after strong ones.
            G = c @ c.mT
            G = G + torch.diag_embed(c.square().sum(dim=2) - G.diagonal(dim1=-2, dim2=-1))
            cC0 = G @ c / (N - 1) - c * v.to(c.dtype)
        else:
            C = c.mT @ c / (N - 1)
            cC0 = c @ (C - torch.diag_embed(C.diagonal(dim1=-2, dim2=-1)))
        parts.append(cC0 * (2 * cov_scale / (N - 1)))
    return parts


def _scaled(scalar: Tensor | None, factor: float) -> Tensor | None:
    return None if scalar is None else scalar * factor


def gradient(
    plan: Plan,
    sources: Sequence[Tensor],
    match_index: Tensor | None,
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the sources that ``needs`` marks, differentiable in the sources and in ``upstream`` (3 a group)."""
    dtype = precision.accumulation_dtype([s.dtype for s in sources])
    totals: list[Tensor | None] = [
        torch.zeros(s.shape, dtype=dtype, device=s.device) if need else None
        for s, need in zip(sources, needs, strict=True)
    ]
    with precision.set_matmul_precision("ieee", sources[0].device):
        for k, group in enumerate(plan.groups(sources, match_index)):
            views = [rows.read(FULL_VIEW).to(dtype) for _, rows in group]
            normalisation = Normalisation(len(views), len(plan.pair_list), *views[0].shape)
            # Upstream gradients of the unweighted terms, then the scales of :func:`_statistics_gradient`.
            inv, var, cov = (
                _scaled(grad, weight)
                for grad, weight in zip(upstream[3 * k : 3 * k + 3], plan.weights, strict=True)
            )
            var, cov = _scaled(var, 1 / normalisation.columns), _scaled(cov, 2 / normalisation.columns)
            summands = [_statistics_gradient(z, var, cov, plan) for z in views]
            if inv is not None:
                inv_scale = inv * 2 / normalisation.differences
                for i, j in plan.pair_list:
                    difference = (views[i] - views[j]) * inv_scale
                    summands[i].append(difference)
                    summands[j].append(-difference)
            for (source, rows), parts in zip(group, summands, strict=True):
                total = totals[source]
                if total is not None and parts:
                    rows.add(problems(total), FULL_VIEW, sum(parts[1:], parts[0]))
    return [total.to(s.dtype) for total, s in zip(totals, sources, strict=True) if total is not None]
