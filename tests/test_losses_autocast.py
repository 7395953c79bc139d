"""Autocast changes neither losses nor gradients."""

import pytest
import torch

from vicreg_fast import VICRegLLoss, VICRegLoss

from .loss_formulas import (
    SameCovariance,
    SameLocalCovariance,
    both_backends,
    float32_loss,
    gradients,
    values,
)

MAKERS = {
    "VICRegLoss": VICRegLoss,
    "VICRegLLoss": VICRegLLoss,
    "VICRegLoss-overridden": SameCovariance,
    "VICRegLLoss-overridden": SameLocalCovariance,
}


@both_backends
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_autocast_does_not_change_the_losses(make, backend):
    loss, arguments = float32_loss(make, backend)
    expected = loss(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = loss(**arguments)
    assert {v.dtype for v in losses.values()} == {torch.float32}
    assert values(losses) == values(expected)


def test_autocast_does_not_change_the_gradients():
    loss, arguments = float32_loss(VICRegLLoss)
    inputs = [arguments[n].requires_grad_() for n in ("x1_maps", "x2_maps", "x1_glob", "x2_glob")]
    expected = gradients(loss(**arguments)["loss"], inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(loss(**arguments)["loss"], inputs)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)
