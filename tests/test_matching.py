"""Patch matching against naive loops in float64.

What matches are ordered by has rounding errors of at most E, derived here; u is 2^-24 in float32, 2^-53 in float64.

- Up to three coordinates, D = sum_a (q_a - c_a)^2 from the differences: one rounding of the difference counts
  twice in its square, the square is rounded once and the sum at most C - 1 times: E = (C + 2) u D.  On integer and
  half-integer grids nothing is rounded, ties are exact, and so is the agreement asked for.
- Longer rows, D = |q - s|^2 + |c - s|^2 - 2 (q - s).(c - s) with s the candidates' mean.  In units of
  (|q - s| + |c - s|)^2 u: sums of C products, each rounded at most C times, of total magnitude
  |q - s|^2 + |c - s|^2 + 2 |q - s| |c - s|: C.  Rounding of q - s and c - s: 2.  The last two additions: 2.
  Together E = (C + 4) u (|q - s| + |c - s|)^2; one part in a hundred more for s, which is rounded too.
  Kernels take the mean of each tile of candidates for s, and 0 for 16-bit features, which they multiply as they are.

A nearest candidate found by rounded distances is at most 2 E farther than the nearest, and is the nearest where the
second one is more than 2 E farther.  The same holds, with the largest E of the image, for the k-th nearest query.
"""

import importlib.util
import itertools
import math
import sys
from functools import cache

import pytest
import torch

from vicreg_fast import VICRegLLoss, functional, operators

from .data import EXACT

TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("aten", "reference", *(["triton"] if TRITON else []))
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# NumPy warns of infinity minus infinity, which the interpreter computes with it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    *([pytest.mark.usefixtures("interpreted")] if TRITON else []),
]


def kernels_run(backend, *dtypes):
    """Whether a backend takes these types: Triton has no float64."""
    return backend != "triton" or torch.float64 not in dtypes


def both_directions(queries, candidates, m, order, backend):
    """[query, candidate] of queries -> candidates and [query, candidate] of candidates -> queries, at most m."""
    counts = [min(m, z.shape[1]) for z in (queries, candidates)]
    found = operators.match([queries, candidates], [], counts, order, False, backend)
    return [index for group in found if group.ndim == 3 for index in group]  # not the ticket


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- the oracle -------------------------------------------------------------------------------------------------


def naive_distances(queries, candidates, dtype=torch.float64):
    """Squared distances (B, P1, P2): one query at a time, coordinates added in order."""
    queries, candidates = queries.to(dtype), candidates.to(dtype)
    rows = []
    for q in queries.unbind(1):
        squares = (q[:, None] - candidates) ** 2
        rows.append(sum(squares.unbind(2)) if squares.shape[2] <= 3 else squares.sum(2))
    return torch.stack(rows, dim=1)


def _order(distance):
    """NaN behind infinity, infinity behind every finite number."""
    if math.isnan(distance):
        return math.inf
    return min(distance, sys.float_info.max)


def naive_match(distances, m):
    """(query, candidate) lists of one image's distances (P1, P2): lowest candidate, then lowest query on ties."""
    rows = [[_order(d) for d in row] for row in distances.tolist()]
    candidates = [row.index(min(row)) for row in rows]  # index() finds the first
    best = [min(row) for row in rows]
    queries = sorted(range(len(rows)), key=best.__getitem__)[:m]  # sorted() is stable
    return queries, [candidates[q] for q in queries]


def naive_matches(distances, m):
    """The same for a batch (B, P1, P2), as two tensors (B, m)."""
    found = [naive_match(image, m) for image in distances]
    return torch.tensor([q for q, _ in found]), torch.tensor([c for _, c in found])


def matched(distances, queries, candidates):
    """distances[b, queries[b, k], candidates[b, k]]."""
    return distances[torch.arange(distances.shape[0])[:, None], queries, candidates]


