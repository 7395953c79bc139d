"""The truth of patch matching: naive loops in float64; and the grids, maps and backends that the tests share."""

import importlib.util
import itertools
import math
import sys

import pytest
import torch

from vicreg_fast import backends

TRITON = importlib.util.find_spec("triton") is not None
# NumPy warns of infinity minus infinity, which the interpreter computes with it.
ignore_invalid_values = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
BACKENDS = ("aten", "reference", *(["triton"] if TRITON else []))


every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def kernels_run(backend, *dtypes):
    """Whether a backend takes these types: Triton has no float64."""
    return backend != "triton" or torch.float64 not in dtypes


def both_directions(queries, candidates, m, order, backend):
    """At most m matches of each direction: query and candidate of queries -> candidates, then of candidates -> queries."""
    counts = [min(m, z.shape[1]) for z in (queries, candidates)]
    index = backends.module(backend).match((queries, candidates), (), counts, order, False).match_index
    directions = index.split([2 * len(queries) * count for count in counts])
    return [side for direction in directions for side in direction.view(2, len(queries), -1)]


def naive_distances(queries, candidates, dtype=torch.float64):
    """Squared distances (B, P1, P2): one query at a time, coordinates added in order."""
    queries, candidates = queries.to(dtype), candidates.to(dtype)
    rows = []
    for q in queries.unbind(1):
        squares = (q[:, None] - candidates) ** 2
        rows.append(sum(squares.unbind(2)) if squares.shape[2] <= 3 else squares.sum(2))
    return torch.stack(rows, dim=1)


def order_value(distance):
    """NaN orders as infinity, infinity as the largest finite value."""
    if math.isnan(distance):
        return math.inf
    return min(distance, sys.float_info.max)


def naive_match(distances, m):
    """(query, candidate) lists of one image's distances (P1, P2); ties go to the lowest candidate, then the lowest query."""
    rows = [[order_value(d) for d in row] for row in distances.tolist()]
    candidates = [row.index(min(row)) for row in rows]  # index() returns the first
    best = [min(row) for row in rows]
    queries = sorted(range(len(rows)), key=best.__getitem__)[:m]  # sorted() is stable
    return queries, [candidates[q] for q in queries]


def naive_matches(distances, m):
    """The same for a batch (B, P1, P2), as two tensors (B, m)."""
    images = [naive_match(image, m) for image in distances]
    return torch.tensor([q for q, _ in images]), torch.tensor([c for _, c in images])


def matched(distances, queries, candidates):
    """distances[b, queries[b, k], candidates[b, k]]."""
    return distances[torch.arange(distances.shape[0])[:, None], queries, candidates]


def assert_matches(actual, queries, candidates, m=None):
    """The matches that ``match_patches`` returned are the naive ones."""
    query, candidate = naive_matches(naive_distances(queries, candidates), m)
    assert actual.query_index.tolist() == query.tolist()
    assert actual.candidate_index.tolist() == candidate.tolist()


def assert_both_directions(actual, queries, candidates, m):
    """The four index tensors of :func:`both_directions` are the naive ones, nearest first."""
    distances = naive_distances(queries, candidates)
    expected = [*naive_matches(distances, m), *naive_matches(distances.mT, m)]
    assert [index.tolist() for index in actual] == [index.tolist() for index in expected]


# -- grids of locations ------------------------------------------------------------------------------------------


def grid(*sizes, start=0.0, step=1.0):
    """Locations of a regular grid, one row each, the last axis fastest."""
    starts = start if isinstance(start, tuple) else (start,) * len(sizes)
    axes = [[a + step * k for k in range(n)] for a, n in zip(starts, sizes, strict=True)]
    return torch.tensor(list(itertools.product(*axes)))


def images(*places):
    return torch.stack(places)


