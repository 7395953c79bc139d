"""The losses as functions: checked arguments in, scalars out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, checks, operators, reference
from . import precision as policy
from .autograd import Weight, WeightedTerms, weigh, weighted_terms
from .plan import ONE_VIEW, TWO_VIEWS, local_views
from .reference import VICRegTerms

_UNWEIGHTED = (1.0, 1.0, 1.0)


class PatchMatches(NamedTuple):
    """Matches of ``m`` queries of each image.

    ``query_index`` and ``candidate_index`` are int64 (B, m), ``distance`` is the Euclidean distance (B, m).
    """

    query_index: Tensor
    candidate_index: Tensor
    distance: Tensor


def vicreg_terms(
    x: Tensor,
    y: Tensor,
    *,
    gamma: float = 1.0,
    eps: float = 0.0,
    backend: str = "auto",
    precision: str | None = None,
) -> VICRegTerms:
    """Invariance, variance and covariance of two views, unweighted and differentiable.

    Args:
        x: Embeddings (..., N, D): N samples of D features.  Leading dimensions are independent problems, whose terms
            are averaged.
        y: Embeddings of the other view, of the same shape.  Row n of x and row n of y belong to the same sample.
        gamma: Standard deviation below which a feature is penalised, in units of the features.
        eps: Added to the variance before the square root, in squared units of the features.
        backend: "auto", "triton", "aten" or "reference".
        precision: Of matmuls on a GPU: None (torch's setting), "highest", "high" or "medium".

    Returns:
        Scalars ``inv``, ``var``, ``cov``; var and cov are means over the two views.  They are float32, or float64 if an
        input is float64.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.

    Source: VICReg, arXiv:2105.04906, equations 1 to 6.

    >>> x, y = torch.randn(2, 256, 2048).unbind()
    >>> inv, var, cov = vicreg_terms(x, y)
    """
    checks.views({"x": x, "y": y})
    terms = two_view_terms(x, y, _UNWEIGHTED, Options(gamma, eps, backend, precision))
    return VICRegTerms(terms.inv, terms.var, terms.cov)


def variance_covariance(
    z: Tensor,
    *,
    gamma: float = 1.0,
    eps: float = 0.0,
    backend: str = "auto",
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Variance and covariance terms of one view (..., N, D): two differentiable scalars.

    Arguments, types, errors and source as in :func:`vicreg_terms`.

    >>> var, cov = variance_covariance(torch.randn(256, 2048))
    """
    checks.views({"z": z})
    return one_view_terms(z, Options(gamma, eps, backend, precision))


def match_patches(
    queries: Tensor,
    candidates: Tensor,
    num_matches: int | None = None,
    *,
    backend: str = "auto",
) -> PatchMatches:
    """Nearest candidate of each query by Euclidean distance, for the ``num_matches`` queries nearest to their candidate.

    Matching is not mutual, and a candidate may occur more than once.  Equal distances go to the lowest candidate index,
    then to the lowest query index.  A NaN distance is never nearer than any other.  Patches of up to three channels are
    locations.  They are compared by their differences, so that exact ties are exact.  Patches of more channels are
    features.  They are compared by float32 matmuls, in which equal distances are equal up to rounding.

    Args:
        queries: (B, P1, C), any strides, of a floating or an integer type.
        candidates: (B, P2, C).
        num_matches: Number m of queries to keep in each image, at most P1; None: all queries.
        backend: "auto", "triton", "aten" or "reference".

    Returns:
        ``query_index``, ``candidate_index`` and ``distance``, (B, m) each, nearest first.  None of them has a gradient.
        ``distance`` is in units of the inputs.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.

    Source: VICRegL, arXiv:2210.01571.

    >>> x, y = torch.randn(2, 8, 49, 512).unbind()
    >>> query, candidate, distance = match_patches(x, y, 10)
    """
    checks.one_of("backend", backend, backends.BACKENDS)
    checks.patches(("queries", queries), ("candidates", candidates), integers=True)
    m = queries.shape[1] if num_matches is None else checks.match_count(num_matches)
    checks.enough_patches("queries", queries, m)
    with torch.no_grad():
        queries, candidates = floating(queries), floating(candidates)
        backend = backends.choose(backend, queries.device, (queries.dtype, candidates.dtype))
        if backend == "reference":
            queries, candidates = accumulated(queries, candidates)
            query, candidate = reference.match(queries, candidates, m)
            difference = reference.gather_rows(queries, query) - reference.gather_rows(candidates, candidate)
            return PatchMatches(query, candidate, torch.linalg.vector_norm(difference, dim=-1))
        matches = operators.match(queries, candidates, m, backend)
        query, candidate = matches.unbind()
        return PatchMatches(query, candidate, operators.match_distances(queries, candidates, matches, backend))


class Options(NamedTuple):
    """The options of every loss."""

    gamma: float = 1.0
    eps: float = 0.0
    backend: str = "auto"
    precision: str | None = None

    def checked(self) -> "Options":
        """The options with numbers as floats; raises if a number is out of range or a name is unknown."""
        checks.backend_and_precision(self.backend, self.precision)
        return self._replace(
            gamma=checks.nonnegative("gamma", self.gamma), eps=checks.nonnegative("eps", self.eps)
        )


def accumulated(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in the type in which their loss is computed."""
    dtype = policy.accumulation_dtype([a.dtype, b.dtype])
    return a.to(dtype), b.to(dtype)


def floating(z: Tensor) -> Tensor:
    """A floating tensor unchanged; an integer tensor in float64, or in float32 on a device without float64."""
    return z if z.is_floating_point() else z.to(policy.scalar_dtype(z.device))


def as_locations(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both views' locations in the type in which they are compared."""
    return accumulated(floating(a), floating(b))


def two_view_terms(x: Tensor, y: Tensor, weights: Sequence[Weight], options: Options) -> WeightedTerms:
    """Weighted terms and their sum, from checked views (..., N, D)."""
    gamma, eps, backend, precision = options.checked()
    backend = backends.choose(backend, x.device, (x.dtype, y.dtype))
    if backend == "reference":
        with policy.set_matmul_precision("ieee", x.device):
            x, y = accumulated(x, y)
            return weigh(reference.vicreg_terms(x, y, gamma, eps), weights)
    plan = TWO_VIEWS._replace(gamma=gamma, eps=eps, precision=precision, backend=backend)
    return weighted_terms(plan, weights, [x, y])[0][0]


def one_view_terms(z: Tensor, options: Options, covariance: bool = True) -> tuple[Tensor, Tensor]:
    """(var, cov) of one checked view (..., N, D).  Without ``covariance``, cov is not computed and is zero."""
    gamma, eps, backend, precision = options.checked()
    backend = backends.choose(backend, z.device, (z.dtype,), covariance=covariance)
    if backend == "reference":
        with policy.set_matmul_precision("ieee", z.device):
            z, _ = accumulated(z, z)
            return reference.variance(z, gamma, eps), reference.covariance(z)
    plan = ONE_VIEW._replace(gamma=gamma, eps=eps, precision=precision, covariance=covariance, backend=backend)
    (terms,), _ = weighted_terms(plan, _UNWEIGHTED, [z])
    return terms.var, terms.cov


def local_terms(
    maps: tuple[Tensor, Tensor],
    locations: tuple[Tensor, Tensor],
    counts: tuple[int, int],
    weights: Sequence[Weight],
    statistics: str,
    match_order: str,
    options: Options,
) -> tuple[WeightedTerms, WeightedTerms, Tensor]:
    """Weighted terms of the matches by location and by feature, and their total, from checked maps and locations.

    ``counts``: matches from the first view to the second, and from the second to the first.
    """
    gamma, eps, backend, precision = options.checked()
    backend = backends.choose(backend, maps[0].device, [z.dtype for z in maps])
    locations = as_locations(*locations)
    if backend == "reference":
        with policy.set_matmul_precision("ieee", maps[0].device):
            x1, x2 = accumulated(*maps)
            terms = reference.local_terms(x1, x2, *locations, counts, gamma, eps, statistics, match_order)
        location, feature = weigh(terms.location, weights), weigh(terms.feature, weights)
        return location, feature, location.total + feature.total
    per_slot = statistics == "slot"
    plan = local_views(counts)._replace(
        per_slot=per_slot, gamma=gamma, eps=eps, precision=precision, backend=backend,
        # An image's own statistics do not depend on the order of its matches.
        match_order=match_order if per_slot else "distance",
    )  # fmt: skip
    (location, feature), total = weighted_terms(plan, weights, maps, locations)
    return location, feature, total
