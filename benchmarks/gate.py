"""The gate: a provider that disagrees with the definition in float64 is marked ``wrong`` and not timed."""

import math
from collections.abc import Mapping

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
# By name: a value, or the "gradient of" a loss with respect to the inputs that need one.
Evaluation = dict[str, tuple[Tensor, ...]]


def evaluation(
    case: Case, inputs: Inputs, results: Mapping[str, Tensor], gradients: tuple[Tensor, ...] = ()
) -> Evaluation:
    """The losses and their gradient.  For matches the returned distances, and float64 distances of the chosen patches.

    Indices are not compared: where two candidates are equally near up to rounding, both are correct.
    """
    if case.suite != "matching":
        values = {name: (value.detach(),) for name, value in results.items()}
        return values | ({"gradient of loss": gradients} if gradients else {})
    x, y = (
        reference.gather_rows(z.double(), results[name])
        for z, name in zip(inputs, ("query", "candidate"), strict=True)
    )
    distance = (x - y).square().sum(-1).sqrt()
    return {"distance": (results["distance"],), "distance of the chosen": (distance,)}


def _mean_terms(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """VICRegL's location and feature terms as their mean, which is what eager code returns."""
    if "location/loss" not in results:
        return results
    terms = ("inv-loss", "var-loss", "cov-loss")
    means = {term: (results[f"location/{term}"] + results[f"feature/{term}"]) / 2 for term in terms}
    return means | {"loss": results["loss"]}


def evaluate(case: Case, losses: Losses, inputs: Inputs) -> Evaluation:
    """A provider's values and gradients, computed in memory full of NaN: an unwritten element becomes NaN."""
    full_of_nan = [torch.full_like(z, math.nan) for z in 2 * inputs]
    # The allocator keeps small blocks apart: a few of each size from 512 bytes to 1 MiB.
    small = [torch.full((1 << k,), math.nan, device=inputs[0].device) for k in range(7, 19) for _ in range(4)]
    del full_of_nan, small
    results = _mean_terms(losses(*inputs))
    leaves = [z for z in inputs if z.requires_grad]
    names = [name for name in _DIFFERENTIATED if name in results and leaves]
    return evaluation(case, inputs, results) | {
        f"gradient of {name}": torch.autograd.grad(results[name], leaves, retain_graph=name != names[-1])
        for name in names
    }


def truth(case: Case, definition: Definition, inputs: Inputs, rank: int = 0, ranks: int = 1) -> Evaluation:
    """The definition in float64, kept in float32, whose 6e-8 is far below the bounds.

    Several ranks: of all rows in one process, with this rank's rows of the gradients.  Data parallelism averages the
    gradients of the ranks, so each is ``ranks`` times as large.
    """
    parts = [case.inputs(seed, inputs[0].device) for seed in range(ranks)] if ranks > 1 else [inputs]
    rows = [torch.cat(views).detach().double() for views in zip(*parts, strict=True)]
    wide = tuple(z.requires_grad_(view.requires_grad) for z, view in zip(rows, inputs, strict=True))
    if case.suite == "matching":
        d = reference.distances(*wide).min(-1).values.sort(-1).values[:, : case.shape["m"]]
        return {"distance": (d,), "distance of the chosen": (d,)}
    exact = evaluate(case, providers.eager_of(case, definition), wide)

    def own(z: Tensor) -> Tensor:
        return ranks * z.float().chunk(ranks)[rank] if z.dim() else z

    return {name: tuple(map(own, tensors)) for name, tensors in exact.items()}


def errors(actual: Evaluation, exact: Evaluation) -> dict[str, float]:
    """The Euclidean norm of the difference of each group of tensors, relative to that of the exact group."""
    relative = {}
    for name, tensors in actual.items():
        pairs = zip(tensors, exact[name], strict=True)
        error = sum(float((a.double() - e).square().sum()) for a, e in pairs)
        size = sum(float(e.double().square().sum()) for e in exact[name])
        relative[name] = math.sqrt(error / size) if size > 0 else math.inf if error else 0.0
    return relative


def wrong(relative: Mapping[str, float], bound: float) -> str | None:
    """The largest error in words where it exceeds the bound or is NaN; None otherwise."""
    name = max(relative, key=lambda name: (math.isnan(relative[name]), relative[name]))
    if relative[name] <= bound:
        return None
    return f"{name}: error {relative[name]:.1e} of its size against float64, {bound:.0e} allowed"