GRIDS = {
    "same-7x7": (images(grid(7, 7)), images(grid(7, 7))),
    "7x7-moved-by-one": (images(grid(7, 7)), images(grid(7, 7, start=1.0))),
    "7x7-moved-by-half": (images(grid(7, 7)), images(grid(7, 7, start=0.5))),
    "7x7-moved-by-half-in-one-axis": (images(grid(7, 7)), images(grid(7, 7, start=(0.0, 0.5)))),
    "7x7-far-away": (images(grid(7, 7)), images(grid(7, 7, start=100.0))),
    "7x7-backwards": (images(grid(7, 7)), images(grid(7, 7).flip(0))),
    "7x7-among-3x3": (images(grid(7, 7)), images(grid(3, 3, start=0.5, step=2.0))),
    "3x3-among-7x7": (images(grid(3, 3, start=0.5, step=2.0)), images(grid(7, 7))),
    "3x3-moved-by-half": (images(grid(3, 3)), images(grid(3, 3, start=-0.5))),
    "14x14-moved-by-half": (images(grid(14, 14)), images(grid(14, 14, start=0.5))),
    "14x14-among-7x7": (images(grid(14, 14)), images(grid(7, 7, start=0.5, step=2.0))),
    "4x4x4-moved-by-half": (images(grid(4, 4, 4)), images(grid(4, 4, 4, start=0.5))),
    "4x4x4-moved-by-one": (images(grid(4, 4, 4)), images(grid(4, 4, 4, start=(1.0, 0.0, -1.0)))),
    "line-of-300": (images(grid(300)), images(grid(150, start=0.5, step=2.0))),
    "one-among-7x7": (images(grid(1, 1, start=2.5)), images(grid(7, 7))),
    "7x7-among-one": (images(grid(7, 7)), images(grid(1, 1, start=3.0))),
    "one-among-one": (images(grid(1, 1)), images(grid(1, 1))),
    "all-in-one-place": (torch.ones(1, 9, 2), torch.ones(1, 10, 2)),
    "every-location-twice": (images(grid(3, 3).repeat(2, 1)), images(grid(3, 3, start=0.5).repeat(2, 1))),
    "three-images": (
        images(grid(7, 7), grid(7, 7, start=0.5), grid(7, 7, start=-3.0)),
        images(grid(7, 7, start=0.5), grid(7, 7, start=1.5), grid(7, 7, step=2.0)),
    ),
}
grids = pytest.mark.parametrize(("queries", "candidates"), GRIDS.values(), ids=GRIDS.keys())


# -- maps that are not finite ------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
# Changes of maps: (map, image, patch, channel, value).
EVERY = slice(None)
NOT_FINITE = {
    "nan-in-a-query": [("q", 0, 3, 0, NAN)],
    "nan-in-two-queries": [("q", 0, 3, 0, NAN), ("q", 0, 1, 1, NAN)],
    "nan-in-a-candidate": [("c", 0, 0, 0, NAN)],
    "nan-in-the-last-candidate": [("c", 1, -1, -1, NAN)],
    "nan-in-every-candidate": [("c", 0, EVERY, 1, NAN)],
    "nan-in-every-query": [("q", 0, EVERY, 1, NAN)],
    "nan-in-all-but-one-candidate": [("c", 0, slice(0, -1), 0, NAN)],
    "nan-everywhere": [("q", EVERY, EVERY, EVERY, NAN), ("c", EVERY, EVERY, EVERY, NAN)],
    "inf-in-a-query": [("q", 0, 3, 0, INF)],
    "minus-inf-in-a-query": [("q", 1, 0, -1, -INF)],
    "inf-in-a-candidate": [("c", 0, 0, 0, INF)],
    "minus-inf-in-a-candidate": [("c", 0, -1, 1, -INF)],
    "inf-in-every-candidate": [("c", 0, EVERY, 0, INF)],
    "inf-in-every-query": [("q", 0, EVERY, 0, INF)],
    "inf-and-minus-inf": [("q", 0, 2, 0, INF), ("c", 0, 1, 0, -INF)],
    "inf-before-nan-in-queries": [("q", 0, 1, 0, NAN), ("q", 0, 4, 0, INF)],
    "inf-before-nan-in-candidates": [("c", 0, slice(0, 2), 0, NAN), ("c", 0, slice(2, None), 0, INF)],
    "inf-query-nan-candidate": [("q", 0, 5, 0, INF), ("c", 0, 0, 1, NAN)],
}
not_finite = pytest.mark.parametrize("changes", NOT_FINITE.values(), ids=NOT_FINITE.keys())
# torch.cdist, which the reference uses, has another method from 26 patches on.
some_sizes = pytest.mark.parametrize("size", [(9, 8, 2), (9, 16, 6), (49, 64, 6)], ids=str)


def corrupted(changes, size):
    """Two maps of small integers with some elements replaced.

    The number of candidates is a power of two, so that their mean, and with it every sum, is exact.
    """
    P1, P2, C = size
    generator = torch.Generator().manual_seed(3)
    maps = {n: torch.randint(-2, 3, (2, P, C), generator=generator).float() for n, P in (("q", P1), ("c", P2))}
    for name, image, patch, channel, value in changes:
        maps[name][image, patch, channel] = value
    return maps["q"], maps["c"]
