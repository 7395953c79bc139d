"""The gradient as one out-of-place function of the inputs, so that autograd can differentiate it again.

Used only where ``create_graph=True`` asks for it: the same closed forms as the backends', recomputed from the
saved inputs in plain operators, unblocked.  Serves every backend.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import precision
from .plan import Plan, problems
from .rows import WHOLE
from .scales import Normalisation
from .sides import FEW_SAMPLES, uses_dual


def _statistics_gradient(
    z: Tensor, var_scale: Tensor | None, cov_scale: Tensor | None, plan: Plan
) -> list[Tensor]:
    """Summands of the gradient of var_scale * sum_d relu(gamma - std_d) + cov_scale * sum(C0^2) / 2, one view (P, N, D).

    What nobody asked for (None) is not computed: an infinite term would spoil the others.
    """
    P, N, D = z.shape
    c = z - z.mean(dim=1, keepdim=True)
    c = c - c.mean(dim=1, keepdim=True)  # or a constant column would have a variance
    # A few samples may be so near to each other that float32 has no squares for their distances.
    wide = c.to(precision.scalar_dtype(c.device)) if N < FEW_SAMPLES else c
    v = wide.square().sum(dim=1, keepdim=True) / (N - 1)
    parts = []
    if var_scale is not None:
        active = ((v + plan.eps).sqrt() < plan.gamma) & (v + plan.eps > 0)
        std = torch.where(active, v + plan.eps, 1).sqrt().to(c.dtype)
        parts.append(torch.where(active, c / std, 0) * (-var_scale / (N - 1)))
    if cov_scale is not None and plan.covariance:
        if uses_dual(P, N, D):
            product = (c @ c.mT) @ c / (N - 1) - c * v.to(c.dtype)
        else:
            C = c.mT @ c / (N - 1)
            product = c @ (C - torch.diag_embed(C.diagonal(dim1=-2, dim2=-1)))
        parts.append(product * (2 * cov_scale / (N - 1)))
    return parts


def _scaled(up: Tensor | None, factor: float) -> Tensor | None:
    return None if up is None else up * factor


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
    with precision.exact_products("ieee", sources[0].device):
        for number, group in enumerate(plan.groups(sources, match_index)):
            z = [rows.read(WHOLE).to(dtype) for _, rows in group]
            over = Normalisation(len(z), len(plan.pair_list), *z[0].shape)
            ups = upstream[3 * number : 3 * number + 3]
            inv, var, cov = (_scaled(up, w) for up, w in zip(ups, plan.weights, strict=True))
            var, cov = _scaled(var, 1 / over.columns), _scaled(cov, 2 / over.columns)
            g = [_statistics_gradient(each, var, cov, plan) for each in z]
            if inv is not None:
                factor = inv * 2 / over.differences
                for i, j in plan.pair_list:
                    d = (z[i] - z[j]) * factor
                    g[i].append(d)
                    g[j].append(-d)
            for (source, rows), parts in zip(group, g, strict=True):
                total = totals[source]
                if total is not None and parts:
                    rows.add(problems(total), WHOLE, sum(parts[1:], parts[0]))
    return [total.to(s.dtype) for total, s in zip(totals, sources, strict=True) if total is not None]
