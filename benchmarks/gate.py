"""The gate: every provider is judged against the definition in float64 before it is timed.

An incorrect provider is marked ``wrong`` and not timed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vicreg_fast import reference

from . import providers
from .cases import Case, Inputs
from .libraries import Definition, Losses

# The largest relative error of a provider that is timed.  Measured on the shapes of cases.py (fewer rows at 64
# features), on a CPU that rounds as a GPU does, for values and gradients:
#   highest  float32: at most 4e-7.  TF32 operands: 5e-5 and more, so TF32 in place of float32 is refused.
#   high     TF32 operands, truncated as by cuBLAS: 1.7e-3; rounded to nearest: 2e-4.
#   bf16     Eager code: 7e-3.  A GPU may round split sums to bfloat16 too.  An unwritten tile, one of 272 at
#            2048 x 2048, is 6e-2 of a gradient.
BOUNDS = {"highest": 2e-5, "high": 4e-3, "bf16": 3e-2}
# The covariance gradient could be lost beside the other terms, so it is judged by itself too.
_DIFFERENTIATED = ("loss", "cov-loss")


class Evaluation(NamedTuple):
    """Values by name, and by name of a loss the gradients of the inputs that need one."""

    values: dict[str, Tensor]
    gradients: dict[str, tuple[Tensor, ...]]


def evaluation(
    case: Case, inputs: Inputs, results: Mapping[str, Tensor], gradients: tuple[Tensor, ...] = ()
) -> Evaluation:
    """The losses and their gradients.  For matches the returned distances, and float64 distances of the chosen patches.

    Indices are not compared: where two candidates are equally near up to rounding, both are correct.
    """
    if case.suite != "matching":
        values = {name: value.detach() for name, value in results.items()}
        return Evaluation(values, {"loss": gradients} if gradients else {})
    x, y = (
        reference.gather_rows(z.double(), results[name])
        for z, name in zip(inputs, ("query", "candidate"), strict=True)
    )
    distance = (x - y).square().sum(-1).sqrt()
    return Evaluation({"distance": results["distance"], "distance of the chosen": distance}, {})


def _mean_terms(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """VICRegL's location and feature terms as their mean, which is what eager code returns."""
    if "location/loss" not in results:
        return results
    terms = ("inv-loss", "var-loss", "cov-loss")
    means = {term: (results[f"location/{term}"] + results[f"feature/{term}"]) / 2 for term in terms}
    return {**means, "loss": results["loss"]}


def evaluate(case: Case, losses: Losses, inputs: Inputs) -> Evaluation:
    """A provider's values and gradients, computed in memory full of NaN: an unwritten element becomes NaN."""
    full_of_nan = [torch.full_like(z, math.nan) for z in 2 * inputs]
    # The allocator keeps small blocks apart: a few of each size from 512 bytes to 1 MiB.
    small = [torch.full((1 << k,), math.nan, device=inputs[0].device) for k in range(7, 19) for _ in range(4)]
    del full_of_nan, small
    results = _mean_terms(losses(*inputs))
    leaves = [z for z in inputs if z.requires_grad]
    names = [name for name in _DIFFERENTIATED if name in results and leaves]
    gradients = {
        name: torch.autograd.grad(results[name], leaves, retain_graph=name != names[-1]) for name in names
    }
    return evaluation(case, inputs, results)._replace(gradients=gradients)


def truth(case: Case, definition: Definition, inputs: Inputs) -> Evaluation:
    """The definition in float64.  Gradients are kept in float32, whose 6e-8 is far below the bounds."""
    wide = tuple(z.detach().double().requires_grad_(z.requires_grad) for z in inputs)
    if case.suite == "matching":
        d = reference.distances(*wide).min(-1).values.sort(-1).values[:, : case.shape["m"]]
        return Evaluation({"distance": d, "distance of the chosen": d}, {})
    values, gradients = evaluate(case, providers.eager_of(case, definition), wide)
    return Evaluation(values, {name: tuple(g.float() for g in group) for name, group in gradients.items()})


def _relative_error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The Euclidean norm of the difference of two groups of tensors, relative to that of the exact group."""
    error = sum(float((a.double() - e).square().sum()) for a, e in zip(actual, exact, strict=True))
    size = sum(float(e.double().square().sum()) for e in exact)
    if size > 0:
        return math.sqrt(error / size)
    return 0.0 if error == 0 else math.inf


def errors(actual: Evaluation, exact: Evaluation) -> dict[str, float]:
    """The relative error of each value, and of the gradients of each loss with respect to all inputs together."""
    relative = {name: _relative_error([value], [exact.values[name]]) for name, value in actual.values.items()}
    for name, gradients in actual.gradients.items():
        relative[f"gradient of {name}"] = _relative_error(gradients, exact.gradients[name])
    return relative


def wrong(relative: Mapping[str, float], bound: float) -> str | None:
    """The largest error in words where it exceeds the bound or is NaN; None otherwise."""
    bad = {name: error for name, error in relative.items() if not error <= bound}
    if not bad:
        return None
    name = max(bad, key=lambda name: math.inf if math.isnan(bad[name]) else bad[name])
    return f"{name}: error {bad[name]:.1e} of its size against float64, {bound:.0e} allowed"
