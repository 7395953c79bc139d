"""VICReg's Triton kernels in Triton's interpreter: values and gradients against the reference in float64.

bfloat16 inputs are not tested here, because the interpreter computes them wrong; rounding to bfloat16 is, held as float32
("medium").  What the interpreter cannot show (races, minimal sizes of matmuls, tensor cores) is checked by compilation, see
test_resources.py.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vicreg_fast import VICRegLoss, functional, precision, reference
from vicreg_fast.backends.triton import configs
from vicreg_fast.sides import uses_dual

from .conftest import Launches
from .data import HARD, U, both_sides, normal
from .parity import (
    HALF,
    KINDS,
    LAYOUTS,
    SINGLE,
    TF32,
    assert_nan_stays,
    assert_parity,
    assert_same_bits,
    covering_pairs,
    pair,
)

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.usefixtures("interpreted")
# A few roundings of the result, as in data.py: the largest error below is less than 6 units.
ROUNDINGS = 8 * U
dual_and_primal = both_sides(dual=[(20, 90)], primal=[(90, 20)])


def evaluate(x: Tensor, y: Tensor, backend: str, **options: Any) -> list[Tensor]:
    """The three values, then the gradients of their sum."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    values = functional.vicreg_terms(x, y, backend=backend, **options)
    return [*(value.detach() for value in values), *torch.autograd.grad(sum(values), (x, y))]


# -- parity -----------------------------------------------------------------------------------------------------

AXES: dict[str, Sequence[Any]] = {
    # Both sides, several tiles and several splits of their inner dimension; at 70 x 400 some tiles are split.
    "size": [(2, 65), (33, 140), (20, 300), (70, 400), (3, 31), (130, 33), (300, 20), (150, 70)],
    "kind": ["highest", "high", "medium", "float16", "float16-highest"],
    "layout": list(LAYOUTS),
    "problems": [(), (2,), (2, 2)],
    "eps": [0.0, 1e-4],
}


def assert_case(size: tuple[int, int], kind: str, layout: str, problems: tuple[int, ...], eps: float) -> None:
    dtype, requested, unit = KINDS[kind]
    x = 0.7 * LAYOUTS[layout](*problems, *size)
    y = x.detach() + 0.1 * torch.randn(*problems, *size)
    # Gradients go with 1 / (N D), and may be no float16.
    scale = 2.0 ** (math.prod(size).bit_length() - 4)
    assert_parity(x.to(dtype), y.to(dtype), requested, unit, eps, scale)


@pytest.mark.parametrize(
    "case", covering_pairs(AXES), ids=lambda case: "-".join(str(v).replace(" ", "") for v in case.values())
)
def test_as_good_as_eager(case: dict[str, Any]) -> None:
    assert_case(**case)


@pytest.mark.full
@pytest.mark.parametrize("values", list(itertools.product(*AXES.values())), ids=str)
def test_every_combination_is_as_good_as_eager(values: tuple[Any, ...]) -> None:
    assert_case(*values)


@both_sides(
    dual=[(2, 65), (63, 80), (3, 2, 5)], primal=[(2, 1), (2, 64), (31, 3), (300, 1), (65, 65), (3, 5, 2)]
)
def test_few_samples_or_features(shape: tuple[int, ...]) -> None:
    assert_parity(*pair(*shape), "highest", 0.0)


# Gradients of more than one group of tiles; squared row norms of more column blocks than are read at a time.
@both_sides(dual=[(2, 40, 1200)], primal=[(600, 5)])
def test_more_than_one_round(shape: tuple[int, ...]) -> None:
    assert_parity(*pair(*shape), "highest", 0.0)


# Rows of few features in several chunks, the last one shorter, as on a device with more than one SM.
@pytest.mark.parametrize("shape", [(500, 20), (2, 300, 64)], ids=str)
def test_gradient_of_few_features_in_chunks(
    shape: tuple[int, ...], launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "device_of", lambda device: configs.Device("interpreter", 3))
    assert_parity(*pair(*shape), "highest", 0.0)
    chunks = {launch.arguments["chunks"] for launch in launches if launch.name == "narrow_gradient"}
    assert max(chunks) > 1