def rounding(queries, candidates, distances, backend="aten"):
    """E of the module's docstring, (B, P1, P2)."""
    C = queries.shape[-1]
    wide = torch.float64 in (queries.dtype, candidates.dtype)
    # In float64 the oracle's own error, no larger than E, is added.
    u = 2 * 2.0**-53 if wide else 2.0**-24
    if C <= 3:
        return (C + 2) * u * distances
    q, c = queries.double(), candidates.double()
    tiles = [c]
    native = False
    if backend == "triton":
        from vicreg_fast.backends.triton import configs
        from vicreg_fast.backends.triton import matching as kernels

        key = kernels.key([queries, candidates], configs.INTERPRETER)
        native = key.kind == "half"
        tiles = c.split(kernels.choose(key).tile, dim=1)
    parts = []
    for tile in tiles:
        s = 0.0 if native else tile.mean(1, keepdim=True)
        parts.append((q - s).norm(dim=-1)[:, :, None] + (tile - s).norm(dim=-1)[:, None, :])
    return 1.01 * (C + 4) * u * torch.cat(parts, dim=2) ** 2


# -- grids of locations: ties are exact -------------------------------------------------------------------------


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


@every_backend
@pytest.mark.parametrize("m", [1, 5, None], ids=["one", "five", "all"])
@grids
def test_grid_ties_go_to_the_lowest(queries, candidates, m, backend):
    m = None if m is None else min(m, queries.shape[1])
    found = functional.match_patches(queries, candidates, m, backend=backend)
    query, candidate = naive_matches(naive_distances(queries, candidates), m)
    assert found.query_index.tolist() == query.tolist()
    assert found.candidate_index.tolist() == candidate.tolist()


# ATen, elements.  1: a tile is one row of one image; 400: eight rows of 49, and groups of images that are smaller;
# 1 << 19: every image here is whole.  Triton, patches.  16: most images have several tiles; 64: most have one.
TILES = [("aten", 1), ("aten", 400), ("aten", 1 << 19), *([("triton", 16), ("triton", 64)] if TRITON else [])]


@pytest.fixture(params=TILES, ids=lambda tile: "-".join(map(str, tile)))
def tiled(request, monkeypatch):
    """A backend whose tiles have a given size."""
    backend, tile = request.param
    if backend == "aten":
        monkeypatch.setattr(matching, "TILE_ELEMENTS", tile)
    else:
        from vicreg_fast.backends.triton import configs
        from vicreg_fast.backends.triton import matching as kernels

        monkeypatch.setattr(kernels, "choose", lambda key: configs.Matching(tile, 16))
    return backend


@grids
def test_grid_ties_go_to_the_lowest_in_both_directions_whatever_the_tile(queries, candidates, tiled):
    found = both_directions(queries, candidates, 5, "distance", tiled)
    distances = naive_distances(queries, candidates)
    expected = [*naive_matches(distances, 5), *naive_matches(distances.mT, 5)]
    assert [index.tolist() for index in found] == [index.tolist() for index in expected]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_grid_ties_in_other_types(dtype, backend):
    queries, candidates = (place.to(dtype) for place in GRIDS["7x7-moved-by-half"])  # exact in all of them
    found = functional.match_patches(queries, candidates, backend=backend)
    query, candidate = naive_matches(naive_distances(queries, candidates), None)
    assert found.query_index.tolist() == query.tolist()
    assert found.candidate_index.tolist() == candidate.tolist()


@every_backend
@pytest.mark.parametrize("sizes", [(7, 7), (14, 14), (4, 4, 4)], ids=["7x7", "14x14", "4x4x4"])
@pytest.mark.parametrize("scale", [1 / 7, 1 / 224, 0.1], ids=["sevenths", "pixels", "tenths"])
def test_inexact_grids_are_compared_axis_by_axis_in_float32(scale, sizes, backend):
    # Which of two nearly equal distances is smaller depends on every rounding: differences, axes added in order,
    # no fused multiply-add.
    queries = images(grid(*sizes) * scale)
    candidates = images(grid(*sizes, start=0.5) * scale)
    found = functional.match_patches(queries, candidates, backend=backend)
    query, candidate = naive_matches(naive_distances(queries, candidates, torch.float32), None)
    assert found.query_index.tolist() == query.tolist()
    assert found.candidate_index.tolist() == candidate.tolist()


@pytest.mark.parametrize("name", ["7x7-moved-by-half", "7x7-among-3x3", "4x4x4-moved-by-half"])
def test_patch_order_lists_the_same_matches_by_number(name, tiled):
    queries, candidates = GRIDS[name]
    found = both_directions(queries, candidates, 5, "patch", tiled)
    distances = naive_distances(queries, candidates)
    expected = []
    for d in (distances, distances.mT):
        pairs = sorted(zip(*naive_match(d[0], 5), strict=True))
        expected += [[[q for q, _ in pairs]], [[c for _, c in pairs]]]
    assert [index.tolist() for index in found] == expected


