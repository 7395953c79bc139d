"""The stages that a backend offers, composed for a plan: ``terms``, ``gradient``, ``match``."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...plan import Plan, problems
from . import configs, launch, local, matching, scatter, tuning
from . import gradient as _gradient
from . import terms as _terms


def saved(
    plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor]
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what is saved besides the inputs."""
    products = launch.products(plan.precision, _of_one_type(sources), configs.machine(sources[0].device))
    if local.fits(plan, indices):
        return local.saved(plan, sources[0].shape, indices, products)
    return [
        each
        for group in plan.groups(sources, indices)
        for each in _terms.saved(plan, products, bool(indices), len(group), *group[0][1].shape)
    ]


def terms(plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """[weighted inv, var, cov and their sum of every loss, their total, then moments, M and operand of every group]."""
    sources = _of_one_type(sources)
    machine = configs.machine(sources[0].device)
    products = launch.products(plan.precision, sources, machine)
    if local.fits(plan, indices):
        with launch.on_device(sources[0].device):
            return tuning.tuned(
                lambda: local.keys(plan, sources, indices, products, machine)[:1],
                lambda: local.terms(plan, sources, indices, products, machine),
            )
    values: list[Tensor] = []
    saved: list[Tensor] = []
    with launch.on_device(sources[0].device):
        for number, group in enumerate(plan.groups(sources, indices)):
            views = launch.views(group, indices[number] if indices else None)
            found = tuning.tuned(
                functools.partial(_terms.keys, views, products, machine),
                functools.partial(_terms.terms, views, plan, products, machine),
            )
            values += found[:4]
            saved += found[4:]
    return [*plan.outputs_of(values), *saved]


def gradient(
    plan: Plan,
    sources: Sequence[Tensor],
    indices: Sequence[Tensor],
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the sources that ``needs`` marks, in their own types."""
    alike = _of_one_type(sources)
    machine = configs.machine(sources[0].device)
    products = launch.products(plan.precision, alike, machine)
    if local.fits(plan, indices):
        with launch.on_device(sources[0].device):
            grads = tuning.tuned(
                lambda: local.keys(plan, alike, indices, products, machine)[1:],
                lambda: local.gradient(plan, alike, indices, saved, upstream, needs, products, machine),
            )
        return [g.to(source.dtype) for g, source in zip(grads, sources, strict=True) if g is not None]
    totals: list[Tensor | None] = [None] * len(sources)
    with launch.on_device(sources[0].device):
        for number, group in enumerate(plan.groups(alike, indices)):
            reached = upstream[3 * number : 3 * number + 3]
            if all(u is None for u in reached):
                continue
            views = launch.views(group, indices[number] if indices else None)
            kept = saved[3 * number : 3 * number + 3]
            differentiate = functools.partial(_gradient.gradient, views, plan, products, machine, kept, reached)
            keys = functools.partial(_gradient.keys, views, products, machine)
            if views.index is None:  # rows are the source's own, each once
                totals = tuning.tuned(keys, functools.partial(differentiate, needs))
                continue
            # The sources in the order of the views: the second direction's queries are of the second source.  One after
            # the other: their rows' gradients are as large as the matches.
            order = list(dict.fromkeys(source for source, _ in group))
            for which, source in enumerate(order):
                if not needs[source]:
                    continue
                alone = [which == k for k in range(len(order))]
                rows = tuning.tuned(keys, functools.partial(differentiate, alone))[which]
                before = totals[source]
                totals[source] = scatter.scatter(
                    views, which, rows, problems(sources[source]).shape, before, products, machine
                )
    return [
        total.view(source.shape).to(source.dtype)
        for total, source in zip(totals, sources, strict=True)
        if total is not None
    ]


def match(
    maps: Sequence[Tensor],
    locations: Sequence[Tensor],
    counts: Sequence[int],
    match_order: str,
    across: bool,
) -> list[Tensor]:
    """Numbers of matched patches, by location and by feature: see :func:`vicreg_fast.operators.match`."""
    machine = configs.machine(maps[0].device)
    with launch.on_device(maps[0].device):
        return tuning.tuned(
            lambda: [matching.key(maps, machine)],
            lambda: matching.match(maps, locations, counts, match_order, across, machine),
        )


def match_distances(queries: Tensor, candidates: Tensor, matches: Tensor) -> Tensor:
    """Euclidean distances (B, m) of matches (2, B, m)."""
    with launch.on_device(queries.device):
        return matching.match_distances(queries, candidates, matches, configs.machine(queries.device))


def _of_one_type(sources: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sources, as float32 where their types differ: kernels read both through pointers of one type."""
    if all(source.dtype == sources[0].dtype for source in sources):
        return sources
    return [source.float() for source in sources]
