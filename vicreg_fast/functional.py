"""The losses as functions: checked arguments in, scalars out."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks, operators, precision, reference
from .autograd import Weight, WeightedTerms, weighted_terms
from .multiview import LOCAL_VIEWS, ONE_VIEW, TWO_VIEWS, Plan
from .reference import VICRegTerms

_UNWEIGHTED = (1.0, 1.0, 1.0)


class PatchMatches(NamedTuple):
    """Matches of ``m`` queries: their numbers and their candidates' (B, m) int64, Euclidean distances (B, m)."""

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
        x: Embeddings (..., N, D): N samples of D features; leading dimensions are independent problems, averaged.
        y: Embeddings of the other view, same shape, row n of the same sample as row n of x.
        gamma: Standard deviation below which a feature is penalised, in units of the features.
        eps: Added to the variance before its root, in squared units of the features.
        backend: "auto", "triton", "aten" or "reference".
        precision: None (torch's setting), "highest", "high" or "medium": of products on a GPU.

    Returns:
        Scalars ``inv``, ``var``, ``cov``; var and cov are means over the two views.  float32, or float64 if an
        input is.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.

    Source: VICReg, arXiv:2105.04906, equations 1 to 6.

    >>> x, y = torch.randn(2, 256, 2048).unbind()
    >>> inv, var, cov = vicreg_terms(x, y)
    """
    checks.views({"x": x, "y": y})
    terms = two_view_terms(x, y, _UNWEIGHTED, gamma, eps, backend, precision)
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

    Arguments, types and errors as :func:`vicreg_terms`.

    >>> var, cov = variance_covariance(torch.randn(256, 2048))
    """
    checks.views({"z": z})
    terms = _one_view_terms(z, gamma, eps, backend, precision, covariance=True)
    return terms.var, terms.cov


def match_patches(
    queries: Tensor,
    candidates: Tensor,
    num_matches: int | None = None,
    *,
    backend: str = "auto",
) -> PatchMatches:
    """Nearest candidate of each query by Euclidean distance, for the queries nearest to theirs.

    Matching is not mutual and candidates repeat.  Equal distances go to the lowest candidate, then to the lowest
    query; NaN is never nearer than a number.  Up to three channels are locations, compared by their differences,
    so that exact ties are exact; longer rows are features, compared by float32 products.

    Args:
        queries: (B, P1, C), any strides.
        candidates: (B, P2, C).
        num_matches: How many queries to keep, at most P1; None: every one.
        backend: "auto", "triton", "aten" or "reference".

    Returns:
        ``query_index``, ``candidate_index`` and ``distance``, (B, m) each, nearest first; none has a gradient.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.

    >>> here, there = torch.randn(8, 49, 512), torch.randn(8, 49, 512)
    >>> query, candidate, distance = match_patches(here, there, 10)
    """
    checks.one_of("backend", backend, backends.BACKENDS)
    checks.patches(("queries", queries), ("candidates", candidates))
    m = queries.shape[1] if num_matches is None else checks.num_matches(num_matches, "slot")
    checks.enough_patches("queries", queries, m)
    with torch.no_grad():
        query, candidate, *_ = _match(queries, candidates, m, "distance", backend)
        dtype = precision.accumulation_dtype([queries.dtype, candidates.dtype])
        difference = _rows(queries, query).to(dtype) - _rows(candidates, candidate)
        return PatchMatches(query, candidate, torch.linalg.vector_norm(difference, dim=-1))


def _rows(maps: Tensor, index: Tensor) -> Tensor:
    return maps[torch.arange(maps.shape[0], device=maps.device)[:, None], index]


def _reference_inputs(*tensors: Tensor) -> list[Tensor]:
    dtype = precision.accumulation_dtype([t.dtype for t in tensors])
    return [t.to(dtype) for t in tensors]


def _weigh(terms: VICRegTerms, weights: Sequence[Weight]) -> WeightedTerms:
    inv, var, cov = (w * t for w, t in zip(weights, terms, strict=True))
    return WeightedTerms(inv, var, cov, inv + var + cov)


def _problems(z: Tensor) -> Tensor:
    return z.reshape(-1, *z.shape[-2:]) if z.ndim != 3 else z


def two_view_terms(
    x: Tensor,
    y: Tensor,
    weights: Sequence[Weight],
    gamma: float,
    eps: float,
    backend: str,
    precision_: str | None,
) -> WeightedTerms:
    """Weighted terms and their sum, of checked views (..., N, D)."""
    gamma, eps = _constants(gamma, eps, backend, precision_)
    chosen = backends.choose(backend, x.device)
    if chosen == "reference":
        with precision.exact_products("ieee", x.device):
            return _weigh(reference.vicreg_terms(*_reference_inputs(x, y), gamma, eps), weights)
    plan = Plan(**TWO_VIEWS, across=False, gamma=gamma, eps=eps, precision=precision_, covariance=True, backend=chosen)
    return weighted_terms(plan, weights, [_problems(x), _problems(y)])[0]
