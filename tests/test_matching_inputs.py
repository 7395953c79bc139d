"""match_patches: inputs of any layout, and the type, gradient and independence of its results."""

import math

import pytest
import torch

from vicreg_fast import functional

from .data import seeded_randn
from .naive_matching import (
    BACKENDS,
    assert_matches,
    every_backend,
    ignore_invalid_values,
    kernels_run,
    naive_distances,
    naive_matches,
)

pytestmark = ignore_invalid_values
B, P = 3, 12


def layouts(C, seed):
    return {
        "channels-first": seeded_randn(B, C, 3, 4, seed=seed).flatten(2).transpose(1, 2),
        "channels-first-permuted": seeded_randn(B, C, P, seed=seed).permute(0, 2, 1),
        "batch-second": seeded_randn(P, B, C, seed=seed).transpose(0, 1),
        "every-other-image": seeded_randn(2 * B, P, C, seed=seed)[::2],
        "every-other-patch": seeded_randn(B, 2 * P, C, seed=seed)[:, 1::2],
        "every-other-channel": seeded_randn(B, P, 2 * C, seed=seed)[..., ::2],
        "one-image-expanded": seeded_randn(1, P, C, seed=seed).expand(B, P, C),
        "one-patch-expanded": seeded_randn(B, 1, C, seed=seed).expand(B, P, C),
        "unaligned": seeded_randn(B * P * C + 1, seed=seed)[1:].view(B, P, C),
    }


@every_backend
@pytest.mark.parametrize("C", [2, 64])
@pytest.mark.parametrize("side", ["queries", "candidates", "both"])
@pytest.mark.parametrize("layout", layouts(1, 0))
def test_layout_does_not_matter(layout, side, C, backend):
    queries = layouts(C, 5)[layout] if side != "candidates" else seeded_randn(B, P, C, seed=5)
    candidates = layouts(C, 6)[layout] if side != "queries" else seeded_randn(B, P, C, seed=6)
    actual = functional.match_patches(queries, candidates, backend=backend)
    query, candidate = naive_matches(naive_distances(queries, candidates), None)
    if layout == "one-patch-expanded" and C == 64:
        # Twelve equal patches, whose products may differ by a rounding: any order of them is right.
        if side != "candidates":
            query = actual.query_index
            candidate = candidate[:, :1].expand_as(query)
        if side != "queries":
            candidate = actual.candidate_index
    assert actual.query_index.tolist() == query.tolist()
    assert actual.candidate_index.tolist() == candidate.tolist()


# -- results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (dtype, backend)
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
        for backend in BACKENDS
        if kernels_run(backend, dtype)
    ],
    indirect=["backend"],
    ids=str,
)
def test_indices_are_int64_and_distances_float32_at_least(dtype, backend):
    matches = functional.match_patches(
        seeded_randn(B, P, 5).to(dtype), seeded_randn(B, 8, 5, seed=1).to(dtype), backend=backend
    )
    distance = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in matches] == [torch.int64, torch.int64, distance]


@every_backend
@pytest.mark.parametrize("C", [2, 5])
def test_matches_have_no_gradient(C, backend):
    queries, candidates = seeded_randn(B, P, C).requires_grad_(), seeded_randn(B, 8, C, seed=1).requires_grad_()
    matches = functional.match_patches(queries, candidates, backend=backend)
    assert [t.requires_grad for t in matches] == [False] * 3


@every_backend
@pytest.mark.parametrize("C", [2, 64])
def test_inputs_are_left_alone(C, backend):
    queries, candidates = seeded_randn(B, P, C), seeded_randn(B, 8, C, seed=1)
    queries[0, 0, 0], candidates[1, 2, 1] = math.nan, math.inf
    before = queries.clone(), candidates.clone()
    functional.match_patches(queries, candidates, backend=backend)
    assert torch.equal(queries.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(candidates, before[1])


@every_backend
@pytest.mark.parametrize("C", [2, 64])
def test_autocast_does_not_change_matches(C, backend):
    queries, candidates = seeded_randn(B, 49, C), seeded_randn(B, 49, C, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = functional.match_patches(queries, candidates, backend=backend)
    assert_matches(actual, queries, candidates)
