"""Nearest-neighbour patch matching.

    distance(q, c) = sum_a (q_a - c_a)^2                         up to three channels: locations
                   = |q - s|^2 + |c - s|^2 - 2 (q - s).(c - s)   more channels: features

q is a query and c a candidate.  s is one vector for both maps, the mean of the candidates.  It cancels in the distance.
Without it, the distance is a small difference of large numbers (at mean 10 sigma the nearest distance's error falls from
1.7e-2 to 1e-4).  The row minima and the column minima of one tile are the matches of both directions.  The matrix
(B, P1, P2) is never stored.

The squares of locations are added axis by axis, without fused multiply-add, so that exact ties stay exact.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import precision
from .blocks import SMALL_ELEMENTS

# Elements of one tile of distances: 2^19 float32 stay in the second-level cache.  Two tiles take no more memory than
# both maps, unless the maps are small.
TILE_ELEMENTS = 1 << 19
# Elements of both maps that are centred at once: 4 MiB of float32.  On two cores 2^19 took 0.97 to 1.04 times as long
# over four shapes, 2^21 took 1.0 to 1.12 times.
MAP_ELEMENTS = 1 << 20
# Patches with at most this many channels are locations.
MAX_COORDINATES = 3


class Nearest(NamedTuple):
    """Each query's nearest candidate, (B, P1) each: the value by which matches are ordered, and the candidate's index."""

    value: Tensor
    candidate: Tensor


class _Operands(NamedTuple):
    """Both maps of some images.  Features are shifted by s and come with their squared row norms (B, P)."""

    queries: Tensor
    candidates: Tensor
    row_sq_norms: tuple[Tensor, Tensor] | None


def _prepare(queries: Tensor, candidates: Tensor, dtype: torch.dtype) -> _Operands:
    if queries.shape[-1] <= MAX_COORDINATES:
        return _Operands(queries.to(dtype), candidates.to(dtype), None)
    # Any vector is right, as long as both maps have the same.  A channel with a candidate that is not finite is not shifted.
    shift = candidates.mean(dim=1, keepdim=True, dtype=dtype).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    (q, q_sq_norms), (c, c_sq_norms) = _shifted(queries, shift), _shifted(candidates, shift)
    return _Operands(q, c, (q_sq_norms, c_sq_norms))


def _shifted(z: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Rows minus the shift, in the type of the shift, and their squared norms.

    A row whose squared norm is inf or NaN has the distance inf or NaN to every other row.  The norm alone decides which:
    the matmul could turn inf into NaN, so the row is set to zero in it.
    """
    z = z - shift
    row_sq_norms = torch.linalg.vecdot(z, z)
    finite = row_sq_norms.isfinite()
    # On a CPU the test costs almost nothing and the fill one pass.  On other devices the test would wait for the device.
    if z.device.type != "cpu" or torch.compiler.is_compiling() or not finite.all():
        z.masked_fill_(~finite[..., None], 0.0)
    return z, row_sq_norms


def _tile(operands: _Operands, part: slice) -> Tensor:
    """Distances of a part of the queries to all candidates, as :func:`ordered` returns them."""
    q, c, row_sq_norms = operands
    if row_sq_norms is not None:
        tile = row_sq_norms[0][:, part, None] + row_sq_norms[1][:, None, :]
        tile.baddbmm_(q[:, part], c.mT, alpha=-2)
    else:
        axes = zip(q[:, part].unbind(-1), c.unbind(-1), strict=True)
        differences = (q_axis[:, :, None] - c_axis[:, None, :] for q_axis, c_axis in axes)
        squares = (difference.mul_(difference) for difference in differences)
        tile = next(squares)
        for square in squares:
            tile += square
    return ordered(tile)


def ordered(distances: Tensor) -> Tensor:
    """Distances with NaN replaced by inf, and inf by the largest finite number, in place: NaN comes last in any order."""
    return distances.nan_to_num_(nan=torch.inf, posinf=torch.finfo(distances.dtype).max)


def ordering(queries: Tensor, candidates: Tensor) -> Tensor:
    """The complete matrix (B, P1, P2) of ordered distances, of which :func:`nearest` holds one tile at a time."""
    dtype = precision.accumulation_dtype([queries.dtype, candidates.dtype])
    return _tile(_prepare(queries, candidates, dtype), slice(None))


def _minimum(tile: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Minima of a tile without NaN along ``dim``, and the lowest indices at which they occur.

    Two calls of amin and a comparison take a third of the time of one min that returns indices (13 tiles of 196x196).
    For short rows (32 tiles of 49x49) or few elements they do not.
    """
    if tile.shape[dim] < 128 or tile.numel() < 1 << 16:
        value, index = tile.min(dim)
        return value, index
    value = tile.amin(dim, keepdim=True)
    size = tile.shape[dim]
    indices = torch.arange(size, dtype=tile.dtype, device=tile.device)
    # The index where the minimum occurs; at least ``size`` everywhere else.
    candidates = torch.gt(tile, value, out=torch.empty_like(tile))
    candidates = candidates.mul_(size).add_(indices if dim == 2 else indices[:, None])
    return value.squeeze(dim), candidates.amin(dim).long()


def nearest(queries: Tensor, candidates: Tensor, both: bool) -> list[Nearest]:
    """Nearest candidate of every query, and with ``both`` the nearest query of every candidate.

    queries (B, P1, C), candidates (B, P2, C), any floating types and strides.  A NaN distance is never nearer than any
    other, inf included.  Equal distances go to the lowest index.
    """
    dtype = precision.accumulation_dtype([queries.dtype, candidates.dtype])
    B, P1, C = queries.shape
    P2 = candidates.shape[1]
    device = queries.device
    x_to_y, *y_to_x = (  # y_to_x: empty, or the one other direction
        Nearest(
            torch.empty(B, P, dtype=dtype, device=device), torch.empty(B, P, dtype=torch.int64, device=device)
        )
        for P in ((P1, P2) if both else (P1,))
    )
    tile_elements = min(TILE_ELEMENTS, max(SMALL_ELEMENTS, B * (P1 + P2) * C // 2))
    images = max(1, min(tile_elements // (P1 * P2), MAP_ELEMENTS // ((P1 + P2) * C)))
    images = -(-B // -(-B // images))  # groups of equal size
    step = min(P1, max(1, tile_elements // P2))
    for first in range(0, B, images):
        group = slice(first, first + images)
        operands = _prepare(queries[group], candidates[group], dtype)
        for top in range(0, P1, step):
            part = slice(top, top + step)
            tile = _tile(operands, part)
            x_to_y.value[group, part], x_to_y.candidate[group, part] = _minimum(tile, 2)
            for reverse in y_to_x:
                value, query = _minimum(tile, 1)
                if top:
                    previous = reverse.value[group]
                    nearer = value < previous  # an equal distance does not replace a lower index
                    value = torch.where(nearer, value, previous)
                    query = torch.where(nearer, query + top, reverse.candidate[group])
                reverse.value[group], reverse.candidate[group] = value, query
    return [x_to_y, *y_to_x]


def select(nearest: Nearest, num_matches: int, match_order: str) -> tuple[Tensor, Tensor]:
    """Indices of the ``num_matches`` queries nearest to their candidates: (query, candidate), (B, m) each."""
    query = nearest.value.sort(dim=1, stable=True).indices[:, :num_matches]
    if match_order == "patch":
        query = query.sort(dim=1).values
    return query, nearest.candidate.gather(1, query)
