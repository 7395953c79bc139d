"""The three terms, values and gradients, against the reference in float64."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vicreg_fast import functional, precision, reference
from vicreg_fast.backends.aten import blocks, gradient, terms
from vicreg_fast.multiview import ONE_VIEW
from vicreg_fast.rows import WHOLE, Rows, uses_dual

from .data import HARD, U, far_mean, huge, normal, tiny

SIZES = (2, 3, 31, 32, 33, 257)
SHAPES = list(itertools.product(SIZES, SIZES))
EPS = (0.0, 1e-4)
TERMS = ("inv", "var", "cov")

Evaluated = tuple[Tensor, list[list[Tensor]]]


def evaluate(function: Callable[..., tuple[Tensor, ...]], x: Tensor, y: Tensor, eps: float) -> Evaluated:
    """Values (3,), and per term the gradients of x and y, in float64."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    values = function(x, y, gamma=1.0, eps=eps)
    gradients = []
    for value in values:
        found = torch.autograd.grad(value, (x, y), retain_graph=True, allow_unused=True)
        gradients.append([torch.zeros_like(x) if g is None else g for g in found])
    return torch.stack(values).detach().double(), [[g.double() for g in pair] for pair in gradients]


def assert_as_good_as_eager(x64: Tensor, y64: Tensor, eps: float) -> None:
    """error(fast) <= 2 * error(eager) + floor, both in float32 against float64, each term by itself."""
    x, y = x64.float(), y64.float()
    N, D = x.shape[-2:]
    truth, truth_grads = evaluate(reference.vicreg_terms, x.double(), y.double(), eps)
    eager, eager_grads = evaluate(reference.vicreg_terms, x, y, eps)
    fast, fast_grads = evaluate(functional.vicreg_terms, x, y, eps)

    c = [z.double() - z.double().mean(0) for z in (x, y)]
    v = [a.square().sum(0) / (N - 1) for a in c]
    C = [a.T @ a / (N - 1) for a in c]
    norm = sum(float(m.square().sum()) for m in C) / 2 / D
    diagonal = sum(float(w.square().sum()) for w in v) / 2 / D
    # Floors, where eager is right by luck: a few roundings of the result, and of what it is a difference of:
    # gamma for the hinge; for the dual side, which subtracts, 4 u ||C||^2 / D.  A primal C0 that is nothing but
    # rounding (decorrelated features) is noise of u times its diagonal in every entry.
    floors = {
        "inv": 8 * U * float(truth[0]),
        "var": 8 * U,
        "cov": 8 * U * float(truth[2]) + (4 * U * norm if uses_dual(1, N, D) else 8 * U**2 * N * D * diagonal),
    }
    for k, name in enumerate(TERMS):
        if truth[k] > torch.finfo(torch.float32).max:
            assert fast[k] == math.inf
            continue
        allowed = 2 * abs(eager[k] - truth[k]) if eager[k].isfinite() else 0.0
        assert abs(fast[k] - truth[k]) <= allowed + floors[name] + 1e-44, name
        for side, g, e, t, a, w in zip("xy", fast_grads[k], eager_grads[k], truth_grads[k], c, v, strict=True):
            if not bool((t.abs() < torch.finfo(torch.float32).max).all()):
                continue
            floor = 8 * U * t.norm()
            if name == "cov":
                # The dual's gradient is the difference of G c and c v, the primal's rounding noise is of that size.
                floor = floor + 8 * U * (4 / (D * (N - 1))) * (a * w).norm()
            allowed = 2 * (e - t).norm() if e.isfinite().all() else 0.0
            # One unit in the last place of the smallest normal number per element: gradients that underflow.
            assert (g - t).norm() <= allowed + floor + 1.2e-38 * g.numel() ** 0.5, f"d{name}/d{side}"


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("N", "D"), SHAPES)
def test_float64_is_exact(N: int, D: int, eps: float) -> None:
    x, y = normal(N, D), normal(N, D)
    truth, truth_grads = evaluate(reference.vicreg_terms, x, y, eps)
    fast, fast_grads = evaluate(functional.vicreg_terms, x, y, eps)
    torch.testing.assert_close(fast, truth, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast_grads, truth_grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("N", "D"), SHAPES)
