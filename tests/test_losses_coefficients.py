"""Coefficients are read at every call, and may be tensors and trainable parameters."""

import pytest
import torch
from torch import nn

from vicreg_fast import VICRegLLoss, VICRegLoss

from .data import CLOSE
from .loss_formulas import (
    KEYS,
    NAMES,
    PARTS,
    M,
    both_backends,
    gradients,
    keys_of,
    local_arguments,
    true_local_losses,
    true_losses,
    true_terms,
    two_views,
    values,
)


def test_vicreg_reads_coefficients_at_every_call():
    x, y = two_views()
    loss = VICRegLoss()
    loss(x, y)
    loss.inv_coeff, loss.var_coeff, loss.cov_coeff, loss.gamma, loss.eps = 2.0, 3.0, -4.0, 0.7, 1e-3
    expected = true_losses(x, y, (2.0, 3.0, -4.0), 0.7, 1e-3)
    assert values(loss(x, y)) == pytest.approx(values(expected), rel=1e-10)


def test_vicregl_reads_coefficients_of_its_local_part_at_every_call():
    arguments = local_arguments()
    loss = VICRegLLoss(M, 0.0)
    loss(**arguments)
    loss.inv_coeff, loss.var_coeff, loss.cov_coeff, loss.gamma = 2.0, 3.0, -4.0, 0.7
    expected = true_local_losses(**arguments, alpha=0.0, coefficients=(2.0, 3.0, -4.0), gamma=0.7)
    assert values(loss(**arguments)) == pytest.approx(values(expected), rel=1e-10)


def test_vicregl_global_coefficients_are_those_of_its_global_part():
    arguments = local_arguments()
    loss = VICRegLLoss(M, 1.0)
    loss.inv_coeff = 100.0  # of the local part
    loss.global_vicreg_loss.cov_coeff = 7.0
    expected = true_local_losses(**arguments, alpha=1.0, coefficients=(25.0, 15.0, 7.0))
    assert values(loss(**arguments)) == pytest.approx(values(expected), rel=1e-10)


def test_vicregl_reads_alpha_and_num_matches_at_every_call():
    arguments = local_arguments()
    loss = VICRegLLoss(M)
    loss(**arguments)
    loss.alpha, loss.num_matches = 0.25, 6
    expected = true_local_losses(**arguments, alpha=0.25, m=6)
    assert values(loss(**arguments)) == pytest.approx(values(expected), rel=1e-10)


TENSORS = {
    "float64": lambda w: torch.tensor(w, dtype=torch.float64),
    "float32": lambda w: torch.tensor(w),
    "one-element": lambda w: torch.tensor([w]),
    "parameter": lambda w: nn.Parameter(torch.tensor(w)),
    "parameter-one-element": lambda w: nn.Parameter(torch.tensor([w])),
}
tensor_kinds = pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS.keys())


def tensor_coefficients(tensor):
    return {f"{n}_coeff": tensor(w) for n, w in zip(NAMES, (2.0, 3.0, 0.5), strict=True)}


@both_backends
@tensor_kinds
def test_tensor_coefficients_give_the_same_values(tensor, backend):
    x, y = two_views()
    losses = VICRegLoss(backend=backend, **tensor_coefficients(tensor))(x, y)
    expected = true_losses(x, y, (2.0, 3.0, 0.5))
    assert values(losses) == pytest.approx(values(expected), rel=1e-10)


@both_backends
@tensor_kinds
def test_tensor_coefficients_leave_shape_and_type(tensor, backend):
    losses = VICRegLoss(backend=backend, **tensor_coefficients(tensor))(*two_views(dtype=torch.float32))
    assert {k: (tuple(v.shape), v.dtype) for k, v in losses.items()} == dict.fromkeys(KEYS, ((), torch.float32))


@both_backends
@tensor_kinds
def test_tensor_coefficients_leave_shape_and_type_of_local_losses(tensor, backend):
    loss = VICRegLLoss(M, 0.5, backend=backend, **tensor_coefficients(tensor))
    losses = loss(**local_arguments(torch.float32))
    expected = dict.fromkeys(keys_of(*PARTS), ((), torch.float32))
    assert {k: (tuple(v.shape), v.dtype) for k, v in losses.items()} == expected


@both_backends
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one-element"])
@pytest.mark.parametrize("key", KEYS)
def test_gradient_of_a_trainable_coefficient_is_the_unweighted_term(key, shape, backend):
    x, y = two_views()
    weights = [nn.Parameter(torch.full(shape, w, dtype=torch.float64)) for w in (2.0, 3.0, 0.5)]
    losses = VICRegLoss(*weights, backend=backend)(x, y)
    expected = [
        t.expand(shape) if key in ("loss", f"{n}-loss") else torch.zeros(shape, dtype=torch.float64)
        for n, t in zip(NAMES, true_terms(x, y), strict=True)
    ]
    torch.testing.assert_close(list(gradients(losses[key].sum(), weights)), expected, **CLOSE)


@both_backends
def test_gradient_of_a_trainable_coefficient_of_the_local_part(backend):
    arguments = local_arguments()
    weights = [nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in (2.0, 3.0, 0.5)]
    losses = VICRegLLoss(M, 0.25, *weights, backend=backend)(**arguments)
    coefficients = [w.detach().clone().requires_grad_() for w in weights]
    expected = true_local_losses(**arguments, alpha=0.25, coefficients=coefficients)["loss"]
    actual = gradients(losses["loss"], weights)
    torch.testing.assert_close(actual, gradients(expected, coefficients), **CLOSE)


def test_inputs_and_coefficients_train_together():
    views = two_views(grad=True)
    weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    loss = VICRegLoss(cov_coeff=weight)(*views)["loss"]
    other = weight.detach().clone().requires_grad_()
    expected = true_losses(*views, (25.0, 15.0, other))["loss"]
    torch.testing.assert_close(gradients(loss, (*views, weight)), gradients(expected, (*views, other)), **CLOSE)


def test_trainable_coefficients_are_parameters():
    loss = VICRegLoss(cov_coeff=nn.Parameter(torch.tensor(1.0)))
    assert [name for name, _ in loss.named_parameters()] == ["cov_coeff"]
