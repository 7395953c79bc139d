"""The interface of vicreg_loss 1.0.0: its names, its published methods, and the losses composed of these methods.

A published method may be replaced in a subclass, on an instance, or by patching the class.  The fused computation does not
call the published methods.  If one of them is replaced, the loss is therefore composed of them, term by term.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import backends, checks, functional, reference
from . import precision as policy
from .autograd import WeightedTerms, weigh
from .backends.aten import nearest_patches
from .functional import Options
from .reference import VICRegTerms

Losses = dict[str, Tensor]


# -- names --------------------------------------------------------------------------------------------------------


def named(terms: WeightedTerms) -> Losses:
    """The weighted terms under their published names."""
    return {"inv-loss": terms.inv, "var-loss": terms.var, "cov-loss": terms.cov, "loss": terms.total}


def prefixed(prefix: str, losses: Losses) -> Losses:
    """The losses of one part of VICRegL: ``prefix/name``."""
    return {f"{prefix}/{name}": loss for name, loss in losses.items()}


# -- published static methods -------------------------------------------------------------------------------------


def representation_loss(x: Tensor, y: Tensor) -> Tensor:
    """Unweighted invariance term of two views of one shape: a scalar."""
    checks.views({"x": x, "y": y}, count_samples=False)
    return mean_squared_difference(x, y)


def variance_loss(x: Tensor, gamma: float) -> Tensor:
    """Unweighted variance term of one view (..., N, D), with eps = 0: a scalar."""
    checks.views({"x": x})
    return functional.one_view_terms(x, Options(gamma), covariance=False)[0]


def covariance_loss(x: Tensor) -> Tensor:
    """Unweighted covariance term of one view (..., N, D): a scalar."""
    checks.views({"x": x})
    return functional.one_view_terms(x, Options())[1]


def neirest_neighbores(
    input_maps: Tensor, candidate_maps: Tensor, distances: Tensor, num_matches: int
) -> tuple[Tensor, Tensor]:
    """Matched patches of two maps, from the matrix of their distances.

    Args:
        input_maps: (B, P1, C).
        candidate_maps: (B, P2, C).
        distances: (B, P1, P2), in any unit: only their order counts.
        num_matches: Number of input patches to keep, nearest first.

    Returns:
        The kept input patches and their candidates, (B, m, C) each, differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.
    """
    checks.patches(("input_maps", input_maps), ("candidate_maps", candidate_maps))
    checks.match_count(num_matches)
    checks.enough_patches("input_maps", input_maps, num_matches)
    checks.distance_matrix(distances, input_maps, candidate_maps)
    query, candidate = select_matches(distances, num_matches)
    return gather_patches(input_maps, query), gather_patches(candidate_maps, candidate)


# -- replaced methods ---------------------------------------------------------------------------------------------
# ``loss`` is the module.  It is typed Any, because a replaced method may have any signature and result.

LossClass = TypeVar("LossClass", bound=type)


def published(loss_class: LossClass) -> LossClass:
    """Class decorator: records the public methods as the library defines them, for :func:`replaces`."""
    methods = {name: getattr(loss_class, name) for name in dir(loss_class) if not name.startswith("_")}
    loss_class._published = methods  # type: ignore[attr-defined]
    return loss_class


def replaces(loss: Any, *names: str) -> bool:
    """Whether a subclass, the instance or a patch of the class replaces one of the published methods ``names``."""
    methods = loss._published
    return any(name in loss.__dict__ or getattr(type(loss), name) is not methods[name] for name in names)


def composed(loss: Any, x: Tensor, y: Tensor, invariance: Callable[[Tensor, Tensor], Any]) -> Losses:
    """VICReg of two views (..., N, D), term by term through the published methods."""
    options = loss._options()
    # A backend that cannot run is refused, even if the replaced methods leave nothing for it to compute.
    backends.choose(options.backend, x.device)

    # The published methods are static: they have no access to the loss's eps, backend and precision.
    def variance(z: Tensor) -> Any:
        if replaces(loss, "variance_loss"):
            return loss.variance_loss(z, loss.gamma)
        return functional.one_view_terms(z, options, covariance=False)[0]

    def covariance(z: Tensor) -> Any:
        if replaces(loss, "covariance_loss"):
            return loss.covariance_loss(z)
        return functional.one_view_terms(z, options)[1]

    inv = invariance(x, y)
    var = (variance(x) + variance(y)) / 2
    cov = (covariance(x) + covariance(y)) / 2
    # A replaced method may return a Python number.
    terms = (torch.as_tensor(term, device=x.device) for term in (inv, var, cov))
    return named(weigh(VICRegTerms(*terms), loss._weights(x)))


def composed_local(
    loss: Any, maps: tuple[Tensor, Tensor], locations: tuple[Tensor, Tensor], counts: tuple[int, int]
) -> Losses:
    """VICRegL's local part through the published methods; ``counts``: matches from x to y and from y to x."""
    x, y = maps
    losses: Losses = {}
    for kind, (a, b) in (("location", functional.as_locations(*locations)), ("feature", maps)):
        x_to_y = distance_matrix(a, b, loss.backend)
        y_to_x = distance_matrix(b, a, loss.backend)
        first = loss.local_vicreg_loss(*_matched_patches(loss, x, y, x_to_y, counts[0]))
        second = loss.local_vicreg_loss(*_matched_patches(loss, y, x, y_to_x, counts[1]))
        losses |= {f"{kind}/{name}": (first[name] + second[name]) / 2 for name in first}
    return losses


def _matched_patches(
    loss: Any, queries: Tensor, candidates: Tensor, distances: Tensor, num_matches: int
) -> tuple[Tensor, Tensor]:
    """Matched patches of both maps.  A replaced ``neirest_neighbores`` decides on their order itself."""
    if replaces(loss, "neirest_neighbores"):
        return loss.neirest_neighbores(queries, candidates, distances, num_matches)  # type: ignore[no-any-return]
    query, candidate = select_matches(distances, num_matches, loss.match_order)
    return gather_patches(queries, query), gather_patches(candidates, candidate)


# -- steps of the composition -------------------------------------------------------------------------------------


def mean_squared_difference(x: Tensor, y: Tensor) -> Tensor:
    """The invariance term of two views of one shape, in float32 at least."""
    return nn.functional.mse_loss(*functional.accumulated(x, y))


def distance_matrix(queries: Tensor, candidates: Tensor, backend: str) -> Tensor:
    """The matrix (B, P1, P2) by which matches are ordered, in any unit; carries no gradient.

    The reference backend has its own definition.  All others share the ATen operators, because they never store the matrix.
    """
    with torch.no_grad(), policy.set_matmul_precision("ieee", queries.device):
        if backends.choose(backend, queries.device, (queries.dtype, candidates.dtype)) == "reference":
            return reference.distances(*functional.accumulated(queries, candidates))
        return nearest_patches.ordering(queries, candidates)


def select_matches(distances: Tensor, num_matches: int, match_order: str = "distance") -> tuple[Tensor, Tensor]:
    """Indices of the matched patches, (query, candidate), (B, m) each, from distances (B, P1, P2)."""
    with torch.no_grad():
        nearest = nearest_patches.Nearest(*nearest_patches.ordered(distances.clone()).min(dim=2))
        return nearest_patches.select(nearest, num_matches, match_order)


def gather_patches(maps: Tensor, index: Tensor) -> Tensor:
    """Patches ``index`` (B, m) of maps (B, P, C), differentiable: (B, m, C)."""
    return maps[torch.arange(maps.shape[0], device=maps.device)[:, None], index]
