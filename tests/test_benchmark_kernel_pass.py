"""A shape's step without autograd in between computes what the losses do."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cases
from vicreg_fast import functional
from vicreg_fast.functional import Options

from .interpreted import import_interpreted

kernel_pass: Any = import_interpreted("benchmarks.kernel_pass")
pytestmark = pytest.mark.usefixtures("interpreted")
CPU = torch.device("cpu")
TINY = {
    "vicreg": cases.vicreg("highest", 8, 16),
    "image": cases.local("highest", 2, (5, 4), 8, (3, 2)),
    "slot": cases.local("highest", 3, (5, 4), 8, (3, 2), statistics="slot", match_order="patch"),
}


def terms_of(case: cases.Case, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The unweighted terms, by the functions behind the losses, on ATen."""
    if case.suite == "vicreg":
        return list(functional.vicreg_terms(*inputs, backend="aten", precision="highest"))
    x, y, *locations = inputs
    shape, options = case.shape, Options(1.0, 0.0, "aten", "highest")
    location, feature, _ = functional.local_terms(
        (x, y), (locations[0], locations[1]), tuple(shape["m"]), (1.0, 1.0, 1.0),
        shape["statistics"], shape["match_order"], options,
    )  # fmt: skip
    return [*location[:3], *feature[:3]]


@pytest.mark.parametrize("name", TINY)
def test_a_step_is_that_of_the_losses(name: str) -> None:
    case = TINY[name]
    inputs = case.inputs(0, CPU)
    made = kernel_pass.make(case, [z.detach() for z in inputs])
    expected = terms_of(case, inputs)
    losses, gradients = made[:-2], made[-2:]
    actual = [losses[4 * (k // 3) + k % 3] for k in range(len(expected))]
    torch.testing.assert_close(actual, [term.detach() for term in expected])
    torch.testing.assert_close(gradients, list(torch.autograd.grad(sum(expected), inputs[:2])))


def test_a_step_of_matching_is_that_of_match_patches() -> None:
    case = cases.matching("highest", 2, (5, 4), 8, 3)
    inputs = case.inputs(0, CPU)
    (squares,) = kernel_pass.make(case, inputs)
    torch.testing.assert_close(squares, functional.match_patches(*inputs, 3, backend="aten").distance.square())
