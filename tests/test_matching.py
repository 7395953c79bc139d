"""Patch matching of features against naive loops in float64, and both directions with tiles of any size.

The ordering value of a match has a rounding error of at most E, derived here; u is 2^-24 in float32, 2^-53 in float64.

- Up to three coordinates, D = sum_a (q_a - c_a)^2 from the differences: one rounding of the difference counts
  twice in its square, the square is rounded once and the sum at most C - 1 times: E = (C + 2) u D.  On integer and
  half-integer grids nothing is rounded and ties are exact, so the tests require exact agreement.
- Longer rows, D = |q - s|^2 + |c - s|^2 - 2 (q - s).(c - s) with s the candidates' mean.  In units of
  (|q - s| + |c - s|)^2 u: sums of C products, each rounded at most C times, of total magnitude
  |q - s|^2 + |c - s|^2 + 2 |q - s| |c - s|: C.  Rounding of q - s and c - s: 2.  The last two additions: 2.
  Together E = (C + 4) u (|q - s| + |c - s|)^2, times 1.01 because s is rounded too.
  Kernels take the mean of each tile of candidates for s, and 0 for 16-bit features, which they multiply as they are.

The nearest candidate by rounded distances is at most 2 E farther than the true nearest, and equals it if the second
nearest is more than 2 E farther.  The same holds, with the largest E of the image, for the k-th nearest query.
"""

import itertools
import math
from functools import cache

import pytest
import torch

from vicreg_fast import functional
from vicreg_fast.backends.aten import nearest_patches

from .data import seeded_randn
from .naive_matching import (
    BACKENDS,
    GRIDS,
    TRITON,
    assert_both_directions,
    assert_matches,
    both_directions,
    corrupted,
    every_backend,
    grids,
    ignore_invalid_values,
    matched,
    naive_distances,
    naive_match,
    not_finite,
    some_sizes,
)

pytestmark = ignore_invalid_values


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
        from vicreg_fast.backends.triton import configs, launch_matching

        key = launch_matching.key([queries, candidates], configs.INTERPRETER)
        native = key.kind == "half"
        tiles = c.split(configs.choose(key).largest_tile, dim=1)
    parts = []
    for tile in tiles:
        s = 0.0 if native else tile.mean(1, keepdim=True)
        parts.append((q - s).norm(dim=-1)[:, :, None] + (tile - s).norm(dim=-1)[:, None, :])
    return 1.01 * (C + 4) * u * torch.cat(parts, dim=2) ** 2


# -- tiles of any size --------------------------------------------------------------------------------------------

# ATen, in elements.  1: a tile is one row of one image; 400: eight rows of 49, or several smaller images; 1 << 19: every
# image here is one tile.  Triton, in patches.  16: most images have several tiles; 64: most have one.
TILES = [("aten", 1), ("aten", 400), ("aten", 1 << 19), *([("triton", 16), ("triton", 64)] if TRITON else [])]


@pytest.fixture(params=TILES, ids=lambda tile: "-".join(map(str, tile)))
def tiled(request, monkeypatch):
    """A backend whose tiles have a given size."""
    backend, tile = request.param
    if backend == "aten":
        monkeypatch.setattr(nearest_patches, "TILE_ELEMENTS", tile)
    else:
        request.getfixturevalue("interpreted")
        from vicreg_fast.backends.triton import configs, launch_matching

        monkeypatch.setattr(launch_matching, "choose", lambda key: configs.Matching(tile, 16))
    return backend


@grids
def test_grid_ties_go_to_the_lowest_in_both_directions_whatever_the_tile(queries, candidates, tiled):
    actual = both_directions(queries, candidates, 5, "distance", tiled)
    assert_both_directions(actual, queries, candidates, 5)


@pytest.mark.parametrize("name", ["7x7-moved-by-half", "7x7-among-3x3", "4x4x4-moved-by-half"])
def test_patch_order_lists_the_same_matches_by_index(name, tiled):
    queries, candidates = GRIDS[name]
    actual = both_directions(queries, candidates, 5, "patch", tiled)
    distances = naive_distances(queries, candidates)
    expected = []
    for d in (distances, distances.mT):
        pairs = sorted(zip(*naive_match(d[0], 5), strict=True))
        expected += [[[q for q, _ in pairs]], [[c for _, c in pairs]]]
    assert [index.tolist() for index in actual] == expected


def test_integer_features_are_exact_in_both_directions_whatever_the_tile(tiled):
    half = torch.randint(-1, 2, (3, 20, 4), generator=torch.Generator().manual_seed(0)).float()
    candidates = torch.cat((half, -half), dim=1)
    queries = torch.randint(-1, 2, (3, 50, 4), generator=torch.Generator().manual_seed(1)).float()
    actual = both_directions(queries, candidates, 40, "distance", tiled)
    assert_both_directions(actual, queries, candidates, 40)