# -- batches and images too large for one tile ------------------------------------------------------------------


def test_more_images_than_one_tile_holds():
    B, P = 450, 49
    assert matching.TILE_ELEMENTS // (P * P) < B / 2  # three groups of images at least
    moves = torch.randint(-6, 7, (B, 1, 2), generator=torch.Generator().manual_seed(0)) / 2
    queries = grid(7, 7).expand(B, P, 2)
    candidates = queries + moves
    found = both_directions(queries, candidates, 6, "distance", "aten")
    distances = naive_distances(queries, candidates)
    expected = [*naive_matches(distances, 6), *naive_matches(distances.mT, 6)]
    assert [index.tolist() for index in found] == [index.tolist() for index in expected]


@cache
def large_locations():
    queries, candidates = images(grid(1100)[:, [0, 0]] % 25), images(grid(22, 50, start=0.5))
    return queries, candidates, naive_distances(queries, candidates)


@pytest.mark.parametrize("direction", ["there", "back"])
def test_an_image_larger_than_one_tile(direction):
    # 44 queries in each place, so the column minima tie across the cut between rows.
    queries, candidates, distances = large_locations()
    assert matching.TILE_ELEMENTS // candidates.shape[1] < queries.shape[1]  # cut between rows
    back = direction == "back"
    found = both_directions(queries, candidates, 1100, "distance", "aten")[2 * back :][:2]
    expected = naive_matches(distances.mT if back else distances, 1100)
    assert [index.tolist() for index in found] == [index.tolist() for index in expected]


# -- features: agreement where the gap exceeds the bound --------------------------------------------------------


def features(P1, P2, C, *, B=2, seed=0, mean=0.0, dtypes=(torch.float32, torch.float32)):
    """Two maps of standard normal features about ``mean``, given in standard deviations."""
    queries = randn(B, P1, C, seed=seed) + mean
    candidates = randn(B, P2, C, seed=seed + 1) + mean
    return queries.to(dtypes[0]), candidates.to(dtypes[1])


def _cases():
    for P, C in itertools.product((1, 2, 9, 49, 50, 196, 300), (1, 2, 3, 4, 32, 130)):
        yield f"{P}x{C}", lambda P=P, C=C: features(P, P, C, seed=P + C)
    for P1, P2, C in ((1, 50, 32), (50, 1, 32), (9, 196, 4), (196, 9, 130), (49, 50, 2), (3, 7, 5)):
        yield f"{P1}-and-{P2}x{C}", lambda P1=P1, P2=P2, C=C: features(P1, P2, C, seed=P1 + C)
    for mean, P, C in itertools.product((10, 1000), (20, 49), (4, 64)):
        yield f"mean-{mean}-sigma-{P}x{C}", lambda P=P, C=C, mean=mean: features(P, P, C, mean=mean)
    half, bfloat, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for a, b in (
        (half, half),
        (bfloat, bfloat),
        (double, double),
        (half, single),
        (single, double),
        (bfloat, half),
    ):
        name = "-".join(str(dtype)[6:] for dtype in (a, b))
        yield f"{name}-49x32", lambda a=a, b=b: features(49, 50, 32, dtypes=(a, b))
    yield "bfloat16-mean-10-sigma", lambda: features(49, 50, 32, mean=10, dtypes=(bfloat, bfloat))

    def duplicates():
        queries, candidates = features(30, 10, 32)
        return queries, candidates.repeat(1, 3, 1)

    def copies():
        queries, _ = features(49, 1, 32)
        return queries, queries.flip(1)

    yield "every-candidate-three-times", duplicates
    yield "candidates-are-the-queries", copies
    yield "450-images", lambda: features(49, 49, 8, B=450)
    yield "1100-patches", lambda: features(1100, 1100, 8, B=1)


CASES = dict(_cases())


def backends_of(case):
    """Kernels take no float64; many images are more than one tile to ATen alone, to kernels each is a program."""
    return [b for b in BACKENDS if b != "triton" or not ("float64" in case or case == "450-images")]


