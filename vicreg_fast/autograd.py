"""The one autograd.Function of the losses: composes the stages, says what is saved."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import operators, second_order
from .multiview import Plan
from .reference import VICRegTerms

Weight = float | Tensor


class WeightedTerms(NamedTuple):
    """The terms of one group times their weights, and their sum: scalars, each with storage of its own."""

    inv: Tensor
    var: Tensor
    cov: Tensor
    total: Tensor


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


class _WeightedTerms(torch.autograd.Function):
    """forward(plan, *sources, *indices) -> the plan's outputs: 4 scalars a loss, and their total where there are several."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = plan.source_count
        outputs = operators.terms(plan, tensors[:count], tensors[count:])
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.given = plan, len(tensors)
        ctx.save_for_backward(*tensors, *outputs[plan.outputs :])
        return tuple(outputs[: plan.outputs])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        plan, count = ctx.plan, ctx.plan.source_count
        everything = ctx.saved_tensors  # read once: checkpointing computes them anew at each reading
        tensors, saved = everything[: ctx.given], everything[ctx.given :]
        sources, indices = tensors[:count], tensors[count:]
        needs = ctx.needs_input_grad[1 : 1 + count]
        # What multiplies each weighted term of each group; None: nothing.
        total = upstream[4 * plan.losses] if plan.losses > 1 else None
        sums = [_add(up, total) for up in upstream[3 : 4 * plan.losses : 4]]
        reached = [
            _add(upstream[4 * loss + k], sums[loss])
            for loss in range(plan.losses)
            for _ in range(plan.averaged)
            for k in range(3)
        ]
        grads: list[Tensor | None] = [None] * count
        if any(needs) and any(up is not None for up in reached):
            if torch.is_grad_enabled():
                found = second_order.gradient(plan, sources, indices, reached, needs)
            else:
                found = operators.gradient(plan, sources, indices, saved, reached, needs)
            remaining = iter(found)
            grads = [next(remaining) if need else None for need in needs]
        return None, *grads, *([None] * len(indices))


def weigh(terms: VICRegTerms | WeightedTerms, weights: Sequence[Weight]) -> WeightedTerms:
    """Unweighted terms times weights and their sum, in the terms' type."""
    inv, var, cov = ((w * t).to(t.dtype) for w, t in zip(weights, terms[:3], strict=True))
    return WeightedTerms(inv, var, cov, inv + var + cov)


def weighted_terms(
    plan: Plan, weights: Sequence[Weight], sources: Sequence[Tensor], indices: Sequence[Tensor] = ()
) -> tuple[list[WeightedTerms], Tensor]:
    """Of each loss of the plan the weighted terms and their sum; and the total of all losses.

    Numbers are multiplied inside the stages, for nothing.  Tensors are multiplied outside, where autograd sees
    them; so are numbers in traced code, where a schedule's new number would otherwise mean compiling anew.
    """
    outside = torch.compiler.is_compiling() or any(isinstance(w, Tensor) for w in weights)
    inside = (1.0, 1.0, 1.0) if outside else map(float, weights)
    plan = plan._replace(weights=tuple(w / plan.averaged for w in inside))
    if torch.compiler.is_compiling() and len(sources) > 1 and sources[0] is sources[1]:
        sources = [source.view_as(source) for source in sources]  # Dynamo refuses the same tensor twice
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        flat = _WeightedTerms.apply(plan, *sources, *indices)  # type: ignore[no-untyped-call]
    else:
        # Nothing to save.  (Dynamo 2.13, too, inlines a Function without gradients and then counts its arguments to
        # tell whether forward takes a context, which *tensors defeats.)
        flat = operators.terms(plan._replace(keep=False), sources, indices)[: plan.outputs]
    losses = [WeightedTerms(*flat[at : at + 4]) for at in range(0, 4 * plan.losses, 4)]
    if outside:
        losses = [weigh(loss, weights) for loss in losses]
        return losses, sum((loss.total for loss in losses[1:]), start=losses[0].total)
    return losses, flat[-1]
