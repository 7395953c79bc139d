"""Types of losses and gradients, for inputs of every type and pair of types."""

import pytest
import torch

from vicreg_fast import VICRegLLoss, VICRegLoss

from .loss_formulas import (
    KEYS,
    PARTS,
    M,
    SameCovariance,
    SameLocalCovariance,
    both_backends,
    gradients,
    keys_of,
    local_arguments,
    randn,
    true_losses,
    values,
)

TYPES = {
    "float16": (torch.float16, torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.float32),
    "float32": (torch.float32, torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64, torch.float64),
    "float16-float32": (torch.float16, torch.float32, torch.float32),
    "bfloat16-float16": (torch.bfloat16, torch.float16, torch.float32),
    "float32-float64": (torch.float32, torch.float64, torch.float64),
    "float64-float16": (torch.float64, torch.float16, torch.float64),
}
types = pytest.mark.parametrize(("first", "second", "of_loss"), TYPES.values(), ids=TYPES.keys())


def typed_views(first, second):
    return randn(12, 5, seed=1, dtype=first, grad=True), randn(12, 5, seed=2, dtype=second, grad=True)


def typed_local(first, second):
    arguments = local_arguments()
    for name, dtype in (("x1_maps", first), ("x2_maps", second), ("x1_glob", first), ("x2_glob", second)):
        arguments[name] = arguments[name].to(dtype).requires_grad_()
    return arguments


@both_backends
@pytest.mark.parametrize("make", [VICRegLoss, SameCovariance], ids=["plain", "overridden"])
@types
def test_vicreg_type_of_losses(first, second, of_loss, make, backend):
    losses = make(backend=backend)(*typed_views(first, second))
    assert {k: v.dtype for k, v in losses.items()} == dict.fromkeys(KEYS, of_loss)


@both_backends
@pytest.mark.parametrize("make", [VICRegLLoss, SameLocalCovariance], ids=["plain", "overridden"])
@types
def test_vicregl_type_of_losses(first, second, of_loss, make, backend):
    losses = make(M, 0.5, backend=backend)(**typed_local(first, second))
    assert {k: v.dtype for k, v in losses.items()} == dict.fromkeys(keys_of(*PARTS), of_loss)


@types
def test_type_of_static_losses(first, second, of_loss):
    x, y = typed_views(first, second)
    assert VICRegLoss.representation_loss(x, y).dtype == of_loss
    for z in (x, y):
        own = torch.float64 if z.dtype == torch.float64 else torch.float32
        assert [VICRegLoss.variance_loss(z, 1.0).dtype, VICRegLoss.covariance_loss(z).dtype] == [own, own]


@both_backends
@types
def test_vicreg_values_in_other_types(first, second, of_loss, backend):
    x, y = typed_views(first, second)
    expected = true_losses(x.detach().double(), y.detach().double())  # of the rounded inputs
    losses = VICRegLoss(backend=backend)(x, y)
    # Sums of at most 60 float32 products: a few units of 2^-24 each.
    assert values(losses) == pytest.approx(values(expected), rel=1e-5)


@both_backends
@types
def test_vicreg_gradients_come_in_the_inputs_type(first, second, of_loss, backend):
    x, y = typed_views(first, second)
    VICRegLoss(backend=backend)(x, y)["loss"].backward()
    wide = [z.detach().double().requires_grad_() for z in (x, y)]
    expected = gradients(true_losses(*wide)["loss"], wide)
    for z, e in zip((x, y), expected, strict=True):
        assert z.grad.dtype == z.dtype
        # Sums are in float32; each element is rounded once to the input's type, which has a smallest positive value.
        info = torch.finfo(z.dtype)
        torch.testing.assert_close(z.grad.double(), e, rtol=max(info.eps, 1e-5), atol=max(info.tiny, 1e-5))


@both_backends
@types
def test_vicregl_gradients_come_in_the_inputs_type(first, second, of_loss, backend):
    arguments = typed_local(first, second)
    VICRegLLoss(M, 0.5, backend=backend)(**arguments)["loss"].backward()
    actual = {n: t.grad.dtype for n, t in arguments.items() if t.requires_grad}
    assert actual == {n: t.dtype for n, t in arguments.items() if t.requires_grad}
