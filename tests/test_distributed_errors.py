"""gather_distributed: every rank raises where one rank's input is bad, and second derivatives are refused."""

import re

import pytest
import torch

from vicreg_fast import reference

from .data import CLOSE
from .distributed_batch import COEFFICIENTS, EPS, GAMMA, M, arguments_of_one_rank, true_losses
from .distributed_ranks import (
    BAD_ON_ONE_RANK,
    COLLECTIVE_SECONDS,
    DIFFERENT_BETWEEN_RANKS,
    FAULTS,
    both_worlds,
)


@both_worlds
@pytest.mark.parametrize("name", BAD_ON_ONE_RANK)
def test_bad_input_on_one_rank_raises_on_every_rank(rank_results, world, name):
    *others, bad = rank_results[world](name)
    assert bad["error"].startswith(BAD_ON_ONE_RANK[name].error)
    for other in others:
        assert other["error"].startswith(f"RuntimeError: rank {world - 1} was given bad input")


@both_worlds
@pytest.mark.parametrize("name", DIFFERENT_BETWEEN_RANKS)
def test_shapes_and_types_that_differ_between_ranks_raise_on_every_rank(rank_results, world, name):
    errors = {rank["error"] for rank in rank_results[world](name)}
    assert len(errors) == 1
    (error,) = errors
    assert error.startswith(DIFFERENT_BETWEEN_RANKS[name].error)
    assert f"on rank {world - 1}" in error


@both_worlds
@pytest.mark.parametrize("name", FAULTS)
def test_no_rank_waits_for_the_one_with_bad_input(rank_results, world, name):
    assert max(rank["waited"] for rank in rank_results[world](name)) < COLLECTIVE_SECONDS / 2


@both_worlds
@pytest.mark.parametrize("name", FAULTS)
def test_the_step_after_bad_input_works(rank_results, world, name):
    kind = FAULTS[name].kind
    good = {n: torch.cat([t] * world) for n, t in arguments_of_one_rank(kind).items()}
    if kind == "vicreg":
        truth = true_losses("vicreg", (None, None, *good.values()), ())["loss"]
    else:
        *outputs, x1_locations, x2_locations = good.values()
        truth = true_losses(kind, outputs, (x1_locations, x2_locations))["loss"]
    for rank in rank_results[world](name):
        torch.testing.assert_close(rank["next"], truth, **CLOSE)


@both_worlds
def test_one_sample_in_the_global_batch_raises_on_every_rank(rank_results, world):
    for rank in rank_results[world]("too few"):
        assert rank["error"] == "ValueError: x needs at least 2 samples to have a variance, got 1"


# -- second derivatives -----------------------------------------------------------------------------------------

every_way = pytest.mark.parametrize("way", ["backward", "grad", "grad_of_both"])


@both_worlds
@every_way
@pytest.mark.parametrize("name", ["vicreg", "slot", "global"])
def test_second_derivatives_through_the_gather_raise(rank_results, world, name, way):
    for rank in rank_results[world](f"second {name}"):
        assert isinstance(rank[way], str), f"a gradient instead of an error: {rank[way]}"
        assert re.search("twice|second derivative", rank[way]), rank[way]


@both_worlds
@every_way
def test_second_derivatives_of_per_image_statistics_raise_or_are_right(rank_results, world, way):
    """Per-image statistics are not gathered: the gradient is R n_r / N = 1 times that of this rank's own loss."""
    inputs = arguments_of_one_rank("image")
    maps = inputs["x1_maps"].requires_grad_()
    places = inputs["x1_locations"], inputs["x2_locations"]
    local = reference.local_terms(maps, inputs["x2_maps"], *places, M, GAMMA, EPS)
    loss = sum(w * t for terms in local for w, t in zip(COEFFICIENTS, terms, strict=True)) / 2
    (first,) = torch.autograd.grad(loss, maps, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), maps)
    for rank in rank_results[world]("second image"):
        if isinstance(rank[way], str):
            assert re.search("twice|second derivative", rank[way]), rank[way]
        else:
            torch.testing.assert_close(rank[way], second, **CLOSE)
