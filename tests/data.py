"""Embeddings on which careless implementations fail, shapes of both sides, and the error rule.

The rule: against the float64 truth, the fast path's error is at most twice the error of eager code in the same type, plus
a floor for the cases in which eager code is exact by luck.  In float64 itself, the relative error is at most EXACT.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from vicreg_fast import functional, reference
from vicreg_fast.sides import uses_dual

U = 2.0**-24  # unit roundoff of float32

# Hundreds of roundings of 2^-53, which the dual side amplifies five times at most: below 1e-12.  The smallest mistake
# to detect, N in place of N - 1 at N = 1000, is 1e-3.
EXACT = 1e-10
# The same for torch.testing.assert_close; the absolute part is for sums that cancel.
CLOSE = {"rtol": EXACT, "atol": 1e-12}


def assert_exact(actual: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """The error of each tensor is at most EXACT times the norm of its truth; where the truth is zero, it is zero."""
    for k, (a, t) in enumerate(zip(actual, truth, strict=True)):
        assert a.dtype == t.dtype == torch.float64
        a, t = a.detach(), t.detach()
        error, norm = float((a - t).norm()), float(t.norm())
        assert error <= EXACT * norm, f"tensor {k} of {len(truth)}: error {error:.1e} at a norm of {norm:.1e}"


def seeded_randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values that depend on shape, seed and type alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def both_sides(dual: Sequence[tuple[int, ...]], primal: Sequence[tuple[int, ...]]) -> pytest.MarkDecorator:
    """Parametrise ``shape``, (N, D) or (P, N, D), with ids that name the side; asserts that each shape is of its side."""
    parameters = []
    for side, shapes in (("dual", dual), ("primal", primal)):
        for shape in shapes:
            *P, N, D = shape
            assert uses_dual(P[0] if P else 1, N, D) == (side == "dual"), f"{shape} is not {side}"
            parameters.append(pytest.param(shape, id=f"{side}-{'x'.join(map(str, shape))}"))
    return pytest.mark.parametrize("shape", parameters)


def normal(N: int, D: int) -> Tensor:
    return 0.7 * torch.randn(N, D, dtype=torch.float64)


def far_mean(N: int, D: int) -> Tensor:
    """Mean 1000 standard deviations from zero."""
    return normal(N, D) + 700.0


def decorrelated(N: int, D: int) -> Tensor:
    """Features of variance 1.44, as uncorrelated as N samples allow: orthonormal columns, or rows where N <= D (QR).

    The variance is not 1: there the standard deviation is gamma, and one rounding decides whether a feature has a gradient.
    """
    z = normal(N, D)
    q = torch.linalg.qr(z - z.mean(0))[0] if N > D else torch.linalg.qr(z.T)[0].T * (D / N) ** 0.5
    return 1.2 * q * (N - 1) ** 0.5


def strong_and_weak(N: int, D: int) -> Tensor:
    """A few strong orthogonal features, of variance 1.44 or just below, followed by many weak ones."""
    q = torch.linalg.qr(normal(N, D) - 0.1)[0]
    out = normal(N, D) * 1e-3
    out[:, : q.shape[1]] = 1.2 * q * (N - 1) ** 0.5
    return out


def rank_one(N: int, D: int) -> Tensor:
    return torch.randn(N, 1, dtype=torch.float64) * torch.randn(1, D, dtype=torch.float64)


def constant_columns(N: int, D: int) -> Tensor:
    """Every second column is a constant, a different non-dyadic number in each."""
    z = normal(N, D)
    z[:, ::2] = 0.1 + torch.arange((D + 1) // 2, dtype=torch.float64) / 3
    return z


def equal_rows(N: int, D: int) -> Tensor:
    return normal(1, D).expand(N, D).clone()


def outlier(N: int, D: int) -> Tensor:
    z = normal(N, D)
    z[N // 2] += 1e4
    return z


def first_row_outlier(N: int, D: int) -> Tensor:
    z = normal(N, D)
    z[0] += 1e4
    return z


def strong_column(N: int, D: int) -> Tensor:
    """One feature a hundred times as strong as the others."""
    z = normal(N, D)
    z[:, 0] *= 100
    return z


def spike(N: int, D: int) -> Tensor:
    """One feature is zero except in one sample: after centring its terms are equal, and their roundings all have one sign."""
    z = normal(N, D)
    z[:, 0] = 0
    z[N // 2, 0] = 100
    return z


def tiny(N: int, D: int) -> Tensor:
    return normal(N, D) * 1e-18


def huge(N: int, D: int) -> Tensor:
    return normal(N, D) * 1e9


HARD: tuple[Callable[[int, int], Tensor], ...] = (
    far_mean,
    decorrelated,
    strong_and_weak,
    rank_one,
    constant_columns,
    equal_rows,
    outlier,
    first_row_outlier,
    strong_column,
    spike,
    tiny,
    huge,
)


# -- values and gradients of two views --------------------------------------------------------------------------

TERMS = ("inv", "var", "cov")

Evaluated = tuple[Tensor, list[list[Tensor]]]


def evaluate(
    function: Callable[..., tuple[Tensor, ...]], x: Tensor, y: Tensor, eps: float, create_graph: bool = False
) -> Evaluated:
    """Values (3,), and per term the gradients of x and y, in float64."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()  # detach() keeps the layout
    values = function(x, y, gamma=1.0, eps=eps)
    gradients = []
    for value in values:
        grads = torch.autograd.grad(
            value, (x, y), retain_graph=True, allow_unused=True, create_graph=create_graph
        )
        gradients.append([torch.zeros_like(x) if g is None else g.detach() for g in grads])
    return torch.stack(values).detach().double(), [[g.double() for g in pair] for pair in gradients]


