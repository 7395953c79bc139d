"""Matching of rows that are not finite: NaN is farther than every distance, infinity than every finite one."""

import torch

from vicreg_fast import functional

from .naive_matching import (
    assert_matches,
    corrupted,
    every_backend,
    ignore_invalid_values,
    matched,
    naive_distances,
    not_finite,
    some_sizes,
)

pytestmark = ignore_invalid_values


@every_backend
@some_sizes
@not_finite
def test_nan_is_never_nearer_than_another_distance(changes, size, backend):
    queries, candidates = corrupted(changes, size)
    assert_matches(functional.match_patches(queries, candidates, backend=backend), queries, candidates)


@every_backend
@some_sizes
@not_finite
def test_distance_of_rows_that_are_not_finite(changes, size, backend):
    queries, candidates = corrupted(changes, size)
    query, candidate, distance = functional.match_patches(queries, candidates, backend=backend)
    expected = matched(naive_distances(queries, candidates), query, candidate).sqrt()
    # Squares of small integers add up exactly; the root is rounded by one unit in the last place.
    assert torch.allclose(distance.double(), expected, rtol=2.0**-23, atol=0.0, equal_nan=True)