@some_sizes
@not_finite
def test_nan_is_never_nearer_in_both_directions_whatever_the_tile(changes, size, tiled):
    queries, candidates = corrupted(changes, size)
    actual = both_directions(queries, candidates, 100, "distance", tiled)
    assert_both_directions(actual, queries, candidates, 100)


# -- features: agreement where the gap exceeds the bound --------------------------------------------------------


def features(P1, P2, C, *, B=2, seed=0, mean=0.0, dtypes=(torch.float32, torch.float32)):
    """Two maps of normal features with this mean and standard deviation 1."""
    queries = seeded_randn(B, P1, C, seed=seed) + mean
    candidates = seeded_randn(B, P2, C, seed=seed + 1) + mean
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
    """Kernels take no float64.  For ATen many images are more than one tile; for kernels each image is a program anyway."""
    return [b for b in BACKENDS if b != "triton" or not ("float64" in case or case == "450-images")]


every_case = pytest.mark.parametrize(
    ("case", "backend"),
    [(case, backend) for case in CASES for backend in backends_of(case)],
    indirect=["backend"],
)


@cache
def inputs_of(case):
    """Inputs and their float64 distances."""
    queries, candidates = CASES[case]()
    return queries, candidates, naive_distances(queries, candidates)


@cache
def truth(case, backend="aten"):
    """Inputs, their float64 distances and the bound E on the rounding error."""
    return *inputs_of(case), rounding(*inputs_of(case), backend)


@cache
def matches_of(backend, case):
    queries, candidates, *_ = inputs_of(case)
    return functional.match_patches(queries, candidates, backend=backend)


@every_case
def test_candidate_is_the_nearest(case, backend):
    _, _, distances, E = truth(case, backend)
    query, candidate, _ = matches_of(backend, case)
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
    query, *_ = matches_of(backend, case)
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
    query, *_ = matches_of(backend, case)
    assert torch.equal(query.sort(dim=1).values, torch.arange(query.shape[1]).expand_as(query))


@every_case
def test_distance_is_that_of_the_chosen_rows(case, backend):
    queries, candidates, distances, _ = truth(case)
    query, candidate, distance = matches_of(backend, case)
    wide = torch.float64 in (queries.dtype, candidates.dtype)
    assert distance.dtype == (torch.float64 if wide else torch.float32)
    # Differences are rounded to one part in 2^24; a sum of 130 squares adds less than 130 such roundings.
    expected = matched(distances, query, candidate).sqrt()
    assert torch.allclose(distance.double(), expected, rtol=1e-5, atol=0.0)


@every_case
def test_distances_are_sorted(case, backend):
    _, _, _, E = truth(case, backend)
    square = matches_of(backend, case).distance.double().square()
    rise = square.diff(dim=1)
    # The last term allows for the rounding of the two returned distances, as above.
    assert (rise >= -2 * E.amax((1, 2))[:, None] - 4e-5 * square[:, 1:]).all()


@pytest.mark.parametrize("m", [1, 2, 10, 49])
@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, b) for case in ("49x2", "49x32", "450-images") for b in backends_of(case)],
    indirect=["backend"],
)
def test_fewer_matches_are_the_first_of_all(case, m, backend):
    queries, candidates, distances, E = truth(case, backend)
    query, *_ = functional.match_patches(queries, candidates, m, backend=backend)
    best = distances.amin(-1).sort(dim=1).values[:, : query.shape[1]]
    assert query.shape[1] == m
    assert ((distances.amin(-1).gather(1, query) - best).abs() <= 2 * E.amax((1, 2))[:, None]).all()


@pytest.mark.parametrize("case", ["49x32", "9-and-196x4", "196-and-9x130", "mean-1000-sigma-49x64"])
def test_both_directions_whatever_the_tile(case, tiled):
    queries, candidates, distances = inputs_of(case)
    E = rounding(queries, candidates, distances, tiled)
    index = both_directions(queries, candidates, 300, "distance", tiled)
    for q, c, d, e in ((*index[:2], distances, E), (*index[2:], distances.mT, E.mT)):
        assert torch.equal(q.sort(1).values, torch.arange(d.shape[1]).expand_as(q))
        assert (matched(d, q, c) <= (d.amin(-1) + 2 * e.amax(-1)).gather(1, q)).all()


@every_backend
def test_integer_features_are_exact(backend):
    # Small integers, centre zero: products and sums are exact, and so are the many ties.
    half = torch.randint(-2, 3, (3, 20, 6), generator=torch.Generator().manual_seed(0)).float()
    candidates = torch.cat((half, -half), dim=1)
    queries = torch.randint(-2, 3, (3, 50, 6), generator=torch.Generator().manual_seed(1)).float()
    assert_matches(functional.match_patches(queries, candidates, backend=backend), queries, candidates)
