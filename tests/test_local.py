"""The local loss, values and gradients of both maps, against the reference in float64.

A map's gradient is a sum over four views, two match sets of two directions each, and over the queries that share a
candidate.  The two parts, location and feature, are judged separately.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vicreg_fast import VICRegLLoss, reference
from vicreg_fast.sides import uses_dual

from .data import U, assert_exact

TERMS = ("inv", "var", "cov")
PARTS = ("location", "feature")
STATISTICS, ORDERS = ("image", "slot"), ("distance", "patch")

Evaluated = tuple[dict[str, Tensor], dict[str, list[Tensor]]]

every_statistics = pytest.mark.parametrize("statistics", STATISTICS)
every_order = pytest.mark.parametrize("order", ORDERS)


class Shape(NamedTuple):
    """B images of P1 and P2 patches, of which m are matched."""

    B: int
    P1: int
    P2: int
    m: int

    def problems(self, statistics: str) -> tuple[int, int]:
        """P problems of N samples."""
        return (self.B, self.m) if statistics == "image" else (self.m, self.B)


SOME, ALL, MOST = Shape(5, 9, 12, 4), Shape(5, 9, 12, 9), Shape(6, 21, 18, 18)
MANY_IMAGES, FEW_IMAGES = Shape(85, 3, 4, 2), Shape(2, 7, 6, 5)
# Features of three channels are compared like locations.
CASES = {
    "some of 9 patches, 3 channels": (SOME, 3, False),
    "some of 9 patches, 16 channels": (SOME, 16, False),
    "some of 9 patches, 96 channels": (SOME, 96, False),
    "some of 9 patches, one candidate": (SOME, 96, True),
    "all of 9 patches, 3 channels": (ALL, 3, False),
    "all of 9 patches, 96 channels": (ALL, 96, False),
    "all of 9 patches, one candidate": (ALL, 16, True),
    "most of 21 patches, 16 channels": (MOST, 16, False),
    "most of 21 patches, one candidate": (MOST, 16, True),
    "85 images, 96 channels": (MANY_IMAGES, 96, False),
    "2 images, 512 channels": (FEW_IMAGES, 512, False),
}
every_case = pytest.mark.parametrize(("shape", "C", "shared"), CASES.values(), ids=CASES.keys())


@every_statistics
def test_cases_are_of_both_sides_above_and_below_64_channels(statistics: str) -> None:
    sides = {(C > 64, uses_dual(*shape.problems(statistics), C)) for shape, C, _ in CASES.values()}
    # 96 channels are primal only with so many matches an image that the test would take too long.
    both = {(False, False), (False, True), (True, True)}
    assert sides == (both if statistics == "image" else both | {(True, False)})


def local_inputs(shape: Shape, C: int, shared: bool) -> list[Tensor]:
    """Both maps, then both views' locations, in float32; ``shared``: one candidate is nearest to every location."""
    B, P1, P2, _ = shape
    generator = torch.Generator().manual_seed(B + P1 + C)
    chosen = torch.randint(P1, (B, P2), generator=generator)  # with repetitions
    x1 = 0.7 * torch.randn(B, P1, C, generator=generator) + 0.5
    x2 = reference.gather_rows(x1, chosen) + 0.4 * torch.randn(B, P2, C, generator=generator)
    l1, l2 = (torch.rand(B, P, 2, generator=generator) for P in (P1, P2))
    if shared:
        l1[:, 1:] += 100
        l2[:, 1:] -= 100
    return [x1, x2, l1, l2]


def evaluate(losses: dict[str, Tensor], maps: list[Tensor], create_graph: bool = False) -> Evaluated:
    """Values by name and, for each, the gradients of both maps, in float64; and those of a weighted sum of all."""
    losses = losses | {"all": sum(k * value for k, value in enumerate(losses.values(), 1))}
    options = {"retain_graph": True, "create_graph": create_graph}
    gradients = {
        name: [g.detach().double() for g in torch.autograd.grad(value, maps, **options)]
        for name, value in losses.items()
    }
    return {name: value.detach().double() for name, value in losses.items()}, gradients


def unweighted(m: int, statistics: str, order: str, backend: str = "aten") -> Callable[..., dict[str, Tensor]]:
    """The local part of the loss, as a function of maps and locations."""
    loss = VICRegLLoss(m, 0.0, 1.0, 1.0, 1.0, statistics=statistics, match_order=order, backend=backend)

    def function(*inputs: Tensor) -> dict[str, Tensor]:
        losses = loss.local_loss(*inputs)
        return {f"{part}/{term}": losses[f"{part}/{term}-loss"] for part in PARTS for term in TERMS}

    return function


def fast(inputs: list[Tensor], *options: Any, create_graph: bool = False) -> Evaluated:
    maps = [z.clone().requires_grad_() for z in inputs[:2]]
    return evaluate(unweighted(*options)(*maps, *inputs[2:]), maps, create_graph)


def eager(inputs: list[Tensor], m: int, statistics: str, order: str) -> Evaluated:
    maps = [z.clone().requires_grad_() for z in inputs[:2]]
    terms = reference.local_terms(*maps, *inputs[2:], m, 1.0, 0.0, statistics, order)
    return evaluate({f"{p}/{t}": getattr(getattr(terms, p), t) for p in PARTS for t in TERMS}, maps)


class Sizes(NamedTuple):
    """Sizes of the terms of sums and differences, in float64: each rounding errs by up to u times these."""

    norm: float  # sum of the squared covariances, diagonal included, over D
    diagonal: float  # of the variances' squares, over D
    summands: dict[str, list[Tensor]]  # of each element of a map's gradient: the sum of magnitudes


