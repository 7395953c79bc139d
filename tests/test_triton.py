"""The Triton kernels in Triton's interpreter: values and gradients against the reference in float64.

bfloat16 is left out by name: the interpreter computes it wrong.  What the interpreter cannot show (races, minimal
sizes of products, tensor cores) the compilation matrix looks at, see test_resources.py.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vicreg_fast import VICRegLLoss, VICRegLoss, functional, precision, reference
from vicreg_fast.rows import uses_dual

from .data import HARD, U, normal

pytest.importorskip("triton")
from triton.runtime import interpreter

TERMS = ("inv", "var", "cov")
# Both sides, several tiles and several chunks of their inner dimension; not every shape with every option: a launch
# takes a third of a second.
SHAPES = [
    (2, 1),
    (2, 65),
    (3, 31),
    (31, 3),
    (32, 32),
    (33, 257),
    (257, 33),
    (65, 70),
    (600, 20),
    (20, 600),
    (70, 130),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are made for the interpreter, or not, when they are first imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    importlib.import_module("vicreg_fast.kernels.gram")
    return


def terms(x: Tensor, y: Tensor, backend: str, **options: Any) -> tuple[Tensor, list[list[Tensor]]]:
    """Values (3,), and per term the gradients of x and y, in float64."""
    x, y = x.clone(memory_format=torch.preserve_format).requires_grad_(), y.clone().requires_grad_()
    values = functional.vicreg_terms(x, y, backend=backend, **options)
    gradients = []
    for value in values:
        found = torch.autograd.grad(value, (x, y), retain_graph=True, materialize_grads=True, allow_unused=True)
        gradients.append([g.double() for g in found])
    return torch.stack(values).detach().double(), gradients


def assert_as_good_as_eager(x: Tensor, y: Tensor, eps: float = 0.0) -> None:
    """error(fast) <= 2 * error(eager) + floor, in float32 against float64: the rule of tests/test_terms.py."""
    x, y = x.float(), y.float()
    N, D = x.shape[-2:]
    truth, truth_grads = terms(x.double(), y.double(), "reference", eps=eps)
    eager, eager_grads = terms(x, y, "reference", eps=eps)
    fast, fast_grads = terms(x, y, "triton", eps=eps, precision="highest")
    c = [z.double() - z.double().mean(-2, keepdim=True) for z in (x, y)]
    v = [a.square().sum(-2) / (N - 1) for a in c]
    norm = sum(float((a.mT @ a / (N - 1)).square().sum((-2, -1)).mean()) for a in c) / 2 / D
    diagonal = sum(float(w.square().sum(-1).mean()) for w in v) / 2 / D
    dual = uses_dual(math.prod(x.shape[:-2]), N, D)
    floors = {
        "inv": 8 * U * float(truth[0]),
        "var": 8 * U,
        "cov": 8 * U * float(truth[2]) + (4 * U * norm if dual else 8 * U**2 * N * D * diagonal),
    }
    for k, name in enumerate(TERMS):
        assert abs(fast[k] - truth[k]) <= 2 * abs(eager[k] - truth[k]) + floors[name] + 1e-44, name
        for g, e, t, a, w in zip(fast_grads[k], eager_grads[k], truth_grads[k], c, v, strict=True):
            floor = 8 * U * t.norm()
            if name == "cov":
                floor = floor + 8 * U * (4 / (D * (N - 1))) * (a * w.unsqueeze(-2)).norm()
            # 1.2e-38 is the smallest normal number: below it gradients underflow.
            assert (g - t).norm() <= 2 * (e - t).norm() + floor + 1.2e-38 * g.numel() ** 0.5, name


@pytest.mark.parametrize(("N", "D"), SHAPES, ids=str)
def test_as_good_as_eager(N: int, D: int) -> None:
    x = normal(N, D)
    assert_as_good_as_eager(x, x + 0.1 * normal(N, D), eps=1e-4 if N % 2 else 0.0)


@pytest.mark.parametrize(("N", "D"), [(40, 90), (150, 40)], ids=["dual", "primal"])
@pytest.mark.parametrize("data", HARD, ids=lambda data: data.__name__)
def test_hard_data(data: Callable[[int, int], Tensor], N: int, D: int) -> None:
    assert_as_good_as_eager(data(N, D), data(N, D))


@pytest.mark.parametrize("shape", [(3, 9, 12), (2, 2, 12, 9)], ids=str)
def test_leading_dimensions_are_problems(shape: tuple[int, ...]) -> None:
    x = 0.7 * torch.randn(shape, dtype=torch.float64)
    assert_as_good_as_eager(x, x + 0.1 * torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(("N", "D"), [(20, 90), (90, 20)], ids=["dual", "primal"])
def test_any_strides(N: int, D: int) -> None:
    x = normal(D, N).float().t()
    y = normal(2 * N, 3 * D).float()[::2, ::3]
    found = terms(x, y, "triton", precision="highest")
    expected = terms(x.double(), y.double(), "reference")
    # float32 sums of at most 90 terms, measured: 3 U.
    torch.testing.assert_close(found, expected, rtol=32 * U, atol=32 * U)


@pytest.mark.parametrize(("N", "D"), [(40, 90), (90, 40)], ids=["dual", "primal"])
def test_a_tf32_product_is_that_of_rounded_operands(N: int, D: int) -> None:
    z = (normal(N, D) + 3).float().requires_grad_()
    cov = functional.variance_covariance(z, backend="triton", precision="high")[1]
    (found,) = torch.autograd.grad(cov, z)
    c = z.detach().double() - z.detach().double().mean(0)
    o = precision.round_operand(c.float(), "tf32").double()
    # On the primal side the operand is shifted by a provisional centre before it is rounded: to TF32's unit.
    unit = U if uses_dual(1, N, D) else 2.0**-11
    C = o.T @ o / (N - 1)
    C0 = C - C.diagonal().diag()
    assert abs(float(cov.detach()) - float(C0.square().sum()) / D) <= 4 * unit * float(C.square().sum()) / D
    # The backward's other operand, M, is rounded too.
    scale = 4 / (D * (N - 1))
    assert float((found - scale * o @ C0).norm()) <= 2.0**-11 * 2 * scale * float((o @ C).norm())


@pytest.mark.parametrize(("N", "D"), [(40, 300), (300, 40)], ids=["dual", "primal"])
def test_float16_beyond_its_range(N: int, D: int) -> None:
    x, y = (200 * normal(N, D)).half(), (200 * normal(N, D)).half()  # N |cov| is 1e7, float16 ends at 65504
    assert uses_dual(1, N, D) == (N < D)
    found, gradients = terms(x, y, "triton", precision="highest")
    truth, truth_grads = terms(x.double(), y.double(), "reference")
    torch.testing.assert_close(found, truth, rtol=32 * U, atol=0)
    half = 2.0**-11  # the gradient's own rounding
    for g, t in zip(gradients[2], truth_grads[2], strict=True):
        assert (g - t).norm() <= 1.01 * half * t.norm()


def test_mixed_types() -> None:
    x, y = normal(20, 90).float().requires_grad_(), normal(20, 90).half().requires_grad_()
    losses = functional.vicreg_terms(x, y, backend="triton", precision="highest")
    truth = reference.vicreg_terms(x.detach().double(), y.detach().double())
    torch.testing.assert_close(torch.stack(losses).double(), torch.stack(truth), rtol=32 * U, atol=0)
    gradients = torch.autograd.grad(sum(losses), (x, y))
    assert [g.dtype for g in gradients] == [torch.float32, torch.float16]


@pytest.mark.parametrize("which", [0, 1], ids=["x", "y"])
@pytest.mark.parametrize(("N", "D"), [(20, 90), (90, 20)], ids=["dual", "primal"])
def test_one_input_without_gradient(N: int, D: int, which: int) -> None:
    inputs = [normal(N, D).float(), normal(N, D).float()]
    leaf = inputs[which].requires_grad_()
    losses = VICRegLoss(backend="triton", precision="highest")(*inputs)
    (found,) = torch.autograd.grad(losses["loss"], leaf)
    exact = [z.detach().double() for z in inputs]
    exact[which].requires_grad_()
    (truth,) = torch.autograd.grad(VICRegLoss(backend="reference")(*exact)["loss"], exact[which])
    assert (found - truth).norm() <= 16 * U * truth.norm()


def test_one_view() -> None:
    for shape in ((20, 90), (90, 20)):
        z = normal(*shape)
        found = functional.variance_covariance(z.float(), backend="triton", precision="highest")
        expected = reference.variance(z.float().double()), reference.covariance(z.float().double())
        torch.testing.assert_close(torch.stack(found).double(), torch.stack(expected), rtol=32 * U, atol=8 * U)


@pytest.mark.parametrize("N", [3, 33, 200])
def test_constant_columns_have_no_gradient_from_the_variance(N: int) -> None:
    for D in (7, 300):
        z = (0.1 + torch.arange(D) / 3).expand(N, D).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(functional.variance_covariance(z, backend="triton")[0], z)
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("N", "D"), [(20, 90), (90, 20)], ids=["dual", "primal"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_shows_what_is_not_finite(N: int, D: int, value: float) -> None:
    x, y = normal(N, D).float(), normal(N, D).float()
    y[-1, -1] = value
    losses = functional.vicreg_terms(x, y, backend="triton")
    assert not any(loss.isfinite() for loss in losses)


@pytest.mark.parametrize(("N", "D"), [(20, 600), (600, 20)], ids=["dual", "primal"])
def test_two_runs_agree_bit_for_bit(N: int, D: int) -> None:
    x, y = normal(N, D).float(), normal(N, D).float()
    torch.testing.assert_close(terms(x, y, "triton"), terms(x, y, "triton"), rtol=0, atol=0)


def test_a_problem_does_not_depend_on_the_others() -> None:
    x = torch.randn(2, 20, 30)
    x.requires_grad_()
    y = torch.randn(2, 20, 30)
    (both,) = torch.autograd.grad(sum(functional.vicreg_terms(x, y, backend="triton")), x)
    other = torch.cat([x.detach()[:1], 1e3 * torch.randn(1, 20, 30)]).requires_grad_()
    (changed,) = torch.autograd.grad(sum(functional.vicreg_terms(other, y, backend="triton")), other)
    assert torch.equal(both[0], changed[0])


@pytest.mark.parametrize(("N", "D", "forward"), [(20, 90, 3), (90, 20, 2)], ids=["dual", "primal"])
def test_launches(N: int, D: int, forward: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    run = interpreter.InterpretedFunction.run
    monkeypatch.setattr(
        interpreter.InterpretedFunction,
        "run",
        lambda self, *args, **kwargs: launched.append(self.fn.__name__) or run(self, *args, **kwargs),
    )
    x, y = normal(N, D).float().requires_grad_(), normal(N, D).float().requires_grad_()
    loss = VICRegLoss(backend="triton")(x, y)["loss"]
    assert len(launched) == forward
    loss.backward()
    assert launched[forward:] == ["_gradient_kernel"]


def test_second_derivatives() -> None:
    x, y = normal(12, 80).float().requires_grad_(), normal(12, 80).float()

    def second(backend: str, x: Tensor) -> Tensor:
        loss = VICRegLoss(backend=backend)(x, y.to(x.dtype))["loss"]
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    truth = second("reference", x.detach().double().requires_grad_())
    assert (second("triton", x) - truth).norm() <= 32 * U * truth.norm()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph() -> None:
    x, y = normal(12, 80).float().requires_grad_(), normal(12, 80).float()
    compiled = torch.compile(VICRegLoss(backend="triton"), fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x, y)["loss"], x)
    exact = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(VICRegLoss(backend="reference")(exact, y.double())["loss"], exact)
    assert (found - truth).norm() <= 16 * U * truth.norm()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(VICRegLoss(backend="triton"), fullgraph=True, backend="aot_eager")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu: it needs a CUDA or ROCm device"):
        compiled(torch.randn(8, 4), torch.randn(8, 4))


def test_refuses_float64() -> None:
    z = normal(8, 4)
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu: it has no float64"):
        VICRegLoss(backend="triton")(z, z)


def test_refuses_patches() -> None:
    maps, places = torch.randn(2, 9, 5), torch.rand(2, 9, 2)
    with pytest.raises(
        ValueError, match="backend='triton' cannot run on cpu: it has no kernels for patches yet"
    ):
        VICRegLLoss(3, alpha=0.0, backend="triton")(maps, maps, None, None, places, places)


def test_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    z = torch.randn(8, 4)
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu: it needs a CUDA or ROCm device"):
        VICRegLoss(backend="triton")(z, z)
