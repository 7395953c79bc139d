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
from .blocks import SMALL_ELEMENTS

# Elements of one tile of distances: 2^19 float32 stay in the second-level cache.  Two tiles take no more memory than
# both maps, unless these are small.
TILE_ELEMENTS = 1 << 19
# Elements of both maps that are centred at once: 4 MiB of float32.  On two cores 2^19 took 0.97 to 1.04 times as long
# over four shapes, 2^21 1.0 to 1.12 times.
MAP_ELEMENTS = 1 << 20
# Rows this short are locations.
MAX_COORDINATES = 3


class Nearest(NamedTuple):
    """Each query's nearest candidate: an ordering value and its number, (B, P1) each."""

    value: Tensor
    candidate: Tensor


class _Operands(NamedTuple):
    """Both maps of some images, ready for tiles: features centred, with their squared norms (B, P)."""

    queries: Tensor
    candidates: Tensor
    norms: tuple[Tensor, Tensor] | None


def _prepare(queries: Tensor, candidates: Tensor, dtype: torch.dtype) -> _Operands:
    if queries.shape[-1] <= MAX_COORDINATES:
        return _Operands(queries.to(dtype), candidates.to(dtype), None)
    # Any common vector will do; a channel in which some candidate is not finite stays as it is.
    shift = candidates.mean(dim=1, keepdim=True, dtype=dtype).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    (q, q_norm), (c, c_norm) = _centred(queries, shift), _centred(candidates, shift)
    return _Operands(q, c, (q_norm, c_norm))


def _centred(z: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Rows minus the shift, in its type, and their squared norms.

    A row whose norm is not finite is at infinity from every other, or nowhere, and its norm alone says which: its
    products would turn one into the other, so the row is zero in them.
    """
    z = z - shift
    norm = torch.linalg.vecdot(z, z)
    finite = norm.isfinite()
    # On a CPU looking costs nothing, and the fill a pass.
    if z.device.type != "cpu" or torch.compiler.is_compiling() or not finite.all():
        z.masked_fill_(~finite[..., None], 0.0)
    return z, norm


def _tile(operands: _Operands, part: slice) -> Tensor:
    """Ordering values of a part of the queries to every candidate; NaN ordered behind infinity."""
    q, c, norms = operands
    if norms is not None:
        tile = norms[0][:, part, None] + norms[1][:, None, :]
        tile.baddbmm_(q[:, part], c.mT, alpha=-2)
    else:
        axes = zip(q[:, part].unbind(-1), c.unbind(-1), strict=True)
        differences = (a[:, :, None] - b[:, None, :] for a, b in axes)
        squares = (d.mul_(d) for d in differences)
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


def _minimum(tile: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Minima of a tile without NaN along ``dim`` and the first positions that have them.

    Two plain minima with a comparison between them take a third of the time of one that carries positions (13 tiles
    of 196x196), but not where rows are short (32 of 49x49) or elements few.
    """
    if tile.shape[dim] < 128 or tile.numel() < 1 << 16:
        value, position = tile.min(dim)
        return value, position
    value = tile.amin(dim, keepdim=True)
    size = tile.shape[dim]
    numbers = torch.arange(size, dtype=tile.dtype, device=tile.device)
    elsewhere = torch.gt(tile, value, out=torch.empty_like(tile))  # 1 where the minimum is not
    elsewhere = elsewhere.mul_(size).add_(numbers if dim == 2 else numbers[:, None])
    return value.squeeze(dim), elsewhere.amin(dim).long()


def nearest(queries: Tensor, candidates: Tensor, both: bool) -> list[Nearest]:
    """Nearest candidate of every query; ``both``: and nearest query of every candidate.

    queries (B, P1, C), candidates (B, P2, C), any floating types and strides.  NaN is never nearer than a number,
    infinity included; equal distances go to the lowest number.
    """
    dtype = precision.accumulation_dtype([queries.dtype, candidates.dtype])
    B, P1, C = queries.shape
    P2 = candidates.shape[1]
    device = queries.device
    rows, *back = (
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
            rows.value[group, part], rows.candidate[group, part] = _minimum(tile, 2)
            for columns in back:
                value, query = _minimum(tile, 1)
                if top:
                    before = columns.value[group]
                    nearer = value < before  # an equal one further down does not replace the first
                    value = torch.where(nearer, value, before)
                    query = torch.where(nearer, query + top, columns.candidate[group])
                columns.value[group], columns.candidate[group] = value, query
    return [rows, *back]


def select(found: Nearest, num_matches: int, match_order: str) -> tuple[Tensor, Tensor]:
    """The ``num_matches`` queries nearest to their candidates: (query, candidate), (B, m) each."""
    query = found.value.sort(dim=1, stable=True).indices[:, :num_matches]
    if match_order == "patch":
        query = query.sort(dim=1).values
    return query, found.candidate.gather(1, query)