def flat(evaluated: Evaluated) -> list[Tensor]:
    """The three values, then the six gradients."""
    values, gradients = evaluated
    return [*values.unbind(), *itertools.chain(*gradients)]


def assert_as_good_as_eager(x: Tensor, y: Tensor, eps: float, create_graph: bool = False) -> None:
    """error(fast) <= 2 * error(eager) + floor against float64, for each term and each of its gradients.

    Both compute in float32.  The fast path reads x and y in their own types and rounds the gradients to these.
    """
    N, D = x.shape[-2:]
    truth, truth_grads = evaluate(reference.vicreg_terms, x.double(), y.double(), eps)
    eager, eager_grads = evaluate(reference.vicreg_terms, x.float(), y.float(), eps)
    fast, fast_grads = evaluate(functional.vicreg_terms, x, y, eps, create_graph)

    c = [z.double() - z.double().mean(0) for z in (x, y)]
    v = [a.square().sum(0) / (N - 1) for a in c]
    C = [a.T @ a / (N - 1) for a in c]
    norm = sum(float(m.square().sum()) for m in C) / 2 / D
    diagonal = sum(float(w.square().sum()) for w in v) / 2 / D
    # Floors, for results that eager code has exact by luck: a few roundings of the result and of the terms of the
    # subtraction that it comes from.  Hinge: gamma.  Covariance on the dual side: 4 u ||C||^2 / D.  Covariance on the
    # primal side of decorrelated features: each entry of C0 is rounding noise of u times the diagonal.
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
        # A value that underflows is rounded to a multiple of float32's smallest positive value.
        assert abs(fast[k] - truth[k]) <= allowed + floors[name] + 2.0**-149, name
        both = zip("xy", (x, y), fast_grads[k], eager_grads[k], truth_grads[k], c, v, strict=True)
        for side, z, g, e, t, a, w in both:
            if not bool((t.abs() < torch.finfo(z.dtype).max).all()):
                continue
            floor = 8 * U * t.norm()
            if z.dtype != torch.float32:
                # One more rounding, to the input's type: by half a unit in the last place of each element, or by half
                # of the type's smallest positive value.
                finfo = torch.finfo(z.dtype)
                floor = floor + finfo.eps / 2 * t.norm() + finfo.tiny * finfo.eps / 2 * t.numel() ** 0.5
            if name == "cov":
                # The dual gradient is the difference of G c and c v; the primal gradient's rounding noise is as large.
                floor = floor + 8 * U * (4 / (D * (N - 1))) * (a * w).norm()
            allowed = 2 * (e - t).norm() if e.isfinite().all() else 0.0
            # An element that underflows errs by at most the smallest normal value.
            underflow = torch.finfo(torch.float32).tiny * g.numel() ** 0.5
            assert (g - t).norm() <= allowed + floor + underflow, f"d{name}/d{side}"