every_case = pytest.mark.parametrize(
    ("case", "backend"), [(case, backend) for case in CASES for backend in backends_of(case)]
)


@cache
def given(case):
    """Inputs and their float64 distances."""
    queries, candidates = CASES[case]()
    return queries, candidates, naive_distances(queries, candidates)


@cache
def truth(case, backend="aten"):
    """Inputs, their float64 distances and the rounding to allow for."""
    return *given(case), rounding(*given(case), backend)


@cache
def found_by(backend, case):
    queries, candidates, *_ = given(case)
    return functional.match_patches(queries, candidates, backend=backend)


@every_case
def test_candidate_is_the_nearest(case, backend):
    _, _, distances, E = truth(case, backend)
    query, candidate, _ = found_by(backend, case)
    allowed = 2 * E.amax(-1).gather(1, query)
    (best, *second), (index, *_) = (
        t.unbind(-1) for t in distances.topk(min(2, distances.shape[2]), largest=False)
    )
    clear = second[0] - best > 2 * E.amax(-1) if second else torch.ones_like(index, dtype=torch.bool)
    assert (matched(distances, query, candidate) <= best.gather(1, query) + allowed).all()
    assert torch.equal(candidate[clear.gather(1, query)], index.gather(1, query)[clear.gather(1, query)])


@every_case
def test_queries_come_nearest_first(case, backend):
    _, _, distances, E = truth(case, backend)
    query, *_ = found_by(backend, case)
    allowed = 2 * E.amax((1, 2))[:, None]
    best = distances.amin(-1)
    expected, order = best.sort(dim=1)
    gap = torch.full((best.shape[0], best.shape[1] + 1), math.inf, dtype=best.dtype)
    gap[:, 1:-1] = expected.diff(dim=1)
    clear = (gap[:, :-1] > allowed) & (gap[:, 1:] > allowed)
    assert ((best.gather(1, query) - expected).abs() <= allowed).all()
    assert torch.equal(query[clear], order[clear])


@every_case
def test_every_query_is_listed_once(case, backend):
    query, *_ = found_by(backend, case)
    assert torch.equal(query.sort(dim=1).values, torch.arange(query.shape[1]).expand_as(query))


@every_case
def test_distance_is_that_of_the_chosen_rows(case, backend):
    queries, candidates, distances, _ = truth(case)
    query, candidate, distance = found_by(backend, case)
    wide = torch.float64 in (queries.dtype, candidates.dtype)
    assert distance.dtype == (torch.float64 if wide else torch.float32)
    # Differences are rounded to one part in 2^24, a sum of 130 squares to less than 130 of them.
    expected = matched(distances, query, candidate).sqrt()
    assert torch.allclose(distance.double(), expected, rtol=1e-5, atol=0.0)


@every_case
def test_distances_are_sorted(case, backend):
    _, _, _, E = truth(case, backend)
    square = found_by(backend, case).distance.double().square()
    rise = square.diff(dim=1)
    # The last term: what the rounding of the two returned distances may add, as above.
    assert (rise >= -2 * E.amax((1, 2))[:, None] - 4e-5 * square[:, 1:]).all()


@pytest.mark.parametrize("m", [1, 2, 10, 49])
@pytest.mark.parametrize(
    ("case", "backend"), [(case, b) for case in ("49x2", "49x32", "450-images") for b in backends_of(case)]
)
def test_fewer_matches_are_the_first_of_all(case, m, backend):
    queries, candidates, distances, E = truth(case, backend)
    found = functional.match_patches(queries, candidates, m, backend=backend)
    best = distances.amin(-1).sort(dim=1).values[:, : found.query_index.shape[1]]
    assert found.query_index.shape[1] == m
    assert ((distances.amin(-1).gather(1, found.query_index) - best).abs() <= 2 * E.amax((1, 2))[:, None]).all()


@pytest.mark.parametrize("case", ["49x32", "9-and-196x4", "196-and-9x130", "mean-1000-sigma-49x64"])
def test_both_directions_whatever_the_tile(case, tiled):
    queries, candidates, distances = given(case)
    E = rounding(queries, candidates, distances, tiled)
    query, candidate, back_query, back_candidate = both_directions(queries, candidates, 300, "distance", tiled)
    for q, c, d, e in (
        (query, candidate, distances, E),
        (back_query, back_candidate, distances.mT, E.mT),
    ):
        assert torch.equal(q.sort(1).values, torch.arange(d.shape[1]).expand_as(q))
        assert (matched(d, q, c) <= (d.amin(-1) + 2 * e.amax(-1)).gather(1, q)).all()


