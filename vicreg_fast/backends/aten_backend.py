"""The ATen backend: closed forms in PyTorch operators, for every device and type.  Letters: docs/notation.md."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import precision
from ..plan import Matches, Plan, problems
from ..rows import FULL_VIEW, Rows
from ..sides import keeps_moments, keeps_operand_variance, side_of
from .aten import backward, forward, nearest_patches
from .aten.blocks import workspace_elements


def saved(
    plan: Plan, sources: Sequence[Tensor], match_index: Tensor | None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what is saved besides the inputs: moments and M of each group.  (0,): not saved."""
    dtype = precision.accumulation_dtype([source.dtype for source in sources])
    shapes: list[tuple[int, ...]] = []
    for group in plan.groups(sources, match_index):
        V = len(group)
        P, N, D = group[0][1].shape
        side = side_of(P, N, D)
        rows = 4 if plan.covariance and keeps_operand_variance(P, N, D, sources[0].device) else 3
        shapes.append((rows, P, V, 1, D) if keeps_moments(P, N, D) else (0,))
        shapes.append((P, V, side, side) if plan.covariance else (0,))
    return [(shape, dtype) for shape in shapes]


def terms(plan: Plan, sources: Sequence[Tensor], matches: Matches | None) -> list[Tensor]:
    """[the plan's outputs, then moments and M of every group]."""
    match_index = None if matches is None else matches.match_index
    matmul_precision = precision.resolve_matmul_precision(
        plan.precision, sources[0].device, [s.dtype for s in sources]
    )
    groups = list(plan.groups(sources, match_index))
    workspace = workspace_elements(groups, sources, match_index)
    values: list[Tensor] = []
    saved: list[Tensor] = []
    with precision.set_matmul_precision(matmul_precision, sources[0].device):
        for group in groups:
            outputs, statistics = forward.terms([rows for _, rows in group], plan, matmul_precision, workspace)
            values.extend(outputs)
            saved.extend(statistics)
    return [*plan.outputs_of(values), *saved]


def gradient(
    plan: Plan,
    sources: Sequence[Tensor],
    match_index: Tensor | None,
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the sources that ``needs`` marks: see :func:`vicreg_fast.operators.gradient`."""
    device = sources[0].device
    dtypes = [source.dtype for source in sources]
    matmul_precision = precision.resolve_matmul_precision(plan.precision, device, dtypes)
    groups = list(plan.groups(sources, match_index))
    workspace = workspace_elements(groups, sources, match_index)
    # If each source is one view with all its rows, every element is written once.  Otherwise gradients are added.
    add = match_index is not None or len(plan.view_source) > plan.source_count
    totals: list[Tensor | None] = [None] * len(sources)
    for k, (source, need) in enumerate(zip(sources, needs, strict=True)):
        if need and add:
            dtype = precision.accumulation_dtype(dtypes)
            totals[k] = torch.zeros(source.shape, dtype=dtype, device=device)
            workspace -= source.numel() if source.dtype != dtype else 0
        elif need:
            totals[k] = torch.empty(source.shape, dtype=source.dtype, device=device)
    with precision.set_matmul_precision(matmul_precision, device):
        for k, group in enumerate(groups):
            backward.gradient(
                [rows for _, rows in group],
                plan,
                matmul_precision,
                workspace,
                forward.Statistics(*saved[2 * k : 2 * k + 2]),
                upstream[3 * k : 3 * k + 3],
                [None if (total := totals[source]) is None else problems(total) for source, _ in group],
                add=add,
            )
    return [total.to(source.dtype) for total, source in zip(totals, sources, strict=True) if total is not None]


def match(
    maps: Sequence[Tensor],
    locations: Sequence[Tensor],
    counts: Sequence[int],
    match_order: str,
    per_slot: bool,
) -> Matches:
    """Match patches by location, if there are locations, and by feature: see :class:`vicreg_fast.plan.Matches`.

    ``maps``, ``locations``: of x and y.  ``counts``: matches from x to y and from y to x, or the former alone.
    """
    index: list[Tensor] = []
    with precision.set_matmul_precision("ieee", maps[0].device):
        for queries, candidates in [locations, maps] if locations else [maps]:
            directions = nearest_patches.nearest(queries, candidates, both=len(counts) == 2)
            for nearest, m in zip(directions, counts, strict=True):
                for patches in nearest_patches.select(nearest, m, match_order):
                    index.append((patches.t() if per_slot else patches).reshape(-1))
    return Matches(torch.cat(index))


def match_distances(queries: Tensor, candidates: Tensor, matches: Tensor) -> Tensor:
    """Euclidean distances (B, m) of matches (2, B, m)."""
    dtype = precision.accumulation_dtype([queries.dtype, candidates.dtype])
    query, candidate = (
        Rows(z, patch).read(FULL_VIEW).to(dtype)
        for z, patch in zip((queries, candidates), matches.unbind(), strict=True)
    )
    distance: Tensor = torch.linalg.vector_norm(query - candidate, dim=-1)
    return distance
