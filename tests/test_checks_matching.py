"""Bad arguments of match_patches and of neirest_neighbores are refused by name."""

import pytest
import torch

from vicreg_fast import VICRegLLoss, functional

from .check_arguments import BAD, B, C, P, of_type
from .data import seeded_randn

MATCH_ERRORS = {
    "queries-list": ({"queries": [1.0]}, r"queries needs a tensor of shape \(B, P, C\), got list"),
    "candidates-none": ({"candidates": None}, r"candidates needs a tensor of shape \(B, P, C\), got NoneType"),
    "queries-2d": ({"queries": seeded_randn(P, C)}, r"queries needs shape \(B, P, C\), got \(6, 5\)"),
    "candidates-4d": (
        {"candidates": seeded_randn(B, C, 2, 3)},
        r"candidates needs shape .*, got \(3, 5, 2, 3\)",
    ),
    "other-images": (
        {"candidates": seeded_randn(1, P, C)},
        r"candidates needs the images.*queries.*, got .*\(1, 6, 5\)",
    ),
    "other-channels": (
        {"candidates": seeded_randn(B, P, 2)},
        r"candidates needs .*channels.*queries.*, got .*\(3, 6, 2\)",
    ),
    "no-candidate": (
        {"candidates": seeded_randn(B, 0, C)},
        r"candidates needs at least 1 .*, got shape \(3, 0, 5\)",
    ),
    "no-query": ({"queries": seeded_randn(B, 0, C)}, r"queries needs at least 1 .*, got shape \(3, 0, 5\)"),
    "candidates-meta": (
        {"candidates": torch.empty(B, P, C, device="meta")},
        "candidates needs the device of queries, cpu, got meta",
    ),
    "queries-complex": (
        {"queries": of_type(torch.complex64, B, P, C)},
        "queries needs dtype .*integer type, got complex64",
    ),
    "candidates-bool": ({"candidates": of_type(torch.bool, B, P, C)}, "candidates needs dtype .*, got bool"),
    "too-many": ({"num_matches": P + 1}, r"num_matches=7 needs .*queries, got shape \(3, 6, 5\)"),
    "num_matches-zero": ({"num_matches": 0}, "num_matches needs to be at least 1, got 0"),
    "num_matches-fraction": ({"num_matches": 2.5}, "num_matches needs a whole number, got float 2.5"),
    "num_matches-bool": ({"num_matches": True}, "num_matches needs a whole number, got bool True"),
    "num_matches-string": ({"num_matches": "3"}, "num_matches needs a whole number, got str '3'"),
    "backend-unknown": ({"backend": "cuda"}, "backend needs one of .*, got 'cuda'"),
}


@pytest.mark.parametrize(("changed", "message"), MATCH_ERRORS.values(), ids=MATCH_ERRORS.keys())
def test_match_patches_refuses_argument(changed, message):
    arguments = {"queries": seeded_randn(B, P, C), "candidates": seeded_randn(B, P, C)} | changed
    with pytest.raises(BAD, match=message):
        functional.match_patches(**arguments)


NEAREST_ERRORS = {
    "input_maps-list": ({"input_maps": [1.0]}, r"input_maps needs a tensor of shape .*, got list"),
    "candidate_maps-2d": (
        {"candidate_maps": seeded_randn(P, C)},
        r"candidate_maps needs shape .*, got \(6, 5\)",
    ),
    "candidate_maps-other": (
        {"candidate_maps": seeded_randn(B, P, 2)},
        r"candidate_maps needs .*input_maps.*, got .*\(3, 6, 2\)",
    ),
    "input_maps-int64": ({"input_maps": of_type(torch.int64, B, P, C)}, "input_maps needs dtype .*, got int64"),
    "distances-none": ({"distances": None}, r"distances needs a tensor of shape .*, got NoneType"),
    "distances-2d": ({"distances": seeded_randn(P, P)}, r"distances needs shape .*, got \(6, 6\)"),
    "distances-other": (
        {"distances": seeded_randn(B, P, 5)},
        r"distances needs shape \(3, 6, 6\), got \(3, 6, 5\)",
    ),
    "distances-int64": ({"distances": of_type(torch.int64, B, P, P)}, "distances needs dtype .*, got int64"),
    "distances-meta": (
        {"distances": torch.empty(B, P, P, device="meta")},
        "distances needs the device of input_maps, cpu, got meta",
    ),
    "num_matches-too-many": ({"num_matches": 7}, r"num_matches=7 needs .*input_maps, got shape \(3, 6, 5\)"),
    "num_matches-zero": ({"num_matches": 0}, "num_matches needs to be at least 1, got 0"),
    "num_matches-none": ({"num_matches": None}, "num_matches needs a whole number, got NoneType None"),
}


@pytest.mark.parametrize(("changed", "message"), NEAREST_ERRORS.values(), ids=NEAREST_ERRORS.keys())
def test_neirest_neighbores_refuses_argument(changed, message):
    arguments = {
        "input_maps": seeded_randn(B, P, C),
        "candidate_maps": seeded_randn(B, P, C),
        "distances": seeded_randn(B, P, P),
        "num_matches": 3,
    } | changed
    with pytest.raises(BAD, match=message):
        VICRegLLoss.neirest_neighbores(**arguments)