@every_backend
def test_integer_features_are_exact(backend):
    # Small integers, centre zero: products and sums are exact, and so are the ties, of which there are many.
    half = torch.randint(-2, 3, (3, 20, 6), generator=torch.Generator().manual_seed(0)).float()
    candidates = torch.cat((half, -half), dim=1)
    queries = torch.randint(-2, 3, (3, 50, 6), generator=torch.Generator().manual_seed(1)).float()
    found = functional.match_patches(queries, candidates, backend=backend)
    query, candidate = naive_matches(naive_distances(queries, candidates), None)
    assert found.query_index.tolist() == query.tolist()
    assert found.candidate_index.tolist() == candidate.tolist()


def test_integer_features_are_exact_in_both_directions_whatever_the_tile(tiled):
    half = torch.randint(-1, 2, (3, 20, 4), generator=torch.Generator().manual_seed(0)).float()
    candidates = torch.cat((half, -half), dim=1)
    queries = torch.randint(-1, 2, (3, 50, 4), generator=torch.Generator().manual_seed(1)).float()
    found = both_directions(queries, candidates, 40, "distance", tiled)
    distances = naive_distances(queries, candidates)
    expected = [*naive_matches(distances, 40), *naive_matches(distances.mT, 40)]
    assert [index.tolist() for index in found] == [index.tolist() for index in expected]


# -- rows that are not finite -----------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
# (map, image, patch, channel, value): slices take every one.
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
# 9 patches and 49: torch.cdist, which the reference uses, has another method from 26 on.
some_sizes = pytest.mark.parametrize("size", [(9, 8, 2), (9, 16, 6), (49, 64, 6)], ids=str)


def spoilt(changes, size):
    # Small integers, and as many candidates as a power of two: their mean, and so every sum, is exact.
    P1, P2, C = size
    generator = torch.Generator().manual_seed(3)
    maps = {n: torch.randint(-2, 3, (2, P, C), generator=generator).float() for n, P in (("q", P1), ("c", P2))}
    for name, image, patch, channel, value in changes:
        maps[name][image, patch, channel] = value
    return maps["q"], maps["c"]


@every_backend
@some_sizes
@not_finite
def test_nan_is_never_nearer_than_a_number(changes, size, backend):
    queries, candidates = spoilt(changes, size)
    found = functional.match_patches(queries, candidates, backend=backend)
    query, candidate = naive_matches(naive_distances(queries, candidates), None)
    assert found.query_index.tolist() == query.tolist()
    assert found.candidate_index.tolist() == candidate.tolist()


@some_sizes
@not_finite
def test_nan_is_never_nearer_in_both_directions_whatever_the_tile(changes, size, tiled):
    queries, candidates = spoilt(changes, size)
    found = both_directions(queries, candidates, 100, "distance", tiled)
    distances = naive_distances(queries, candidates)
    expected = [*naive_matches(distances, 100), *naive_matches(distances.mT, 100)]
    assert [index.tolist() for index in found] == [index.tolist() for index in expected]


@every_backend
@some_sizes
@not_finite
def test_distance_shows_what_is_not_finite(changes, size, backend):
    queries, candidates = spoilt(changes, size)
    query, candidate, distance = functional.match_patches(queries, candidates, backend=backend)
    expected = matched(naive_distances(queries, candidates), query, candidate).sqrt()
    # The squares of small integers add up exactly: one unit in the last place of the root.
    assert torch.allclose(distance.double(), expected, rtol=2.0**-23, atol=0.0, equal_nan=True)


# -- layouts ----------------------------------------------------------------------------------------------------

B, P = 3, 12


def _layouts(C, seed):
    return {
        "channels-first": randn(B, C, 3, 4, seed=seed).flatten(2).transpose(1, 2),
        "channels-first-permuted": randn(B, C, P, seed=seed).permute(0, 2, 1),
        "batch-second": randn(P, B, C, seed=seed).transpose(0, 1),
        "every-other-image": randn(2 * B, P, C, seed=seed)[::2],
        "every-other-patch": randn(B, 2 * P, C, seed=seed)[:, 1::2],
        "every-other-channel": randn(B, P, 2 * C, seed=seed)[..., ::2],
        "one-image-expanded": randn(1, P, C, seed=seed).expand(B, P, C),
        "one-patch-expanded": randn(B, 1, C, seed=seed).expand(B, P, C),
        "unaligned": randn(B * P * C + 1, seed=seed)[1:].view(B, P, C),
    }


