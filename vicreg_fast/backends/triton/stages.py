"""The stages that a backend offers, composed for a plan: ``terms`` and ``gradient`` of one view or one pair."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...multiview import Plan
from ...rows import uses_dual
from . import gradient as _gradient
from . import gram, launch


def saved_shapes(
    plan: Plan, V: int, P: int, N: int, D: int, device: torch.device
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of what a group saves besides its inputs: moments, M and the operand that the dual side multiplied."""
    if uses_dual(P, N, D):
        return (4, P, V, D), (V * P, N, N), (V, P, N, D)
    return (3, P, V, D), (V * P, D, D), (0,)


def terms(plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """[weighted inv, var, cov and their sum of every group, then moments, M and operand of every group]."""
    sources = _of_one_type(sources)
    products = launch.products(plan.precision, sources)
    values: list[Tensor] = []
    saved: list[Tensor] = []
    with launch.on_device(sources[0].device):
        for group in plan.groups(sources, indices):
            found = gram.terms(launch.views(group), plan, products)
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
    products = launch.products(plan.precision, alike)
    (group,) = plan.groups(alike, indices)
    with launch.on_device(sources[0].device):
        grads = _gradient.gradient(launch.views(group), plan, products, saved, upstream, needs)
    return [
        grad.view(source.shape).to(source.dtype)
        for grad, source in zip(grads, sources, strict=True)
        if grad is not None
    ]


def _of_one_type(sources: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sources, as float32 where their types differ: kernels read both through pointers of one type."""
    if all(source.dtype == sources[0].dtype for source in sources):
        return sources
    return [source.float() for source in sources]
