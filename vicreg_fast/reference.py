"""The definitions, in plain eager PyTorch: what every faster path must reproduce.

Notation: a view z holds problems (..., N, D), N samples of D features; m its column means, c = z - m,
v_d = sum_n c_nd^2 / (N-1), C = c'c / (N-1), C0 = C with a zero diagonal.

    invariance      mean((x - y)^2)
    variance        mean_d relu(gamma - sqrt(v_d + eps))
    covariance      sum(C0^2) / D

Leading dimensions are independent problems and are averaged.  Nothing here is optimised, and nothing here is
called by a fast path.  Sources: VICReg, arXiv:2105.04906; VICRegL, arXiv:2210.01571.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class VICRegTerms(NamedTuple):
    """The three unweighted terms of VICReg, scalars; ``var`` and ``cov`` are means over the views."""

    inv: Tensor
    var: Tensor
    cov: Tensor


def invariance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of two views, both (..., N, D)."""
    return F.mse_loss(x, y)


def variance(z: Tensor, gamma: float = 1.0, eps: float = 0.0) -> Tensor:
    """Hinge on the standard deviation of every feature of one view (..., N, D)."""
    # With eps = 0, std() has gradient 0 at 0, where sqrt(var()) would have an infinite one.
    std = (z.var(dim=-2) + eps).sqrt() if eps else z.std(dim=-2)
    return F.relu(gamma - std).mean()


def covariance(z: Tensor) -> Tensor:
    """Sum of the squared off-diagonal covariances of one view (..., N, D), over D."""
    c = z - z.mean(dim=-2, keepdim=True)
    C = c.mT @ c / (z.shape[-2] - 1)
    C.diagonal(dim1=-2, dim2=-1).zero_()
    return C.square().sum(dim=(-2, -1)).mean() / z.shape[-1]


def vicreg_terms(x: Tensor, y: Tensor, gamma: float = 1.0, eps: float = 0.0) -> VICRegTerms:
    """All three terms of two views (..., N, D), unweighted."""
    return VICRegTerms(
        invariance(x, y),
        (variance(x, gamma, eps) + variance(y, gamma, eps)) / 2,
        (covariance(x) + covariance(y)) / 2,
    )


class Matches(NamedTuple):
    """Which patches belong together: ``query[b, k]`` is matched with ``candidate[b, k]``; both (B, m)."""

    query: Tensor
    candidate: Tensor


def distances(queries: Tensor, candidates: Tensor) -> Tensor:
    """What patches are ordered by: (B, P1, C), (B, P2, C) -> (B, P1, P2).

    Up to three coordinates are locations, whose grids are full of exact ties: squared Euclidean distances from
    the differences, axes added in order.  Longer rows are features: Euclidean distances.  A distance that is
    not a number is farther than any that is, infinity included.
    """
    if queries.shape[-1] <= 3:
        d = torch.zeros((), dtype=queries.dtype, device=queries.device)
        for q, c in zip(queries.unbind(-1), candidates.unbind(-1), strict=True):
            d = d + (q[:, :, None] - c[:, None, :]) ** 2
    else:
        d = torch.cdist(queries, candidates, compute_mode="donot_use_mm_for_euclid_dist")
    return d.nan_to_num(nan=torch.inf, posinf=torch.finfo(d.dtype).max)


def select(distances: Tensor, num_matches: int, match_order: str = "distance") -> Matches:
    """Each query's nearest candidate, for the ``num_matches`` queries that are nearest to theirs.

    Ties go to the lowest candidate, then to the lowest query.  ``match_order``: "distance" lists the nearest
    match first, "patch" lists the chosen queries by their number.
    """
    distance, candidate = distances.min(dim=-1)  # the first of equal candidates
    query = distance.sort(dim=-1, stable=True).indices[:, :num_matches]
    if match_order == "patch":
        query = query.sort(dim=-1).values
    return Matches(query, candidate.gather(-1, query))


def match(queries: Tensor, candidates: Tensor, num_matches: int, match_order: str = "distance") -> Matches:
    """Nearest-neighbour matches of (B, P1, C) among (B, P2, C); carries no gradient."""
    with torch.no_grad():
        return select(distances(queries, candidates), num_matches, match_order)


def gather_rows(maps: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, m) of ``maps`` (B, P, C): (B, m, C)."""
    return maps.gather(1, index[..., None].expand(-1, -1, maps.shape[-1]))


def matched_terms(
    query_maps: Tensor, candidate_maps: Tensor, matches: Matches, gamma: float, eps: float, statistics: str
) -> VICRegTerms:
    """VICReg terms of one set of matches.

    ``statistics``: "image" takes an image's m matched patches as the samples of one problem, "slot" takes the
    images' k-th matches as the samples of problem k.
    """
    q = gather_rows(query_maps, matches.query)
    c = gather_rows(candidate_maps, matches.candidate)
    if statistics == "slot":
        q, c = q.transpose(0, 1), c.transpose(0, 1)
    return vicreg_terms(q, c, gamma, eps)


class LocalTerms(NamedTuple):
    """The unweighted terms of VICRegL's local part, each the mean over both directions."""

    location: VICRegTerms
    feature: VICRegTerms


def local_terms(
    x1_maps: Tensor,
    x2_maps: Tensor,
    x1_locations: Tensor,
    x2_locations: Tensor,
    num_matches: int | tuple[int, int],
    gamma: float = 1.0,
    eps: float = 0.0,
    statistics: str = "image",
    match_order: str = "distance",
) -> LocalTerms:
    """Local terms of two views' maps (B, P1, C), (B, P2, C) with locations (B, P1, 2), (B, P2, 2).

    ``num_matches``: of each direction, or of the first view's patches and of the second's.
    """
    m1, m2 = num_matches if isinstance(num_matches, tuple) else (num_matches, num_matches)

    def both_directions(a: Tensor, b: Tensor) -> VICRegTerms:
        there = matched_terms(x1_maps, x2_maps, match(a, b, m1, match_order), gamma, eps, statistics)
        back = matched_terms(x2_maps, x1_maps, match(b, a, m2, match_order), gamma, eps, statistics)
        return VICRegTerms(*((s + t) / 2 for s, t in zip(there, back, strict=True)))

    return LocalTerms(both_directions(x1_locations, x2_locations), both_directions(x1_maps, x2_maps))