def test_float32_is_as_good_as_eager(N: int, D: int, eps: float) -> None:
    x = normal(N, D)
    assert_as_good_as_eager(x, x + 0.1 * normal(N, D), eps)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("N", "D"), [(3, 64), (33, 64), (64, 33), (200, 64), (257, 31), (31, 257), (1000, 33)])
@pytest.mark.parametrize("data", HARD, ids=lambda data: data.__name__)
def test_hard_data(data: Callable[[int, int], Tensor], N: int, D: int, eps: float) -> None:
    assert_as_good_as_eager(data(N, D), data(N, D), eps)


@pytest.mark.parametrize(("N", "D"), [(3000, 64), (1100, 600), (600, 1100), (40, 1500)])
@pytest.mark.parametrize("data", [normal, *HARD], ids=lambda data: data.__name__)
def test_hard_data_in_several_blocks(
    data: Callable[[int, int], Tensor], N: int, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CACHE_ELEMENTS", 1 << 13)
    parts = [part for _, group in blocks.blocks(1, N, D, 3, 0) for part in group]
    assert len(parts) > 1
    assert_as_good_as_eager(data(N, D), data(N, D), 0.0)


@pytest.mark.parametrize("D", [1, 7, 2000])
@pytest.mark.parametrize("N", [3, 33, 1000])
def test_constant_column_has_zero_gradient_from_the_variance(N: int, D: int) -> None:
    constants = torch.rand(D) * 10 ** (torch.arange(D) % 7 - 3.0) + 0.1
    z = constants.expand(N, D).clone().requires_grad_()
    functional.variance_covariance(z)[0].backward()
    assert z.grad is not None
    assert torch.count_nonzero(z.grad) == 0


@pytest.mark.parametrize("N", [3, 33, 1000, 5001])
def test_constant_column_has_zero_variance_across_blocks(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CACHE_ELEMENTS", 1)
    z = (torch.rand(3) * 10 + 0.1).expand(N, 3).clone()
    _, statistics = terms.terms([Rows(z[None])], ONE_VIEW, "ieee", 0)
    assert torch.count_nonzero(statistics.moments[2]) == 0


@pytest.mark.parametrize(("N", "D"), [(64, 32), (32, 64), (16, 400)])
def test_covariance_that_overflows_is_infinite_and_never_nan(N: int, D: int) -> None:
    x, y = (1e15 * normal(N, D).float() for _ in range(2))
    x.requires_grad_()
    inv, var, cov = functional.vicreg_terms(x, y)
    assert cov == math.inf
    assert var == 0
    # A term that was not asked for spoils nothing.
    assert torch.autograd.grad(inv, x)[0].isfinite().all()


@pytest.mark.parametrize(("N", "D"), [(64, 32), (32, 64)])
def test_scales_reach_the_gradient(N: int, D: int) -> None:
    for z in (tiny(N, D), huge(N, D)):
        x = z.float().requires_grad_()
        var, cov = functional.variance_covariance(x)
        expected = reference.covariance(x.detach().double())
        assert var.isfinite()
        torch.testing.assert_close(cov.double(), expected, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "D"), [(64, 33), (33, 200)])
def test_half_precision_inputs_are_computed_in_float32(N: int, D: int, dtype: torch.dtype) -> None:
    x, y = normal(N, D).to(dtype), normal(N, D).to(dtype)
    truth, truth_grads = evaluate(reference.vicreg_terms, x.double(), y.double(), 0.0)
    fast, fast_grads = evaluate(functional.vicreg_terms, x, y, 0.0)
    torch.testing.assert_close(fast, truth, rtol=1e-5, atol=1e-6)
    unit = torch.finfo(dtype).eps / 2
    for found, true in zip(fast_grads, truth_grads, strict=True):
        for g, t in zip(found, true, strict=True):
            # The gradient is float32 until it is rounded to the input's type (subnormal below 6e-8 in fp16).
            assert (g - t).abs().max() <= 1.01 * unit * t.abs().max() + torch.finfo(
                dtype
            ).smallest_normal * unit * 2


def test_half_precision_that_overflows_its_own_type_stays_right() -> None:
    # N |cov| is 4e7, far above 65504.
    x = (200 * normal(2000, 40)).half()
    cov = functional.variance_covariance(x)[1]
    torch.testing.assert_close(cov.double(), reference.covariance(x.double()), rtol=1e-5, atol=0)
    wide = (200 * normal(40, 2000)).half()
    cov = functional.variance_covariance(wide)[1]
    torch.testing.assert_close(cov.double(), reference.covariance(wide.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("first", "second"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float64)],
    ids=str,
)
def test_mixed_types(first: torch.dtype, second: torch.dtype) -> None:
    x = normal(32, 40).to(first).requires_grad_()
    y = normal(32, 40).to(second).requires_grad_()
    terms_ = functional.vicreg_terms(x, y)
    truth = reference.vicreg_terms(x.detach().double(), y.detach().double())
    torch.testing.assert_close(torch.stack(terms_).double(), torch.stack(truth), rtol=1e-5, atol=1e-7)
    sum(terms_).backward()
    assert x.grad is not None
    assert y.grad is not None
    assert (x.grad.dtype, y.grad.dtype) == (first, second)
    assert terms_.inv.dtype == (torch.float64 if torch.float64 in (first, second) else torch.float32)


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
@pytest.mark.parametrize(("N", "D"), [(33, 20), (20, 33)])
def test_strides(N: int, D: int, layout: str) -> None:
    x, y = normal(N, D), normal(N, D)
    truth = evaluate(reference.vicreg_terms, x, y, 0.0)
    found = evaluate(functional.vicreg_terms, strided(x)[layout], strided(y)[layout], 0.0)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


def test_expanded_input() -> None:
    x, y = normal(1, 20).expand(33, 20), normal(33, 1).expand(33, 20)
    assert_same = torch.testing.assert_close
    assert_same(
        evaluate(functional.vicreg_terms, x, y, 1e-4),
        evaluate(reference.vicreg_terms, x, y, 1e-4),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("shape", [(5, 7, 9), (2, 3, 9, 7), (300, 4, 50), (0 + 1, 2, 1)], ids=str)
def test_leading_dimensions_are_problems_and_are_averaged(shape: tuple[int, ...]) -> None:
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    each = [
        torch.stack(reference.vicreg_terms(a, b))
        for a, b in zip(x.flatten(0, -3), y.flatten(0, -3), strict=True)
    ]
    torch.testing.assert_close(
        torch.stack(functional.vicreg_terms(x, y)), torch.stack(each).mean(0), rtol=1e-10, atol=1e-10
    )
    found = evaluate(functional.vicreg_terms, x, y, 0.0)[1]
    truth = evaluate(reference.vicreg_terms, x, y, 0.0)[1]
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("N", "D"), [(20, 9), (9, 20)])
@pytest.mark.parametrize("which", ["x", "y"])
def test_one_input_without_gradient(N: int, D: int, which: str) -> None:
    x, y = normal(N, D), normal(N, D)
    leaf = (x if which == "x" else y).requires_grad_()
    inv, var, cov = functional.vicreg_terms(x, y)
    (found,) = torch.autograd.grad(2 * inv + 3 * var + 5 * cov, leaf)
    inv, var, cov = reference.vicreg_terms(x, y)
    (truth,) = torch.autograd.grad(2 * inv + 3 * var + 5 * cov, leaf)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


def test_upstream_gradient_of_any_layout() -> None:
    x = normal(20, 30).requires_grad_()
    y = normal(20, 30)
    mixing = torch.randn(7, 3, dtype=torch.float64)
    found = torch.autograd.grad((mixing @ torch.stack(functional.vicreg_terms(x, y))).square().sum(), x)
    truth = torch.autograd.grad((mixing @ torch.stack(reference.vicreg_terms(x, y))).square().sum(), x)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    expanded = torch.autograd.grad(functional.vicreg_terms(x, y).cov.expand(4, 5).sum(), x)
    truth = torch.autograd.grad(20 * reference.vicreg_terms(x, y).cov, x)
    torch.testing.assert_close(expanded, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("N", "D"), [(6, 4), (4, 4), (3, 70), (2, 1)])
def test_gradcheck_and_gradgradcheck(N: int, D: int, eps: float) -> None:
    x, y = normal(N, D).requires_grad_(), (1.5 * normal(N, D)).requires_grad_()

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(functional.vicreg_terms(x, y, eps=eps))

    assert torch.autograd.gradcheck(function, (x, y))
    assert torch.autograd.gradgradcheck(function, (x, y))


def test_gradcheck_of_batched_problems() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: functional.variance_covariance(z), (x,))
    assert torch.autograd.gradgradcheck(lambda z: functional.variance_covariance(z), (x,))