def sizes(inputs: list[Tensor], part: str, m: int, statistics: str, order: str) -> Sizes:
    x1, x2, l1, l2 = (z.double() for z in inputs)
    maps = [x1, x2]
    a, b = (l1, l2) if part == "location" else (x1, x2)
    x_to_y, y_to_x = reference.match(a, b, m, order), reference.match(b, a, m, order)
    views = [(0, x_to_y.query), (1, x_to_y.candidate), (1, y_to_x.query), (0, y_to_x.candidate)]
    rows = [reference.gather_rows(maps[source], index).requires_grad_() for source, index in views]
    problems = [z.transpose(0, 1) if statistics == "slot" else z for z in rows]
    terms = [torch.stack(reference.vicreg_terms(q, c)) for q, c in (problems[:2], problems[2:])]
    P, N, D = problems[0].shape
    c = [z.detach() - z.detach().mean(1, keepdim=True) for z in problems]
    v = [z.square().sum(1, keepdim=True) / (N - 1) for z in c]
    summands = {}
    for name, value in zip(TERMS, (terms[0] + terms[1]) / 2, strict=True):
        parts = [g.abs() for g in torch.autograd.grad(value, rows, retain_graph=True)]
        if name == "cov":
            # The dual gradient is the difference of G c and c v; the primal gradient's rounding noise is as large.
            noise = [(z * w).abs() * (4 / (4 * P * D * (N - 1))) for z, w in zip(c, v, strict=True)]
            noise = [z.transpose(0, 1) if statistics == "slot" else z for z in noise]
            parts = [p + n for p, n in zip(parts, noise, strict=True)]
        summands[name] = [torch.zeros_like(z) for z in maps]
        for (source, index), p in zip(views, parts, strict=True):
            summands[name][source].scatter_add_(1, index[..., None].expand_as(p), p)
    norm = sum(float((z.mT @ z / (N - 1)).square().sum()) for z in c) / (4 * P * D)
    diagonal = sum(float(w.square().sum()) for w in v) / (4 * P * D)
    return Sizes(norm, diagonal, summands)


@every_statistics
@every_order
@every_case
@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "create_graph"])
def test_float64_is_exact(
    create_graph: bool, shape: Shape, C: int, shared: bool, order: str, statistics: str
) -> None:
    exact = [z.double() for z in local_inputs(shape, C, shared)]
    options = shape.m, statistics, order
    values, gradients = fast(exact, *options, create_graph=create_graph)
    true_values, true_gradients = eager(exact, *options)
    assert_exact(list(values.values()), list(true_values.values()))
    for name, truth in true_gradients.items():
        assert_exact(gradients[name], truth)


@every_statistics
@every_order
@every_case
def test_float32_is_as_good_as_eager(shape: Shape, C: int, shared: bool, order: str, statistics: str) -> None:
    assert_as_good_as_eager(shape, C, shared, order, statistics, "aten")


def assert_as_good_as_eager(
    shape: Shape, C: int, shared: bool, order: str, statistics: str, backend: str
) -> None:
    inputs = local_inputs(shape, C, shared)
    options = shape.m, statistics, order
    truth, truth_grads = eager([z.double() for z in inputs], *options)
    rough, rough_grads = eager(inputs, *options)
    actual, actual_grads = fast(inputs, *options, backend)
    P, N = shape.problems(statistics)
    for part in PARTS:
        size = sizes(inputs, part, *options)
        # As in data.py: a few roundings of the result and of the terms of the subtraction that it comes from.
        floors = {
            "inv": 8 * U * float(truth[f"{part}/inv"]),
            "var": 8 * U,
            "cov": 8 * U * float(truth[f"{part}/cov"])
            + (4 * U * size.norm if uses_dual(P, N, C) else 8 * U**2 * N * C * size.diagonal),
        }
        for term in TERMS:
            name = f"{part}/{term}"
            allowed = 2 * abs(rough[name] - truth[name]) + floors[term]
            assert abs(actual[name] - truth[name]) <= allowed, name
            for g, r, t, s in zip(
                actual_grads[name], rough_grads[name], truth_grads[name], size.summands[term], strict=True
            ):
                assert (g - t).norm() <= 2 * (r - t).norm() + 8 * U * s.norm(), name


# Shapes that are differentiated twice.  Two problems at least, so that a few channels may be dual.
DIFFERENTIATED = {
    "primal, 4 channels": (Shape(4, 4, 5, 4), 4, False),
    "dual, 7 channels": (Shape(3, 3, 4, 3), 7, False),
    "dual, 70 channels": (Shape(3, 3, 4, 3), 70, False),
    "primal, one candidate": (Shape(4, 4, 5, 4), 4, True),
    "dual, one candidate": (Shape(3, 3, 4, 3), 70, True),
}


@every_statistics
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_differentiated_shapes_are_of_the_side_that_they_name(name: str, statistics: str) -> None:
    shape, C, _ = DIFFERENTIATED[name]
    assert uses_dual(*shape.problems(statistics), C) == name.startswith("dual")


@every_statistics
@every_order
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradcheck_and_gradgradcheck(name: str, order: str, statistics: str) -> None:
    shape, C, shared = DIFFERENTIATED[name]
    x1, x2, l1, l2 = (z.double() for z in local_inputs(shape, C, shared))
    function = unweighted(shape.m, statistics, order)

    def terms(x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(x1, x2, l1, l2).values())

    maps = x1.requires_grad_(), x2.requires_grad_()
    # One random direction instead of every element: those are hundreds.
    assert torch.autograd.gradcheck(terms, maps, fast_mode=True)
    assert torch.autograd.gradgradcheck(terms, maps, fast_mode=True)
