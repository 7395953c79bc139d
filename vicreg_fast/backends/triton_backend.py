"""The Triton backend: fused kernels on CUDA and ROCm devices, and in Triton's interpreter."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan import Matches, Plan, problems
from .triton import arguments, autotune, configs, launch_matching, launch_vicreg, launch_vicregl
from .triton.arguments import Call


def saved(
    plan: Plan, sources: Sequence[Tensor], match_index: Tensor | None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what is saved besides the inputs: see the launchers."""
    device = configs.device_of(sources[0].device)
    of_one_dtype = _of_one_dtype(sources)
    matmul = arguments.matmul_policy(plan.precision, of_one_dtype, device)
    if launch_vicregl.fits(plan):
        return launch_vicregl.saved(plan, of_one_dtype, matmul, device)
    return [
        shape_and_dtype
        for group in plan.groups(sources, match_index)
        for shape_and_dtype in launch_vicreg.saved(
            plan, matmul, match_index is not None, len(group), *group[0][1].shape
        )
    ]


def terms(plan: Plan, sources: Sequence[Tensor], matches: Matches | None) -> list[Tensor]:
    """[the plan's outputs, then what is saved]."""
    sources = _of_one_dtype(sources)
    device = configs.device_of(sources[0].device)
    matmul = arguments.matmul_policy(plan.precision, sources, device)
    if matches is not None and launch_vicregl.fits(plan):
        with arguments.on_device(sources[0].device):
            return autotune.tuned(
                lambda: launch_vicregl.keys(plan, sources, matmul, device)[:1],
                lambda: launch_vicregl.terms(plan, sources, matches, matmul, device),
            )
    values: list[Tensor] = []
    saved: list[Tensor] = []
    with arguments.on_device(sources[0].device):
        for views in plan.groups(sources, None if matches is None else matches.match_index):
            call = arguments.call_of(arguments.group_of(views), plan, matmul, device)
            results = autotune.tuned(
                functools.partial(launch_vicreg.forward_keys, call.group, call.matmul, device),
                functools.partial(launch_vicreg.terms, call),
            )
            values += results[:4]
            saved += results[4:]
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
    of_one_dtype = _of_one_dtype(sources)
    device = configs.device_of(sources[0].device)
    matmul = arguments.matmul_policy(plan.precision, of_one_dtype, device)
    with arguments.on_device(sources[0].device):
        if match_index is not None and launch_vicregl.fits(plan):
            grads = autotune.tuned(
                lambda: launch_vicregl.keys(plan, of_one_dtype, matmul, device)[1:],
                lambda: launch_vicregl.gradient(
                    plan, of_one_dtype, match_index, saved, upstream, needs, matmul, device
                ),
            )
            return [g.to(source.dtype) for g, source in zip(grads, sources, strict=True) if g is not None]
        totals: list[Tensor | None] = [None] * len(sources)
        for k, views in enumerate(plan.groups(of_one_dtype, match_index)):
            group_upstream = upstream[3 * k : 3 * k + 3]
            if any(u is not None for u in group_upstream):
                call = arguments.call_of(arguments.group_of(views), plan, matmul, device)
                kept = saved[4 * k : 4 * k + 4]
                order = [source for source, _ in views]
                _add_group_gradient(call, order, totals, kept, group_upstream, needs, sources)
    return [
        total.view(source.shape).to(source.dtype)
        for total, source in zip(totals, sources, strict=True)
        if total is not None
    ]


def _add_group_gradient(
    call: Call,
    group_sources: Sequence[int],
    totals: list[Tensor | None],
    kept: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
    sources: Sequence[Tensor],
) -> None:
    """Add a group's gradient to ``totals``, one a source; ``group_sources``: of each view."""
    keys = functools.partial(launch_vicreg.gradient_keys, call.group, call.matmul, call.device)
    differentiate = functools.partial(launch_vicreg.gradient, call, kept, upstream)
    if call.group.match_index is None:  # every row is a sample, once
        totals[:] = autotune.tuned(keys, functools.partial(differentiate, needs))
        return
    # The sources in the order of the views: the queries from y to x are of the second source.  One source after the other,
    # because the gradients of its gathered rows are as large as the matches.
    order = list(dict.fromkeys(group_sources))
    for which, source in enumerate(order):
        if needs[source]:
            alone = [which == k for k in range(len(order))]
            rows = autotune.tuned(keys, functools.partial(differentiate, alone))[which]
            assert rows is not None
            shape = problems(sources[source]).shape
            totals[source] = launch_vicreg.scatter(call, which, rows, shape, totals[source])


def match(
    maps: Sequence[Tensor],
    locations: Sequence[Tensor],
    counts: Sequence[int],
    match_order: str,
    per_slot: bool,
) -> Matches:
    """Match patches by location, if there are locations, and by feature: see :class:`vicreg_fast.plan.Matches`."""
    device = configs.device_of(maps[0].device)
    with arguments.on_device(maps[0].device):
        return autotune.tuned(
            lambda: [launch_matching.key(maps, device)],
            lambda: launch_matching.match(maps, locations, counts, match_order, per_slot, device),
            lambda matches: launch_matching.squared_distances(maps, locations, counts, per_slot, matches),
        )


def match_distances(queries: Tensor, candidates: Tensor, matches: Tensor) -> Tensor:
    """Euclidean distances (B, m) of matches (2, B, m)."""
    with arguments.on_device(queries.device):
        return launch_matching.match_distances(queries, candidates, matches, configs.device_of(queries.device))


def _of_one_dtype(sources: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sources; as float32 if their types differ, because kernels read both through pointers of one type."""
    if all(source.dtype == sources[0].dtype for source in sources):
        return sources
    return [source.float() for source in sources]