@every_backend
@pytest.mark.parametrize("C", [2, 64])
@pytest.mark.parametrize("side", ["queries", "candidates", "both"])
@pytest.mark.parametrize("layout", _layouts(1, 0))
def test_layout_does_not_matter(layout, side, C, backend):
    queries = _layouts(C, 5)[layout] if side != "candidates" else randn(B, P, C, seed=5)
    candidates = _layouts(C, 6)[layout] if side != "queries" else randn(B, P, C, seed=6)
    found = functional.match_patches(queries, candidates, backend=backend)
    query, candidate = naive_matches(naive_distances(queries, candidates), None)
    if (
        layout == "one-patch-expanded" and C == 64
    ):  # twelve equal patches: their products may differ by a rounding
        if side != "candidates":
            query = found.query_index
            candidate = candidate[:, :1].expand_as(query)
        if side != "queries":
            candidate = found.candidate_index
    assert found.query_index.tolist() == query.tolist()
    assert found.candidate_index.tolist() == candidate.tolist()


# -- what comes back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (dtype, backend)
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
        for backend in BACKENDS
        if kernels_run(backend, dtype)
    ],
    ids=str,
)
def test_numbers_are_int64_and_distances_float32_at_least(dtype, backend):
    found = functional.match_patches(
        randn(B, P, 5).to(dtype), randn(B, 8, 5, seed=1).to(dtype), backend=backend
    )
    distance = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in found] == [torch.int64, torch.int64, distance]


@every_backend
@pytest.mark.parametrize("C", [2, 5])
def test_matches_have_no_gradient(C, backend):
    queries, candidates = randn(B, P, C).requires_grad_(), randn(B, 8, C, seed=1).requires_grad_()
    found = functional.match_patches(queries, candidates, backend=backend)
    assert [t.requires_grad for t in found] == [False] * 3


