"""The stages that a backend offers, composed for a plan: ``terms``, ``gradient``, ``match``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import precision
from ...multiview import Plan, problems
from . import matching
from . import terms as groups


def terms(plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """[inv, var, cov of every group, then the five statistics of every group]."""
    product = precision.resolve_product(plan.precision, sources[0].device, [s.dtype for s in sources])
    values: list[Tensor] = []
    saved: list[Tensor] = []
    with precision.exact_products(product, sources[0].device):
        for group in plan.groups(sources, indices):
            value, statistics = groups.terms(
                [rows for _, rows in group],
                plan.pair_list,
                gamma=plan.gamma,
                eps=plan.eps,
                product=product,
                covariance=plan.covariance,
            )
            values.extend(value)
            saved.extend(statistics)
    return [*values, *saved]


def gradient(
    plan: Plan,
    sources: Sequence[Tensor],
    indices: Sequence[Tensor],
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the sources that ``needs`` marks, in their own types.

    ``upstream``, three scalars a group, multiplies the terms; None where a term has no upstream gradient.
    """
    device = sources[0].device
    product = precision.resolve_product(plan.precision, device, [s.dtype for s in sources])
    dtype = precision.accumulation_dtype([s.dtype for s in sources])
    # Where each source is one plain view, every element is written once, straight into its gradient.
    once = not indices and len(plan.view_source) == len(sources)
    totals: list[Tensor | None] = [None] * len(sources)
    for number, (source, need) in enumerate(zip(sources, needs, strict=True)):
        if need and once:
            totals[number] = torch.empty(source.shape, dtype=source.dtype, device=device)
        elif need:
            totals[number] = torch.zeros(source.shape, dtype=dtype, device=device)
    fields = len(groups.Statistics._fields)
    with precision.exact_products(product, device):
        for number, group in enumerate(plan.groups(sources, indices)):
            groups.gradient(
                [rows for _, rows in group],
                plan.pair_list,
                groups.Statistics(*saved[fields * number : fields * (number + 1)]),
                upstream[3 * number : 3 * number + 3],
                [None if (total := totals[source]) is None else problems(total) for source, _ in group],
                gamma=plan.gamma,
                eps=plan.eps,
                product=product,
                add=not once,
            )
    return [total.to(source.dtype) for total, source in zip(totals, sources, strict=True) if total is not None]


def match(queries: Tensor, candidates: Tensor, num_matches: int, match_order: str) -> list[Tensor]:
    """[query, candidate] of queries -> candidates, then [query, candidate] of the other direction.

    (B, m) each, m = min(num_matches, number of queries on that side).
    """
    with precision.exact_products("ieee", queries.device):
        there, back = matching.nearest(queries, candidates)
    return [
        *matching.select(there, num_matches, match_order),
        *matching.select(back, num_matches, match_order),
    ]
