"""The stages that a backend offers, composed for a plan: ``terms`` and ``gradient`` of groups of views."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...multiview import Plan
from ...rows import WHOLE
from ..aten.stages import match as match  # the same on every device, until there is a kernel
from . import configs, launch, tuning
from . import gradient as _gradient
from . import terms as _terms


def saved(
    plan: Plan, sources: Sequence[Tensor], V: int, P: int, N: int, D: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what a group saves besides its inputs: moments, M and the dual's operand."""
    products = launch.products(plan.precision, sources, configs.machine(sources[0].device))
    return _terms.saved(plan, products, V, P, N, D)


def terms(plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """[weighted inv, var, cov and their sum of every group, then moments, M and operand of every group]."""
    sources = _of_one_type(sources)
    machine = configs.machine(sources[0].device)
    products = launch.products(plan.precision, sources, machine)
    values: list[Tensor] = []
    saved: list[Tensor] = []
    with launch.on_device(sources[0].device):
        for group in plan.groups(sources, indices):
            views = launch.views(group)
            found = tuning.tuned(
                functools.partial(_terms.keys, views, products, machine),
                functools.partial(_terms.terms, views, plan, products, machine),
            )
            values += found[:4]
            saved += found[4:]
    return [*values, *saved]


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
    totals: list[Tensor | None] = [None] * len(sources)
    with launch.on_device(sources[0].device):
        for number, group in enumerate(plan.groups(alike, indices)):
            reached = upstream[3 * number : 3 * number + 3]
            if all(u is None for u in reached):
                continue
            views = launch.views(group)
            kept = saved[3 * number : 3 * number + 3]
            found = tuning.tuned(
                functools.partial(_gradient.keys, views, products, machine),
                functools.partial(_gradient.gradient, views, plan, products, machine, kept, reached, needs),
            )
            for source, grads in enumerate(found):
                if grads is None:
                    continue
                if views.index is None:  # rows are the source's own, each once
                    totals[source] = grads
                    continue
                chosen = [rows for which, rows in group if which == source]
                total = totals[source]
                if total is None:
                    shape = chosen[0].source.shape
                    total = totals[source] = torch.zeros(shape, dtype=grads.dtype, device=grads.device)
                for rows, grad in zip(chosen, grads, strict=True):
                    rows.add(total, WHOLE, grad)
    return [
        total.view(source.shape).to(source.dtype)
        for total, source in zip(totals, sources, strict=True)
        if total is not None
    ]


def _of_one_type(sources: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sources, as float32 where their types differ: kernels read both through pointers of one type."""
    if all(source.dtype == sources[0].dtype for source in sources):
        return sources
    return [source.float() for source in sources]
