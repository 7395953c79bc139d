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
    """forward(plan, *sources, *indices) -> 4 scalars a group."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = plan.source_count
        outputs = operators.terms(plan, tensors[:count], tensors[count:])
        split = 4 * len(plan.group_sizes)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.given = plan, len(tensors)
        ctx.save_for_backward(*tensors, *outputs[split:])
        return tuple(outputs[:split])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        plan, count = ctx.plan, ctx.plan.source_count
        everything = ctx.saved_tensors  # read once: checkpointing computes them anew at each reading
        tensors, saved = everything[: ctx.given], everything[ctx.given :]
        sources, indices = tensors[:count], tensors[count:]
        needs = ctx.needs_input_grad[1 : 1 + count]
        # What multiplies each weighted term of each group; None: nothing.
        reached = [
            _add(upstream[at + k], upstream[at + 3]) for at in range(0, len(upstream), 4) for k in range(3)
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
) -> list[WeightedTerms]:
    """Per group of the plan, the weighted terms and their sum.

    Numbers are multiplied inside the stages, for nothing.  Tensors are multiplied outside, where autograd sees
    them; so are numbers in traced code, where a schedule's new number would otherwise mean compiling anew.
    """
    outside = torch.compiler.is_compiling() or any(isinstance(w, Tensor) for w in weights)
    if not outside:
        plan = plan._replace(weights=tuple(map(float, weights)))
    if torch.compiler.is_compiling() and len(sources) > 1 and sources[0] is sources[1]:
        sources = [source.view_as(source) for source in sources]  # Dynamo refuses the same tensor twice
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        flat = _WeightedTerms.apply(plan, *sources, *indices)  # type: ignore[no-untyped-call]
    else:
        # Nothing to save.  (Dynamo 2.13, too, inlines a Function without gradients and then counts its arguments to
        # tell whether forward takes a context, which *tensors defeats.)
        flat = operators.terms(plan._replace(keep=False), sources, indices)[: 4 * len(plan.group_sizes)]
    groups = [WeightedTerms(*flat[at : at + 4]) for at in range(0, len(flat), 4)]
    return [weigh(group, weights) for group in groups] if outside else groups
