"""Each returned loss is differentiable by itself and has its own storage."""

import pytest
import torch

from vicreg_fast import VICRegLoss

from .data import CLOSE
from .loss_formulas import KEYS, any_loss, both_backends, both_losses, gradients, true_losses, two_views, values


@both_backends
@pytest.mark.parametrize("key", KEYS)
def test_backward_of_one_loss_leaves_the_gradient_of_only_that(key, backend):
    x, y = two_views(grad=True)
    VICRegLoss(backend=backend)(x, y)[key].backward()
    expected = gradients(true_losses(x, y)[key], (x, y))
    torch.testing.assert_close((x.grad, y.grad), expected, **CLOSE)


@both_backends
def test_backwards_of_all_losses_add_up(backend):
    x, y = two_views(grad=True)
    losses = VICRegLoss(backend=backend)(x, y)
    for key in KEYS[:3]:
        losses[key].backward(retain_graph=True)
    expected = gradients(true_losses(x, y)["loss"], (x, y))
    torch.testing.assert_close((x.grad, y.grad), expected, **CLOSE)


@both_backends
def test_losses_in_any_combination(backend):
    x, y = two_views(grad=True)
    losses, truth = VICRegLoss(backend=backend)(x, y), true_losses(x, y)
    actual, expected = (d["loss"] * 1024 - d["inv-loss"] ** 2 + 3 * d["cov-loss"] for d in (losses, truth))
    torch.testing.assert_close(gradients(actual, (x, y)), gradients(expected, (x, y)), **CLOSE)


@both_backends
@both_losses
def test_every_loss_owns_its_storage(make, backend):
    loss, arguments = any_loss(make, backend)
    losses = loss(**arguments)
    assert len({value.untyped_storage().data_ptr() for value in losses.values()}) == len(losses)


@both_backends
@both_losses
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_loss_divided_in_place_leaves_the_others(make, alpha, backend):
    loss, arguments = any_loss(make, backend)
    loss.alpha = alpha
    losses = loss(**arguments)
    for changed in losses:
        before = values(losses)
        losses[changed] /= 2
        assert values(losses) == before | {changed: before[changed] / 2}


@both_backends
@both_losses
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_backward_of_a_loss_divided_in_place(make, alpha, backend):
    loss, arguments = any_loss(make, backend)
    loss.alpha = alpha
    inputs = [t for t in arguments.values() if t.requires_grad]
    total = loss(**arguments)["loss"]
    expected = [g / 4 for g in gradients(total, inputs)]
    total = loss(**arguments)["loss"]
    total /= 4
    total.backward()
    actual = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_changing_a_loss_in_place_without_grad_mode_leaves_the_backward_right():
    x, y = two_views(grad=True)
    losses = VICRegLoss()(x, y)
    with torch.no_grad():
        losses["inv-loss"].zero_()
    losses["loss"].backward()
    expected = gradients(true_losses(x, y)["loss"], (x, y))
    torch.testing.assert_close((x.grad, y.grad), expected, **CLOSE)
