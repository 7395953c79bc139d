"""The kernels of a shape's training step: the backend's functions called directly, on real tensors or on ones without data.

Nothing of autograd is in between, so that one thread makes every launch, in order.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from vicreg_fast.backends import triton_backend
from vicreg_fast.backends.triton import configs
from vicreg_fast.plan import TWO_VIEWS, Plan, local_views

from . import resources
from .cases import Case


def make(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    """One step on tensors as :meth:`Case.inputs` makes them.

    The losses, unweighted, and the gradients of the sum of all their terms; or squared distances of matches.
    """
    if case.suite == "matching":
        x, y = inputs
        B, m = case.shape["B"], case.shape["m"]
        matches = triton_backend.match([x, y], [], (m,), "distance", False)
        return [triton_backend.match_distances(x, y, matches.match_index.view(2, B, m)).square()]
    if "N" in case.shape:
        plan = TWO_VIEWS._replace(precision=case.precision)
        return _terms_and_gradients(plan, inputs, None)
    x, y, *locations = inputs
    first, second = case.shape["m"]
    per_slot = case.shape["statistics"] == "slot"
    order = case.shape["match_order"] if per_slot else "distance"
    plan = local_views((first, second))._replace(precision=case.precision, per_slot=per_slot, match_order=order)
    matches = triton_backend.match([x, y], locations, plan.match_counts, order, per_slot)
    return _terms_and_gradients(plan, [x, y], matches)


def _terms_and_gradients(plan: Plan, sources: Sequence[Tensor], matches: Any) -> list[Tensor]:
    plan = plan._replace(weights=(1 / plan.groups_per_loss,) * 3)
    results = triton_backend.terms(plan, sources, matches)
    upstream = [torch.ones_like(results[0])] * (3 * len(plan.group_sizes))
    index = None if matches is None else matches.match_index
    kept = results[plan.outputs :]
    gradients = triton_backend.gradient(plan, sources, index, kept, upstream, [True] * len(sources))
    return [*results[: plan.outputs], *gradients]


def _without_data(case: Case) -> list[Tensor]:
    """Tensors of the shapes and types of the inputs; inside of ``resources.as_if_on``."""

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    shape = case.shape
    if "N" in shape:
        return [empty(shape["N"], shape["D"]) for _ in range(2)]
    maps = [empty(shape["B"], P, shape["C"]) for P in shape["P"]]
    if case.suite == "matching":
        return maps
    return [*maps, *(empty(shape["B"], P, 2, dtype=torch.float32) for P in shape["P"])]


def make_without_data(case: Case, target: str, record: Any, device: configs.Device | None = None) -> None:
    """The step as the library would make it on a target: ``record`` is called in place of each launch."""
    with ExitStack() as stack:
        for context in resources.as_if_on(target, record, device):
            stack.enter_context(context)
        make(case, _without_data(case))
