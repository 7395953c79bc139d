"""The one autograd.Function of the losses: composes the stages, says what is saved, weighs the terms."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import operators, second_order
from .multiview import Plan

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
    """forward(plan, number of sources, 3 weights, *sources, *indices) -> 4 scalars a group."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, count: int, *tensors: Any) -> tuple[Tensor, ...]:
        weights, sources, indices = tensors[:3], tensors[3 : 3 + count], tensors[3 + count :]
        outputs = operators.terms(plan, sources, indices)
        count_terms = 3 * len(plan.group_sizes)
        terms, saved = outputs[:count_terms], outputs[count_terms:]
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.count, ctx.index_count = plan, count, len(indices)
        ctx.weights = tuple(None if isinstance(w, Tensor) else w for w in weights)
        held = (w for w in weights if isinstance(w, Tensor))
        ctx.save_for_backward(*held, *sources, *indices, *saved, *terms)
        weighted: list[Tensor] = []
        for at in range(0, count_terms, 3):
            inv, var, cov = (
                (w * t).to(t.dtype) if isinstance(w, Tensor) else t * w
                for w, t in zip(weights, terms[at : at + 3], strict=True)
            )
            weighted += [inv, var, cov, inv + var + cov]
        return tuple(weighted)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        plan, count = ctx.plan, ctx.count
        rest = list(ctx.saved_tensors)
        weights = [rest.pop(0) if w is None else w for w in ctx.weights]
        split = count + ctx.index_count
        count_terms = 3 * len(plan.group_sizes)
        sources, indices, saved = rest[:count], rest[count:split], rest[split:-count_terms]
        needs_weights, needs = ctx.needs_input_grad[2:5], ctx.needs_input_grad[5 : 5 + count]

        # Per group: what multiplies each unweighted term once its weight is applied; None: nothing.
        reached = [
            [_add(upstream[at + k], upstream[at + 3]) for k in range(3)] for at in range(0, len(upstream), 4)
        ]
        scaled = [
            [None if up is None else up * w for up, w in zip(group, weights, strict=True)] for group in reached
        ]
        differentiable = torch.is_grad_enabled()

        weight_grads: list[Tensor | None] = [None] * 3
        if any(needs_weights):
            terms = unweighted_terms(plan, sources, indices) if differentiable else rest[-count_terms:]
            for k, (w, need) in enumerate(zip(weights, needs_weights, strict=True)):
                if not need:
                    continue
                total = None
                for number, group in enumerate(reached):
                    up = group[k]
                    total = _add(total, None if up is None else up * terms[3 * number + k])
                weight_grads[k] = None if total is None else total.to(w.device, w.dtype).reshape(w.shape)

        grads: list[Tensor | None] = [None] * count
        if any(needs) and any(up is not None for group in scaled for up in group):
            if differentiable:
                found = second_order.gradient(plan, sources, indices, scaled, needs)
            else:
                flat = [up for group in scaled for up in group]
                found = operators.gradient(plan, sources, indices, saved, flat, needs)
            remaining = iter(found)
            grads = [next(remaining) if need else None for need in needs]
        return None, None, *weight_grads, *grads, *([None] * len(indices))


def weighted_terms(
    plan: Plan, weights: Sequence[Weight], sources: Sequence[Tensor], indices: Sequence[Tensor] = ()
) -> list[WeightedTerms]:
    """Per group of the plan, the weighted terms and their sum."""
    flat = _WeightedTerms.apply(plan, len(sources), *weights, *sources, *indices)  # type: ignore[no-untyped-call]
    return [WeightedTerms(*flat[at : at + 4]) for at in range(0, len(flat), 4)]


def unweighted_terms(plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """inv, var, cov of every group, differentiable."""
    groups = weighted_terms(plan, (1.0, 1.0, 1.0), sources, indices)
    return [term for group in groups for term in group[:3]]