@every_backend
@pytest.mark.parametrize("C", [2, 64])
def test_inputs_are_left_alone(C, backend):
    queries, candidates = randn(B, P, C), randn(B, 8, C, seed=1)
    queries[0, 0, 0], candidates[1, 2, 1] = math.nan, math.inf
    before = queries.clone(), candidates.clone()
    functional.match_patches(queries, candidates, backend=backend)
    assert torch.equal(queries.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(candidates, before[1])


@every_backend
@pytest.mark.parametrize("C", [2, 64])
def test_autocast_does_not_change_matches(C, backend):
    queries, candidates = randn(B, 49, C), randn(B, 49, C, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = functional.match_patches(queries, candidates, backend=backend)
    query, candidate = naive_matches(naive_distances(queries, candidates), None)
    assert found.query_index.tolist() == query.tolist()
    assert found.candidate_index.tolist() == candidate.tolist()


# -- the module's use of it -------------------------------------------------------------------------------------

MAPS = {
    "7x7-and-7x7": (grid(7, 7), grid(7, 7, start=0.5)),
    "7x7-and-3x3": (grid(7, 7), grid(3, 3, start=0.5, step=2.0)),
    "3x3-and-14x14": (grid(3, 3, start=0.5, step=3.0), grid(14, 14)),
    "4x4x4-and-4x4x4": (grid(4, 4, 4), grid(4, 4, 4, start=0.5)),
}


def naive_terms(x, y):
    """Unweighted inv, var, cov of one problem (N, D), one feature pair at a time in matrix form."""
    covariances = []
    variances = []
    for z in (x, y):
        c = z - z.mean(0)
        C = c.T @ c / (len(z) - 1)
        off = C - torch.diag(C.diagonal())
        covariances.append((off**2).sum() / z.shape[1])
        variances.append((1 - C.diagonal().sqrt()).clamp(min=0).mean())
    return torch.stack((((x - y) ** 2).mean(), sum(variances) / 2, sum(covariances) / 2))


def naive_local(x1, x2, d, m, statistics, order):
    """Terms of the matches that distances d (B, P1, P2) give, averaged over both directions."""
    directions = []
    for a, b, distances in ((x1, x2, d), (x2, x1, d.mT)):
        rows = []
        for image in range(len(a)):
            pairs = list(zip(*naive_match(distances[image], m), strict=True))
            pairs = sorted(pairs) if order == "patch" else pairs
            rows.append([(a[image, q], b[image, c]) for q, c in pairs])
        problems = rows if statistics == "image" else list(zip(*rows, strict=True))
        terms = [
            naive_terms(torch.stack([q for q, _ in problem]), torch.stack([c for _, c in problem]))
            for problem in problems
        ]
        directions.append(torch.stack(terms).mean(0))
    return (directions[0] + directions[1]) / 2


@pytest.mark.parametrize("backend", ["aten", "reference"])  # in float64
@pytest.mark.parametrize("order", ["distance", "patch"])
@pytest.mark.parametrize("statistics", ["image", "slot"])
@pytest.mark.parametrize("places", MAPS.values(), ids=MAPS.keys())
def test_local_loss_is_that_of_the_naive_matches(places, statistics, order, backend):
    images_, m = 4, 6
    l1, l2 = (place.expand(images_, -1, -1) for place in places)
    x1 = 0.4 * randn(images_, l1.shape[1], 8, seed=1, dtype=torch.float64)
    x2 = 0.4 * randn(images_, l2.shape[1], 8, seed=2, dtype=torch.float64)
    loss = VICRegLLoss(m, 0.0, 25.0, 15.0, 2.0, statistics=statistics, match_order=order, backend=backend)
    losses = loss(x1, x2, None, None, l1, l2)
    weights = torch.tensor([25.0, 15.0, 2.0], dtype=torch.float64)
    for part, distances in (("location", naive_distances(l1, l2)), ("feature", naive_distances(x1, x2))):
        expected = weights * naive_local(x1, x2, distances, m, statistics, order)
        got = torch.stack([losses[f"{part}/{name}-loss"] for name in ("inv", "var", "cov")])
        # Of small sums in float64, hundreds of roundings below.
        assert torch.allclose(got, expected, rtol=EXACT, atol=0.0), part


@pytest.mark.parametrize("m", [1, 4, 9])
@pytest.mark.parametrize("kind", ["ties", "nan", "inf", "float64"])
def test_neirest_neighbores_takes_any_distances(kind, m):
    x, y = randn(2, 9, 5), randn(2, 11, 5, seed=1)
    distances = torch.randint(0, 3, (2, 9, 11), generator=torch.Generator().manual_seed(2)).float()
    if kind in ("nan", "inf"):
        distances[0, :3] = distances[0, :, 0] = distances[1, 4, 1:] = float(kind)
    if kind == "float64":
        distances = randn(2, 9, 11, dtype=torch.float64)
    before = distances.clone()
    got = VICRegLLoss.neirest_neighbores(x, y, distances, m)
    query, candidate = naive_matches(before, m)
    image = torch.arange(2)[:, None]
    assert torch.equal(got[0], x[image, query])
    assert torch.equal(got[1], y[image, candidate])


def test_neirest_neighbores_leaves_distances_alone():
    distances = randn(2, 9, 11)
    distances[0, 0, 0], distances[1, 2] = math.nan, math.inf
    before = distances.clone()
    VICRegLLoss.neirest_neighbores(randn(2, 9, 5), randn(2, 11, 5), distances, 4)
    assert torch.allclose(distances, before, rtol=0.0, atol=0.0, equal_nan=True)


def test_gathered_rows_are_differentiable_and_repeated_candidates_add_up():
    x, y = randn(1, 6, 3).requires_grad_(), randn(1, 4, 3, seed=1).requires_grad_()
    distances = torch.ones(1, 6, 4)
    distances[:, :, 2] = 0.0  # every query's nearest is candidate 2
    q, c = VICRegLLoss.neirest_neighbores(x, y, distances, 4)
    (q.sum() + (2 * c).sum()).backward()
    assert x.grad.tolist() == [[[1.0] * 3] * 4 + [[0.0] * 3] * 2]
    assert y.grad.tolist() == [[[0.0] * 3, [0.0] * 3, [8.0] * 3, [0.0] * 3]]
