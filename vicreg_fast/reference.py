"""The definitions, in plain eager PyTorch.  Every faster path must reproduce them.

Notation: a view z holds problems (..., N, D), N samples of D features.  c is z minus its column means,
v_d = sum_n c_nd^2 / (N-1), C = c'c / (N-1), and C0 is C with a zero diagonal.  Letters: docs/notation.md.

    invariance      mean((x - y)^2)
    variance        mean_d relu(gamma - sqrt(v_d + eps))
    covariance      sum(C0^2) / D

Leading dimensions are independent problems and are averaged.  The code is not optimised, and no fast path calls it.
Sources: VICReg, arXiv:2105.04906; VICRegL, arXiv:2210.01571.
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
    """Indices of matched patches, (B, m) each: of image b, ``query[b, k]`` is matched with ``candidate[b, k]``."""

    query: Tensor
    candidate: Tensor


def distances(queries: Tensor, candidates: Tensor) -> Tensor:
    """The distances by which matches are ordered: (B, P1, D), (B, P2, D) -> (B, P1, P2).

    Patches of up to three channels are locations.  Their grids have many exact ties, so their distances are the squared
    differences, added axis by axis.  Patches of more channels are features, with Euclidean distances.  NaN is replaced
    by inf, and inf by the largest finite number, so that a NaN distance is never nearer than any other.
    """
    if queries.shape[-1] <= 3:
        result = torch.zeros((), dtype=queries.dtype, device=queries.device)
        for x, y in zip(queries.unbind(-1), candidates.unbind(-1), strict=True):
            result = result + (x[:, :, None] - y[:, None, :]) ** 2
    else:
        result = torch.cdist(queries, candidates, compute_mode="donot_use_mm_for_euclid_dist")
    return result.nan_to_num(nan=torch.inf, posinf=torch.finfo(result.dtype).max)


def select(distances: Tensor, num_matches: int, match_order: str = "distance") -> Matches:
    """Each query's nearest candidate, for the ``num_matches`` queries that are nearest to theirs.

    Equal distances go to the lowest candidate index, then to the lowest query index.  ``match_order``: "distance" lists
    the nearest match first, "patch" orders the matches by the query's index.
    """
    distance, candidate = distances.min(dim=-1)  # the lowest index of equal distances
    query = distance.sort(dim=-1, stable=True).indices[:, :num_matches]
    if match_order == "patch":
        query = query.sort(dim=-1).values
    return Matches(query, candidate.gather(-1, query))


def match(queries: Tensor, candidates: Tensor, num_matches: int, match_order: str = "distance") -> Matches:
    """Nearest-neighbour matches of patches (B, P1, D) among (B, P2, D); carries no gradient."""
    with torch.no_grad():
        return select(distances(queries, candidates), num_matches, match_order)


def gather_rows(maps: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, m) of ``maps`` (B, P, D): (B, m, D)."""
    return maps.gather(1, index[..., None].expand(-1, -1, maps.shape[-1]))


def matched_terms(
    query_maps: Tensor, candidate_maps: Tensor, matches: Matches, gamma: float, eps: float, statistics: str
) -> VICRegTerms:
    """VICReg terms of one set of matches.

    ``statistics`` decides what a problem is.  "image": the samples of problem b are the m matched patches of image b.
    "slot": the samples of problem k are the k-th matches of all images.
    """
    x = gather_rows(query_maps, matches.query)
    y = gather_rows(candidate_maps, matches.candidate)
    if statistics == "slot":
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    return vicreg_terms(x, y, gamma, eps)


class LocalTerms(NamedTuple):
    """The unweighted terms of VICRegL's local part.  Each is the mean over both directions."""

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
    """Local terms of two views' maps (B, P1, D), (B, P2, D) with locations (B, P1, 2), (B, P2, 2).

    ``num_matches``: of both directions, or a pair, from the first view to the second and from the second to the first.
    """
    m1, m2 = num_matches if isinstance(num_matches, tuple) else (num_matches, num_matches)

    def both_directions(x1: Tensor, x2: Tensor) -> VICRegTerms:
        x1_to_x2 = matched_terms(x1_maps, x2_maps, match(x1, x2, m1, match_order), gamma, eps, statistics)
        x2_to_x1 = matched_terms(x2_maps, x1_maps, match(x2, x1, m2, match_order), gamma, eps, statistics)
        return VICRegTerms(*((a + b) / 2 for a, b in zip(x1_to_x2, x2_to_x1, strict=True)))

    return LocalTerms(both_directions(x1_locations, x2_locations), both_directions(x1_maps, x2_maps))
