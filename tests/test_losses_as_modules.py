"""The losses as nn.Modules: representation, copies, conversions, state, checkpointing."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from vicreg_fast import VICRegLLoss, VICRegLoss

from .loss_formulas import M, both_backends, both_losses, gradients, local_arguments, two_views, values

CONFIGURED = {
    "VICRegLoss": lambda: VICRegLoss(2.0, 3, -0.5, 0.9, eps=1e-4, backend="aten", precision="high"),
    "VICRegLLoss": lambda: VICRegLLoss(
        4, 0.25, 2.0, 3, -0.5, 0.9, eps=1e-4, statistics="slot", match_order="patch", backend="reference"
    ),
}
configured = pytest.mark.parametrize("make", CONFIGURED.values(), ids=CONFIGURED.keys())


def arguments_of(loss):
    if isinstance(loss, VICRegLoss):
        return dict(zip("xy", two_views(), strict=True))
    return local_arguments()


@configured
def test_extra_repr_gives_the_constructor_arguments(make):
    loss = make()
    again = type(loss)(**eval(f"dict({loss.extra_repr()})"))
    assert values(again(**arguments_of(loss))) == values(loss(**arguments_of(loss)))


@configured
def test_repr_names_class_and_arguments(make):
    loss = make()
    assert repr(loss).startswith(type(loss).__name__ + "(")
    assert loss.extra_repr() in repr(loss)


@both_losses
def test_repr_of_tensor_coefficients(make):
    assert "cov_coeff=" in repr(make(cov_coeff=nn.Parameter(torch.tensor(1.5))))


ROUND_TRIPS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "to-float64": lambda loss: loss.to(torch.float64),
    "to-cpu": lambda loss: loss.to("cpu"),
    "cpu": lambda loss: loss.cpu(),
    "double": lambda loss: loss.double(),
    "train": lambda loss: loss.train(),
    "eval": lambda loss: loss.eval(),
    "requires_grad_": lambda loss: loss.requires_grad_(False),
}


@configured
@pytest.mark.parametrize("convert", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_losses_survive(convert, make):
    loss = make()
    expected = values(loss(**arguments_of(loss)))
    converted = convert(loss)
    assert type(converted) is type(loss)
    assert values(converted(**arguments_of(loss))) == expected


@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
@both_losses
def test_trainable_coefficients_survive(make, name):
    loss = make(cov_coeff=nn.Parameter(torch.tensor(1.5)))
    converted = ROUND_TRIPS[name](loss)
    assert converted.cov_coeff.item() == 1.5
    assert converted.cov_coeff is not loss.cov_coeff


@configured
def test_a_deep_copy_is_another_module(make):
    loss = make()
    converted = copy.deepcopy(loss)
    converted.inv_coeff = 100.0
    assert loss.inv_coeff == 2.0


@both_losses
def test_a_deep_copy_keeps_its_process_group(make, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        loss = make(process_group=dist.group.WORLD)
        teacher = copy.deepcopy(nn.Sequential(loss))[0]
        assert teacher is not loss
        assert teacher.process_group is dist.group.WORLD
    finally:
        dist.destroy_process_group()


@both_losses
@both_backends
def test_gradient_through_a_checkpoint(make, backend):
    arguments = (
        local_arguments(grad=True)
        if make is VICRegLLoss
        else dict(zip("xy", two_views(grad=True), strict=True))
    )
    inputs = [z for z in arguments.values() if z.requires_grad]
    loss = make(M, backend=backend) if make is VICRegLLoss else make(backend=backend)
    saved = checkpoint(lambda: loss(**arguments)["loss"], use_reentrant=False)
    expected = gradients(loss(**arguments)["loss"], inputs)
    torch.testing.assert_close(gradients(saved, inputs), expected, rtol=0, atol=0)


@both_losses
def test_state_dict_is_empty(make):
    assert make().state_dict() == {}


@both_losses
def test_no_parameters_and_no_buffers(make):
    assert [*make().parameters(), *make().buffers()] == []


@both_losses
def test_loads_an_empty_state_dict(make):
    assert make().load_state_dict({}).missing_keys == []
