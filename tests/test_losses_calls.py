"""Calls without grad mode, repeated calls, and what a call leaves behind."""

import pytest
import torch

from vicreg_fast import VICRegLLoss, VICRegLoss

from .loss_formulas import any_loss, both_backends, both_losses, float32_loss, gradients, values


@both_backends
@both_losses
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_grad_mode(mode, make, backend):
    loss, arguments = any_loss(make, backend)
    expected = values(loss(**arguments))
    with mode():
        losses = loss(**arguments)
    assert values(losses) == expected
    assert not any(value.requires_grad for value in losses.values())


@both_losses
def test_inputs_without_grad_give_losses_without_grad(make):
    loss, arguments = any_loss(make)
    losses = loss(**{name: t.detach() for name, t in arguments.items()})
    assert not any(value.requires_grad for value in losses.values())


@both_backends
@both_losses
def test_backward_twice(make, backend):
    loss, arguments = any_loss(make, backend)
    inputs = [t for t in arguments.values() if t.requires_grad]
    total = loss(**arguments)["loss"]
    once = gradients(total, inputs, retain_graph=True)
    twice = gradients(total, inputs)
    torch.testing.assert_close(twice, once, rtol=0.0, atol=0.0)


@both_losses
def test_a_call_leaves_nothing_behind(make):
    loss, arguments = any_loss(make)
    expected = values(loss(**arguments))
    loss(**{name: t.detach() * 2 for name, t in arguments.items()})["loss"]
    assert values(loss(**arguments)) == expected


@both_losses
def test_two_calls_are_two_graphs(make):
    loss, arguments = any_loss(make)
    inputs = [t for t in arguments.values() if t.requires_grad]
    first, second = loss(**arguments)["loss"], loss(**arguments)["loss"]
    once = gradients(first, inputs)
    both = [g + h for g, h in zip(once, gradients(second, inputs), strict=True)]
    torch.testing.assert_close(both, [2 * g for g in once], rtol=0.0, atol=0.0)


@both_losses
def test_inputs_are_left_alone(make):
    loss, arguments = any_loss(make)
    before = {name: t.detach().clone() for name, t in arguments.items()}
    loss(**arguments)["loss"].backward()
    assert all(torch.equal(t, before[name]) for name, t in arguments.items())


@pytest.mark.parametrize("make", [VICRegLoss, VICRegLLoss], ids=["VICRegLoss", "VICRegLLoss"])
def test_two_runs_agree_bit_for_bit(make):
    runs = []
    for _ in range(2):
        loss, arguments = float32_loss(make)
        inputs = [t.clone().requires_grad_() for n, t in arguments.items() if "locations" not in n]
        arguments |= dict(zip([n for n in arguments if "locations" not in n], inputs, strict=True))
        losses = loss(**arguments)
        runs.append([*(v.detach() for v in losses.values()), *gradients(losses["loss"], inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