@both_sides(dual=[(40, 90)], primal=[(150, 40), (150, 100)])
@pytest.mark.parametrize("data", HARD, ids=lambda data: data.__name__)
def test_hard_data(data: Callable[[int, int], Tensor], shape: tuple[int, int]) -> None:
    assert_parity(data(*shape).float(), data(*shape).float(), "highest", 0.0)


@dual_and_primal
def test_a_tf32_matmul_multiplies_rounded_operands(shape: tuple[int, int]) -> None:
    N, D = shape
    z = (normal(N, D) + 3).float().requires_grad_()
    cov = functional.variance_covariance(z, backend="triton", precision="high")[1]
    (grad,) = torch.autograd.grad(cov, z)
    c = z.detach().double() - z.detach().double().mean(0)
    o = precision.round_operand(c.float(), "tf32").double()
    # On the primal side the operand is shifted by a provisional centre before it is rounded: to TF32's unit.
    unit = U if uses_dual(1, N, D) else TF32
    C = o.T @ o / (N - 1)
    C0 = C - C.diagonal().diag()
    assert abs(float(cov.detach()) - float(C0.square().sum()) / D) <= 4 * unit * float(C.square().sum()) / D
    # The backward's other operand, M, is rounded too.
    scale = 4 / (D * (N - 1))
    assert float((grad - scale * o @ C0).norm()) <= TF32 * 2 * scale * float((o @ C).norm())


@pytest.mark.parametrize("requested", [None, "highest"])
@both_sides(dual=[(40, 300)], primal=[(300, 40), (300, 70)])
def test_float16_beyond_its_range(shape: tuple[int, int], requested: str | None) -> None:
    x, y = (200 * z.detach() for z in pair(*shape, dtype=HALF))  # N |cov| is 1e7, float16 ends at 65504
    assert_parity(x, y, requested, 0.0 if requested else TF32)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # of rows that are not stored
@both_sides(dual=[(40, 300)], primal=[(300, 40), (300, 70)])
def test_float16_centred_beyond_its_range(shape: tuple[int, int]) -> None:
    """An outlier's distance from the mean is no float16, but its half is."""
    x, y = (z.detach() for z in pair(*shape, dtype=HALF))
    x[:, 0] = -60000
    x[0, 0] = 60000
    assert (x[0, 0].double() - x[:, 0].double().mean()).abs() > torch.finfo(HALF).max
    assert_parity(x, y, None, TF32, scale=2.0**-8)  # nor are the gradients


@pytest.mark.parametrize("mean", [0.0, 20.0, -150.0])
def test_bfloat16_rows_are_multiplied_unchanged(mean: float) -> None:
    """The mean's share of the product is subtracted afterwards.

    The interpreter loads bfloat16 right, multiplies it as float32, and truncates what it stores, by up to 2^-7.
    """
    x = (0.7 * torch.randn(300, 70) + mean).bfloat16()
    y = (x + 0.3 * torch.randn(300, 70)).bfloat16()
    assert not uses_dual(1, 300, 70)
    truth = evaluate(x.double(), y.double(), "aten")
    for g, t in zip(evaluate(x, y, "triton")[3:], truth[3:], strict=True):
        assert (g - t).norm() <= 2.0**-7 * t.norm()


def test_mixed_types() -> None:
    x, y = normal(20, 90).float().requires_grad_(), normal(20, 90).half().requires_grad_()
    losses = functional.vicreg_terms(x, y, backend="triton", precision="highest")
    truth = reference.vicreg_terms(x.detach().double(), y.detach().double())
    torch.testing.assert_close(torch.stack(losses).double(), torch.stack(truth), rtol=ROUNDINGS, atol=0)
    gradients = torch.autograd.grad(sum(losses), (x, y))
    assert [g.dtype for g in gradients] == [torch.float32, torch.float16]


@pytest.mark.parametrize("which", [0, 1], ids=["x", "y"])
@dual_and_primal
def test_one_input_without_gradient(shape: tuple[int, int], which: int) -> None:
    inputs = [normal(*shape).float(), normal(*shape).float()]
    leaf = inputs[which].requires_grad_()
    losses = VICRegLoss(backend="triton", precision="highest")(*inputs)
    (grad,) = torch.autograd.grad(losses["loss"], leaf)
    exact = [z.detach().double() for z in inputs]
    exact[which].requires_grad_()
    (truth,) = torch.autograd.grad(VICRegLoss(backend="reference")(*exact)["loss"], exact[which])
    assert (grad - truth).norm() <= ROUNDINGS * truth.norm()


