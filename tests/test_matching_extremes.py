"""VICRegL's local loss of deviations whose squares leave float32's range, on Triton kernels in the interpreter."""

import pytest
import torch

from vicreg_fast import VICRegLLoss

from .data import U
from .parity import KINDS
from .vicregl_parity import maps_of

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("kind", ["highest", "high", "medium"])
@pytest.mark.parametrize("C", [4, 40])  # primal and dual
def test_deviations_whose_squares_are_no_float32(kind: str, C: int) -> None:
    """The gradient of the variance is of size 1 all the same, and zero in channels that are constant."""
    _, precision, _ = KINDS[kind]
    scales = torch.tensor([1e-25, 1.0, 0.0, 1e-21]).repeat(C // 4)
    maps = [(z.detach() * scales).requires_grad_() for z in maps_of(2, (20, 20), C)]
    exact = [z.detach().double().requires_grad_() for z in maps]
    locations = [torch.arange(20.0)[:, None].expand(2, 20, 2)] * 2  # each patch matches itself
    values, gradients = [], []
    for backend, inputs in (("triton", maps), ("reference", exact)):
        loss = VICRegLLoss(20, 0.0, gamma=3.0, backend=backend, precision=precision)
        values += [loss.local_loss(*inputs, *locations)["location/var-loss"]]
        gradients += [torch.autograd.grad(values[-1], inputs)]
    assert abs(values[0] - values[1]) <= 16 * U * values[1].abs()
    for actual, truth in zip(*gradients, strict=True):
        for k in range(4):  # each scale alone
            error = (actual - truth)[..., k::4].norm()
            assert error <= 16 * U * truth[..., k::4].norm(), scales[k]
