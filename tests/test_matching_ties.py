"""Matching of locations: ties of regular grids are exact and go to the lowest index, in images of any number and size."""

from functools import cache

import pytest
import torch

from vicreg_fast import functional
from vicreg_fast.backends.aten import nearest_patches

from .naive_matching import (
    GRIDS,
    assert_both_directions,
    assert_matches,
    both_directions,
    every_backend,
    grid,
    grids,
    images,
    naive_distances,
    naive_matches,
)


@every_backend
@pytest.mark.parametrize("m", [1, 5, None], ids=["one", "five", "all"])
@grids
def test_grid_ties_go_to_the_lowest(queries, candidates, m, backend):
    m = None if m is None else min(m, queries.shape[1])
    actual = functional.match_patches(queries, candidates, m, backend=backend)
    assert_matches(actual, queries, candidates, m)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_grid_ties_in_other_types(dtype, backend):
    queries, candidates = (place.to(dtype) for place in GRIDS["7x7-moved-by-half"])  # exact in all of them
    actual = functional.match_patches(queries, candidates, backend=backend)
    assert_matches(actual, queries, candidates)


@every_backend
@pytest.mark.parametrize("sizes", [(7, 7), (14, 14), (4, 4, 4)], ids=["7x7", "14x14", "4x4x4"])
@pytest.mark.parametrize("scale", [1 / 7, 1 / 224, 0.1], ids=["sevenths", "pixels", "tenths"])
def test_inexact_grids_are_compared_axis_by_axis_in_float32(scale, sizes, backend):
    # Which of two nearly equal distances is smaller depends on each rounding: of the differences, of the sum over axes in
    # order, and of the square before it, which a fused multiply-add would not round.
    queries = images(grid(*sizes) * scale)
    candidates = images(grid(*sizes, start=0.5) * scale)
    actual = functional.match_patches(queries, candidates, backend=backend)
    query, candidate = naive_matches(naive_distances(queries, candidates, torch.float32), None)
    assert actual.query_index.tolist() == query.tolist()
    assert actual.candidate_index.tolist() == candidate.tolist()


# -- batches and images too large for one tile -------------------------------------------------------------------


def test_more_images_than_one_tile_holds():
    B, P = 450, 49
    assert nearest_patches.TILE_ELEMENTS // (P * P) < B / 2  # three groups of images at least
    moves = torch.randint(-6, 7, (B, 1, 2), generator=torch.Generator().manual_seed(0)) / 2
    queries = grid(7, 7).expand(B, P, 2)
    candidates = queries + moves
    actual = both_directions(queries, candidates, 6, "distance", "aten")
    assert_both_directions(actual, queries, candidates, 6)


@cache
def large_locations():
    """44 queries in each place, so that minima over queries tie across the cut between tiles."""
    queries, candidates = images(grid(1100)[:, [0, 0]] % 25), images(grid(22, 50, start=0.5))
    return queries, candidates, naive_distances(queries, candidates)


@pytest.mark.parametrize("direction", ["x_to_y", "y_to_x"])
def test_an_image_larger_than_one_tile(direction):
    queries, candidates, distances = large_locations()
    assert nearest_patches.TILE_ELEMENTS // candidates.shape[1] < queries.shape[1]  # tiles have fewer queries
    index = both_directions(queries, candidates, 1100, "distance", "aten")
    actual, distances = (index[:2], distances) if direction == "x_to_y" else (index[2:], distances.mT)
    expected = naive_matches(distances, 1100)
    assert [side.tolist() for side in actual] == [side.tolist() for side in expected]
