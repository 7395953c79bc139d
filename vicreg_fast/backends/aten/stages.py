"""The stages that a backend offers, composed for a plan: ``terms``, ``gradient``, ``match``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import precision
from ...multiview import Plan, index_shapes, problems
from ...rows import WHOLE, Rows, keeps_moments, keeps_operand_variance, uses_dual
from . import gradient as _gradient
from . import matching
from . import terms as _terms
from .blocks import spare_elements


def saved(
    plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor]
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what is saved besides the inputs: every group's moments and M, (0,) where there is nothing."""
    dtype = precision.accumulation_dtype([source.dtype for source in sources])
    shapes: list[tuple[int, ...]] = []
    for group in plan.groups(sources, indices):
        V = len(group)
        P, N, D = group[0][1].shape
        side = N if uses_dual(P, N, D) else D
        rows = 4 if plan.covariance and keeps_operand_variance(P, N, D, sources[0].device) else 3
        shapes.append((rows, P, V, 1, D) if keeps_moments(P, N, D) else (0,))
        shapes.append((P, V, side, side) if plan.covariance else (0,))
    return [(shape, dtype) for shape in shapes]


def terms(plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """[weighted inv, var, cov and their sum of every loss, their total, then moments and M of every group]."""
    product = precision.resolve_product(plan.precision, sources[0].device, [s.dtype for s in sources])
    groups = list(plan.groups(sources, indices))
    spare = spare_elements(groups, sources, indices)
    values: list[Tensor] = []
    saved: list[Tensor] = []
    with precision.exact_products(product, sources[0].device):
        for group in groups:
            value, statistics = _terms.terms([rows for _, rows in group], plan, product, spare)
            values.extend(value)
            saved.extend(statistics)
    return [*plan.outputs_of(values), *saved]


def gradient(
    plan: Plan,
    sources: Sequence[Tensor],
    indices: Sequence[Tensor],
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the sources that ``needs`` marks, in their own types.

    ``upstream``, three scalars a group, multiplies the weighted terms; None where a term has no upstream gradient.
    """
    device = sources[0].device
    dtypes = [source.dtype for source in sources]
    product = precision.resolve_product(plan.precision, device, dtypes)
    groups = list(plan.groups(sources, indices))
    spare = spare_elements(groups, sources, indices)
    # Where each source is one plain view, every element is written once; else contributions add up.
    add = bool(indices) or len(plan.view_source) > plan.source_count
    totals: list[Tensor | None] = [None] * len(sources)
    for number, (source, need) in enumerate(zip(sources, needs, strict=True)):
        if need and add:
            dtype = precision.accumulation_dtype(dtypes)
            totals[number] = torch.zeros(source.shape, dtype=dtype, device=device)
            spare -= source.numel() if source.dtype != dtype else 0
        elif need:
            totals[number] = torch.empty(source.shape, dtype=source.dtype, device=device)
    with precision.exact_products(product, device):
        for number, group in enumerate(groups):
            _gradient.gradient(
                [rows for _, rows in group],
                plan,
                product,
                spare,
                _terms.Statistics(*saved[2 * number : 2 * number + 2]),
                upstream[3 * number : 3 * number + 3],
                [None if (total := totals[source]) is None else problems(total) for source, _ in group],
                add=add,
            )
    return [total.to(source.dtype) for total, source in zip(totals, sources, strict=True) if total is not None]


def match(
    maps: Sequence[Tensor],
    locations: Sequence[Tensor],
    counts: Sequence[int],
    match_order: str,
    across: bool,
) -> list[Tensor]:
    """Numbers of matched patches, by location and by feature: see :func:`vicreg_fast.operators.match`."""
    found: list[Tensor] = []
    with precision.exact_products("ieee", maps[0].device):
        for queries, candidates in [locations, maps] if locations else [maps]:
            directions = matching.nearest(queries, candidates, both=len(counts) == 2)
            chosen = [
                index.t() if across else index
                for nearest, m in zip(directions, counts, strict=True)
                for index in matching.select(nearest, m, match_order)
            ]
            for V, _, _ in index_shapes(len(queries), counts, across):
                found.append(torch.stack(chosen[:V]))
                chosen = chosen[V:]
    return found


def match_distances(queries: Tensor, candidates: Tensor, matches: Tensor) -> Tensor:
    """Euclidean distances (B, m) of matches (2, B, m)."""
    dtype = precision.accumulation_dtype([queries.dtype, candidates.dtype])
    query, candidate = (
        Rows(z, patch).read(WHOLE).to(dtype)
        for z, patch in zip((queries, candidates), matches.unbind(), strict=True)
    )
    distance: Tensor = torch.linalg.vector_norm(query - candidate, dim=-1)
    return distance
