"""Nearest-neighbour patch matching.

    d(q, c) = sum_a (q_a - c_a)^2                                up to three coordinates: locations
            = |q - s|^2 + |c - s|^2 - 2 (q - s).(c - s)          longer rows: features

s is one vector for both maps, the candidates' mean: it cancels in the distance, and the products no longer
subtract two large numbers (at mean 10 sigma the nearest distance's error falls from 1.7e-2 to 1e-4).  Row minima
and column minima of one tile are the matches of both directions; no (B, P1, P2) matrix exists.

Locations are added up one axis at a time, multiplication and addition apart, so that exact ties stay exact.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import precision

# Elements of one tile of distances: 2^19 float32 stay in the second-level cache.
TILE_ELEMENTS = 1 << 19
# Rows this short are locations.
MAX_COORDINATES = 3


class Nearest(NamedTuple):
    """Each query's nearest candidate: an ordering value and its number, (B, P1) each."""

    value: Tensor
    candidate: Tensor


class _Operands(NamedTuple):
    """Both maps of some images, ready for tiles: features centred, with their squared norms."""

    queries: Tensor
    candidates: Tensor
    norms: tuple[Tensor, Tensor] | None


def _prepare(queries: Tensor, candidates: Tensor, dtype: torch.dtype) -> _Operands:
    q, c = queries.to(dtype), candidates.to(dtype)
    if q.shape[-1] <= MAX_COORDINATES:
        return _Operands(q, c, None)
    # Any common vector will do; a channel in which some candidate is not finite stays as it is.
    shift = c.mean(dim=1, keepdim=True).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    q, c = q - shift, c - shift
    return _Operands(q, c, (q.square().sum(-1), c.square().sum(-1)))


def _tile(operands: _Operands, part: slice) -> Tensor:
    """Ordering values of a part of the queries to every candidate; NaN ordered behind infinity."""
    q, c, norms = operands
    if norms is not None:
        q_norm, c_norm = norms[0][:, part, None], norms[1][:, None, :]
        tile = torch.baddbmm(q_norm, q[:, part], c.mT, alpha=-2)
        # The sum of the norms says what the distance of a row that is not finite is: infinity, or no number.
        # Its products would turn one into the other.
        tile = torch.where((q_norm + c_norm).isfinite(), tile.add_(c_norm), q_norm + c_norm)
    else:
        axes = zip(q[:, part].unbind(-1), c.unbind(-1), strict=True)
        squares = ((a[:, :, None] - b[:, None, :]).square_() for a, b in axes)
        tile = next(squares)
        for square in squares:
            tile += square
    return ordered(tile)


def ordered(distances: Tensor) -> Tensor:
    """Distances with NaN at infinity and infinity below it, in place: NaN is never nearer than a number."""
    return distances.nan_to_num_(nan=torch.inf, posinf=torch.finfo(distances.dtype).max)


def ordering(queries: Tensor, candidates: Tensor) -> Tensor:
    """The whole matrix (B, P1, P2) that :func:`nearest` never holds, for those who want to see it."""
    dtype = precision.accumulation_dtype([queries.dtype, candidates.dtype])
    return _tile(_prepare(queries, candidates, dtype), slice(None))


def nearest(queries: Tensor, candidates: Tensor) -> tuple[Nearest, Nearest]:
    """Both directions: nearest candidate of every query, nearest query of every candidate.

    queries (B, P1, C), candidates (B, P2, C), any floating types and strides.  NaN is never nearer than a number,
    infinity included; equal distances go to the lowest number.
    """
    dtype = precision.accumulation_dtype([queries.dtype, candidates.dtype])
    B, P1, _ = queries.shape
    P2 = candidates.shape[1]
    device = queries.device
    rows = Nearest(
        torch.empty(B, P1, dtype=dtype, device=device), torch.empty(B, P1, dtype=torch.int64, device=device)
    )
    columns = Nearest(
        torch.full((B, P2), torch.inf, dtype=dtype, device=device),
        torch.zeros(B, P2, dtype=torch.int64, device=device),
    )
    images = max(1, TILE_ELEMENTS // (P1 * P2))
    step = min(P1, max(1, TILE_ELEMENTS // P2))
    for first in range(0, B, images):
        group = slice(first, first + images)
        operands = _prepare(queries[group], candidates[group], dtype)
        for top in range(0, P1, step):
            part = slice(top, top + step)
            tile = _tile(operands, part)
            rows.value[group, part], rows.candidate[group, part] = tile.min(dim=2)
            value, query = tile.min(dim=1)
            nearer = value < columns.value[group]  # an equal one further down does not replace the first
            columns.value[group] = torch.where(nearer, value, columns.value[group])
            columns.candidate[group] = torch.where(nearer, query + top, columns.candidate[group])
    return rows, columns


def select(found: Nearest, num_matches: int, match_order: str) -> tuple[Tensor, Tensor]:
    """The ``num_matches`` queries nearest to their candidates: (query, candidate), (B, m) each."""
    query = found.value.sort(dim=1, stable=True).indices[:, :num_matches]
    if match_order == "patch":
        query = query.sort(dim=1).values
    return query.contiguous(), found.candidate.gather(1, query)
