"""The scales against the definition: raw sums times scales are the reference's terms, and gradients likewise.

Everything is in float64.  f is the factor of M: M is f times the covariance (primal) or f times G (dual).
"""

import pytest
import torch
from torch import Tensor

from vicreg_fast import reference
from vicreg_fast.scales import Normalisation, Scales, match_set_scales

from .data import assert_exact

# P problems of N samples and D features; of one feature the covariance term is zero.
SHAPES = [(1, 2, 2), (1, 9, 5), (1, 4, 11), (3, 7, 4), (5, 3, 8)]
WEIGHTS = [(25.0, 15.0, 0.5), (-2.0, 3.0, 7.0)]
FACTORS = [1.0, 0.25]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
weights_of_terms = pytest.mark.parametrize("weights", WEIGHTS, ids=str)
factors = pytest.mark.parametrize("factor", FACTORS, ids=lambda factor: f"f={factor}")
one_or_two_views = pytest.mark.parametrize("V", [1, 2], ids=lambda V: f"{V}views")
sides = pytest.mark.parametrize("dual", [False, True], ids=["primal", "dual"])


def views(V: int, shape: tuple[int, ...]) -> list[Tensor]:
    """Views (P, N, D) whose standard deviations lie on both sides of gamma = 1."""
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(V)]


def centred(z: Tensor) -> Tensor:
    return z - z.mean(1, keepdim=True)


def true_terms(z: list[Tensor]) -> list[Tensor]:
    """Unweighted terms of one view (whose invariance is zero) or of two."""
    if len(z) == 2:
        return list(reference.vicreg_terms(*z))
    return [z[0].new_zeros(()), reference.variance(z[0]), reference.covariance(z[0])]


def normalisation(V: int, shape: tuple[int, ...]) -> Normalisation:
    return Normalisation(V, V - 1, *shape)


def off_diagonal_squares(c: Tensor, factor: float, dual: bool) -> Tensor:
    """The sum of the squared off-diagonal elements of f C, from f C or from f G and the variances."""
    N = c.shape[1]
    v = c.square().sum(1) / (N - 1)
    M = factor * (c @ c.mT if dual else c.mT @ c) / (N - 1)
    return M.square().sum() - factor**2 * v.square().sum()


@one_or_two_views
@sides
@factors
@weights_of_terms
@shapes
def test_raw_sums_times_scales_are_the_weighted_terms(shape, weights, factor, dual, V):
    z = views(V, shape)
    c = [centred(view) for view in z]
    std = [(a.square().sum(1) / (shape[1] - 1)).sqrt() for a in c]
    sums = (
        (z[0] - z[-1]).square().sum(),
        sum((1 - s).relu().sum() for s in std),
        sum(off_diagonal_squares(a, factor, dual) for a in c),
    )
    scales = normalisation(V, shape).terms(weights, factor)
    actual = [s * scale for s, scale in zip(sums, scales, strict=True)]
    truth = [w * term for w, term in zip(weights, true_terms(z), strict=True)]
    assert_exact(actual, truth)


def raw_gradients(z: list[Tensor], factor: float, dual: bool) -> list[list[Tensor]]:
    """For each term, what the gradient scales multiply: (x - y), c / std where std < gamma = 1, and c M."""
    N = z[0].shape[1]
    differences = [z[0] - z[1], z[1] - z[0]] if len(z) == 2 else [torch.zeros_like(z[0])]
    hinges, products = [], []
    for view in z:
        c = centred(view)
        v = c.square().sum(1, keepdim=True) / (N - 1)
        hinges.append(torch.where(v < 1, c / v.sqrt(), 0.0))
        M = factor * (c @ c.mT if dual else c.mT @ c) / (N - 1)
        products.append((M @ c if dual else c @ M) - factor * c * v)
    return [differences, hinges, products]


@one_or_two_views
@sides
@factors
@weights_of_terms
@shapes
def test_gradients_are_their_formulas_times_scales(shape, weights, factor, dual, V):
    z = views(V, shape)
    scales = normalisation(V, shape).gradients(weights, factor)
    raw = raw_gradients([view.detach() for view in z], factor, dual)
    for w, scale, gradients, term in zip(weights, scales, raw, true_terms(z), strict=True):
        truth = [torch.zeros_like(view) for view in z]
        if term.requires_grad:
            truth = list(torch.autograd.grad(w * term, z))
        assert_exact([scale * g for g in gradients], truth)


# -- VICRegL ----------------------------------------------------------------------------------------------------

IMAGES, CHANNELS = [1, 4], [1, 6]


def assert_close(actual: Scales, truth: Scales) -> None:
    assert actual == pytest.approx(
        truth, rel=1e-14
    )  # the same factors in another order: a few roundings of 2^-53


@pytest.mark.parametrize("D", CHANNELS)
@pytest.mark.parametrize("B", IMAGES)
@pytest.mark.parametrize("m", [2, 3, 10])
@weights_of_terms
def test_match_set_values_divide_the_invariance_by_m(weights, m, B, D):
    values, _ = match_set_scales(weights, B, D)
    assert_close(values._replace(inv=values.inv / m), Normalisation(4, 2, B, m, D).terms(weights))


@pytest.mark.parametrize("D", CHANNELS)
@pytest.mark.parametrize("B", IMAGES)
@pytest.mark.parametrize("m", [2, 3, 10])
@weights_of_terms
def test_match_set_gradients_divide_the_invariance_by_m_and_the_statistics_by_m_minus_1(weights, m, B, D):
    _, gradients = match_set_scales(weights, B, D)
    actual = Scales(gradients.inv / m, gradients.var / (m - 1), gradients.cov / (m - 1))
    assert_close(actual, Normalisation(4, 2, B, m, D).gradients(weights))


def test_match_set_scales_are_those_of_the_reference():
    """Two directions of different numbers of matches: each direction's terms, averaged."""
    B, D, counts, weights = 3, 5, (4, 7), (25.0, 15.0, 2.0)
    values, _ = match_set_scales(weights, B, D)
    sums = torch.zeros(3, dtype=torch.float64)
    truth = torch.zeros(3, dtype=torch.float64)
    for m in counts:
        x, y = torch.randn(2, B, m, D, dtype=torch.float64)
        sums[0] += (x - y).square().sum() / m
        for z in (x, y):
            c = centred(z)
            sums[1] += (1 - (c.square().sum(1) / (m - 1)).sqrt()).relu().sum()
            sums[2] += off_diagonal_squares(c, 1.0, dual=False)
        terms = reference.vicreg_terms(x, y)
        truth += torch.stack([w * t for w, t in zip(weights, terms, strict=True)]) / len(counts)
    assert_exact([sums * torch.tensor(values, dtype=torch.float64)], [truth])