@both_sides(dual=[(20, 90), (20, 320)], primal=[(90, 20), (90, 70)])
def test_one_view(shape: tuple[int, int]) -> None:
    z = normal(*shape).float().requires_grad_()
    exact = z.detach().double().requires_grad_()
    actual = functional.variance_covariance(z, backend="triton", precision="highest")
    expected = reference.variance(exact), reference.covariance(exact)
    for f, e in zip(actual, expected, strict=True):
        assert abs(f.double() - e) <= ROUNDINGS * e + 8 * U
        (g,), (t,) = (
            torch.autograd.grad(f, z, retain_graph=True),
            torch.autograd.grad(e, exact, retain_graph=True),
        )
        assert (g - t).norm() <= ROUNDINGS * t.norm()


@pytest.mark.parametrize("N", [3, 33, 200])
def test_constant_columns_have_no_gradient_from_the_variance(N: int) -> None:
    for D in (7, 300):
        z = (0.1 + torch.arange(D) / 3).expand(N, D).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(functional.variance_covariance(z, backend="triton")[0], z)
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@both_sides(dual=[(20, 90), (20, 320)], primal=[(90, 20), (90, 70)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_shows_what_is_not_finite(shape: tuple[int, int], value: float) -> None:
    x, y = normal(*shape).float(), normal(*shape).float()
    y[-1, -1] = value
    losses = functional.vicreg_terms(x, y, backend="triton")
    assert not any(loss.isfinite() for loss in losses)


@pytest.mark.parametrize("kind", ["highest", "high", "medium", "float16"])
@both_sides(dual=[(20, 90)], primal=[(90, 20), (90, 70)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_of_any_bits_stays_nan(shape: tuple[int, int], kind: str) -> None:
    assert_nan_stays(shape, kind)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@dual_and_primal
def test_an_infinite_upstream_gradient_leaves_inactive_columns_alone(shape: tuple[int, int]) -> None:
    """Where the hinge is zero its gradient is zero, whatever it is multiplied with."""
    x, y = (torch.randn(shape) * torch.tensor([3.0, 0.3]).repeat(shape[1] // 2) for _ in range(2))
    grads = {}
    for backend in ("triton", "reference"):
        z = x.clone().requires_grad_()
        (functional.vicreg_terms(z, y, backend=backend).var * float("inf")).backward()
        grads[backend] = z.grad
    assert torch.equal(grads["triton"].isfinite(), grads["reference"].isfinite())
    assert grads["triton"][:, ::2].eq(0).all()


@both_sides(dual=[(3, 90)], primal=[(3, 2), (7, 8)])
def test_few_samples_very_near_to_each_other(shape: tuple[int, int]) -> None:
    """Their distances have squares that are no float32; the gradient of the variance is of size 1 all the same."""
    z = (1e-21 * normal(*shape)).float().requires_grad_()
    exact = z.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(functional.variance_covariance(z, backend="triton")[0], z)
    (truth,) = torch.autograd.grad(reference.variance(exact), exact)
    assert (grad - truth).norm() <= ROUNDINGS * truth.norm()


# -- launches, determinism, composition -----------------------------------------------------------------------------------------------


@both_sides(dual=[(20, 320)], primal=[(300, 20), (150, 100)])
def test_two_runs_agree_bit_for_bit(shape: tuple[int, int]) -> None:
    x, y = normal(*shape).float(), normal(*shape).float()
    assert_same_bits(evaluate(x, y, "triton"), evaluate(x, y, "triton"))


@both_sides(dual=[(2, 20, 30)], primal=[(2, 30, 20), (2, 90, 70)])
def test_a_problem_does_not_depend_on_the_others(shape: tuple[int, int, int]) -> None:
    x, y = torch.randn(shape), torch.randn(shape)
    other = torch.cat([x[:1], 1e3 * torch.randn(shape)[1:]])
    grads, changed = (evaluate(z, y, "triton")[3] for z in (x, other))
    assert torch.equal(grads[0], changed[0])
    assert not torch.equal(grads[1], changed[1])


FORWARD = {
    "dual, full tiles": ((20, 90), ["moments_forward", "gram_forward"]),
    "dual, split tiles": ((20, 1000), ["moments_forward", "gram_forward", "splitk_reduction"]),
    "primal, few features": ((90, 20), ["narrow_second_moment_forward", "splitk_reduction"]),
    "primal": ((150, 100), ["second_moment_forward", "splitk_reduction"]),
}


@pytest.mark.parametrize("case", FORWARD)
def test_launches(case: str, launches: Launches) -> None:
    shape, forward = FORWARD[case]
    x, y = normal(*shape).float().requires_grad_(), normal(*shape).float().requires_grad_()
    losses = VICRegLoss(backend="triton")(x, y)
    assert [launch.name for launch in launches] == forward
    assert len({value.data_ptr() for value in losses.values()}) == 4
    losses["loss"].backward()
    backward = "narrow_gradient" if "few features" in case else "gradient"
    assert [launch.name for launch in launches[len(forward) :]] == [backward]


def test_some_tiles_are_split(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "device_of", lambda device: configs.Device("interpreter", 2))
    assert_parity(*pair(70, 400), "highest", 0.0)
    assert [launch.name for launch in launches[:3]] == ["moments_forward", "gram_forward", "splitk_reduction"]
    gram = launches[1].arguments
    assert 0 < gram["full_tiles"] < 2 * gram["tiles"]
    assert gram["splits"] > 1


@both_sides(dual=[(20, 90), (20, 320)], primal=[(90, 20), (90, 70)])
def test_without_gradients_no_matrix_is_written(shape: tuple[int, int], launches: Launches) -> None:
    x, y = normal(*shape).float(), normal(*shape).float()
    kept = functional.vicreg_terms(x.clone().requires_grad_(), y, backend="triton")
    before = len(launches)
    terms = functional.vicreg_terms(x, y, backend="triton")
    assert_same_bits(list(terms), [value.detach() for value in kept])
    side = min(shape) if uses_dual(1, *shape) else shape[1]
    matrices = [[t for t in launch.tensors if t.shape[1:] == (2, side, side)] for launch in launches]
    assert any(matrices[:before])
    assert not any(matrices[before:])
    stores = [launch.arguments["M_ptr"] is not None for launch in launches if "M_ptr" in launch.arguments]
    assert stores == [True] * (len(stores) // 2) + [False] * (len(stores) // 2)
    assert before == len(launches) / 2


def test_fma_fusion_is_off(launches: Launches) -> None:
    for shape in ((20, 320), (90, 20), (90, 70)):
        x, y = normal(*shape).float().requires_grad_(), normal(*shape).float()
        VICRegLoss(backend="triton")(x, y)["loss"].backward()
    assert [launch.arguments["enable_fp_fusion"] for launch in launches] == [False] * len(launches)


def test_second_derivatives() -> None:
    x, y = normal(12, 80).float().requires_grad_(), normal(12, 80).float()

    def second(backend: str, x: Tensor) -> Tensor:
        loss = VICRegLoss(backend=backend)(x, y.to(x.dtype))["loss"]
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    truth = second("reference", x.detach().double().requires_grad_())
    assert (second("triton", x) - truth).norm() <= ROUNDINGS * truth.norm()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@dual_and_primal
def test_compiles_into_one_graph(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, y = pair(*shape, dtype=dtype)
    loss = VICRegLoss(backend="triton")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x, y)["loss"], x)
    (expected,) = torch.autograd.grad(loss(x, y)["loss"], x)
    # The same kernels; terms are weighted after them, not in them.
    assert (grad.double() - expected.double()).norm() <= (
        8 * U if dtype == SINGLE else TF32
    ) * expected.double().norm()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(VICRegLoss(backend="triton"), fullgraph=True, backend="aot_eager")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu: it needs a CUDA or ROCm device"):
        compiled(torch.randn(8, 4), torch.randn(8, 4))


def test_the_variance_alone_is_left_to_aten(launches: Launches) -> None:
    z = torch.randn(8, 4)
    variance, _ = functional.one_view_terms(z, functional.Options(backend="triton"), covariance=False)
    assert not launches
    assert abs(variance - reference.variance(z.double())) <= 8 * U


def test_refuses_float64() -> None:
    z = normal(8, 4)
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu: it has no float64"):
        VICRegLoss(backend="triton")(z, z)


def test_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    z = torch.randn(8, 4)
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu: it needs a CUDA or ROCm device"):
        VICRegLoss(backend="triton")(z, z)
