"""The three terms, values and gradients, against the reference in float64."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vicreg_fast import functional, reference
from vicreg_fast.backends.aten import blocks, forward
from vicreg_fast.plan import ONE_VIEW
from vicreg_fast.rows import Rows
from vicreg_fast.sides import uses_dual

from .data import (
    HARD,
    TERMS,
    U,
    assert_as_good_as_eager,
    assert_exact,
    both_sides,
    evaluate,
    far_mean,
    first_row_outlier,
    flat,
    normal,
    outlier,
    tiny,
)

# Below and above 64 features, the least at which a single problem may be dual.
SIZES = (2, 3, 31, 33, 64, 65, 257)
SHAPES = list(itertools.product(SIZES, SIZES))
EPS = (0.0, 1e-4)
either_gradient = pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "create_graph"])


def test_sizes_are_of_both_sides() -> None:
    assert {uses_dual(1, N, D) for N, D in SHAPES} == {False, True}


@either_gradient
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("N", "D"), SHAPES)
def test_float64_is_exact(N: int, D: int, eps: float, create_graph: bool) -> None:
    x, y = normal(N, D), normal(N, D)
    truth = evaluate(reference.vicreg_terms, x, y, eps)
    assert_exact(flat(evaluate(functional.vicreg_terms, x, y, eps, create_graph)), flat(truth))


@both_sides(dual=[(6, 80), (33, 90), (100, 125)], primal=[(7, 5), (33, 64), (110, 125)])
def test_float64_is_exact_in_several_blocks(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CACHE_ELEMENTS", 1)
    monkeypatch.setattr(blocks, "MIN_INNER", 4)
    (parts,) = [parts for _, parts in blocks.blocks(1, *shape, 3, 0)]
    assert len(parts) > 1
    x, y = normal(*shape) + 3, normal(*shape)
    truth = evaluate(reference.vicreg_terms, x, y, 0.0)
    assert_exact(flat(evaluate(functional.vicreg_terms, x, y, 0.0)), flat(truth))


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("N", "D"), SHAPES)
def test_float32_is_as_good_as_eager(N: int, D: int, eps: float) -> None:
    x = normal(N, D).float()
    assert_as_good_as_eager(x, x + 0.1 * normal(N, D).float(), eps)


@pytest.mark.parametrize("eps", EPS)
@both_sides(
    dual=[(2, 65), (2, 257), (3, 257), (33, 90), (100, 125), (31, 257), (200, 260)],
    primal=[(3, 64), (33, 64), (64, 33), (200, 64), (110, 125), (257, 31), (1000, 33)],
)
@pytest.mark.parametrize("data", HARD, ids=lambda data: data.__name__)
def test_hard_data(data: Callable[[int, int], Tensor], shape: tuple[int, int], eps: float) -> None:
    assert_as_good_as_eager(data(*shape).float(), data(*shape).float(), eps)


@both_sides(dual=[], primal=[(3000, 8), (2711, 23), (5000, 40)])
@pytest.mark.parametrize("data", [outlier, first_row_outlier], ids=lambda data: data.__name__)
def test_an_outlier_in_a_long_column(data: Callable[[int, int], Tensor], shape: tuple[int, int]) -> None:
    # All terms of a sum but one are equal.  Scaling each term before the product by a factor that is not a power of two
    # made 4 to 24 times eager's error.
    assert_as_good_as_eager(data(*shape).float(), data(*shape).float(), 0.0)


@both_sides(dual=[(300, 600), (40, 1500)], primal=[(3001, 64), (901, 300)])
@pytest.mark.parametrize("data", [normal, *HARD], ids=lambda data: data.__name__)
def test_hard_data_in_several_blocks(
    data: Callable[[int, int], Tensor], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CACHE_ELEMENTS", 1 << 13)
    for buffers in (3, 2):  # forward and backward
        assert all(len(parts) > 1 for _, parts in blocks.blocks(1, *shape, buffers, 0))
    assert_as_good_as_eager(data(*shape).float(), data(*shape).float(), 0.0)


@both_sides(dual=[(33, 90), (31, 257), (31, 2000)], primal=[(33, 64), (200, 64)])
@pytest.mark.parametrize("data", [normal, *HARD], ids=lambda data: data.__name__)
def test_gradients_with_create_graph_are_as_good_as_eager(
    data: Callable[[int, int], Tensor], shape: tuple[int, int]
) -> None:
    assert_as_good_as_eager(data(*shape).float(), data(*shape).float(), 0.0, create_graph=True)


@either_gradient
@pytest.mark.parametrize("D", [2, 65, 257, 5000])  # at 5000 columns the forward pass saves no moments
@pytest.mark.parametrize("seed", range(4))
def test_gradient_from_the_variance_of_two_samples_whose_squared_distance_underflows(
    D: int, seed: int, create_graph: bool
) -> None:
    torch.manual_seed(seed)
    z = tiny(2, D).float()
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(functional.variance_covariance(z)[0], z, create_graph=create_graph)
    wide = z.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(reference.variance(wide), wide)
    # Roundings of each element, u each: two centrings, the root, its reciprocal, the slope and two products.
    assert ((gradient - truth).abs() <= 8 * U * truth.abs()).all()


@either_gradient
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("D", [1, 7, 2000])
@pytest.mark.parametrize("N", [3, 33, 1000])
def test_constant_column_has_zero_gradient_from_the_variance(
    N: int, D: int, dtype: torch.dtype, eps: float, create_graph: bool
) -> None:
    constants = torch.rand(D, dtype=dtype) * 10 ** (torch.arange(D) % 7 - 3.0).to(dtype) + 0.1
    z = constants.expand(N, D).clone().requires_grad_()
    var = functional.variance_covariance(z, eps=eps)[0]
    (gradient,) = torch.autograd.grad(var, z, create_graph=create_graph)
    assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("N", [300, 1000, 5001])
def test_constant_column_has_zero_variance_across_blocks(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CACHE_ELEMENTS", 1)
    assert all(len(parts) > 1 for _, parts in blocks.blocks(1, N, 3, 2, 0))
    z = (torch.rand(3) * 10 + 0.1).expand(N, 3).clone()
    _, statistics = forward.terms([Rows(z[None])], ONE_VIEW, "ieee", 0)
    assert torch.count_nonzero(statistics.moments[2]) == 0


overflowing = both_sides(dual=[(16, 400), (33, 90)], primal=[(64, 32), (32, 64), (100, 80)])


@overflowing
def test_covariance_that_overflows_is_infinite_and_never_nan(shape: tuple[int, int]) -> None:
    _, var, cov = functional.vicreg_terms(*(1e15 * normal(*shape).float() for _ in range(2)))
    assert cov == math.inf
    assert var == 0


@both_sides(dual=[(16, 400), (33, 90)], primal=[(64, 32), (100, 80)])
def test_one_feature_whose_variance_overflows_makes_the_covariance_infinite(shape: tuple[int, int]) -> None:
    z = normal(*shape).float()
    z[:, 1] *= 1e22
    assert functional.variance_covariance(z)[1] == math.inf


@either_gradient
@overflowing
@pytest.mark.parametrize("name", ["inv", "var"])
def test_covariance_that_overflows_leaves_the_other_gradients_right(
    name: str, shape: tuple[int, int], create_graph: bool
) -> None:
    x, y = ((1e15 * normal(*shape)).float().requires_grad_() for _ in range(2))
    value = getattr(functional.vicreg_terms(x, y), name)
    grads = torch.autograd.grad(value, (x, y), create_graph=create_graph)
    wide = [z.detach().double().requires_grad_() for z in (x, y)]
    truth = torch.autograd.grad(getattr(reference.vicreg_terms(*wide), name), wide)
    for g, t in zip(grads, truth, strict=True):
        # A difference and three products or quotients.  The variance is far above gamma: its gradient is zero.
        assert ((g - t).abs() <= 4 * U * t.abs()).all()


def strided(z: Tensor) -> dict[str, Tensor]:
    """The same values in other layouts."""
    N, D = z.shape
    wide = torch.zeros(2 * N, 3 * D, dtype=z.dtype)
    wide[::2, ::3] = z
    return {
        "transposed": z.t().contiguous().t(),
        "sliced": wide[::2, ::3],
        "flipped_twice": z.flip(0).flip(0),
        "offset": torch.cat((z.new_zeros(1), z.flatten()))[1:].view(N, D),
    }


@pytest.mark.parametrize("layout", ["transposed", "sliced", "flipped_twice", "offset"])
@both_sides(dual=[(20, 70)], primal=[(33, 20), (20, 33)])
def test_strides(shape: tuple[int, int], layout: str) -> None:
    x, y = normal(*shape), normal(*shape)
    truth = evaluate(reference.vicreg_terms, x, y, 0.0)
    arranged = strided(x)[layout], strided(y)[layout]
    assert_exact(flat(evaluate(functional.vicreg_terms, *arranged, 0.0)), flat(truth))


@both_sides(dual=[(20, 70)], primal=[(33, 20)])
def test_expanded_input(shape: tuple[int, int]) -> None:
    N, D = shape
    x, y = normal(1, D).expand(N, D), normal(N, 1).expand(N, D)
    values, gradients = evaluate(functional.vicreg_terms, x, y, 1e-4)
    truth, true_gradients = evaluate(reference.vicreg_terms, x, y, 1e-4)
    assert_exact(values, truth)
    assert_exact([gradients[0][0]], [true_gradients[0][0]])
    assert_exact([g for _, g in gradients], [t for _, t in true_gradients])
    # All rows of x are equal: variance and covariance have no gradient there.  The reference has rounding noise instead.
    assert [int(torch.count_nonzero(g)) for g, _ in gradients[1:]] == [0, 0]


@both_sides(dual=[(5, 7, 9), (300, 4, 50), (6, 20, 80)], primal=[(6, 9, 7), (1, 4, 50), (1, 2, 1), (7, 90, 80)])
def test_leading_dimensions_are_problems_and_are_averaged(shape: tuple[int, int, int]) -> None:
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    each = [evaluate(reference.vicreg_terms, a, b, 0.0) for a, b in zip(x, y, strict=True)]
    values = torch.stack([values for values, _ in each]).mean(0)
    gradients = [
        torch.stack([gradients[k][side] for _, gradients in each]) / len(each)
        for k in range(len(TERMS))
        for side in range(2)
    ]
    assert_exact(flat(evaluate(functional.vicreg_terms, x, y, 0.0)), [*values, *gradients])


def test_several_leading_dimensions_are_as_many_problems() -> None:
    x, y = torch.randn(2, 2, 3, 9, 70, dtype=torch.float64)
    actual = evaluate(functional.vicreg_terms, x, y, 0.0)
    assert_exact(flat(actual), flat(evaluate(reference.vicreg_terms, x, y, 0.0)))


@both_sides(dual=[(20, 70)], primal=[(20, 9), (9, 20)])
@pytest.mark.parametrize("which", ["x", "y"])
def test_one_input_without_gradient(shape: tuple[int, int], which: str) -> None:
    x, y = normal(*shape), normal(*shape)
    leaf = (x if which == "x" else y).requires_grad_()
    inv, var, cov = functional.vicreg_terms(x, y)
    grads = torch.autograd.grad(2 * inv + 3 * var + 5 * cov, leaf)
    inv, var, cov = reference.vicreg_terms(x, y)
    assert_exact(grads, torch.autograd.grad(2 * inv + 3 * var + 5 * cov, leaf))


@both_sides(dual=[(20, 70)], primal=[(20, 30)])
def test_upstream_gradient_of_any_layout(shape: tuple[int, int]) -> None:
    x, y = normal(*shape).requires_grad_(), normal(*shape)
    mixing = torch.randn(7, 3, dtype=torch.float64)
    grads = torch.autograd.grad((mixing @ torch.stack(functional.vicreg_terms(x, y))).square().sum(), x)
    truth = torch.autograd.grad((mixing @ torch.stack(reference.vicreg_terms(x, y))).square().sum(), x)
    assert_exact(grads, truth)
    expanded = torch.autograd.grad(functional.vicreg_terms(x, y).cov.expand(4, 5).sum(), x)
    assert_exact(expanded, torch.autograd.grad(20 * reference.vicreg_terms(x, y).cov, x))


@pytest.mark.parametrize("eps", EPS)
@both_sides(dual=[(3, 70)], primal=[(6, 4), (4, 4), (2, 1)])
def test_gradcheck_and_gradgradcheck(shape: tuple[int, int], eps: float) -> None:
    x, y = normal(*shape).requires_grad_(), (1.5 * normal(*shape)).requires_grad_()

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(functional.vicreg_terms(x, y, eps=eps))

    assert torch.autograd.gradcheck(function, (x, y))
    assert torch.autograd.gradgradcheck(function, (x, y))


@both_sides(dual=[(2, 3, 4)], primal=[(2, 4, 4)])
def test_gradcheck_of_batched_problems(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: functional.variance_covariance(z), (x,))
    assert torch.autograd.gradgradcheck(lambda z: functional.variance_covariance(z), (x,))


@both_sides(dual=[(5, 70)], primal=[(5, 3)])
def test_second_derivative_at_a_constant_column_is_finite(shape: tuple[int, int]) -> None:
    x = normal(*shape)
    x[:, 1] = 0.1
    x.requires_grad_()
    (first,) = torch.autograd.grad(sum(functional.vicreg_terms(x, x.detach())), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all()


@both_sides(dual=[(64, 200)], primal=[(64, 32), (32, 64)])
def test_same_bits_twice(shape: tuple[int, int]) -> None:
    x, y = far_mean(*shape).float(), normal(*shape).float()
    first, second = (flat(evaluate(functional.vicreg_terms, x, y, 0.0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
