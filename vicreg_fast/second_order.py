"""The gradient as one out-of-place function of the inputs, so that autograd can differentiate it again.

Used only where ``create_graph=True`` asks for it: the same closed forms as the backends', recomputed from the
saved inputs in plain operators, unblocked.  Serves every backend.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import precision
from .multiview import Plan, problems
from .rows import WHOLE, uses_dual


def _statistics_gradient(z: Tensor, var_scale: Tensor | float, cov_scale: Tensor | float, plan: Plan) -> Tensor:
    """Gradient of var_scale * sum_d relu(gamma - std_d) + cov_scale * sum(C0^2) / 2, for one view (P, N, D)."""
    _, N, D = z.shape
    c = z - z.mean(dim=1, keepdim=True)
    v = c.square().sum(dim=1, keepdim=True) / (N - 1)
    active = ((v + plan.eps).sqrt() < plan.gamma) & (v + plan.eps > 0)
    std = torch.where(active, v + plan.eps, 1).sqrt()
    g = torch.where(active, c / std, 0) * (-var_scale / (N - 1))
    if plan.covariance:
        if uses_dual(N, D):
            product = (c @ c.mT) @ c / (N - 1) - c * v
        else:
            C = c.mT @ c / (N - 1)
            product = c @ (C - torch.diag_embed(C.diagonal(dim1=-2, dim2=-1)))
        g = g + product * (2 * cov_scale / (N - 1))
    return g


def gradient(
    plan: Plan,
    sources: Sequence[Tensor],
    indices: Sequence[Tensor],
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
        for number, group in enumerate(plan.groups(sources, indices)):
            ups = upstream[3 * number : 3 * number + 3]
            inv, var, cov = (0.0 if up is None else up * w for up, w in zip(ups, plan.weights, strict=True))
            z = [rows.read(WHOLE).to(dtype) for _, rows in group]
            V = len(z)
            P, _, D = z[0].shape
            g = [_statistics_gradient(each, var / (V * P * D), 2 * cov / (V * P * D), plan) for each in z]
            for i, j in plan.pair_list:
                d = (z[i] - z[j]) * (inv * 2 / (len(plan.pair_list) * z[i].numel()))
                g[i] = g[i] + d
                g[j] = g[j] - d
            for (source, rows), values in zip(group, g, strict=True):
                total = totals[source]
                if total is not None:
                    rows.add(problems(total), WHOLE, values)
    return [total.to(s.dtype) for total, s in zip(totals, sources, strict=True) if total is not None]
