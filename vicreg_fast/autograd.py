"""The one autograd.Function of the losses: it composes the operators, and saves what the backward pass needs."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import operators, second_order
from .plan import Plan
from .reference import VICRegTerms

Weight = float | Tensor


class WeightedTerms(NamedTuple):
    """The terms of one loss times their weights, and their sum: scalars, each with storage of its own."""

    inv: Tensor
    var: Tensor
    cov: Tensor
    total: Tensor


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _upstream_of_terms(plan: Plan, grad_outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Upstream gradients of the weighted terms of each group, from those of the outputs; None: there is none."""
    total = grad_outputs[4 * plan.losses] if plan.losses > 1 else None
    sums = [_add(grad, total) for grad in grad_outputs[3 : 4 * plan.losses : 4]]
    return [
        _add(grad_outputs[4 * loss + term], sums[loss])
        for loss in range(plan.losses)
        for _ in range(plan.groups_per_loss)
        for term in range(3)
    ]


class _WeightedTerms(torch.autograd.Function):
    """forward(plan, *sources, *locations) -> the plan's outputs: 4 scalars a loss, and their sum if there are several."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        sources, locations = tensors[: plan.source_count], tensors[plan.source_count :]
        plan, results = operators.terms(plan, sources, locations)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.locations = plan, len(locations)
        ctx.save_for_backward(*sources, *results[plan.outputs :])
        return tuple(results[: plan.outputs])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        plan, count = ctx.plan, ctx.plan.source_count
        tensors = ctx.saved_tensors  # read once: activation checkpointing recomputes them at every access
        sources, saved = tensors[:count], tensors[count:]
        match_index = None
        if plan.match_counts:
            match_index, saved = saved[0], saved[1:]
        needs = ctx.needs_input_grad[1 : 1 + count]
        upstream = _upstream_of_terms(plan, grad_outputs)
        grads: list[Tensor | None] = [None] * count
        if any(needs) and any(grad is not None for grad in upstream):
            if torch.is_grad_enabled():
                computed = second_order.gradient(plan, sources, match_index, upstream, needs)
            else:
                computed = operators.gradient(plan, sources, match_index, saved, upstream, needs)
            remaining = iter(computed)
            grads = [next(remaining) if need else None for need in needs]
        return None, *grads, *([None] * ctx.locations)


def weigh(terms: VICRegTerms | WeightedTerms, weights: Sequence[Weight]) -> WeightedTerms:
    """The terms times their weights, and their sum, in the type of the terms."""
    inv, var, cov = ((weight * term).to(term.dtype) for weight, term in zip(weights, terms[:3], strict=True))
    return WeightedTerms(inv, var, cov, inv + var + cov)


def weighted_terms(
    plan: Plan, weights: Sequence[Weight], sources: Sequence[Tensor], locations: Sequence[Tensor] = ()
) -> tuple[list[WeightedTerms], Tensor]:
    """The weighted terms and their sum of each loss of the plan, and the sum of all losses.

    The operators multiply by weights that are Python numbers, at no cost.  Weights that are tensors are multiplied outside
    the operators, because autograd must see them.  In traced code numbers are multiplied outside too: they are constants of
    the operators, and a schedule that changes them would cause recompilation.
    """
    outside = torch.compiler.is_compiling() or any(isinstance(w, Tensor) for w in weights)
    inside = (1.0, 1.0, 1.0) if outside else map(float, weights)
    plan = plan._replace(weights=tuple(w / plan.groups_per_loss for w in inside))
    # Matches carry no gradient.
    locations = [z.detach() if z.requires_grad else z for z in locations]
    if torch.compiler.is_compiling() and any(a is b for a, b in itertools.combinations(sources, 2)):
        sources = [source.view_as(source) for source in sources]  # Dynamo refuses the same tensor twice
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        flat = _WeightedTerms.apply(plan, *sources, *locations)  # type: ignore[no-untyped-call]
    else:
        # Nothing needs to be saved.  The Function is also avoided because Dynamo 2.13 inlines a Function without gradients:
        # it counts the arguments of forward to detect a context, and fails on *tensors.
        plan = plan._replace(save_for_backward=False)
        flat = operators.terms(plan, sources, locations)[1][: plan.outputs]
    losses = [WeightedTerms(*flat[at : at + 4]) for at in range(0, 4 * plan.losses, 4)]
    if outside:
        losses = [weigh(loss, weights) for loss in losses]
        return losses, sum((loss.total for loss in losses[1:]), start=losses[0].total)
    return losses, flat[-1]
