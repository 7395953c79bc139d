"""gather_distributed: several processes give what one process with the whole batch gives."""

import pytest
import torch
import torch.distributed as dist

from vicreg_fast import reference

from .data import CLOSE
from .distributed_batch import (
    ALPHA,
    CASES,
    KEYS,
    KINDS,
    UNEQUAL,
    Network,
    call,
    half_views,
    make_loss,
    part,
    true_losses,
    true_terms,
    views,
    whole_batch,
)
from .distributed_ranks import HALVES, both_worlds

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_ddp_averages_to_the_gradient_of_one_process_with_the_whole_batch(rank_results, case):
    network = Network(case.kind)
    a, b, *places = whole_batch(sum(case.counts))
    loss = true_losses(case.kind, network(a, b), places)["loss"]
    truth = torch.autograd.grad(loss, list(network.parameters()))
    assert all(gradient.abs().max() > 1e-3 for gradient in truth[:2])
    for rank in rank_results[case.world](f"step {case}"):
        for gradient, true in zip(rank["gradients"], truth, strict=True):
            # The last bias shifts all embeddings, which changes no variance: its true gradient is rounding noise.
            torch.testing.assert_close(gradient, true, **CLOSE)


@every_case
def test_every_rank_returns_the_losses_of_the_whole_batch(rank_results, case):
    a, b, *places = whole_batch(sum(case.counts))
    truth = {k: v.detach() for k, v in true_losses(case.kind, Network(case.kind)(a, b), places).items()}
    for rank in rank_results[case.world](f"step {case}"):
        torch.testing.assert_close(rank["losses"], truth, **CLOSE)


@every_case
def test_all_ranks_return_the_same_bits(rank_results, case):
    first, *others = rank_results[case.world](f"step {case}")
    for other in others:
        torch.testing.assert_close(other["losses"], first["losses"], rtol=0, atol=0)


@both_worlds
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_coefficients_average_to_the_global_terms(rank_results, world, kind):
    a, b, *places = whole_batch(sum(UNEQUAL[world]))
    with torch.no_grad():
        terms = true_terms(kind, Network(kind)(a, b), places)
    shares = {"global": 1.0} if kind == "vicreg" else {"global": ALPHA}
    shares |= dict.fromkeys(("location", "feature"), (1 - ALPHA) / 2)
    ranks = rank_results[world](f"coefficients {kind}")
    for k in range(3):
        truth = sum(shares[name] * part_terms[k] for name, part_terms in terms.items())
        average = sum(rank["gradients"][k] for rank in ranks) / world
        torch.testing.assert_close(average, truth, **CLOSE)


def true_losses_and_gradients(
    x: torch.Tensor, y: torch.Tensor
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Losses with VICRegLoss's own coefficients, and the gradients of the total, in float64."""
    x, y = x.double().requires_grad_(), y.double().requires_grad_()
    weighted = [w * t for w, t in zip((25.0, 15.0, 1.0), reference.vicreg_terms(x, y), strict=True)]
    losses = dict(zip(KEYS, (*weighted, sum(weighted)), strict=True))
    gradients = list(torch.autograd.grad(losses["loss"], (x, y)))
    return {k: v.detach() for k, v in losses.items()}, gradients


@both_worlds
@pytest.mark.parametrize("name", HALVES)
def test_half_precision_embeddings_are_gathered(rank_results, world, name):
    counts, dtype = UNEQUAL[world], HALVES[name]
    losses, gradients = true_losses_and_gradients(*half_views(sum(counts), dtype))
    for rank, result in enumerate(rank_results[world](name)):
        for key, loss in result["losses"].items():
            assert loss.dtype == torch.float32
            # Computed in float32: some units of 2^-24.
            torch.testing.assert_close(loss.double(), losses[key], rtol=1e-6, atol=1e-7)
        for gradient, truth in zip(result["gradients"], gradients, strict=True):
            assert gradient.dtype == dtype
            # Rounded to the input's type before and after the factor R.
            u = torch.finfo(dtype).eps
            (own,) = part([world * truth], counts, rank)
            torch.testing.assert_close(gradient.double(), own, rtol=u, atol=u / 100)


@both_worlds
def test_strided_embeddings_are_gathered(rank_results, world):
    counts = UNEQUAL[world]
    losses, gradients = true_losses_and_gradients(*views(sum(counts)))
    for rank, result in enumerate(rank_results[world]("strided")):
        torch.testing.assert_close(result["losses"], losses, **CLOSE)
        own = part([world * truth for truth in gradients], counts, rank)
        torch.testing.assert_close(result["gradients"], own, **CLOSE)


def test_a_process_group_gathers_from_its_ranks_only(rank_results):
    losses, gradients = true_losses_and_gradients(*views(5))
    ranks = rank_results[3]("subgroup")
    for rank in (0, 2):
        torch.testing.assert_close(ranks[rank]["losses"]["loss"], losses["loss"], **CLOSE)
        own = part([2 * truth for truth in gradients], (2, 0, 3), rank)
        torch.testing.assert_close(ranks[rank]["gradients"], own, **CLOSE)


# -- one process ------------------------------------------------------------------------------------------------


def assert_single_process(kind: str) -> None:
    network = Network(kind)
    a, b, *places = whole_batch(4)
    losses = call(make_loss(kind, gather_distributed=True), kind, network(a, b), places)
    gradients = torch.autograd.grad(losses["loss"], list(network.parameters()))
    truth = true_losses(kind, network(a, b), places)
    torch.testing.assert_close(losses, truth, **CLOSE)
    true_gradients = torch.autograd.grad(truth["loss"], list(network.parameters()))
    torch.testing.assert_close(gradients, true_gradients, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_process_group_it_is_a_single_process(kind):
    assert not dist.is_initialized()
    assert_single_process(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_one_rank_is_a_single_process(kind):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert_single_process(kind)
    finally:
        dist.destroy_process_group()