def test_second_derivative_at_a_constant_column_is_finite() -> None:
    x = normal(5, 3)
    x[:, 1] = 0.1
    x.requires_grad_()
    (first,) = torch.autograd.grad(sum(functional.vicreg_terms(x, x.detach())), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all()


@pytest.mark.parametrize(("N", "D"), [(64, 32), (32, 64)])
def test_same_bits_twice(N: int, D: int) -> None:
    x, y = far_mean(N, D).float(), normal(N, D).float()
    first, second = (evaluate(functional.vicreg_terms, x, y, 0.0) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("V", "P", "N", "D"), [(2, 1, 5, 3), (4, 300, 10, 512), (2, 3, 4000, 900), (1, 2, 9, 70000)]
)
def test_blocks_cover_every_element_once(V: int, P: int, N: int, D: int) -> None:
    seen = torch.zeros(P, N, D, dtype=torch.int8)
    for group, parts in blocks.blocks(P, N, D, V, 0):
        for part in parts:
            assert part.problems == group
            assert (part is WHOLE) == (len(list(blocks.blocks(P, N, D, V, 0))) == len(parts) == 1)
            seen[part.problems, part.rows, part.features] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("several", [False, True], ids=["one block", "several"])
@pytest.mark.parametrize("product", ["tf32", "bf16"])
def test_rounded_operand_has_its_own_variances(
    product: str, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the dual computes with a faster product is, but for float32's own rounding, the covariance of the rounded
    # operand.  On decorrelated features the exact variances in place of the operand's are 500 u ||C||^2 / D off.
    if several:
        monkeypatch.setattr(blocks, "CACHE_ELEMENTS", 1 << 13)
    N, D = 384, 512
    z = (torch.linalg.qr(torch.randn(D, N, dtype=torch.float64))[0].T * 20).float()
    views = [Rows(z[None])]
    values, statistics = terms.terms(views, ONE_VIEW, product, 0)
    found = torch.empty(1, N, D)
    upstream = [None, None, torch.tensor(1.0)]
    gradient.gradient(views, ONE_VIEW, product, 0, statistics, upstream, [found], add=False)

    c = z.double() - z.double().mean(0)
    o = precision.round_operand(c.float(), product).double()
    C = o.T @ o / (N - 1)
    C0 = C - C.diagonal().diag()
    # Both of what is subtracted are sums of float32.
    assert abs(float(values[2]) - float(C0.square().sum()) / D) <= 4 * U * float(C.square().sum()) / D
    scale = 4 / (D * (N - 1))
    assert float((found[0] - scale * o @ C0).norm()) <= 100 * U * float((scale * o @ C).norm())
