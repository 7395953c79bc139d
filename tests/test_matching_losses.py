"""The matches inside VICRegLLoss: its losses are those of the naive matches; and its published ``neirest_neighbores``."""

import math

import pytest
import torch

from vicreg_fast import VICRegLLoss

from .data import EXACT, seeded_randn
from .naive_matching import grid, naive_distances, naive_match, naive_matches

MAPS = {
    "7x7-and-7x7": (grid(7, 7), grid(7, 7, start=0.5)),
    "7x7-and-3x3": (grid(7, 7), grid(3, 3, start=0.5, step=2.0)),
    "3x3-and-14x14": (grid(3, 3, start=0.5, step=3.0), grid(14, 14)),
    "4x4x4-and-4x4x4": (grid(4, 4, 4), grid(4, 4, 4, start=0.5)),
}


def naive_terms(x, y):
    """Unweighted inv, var, cov of one problem (N, D), by the formulas."""
    covariances = []
    variances = []
    for z in (x, y):
        c = z - z.mean(0)
        C = c.T @ c / (len(z) - 1)
        off = C - torch.diag(C.diagonal())
        covariances.append((off**2).sum() / z.shape[1])
        variances.append((1 - C.diagonal().sqrt()).clamp(min=0).mean())
    return torch.stack((((x - y) ** 2).mean(), sum(variances) / 2, sum(covariances) / 2))


def naive_local(x1, x2, d, m, statistics, order):
    """Terms of the matches by distances d (B, P1, P2), averaged over both directions."""
    directions = []
    for a, b, distances in ((x1, x2, d), (x2, x1, d.mT)):
        rows = []
        for image in range(len(a)):
            pairs = list(zip(*naive_match(distances[image], m), strict=True))
            pairs = sorted(pairs) if order == "patch" else pairs
            rows.append([(a[image, q], b[image, c]) for q, c in pairs])
        problems = rows if statistics == "image" else list(zip(*rows, strict=True))
        terms = [
            naive_terms(torch.stack([q for q, _ in problem]), torch.stack([c for _, c in problem]))
            for problem in problems
        ]
        directions.append(torch.stack(terms).mean(0))
    return (directions[0] + directions[1]) / 2


@pytest.mark.parametrize("backend", ["aten", "reference"])  # in float64
@pytest.mark.parametrize("order", ["distance", "patch"])
@pytest.mark.parametrize("statistics", ["image", "slot"])
@pytest.mark.parametrize("places", MAPS.values(), ids=MAPS.keys())
def test_local_loss_is_that_of_the_naive_matches(places, statistics, order, backend):
    B, m = 4, 6
    l1, l2 = (place.expand(B, -1, -1) for place in places)
    x1 = 0.4 * seeded_randn(B, l1.shape[1], 8, seed=1, dtype=torch.float64)
    x2 = 0.4 * seeded_randn(B, l2.shape[1], 8, seed=2, dtype=torch.float64)
    loss = VICRegLLoss(m, 0.0, 25.0, 15.0, 2.0, statistics=statistics, match_order=order, backend=backend)
    losses = loss(x1, x2, None, None, l1, l2)
    weights = torch.tensor([25.0, 15.0, 2.0], dtype=torch.float64)
    for part, distances in (("location", naive_distances(l1, l2)), ("feature", naive_distances(x1, x2))):
        expected = weights * naive_local(x1, x2, distances, m, statistics, order)
        actual = torch.stack([losses[f"{part}/{name}-loss"] for name in ("inv", "var", "cov")])
        # Small sums in float64: a few hundred roundings are below EXACT.
        assert torch.allclose(actual, expected, rtol=EXACT, atol=0.0), part


@pytest.mark.parametrize("m", [1, 4, 9])
@pytest.mark.parametrize("kind", ["ties", "nan", "inf", "float64"])
def test_neirest_neighbores_takes_any_distances(kind, m):
    x, y = seeded_randn(2, 9, 5), seeded_randn(2, 11, 5, seed=1)
    distances = torch.randint(0, 3, (2, 9, 11), generator=torch.Generator().manual_seed(2)).float()
    if kind in ("nan", "inf"):
        distances[0, :3] = distances[0, :, 0] = distances[1, 4, 1:] = float(kind)
    if kind == "float64":
        distances = seeded_randn(2, 9, 11, dtype=torch.float64)
    before = distances.clone()
    rows = VICRegLLoss.neirest_neighbores(x, y, distances, m)
    query, candidate = naive_matches(before, m)
    image = torch.arange(2)[:, None]
    assert torch.equal(rows[0], x[image, query])
    assert torch.equal(rows[1], y[image, candidate])


def test_neirest_neighbores_leaves_distances_alone():
    distances = seeded_randn(2, 9, 11)
    distances[0, 0, 0], distances[1, 2] = math.nan, math.inf
    before = distances.clone()
    VICRegLLoss.neirest_neighbores(seeded_randn(2, 9, 5), seeded_randn(2, 11, 5), distances, 4)
    assert torch.allclose(distances, before, rtol=0.0, atol=0.0, equal_nan=True)


def test_gathered_rows_are_differentiable_and_repeated_candidates_add_up():
    x, y = seeded_randn(1, 6, 3).requires_grad_(), seeded_randn(1, 4, 3, seed=1).requires_grad_()
    distances = torch.ones(1, 6, 4)
    distances[:, :, 2] = 0.0  # every query's nearest is candidate 2
    q, c = VICRegLLoss.neirest_neighbores(x, y, distances, 4)
    (q.sum() + (2 * c).sum()).backward()
    assert x.grad.tolist() == [[[1.0] * 3] * 4 + [[0.0] * 3] * 2]
    assert y.grad.tolist() == [[[0.0] * 3, [0.0] * 3, [8.0] * 3, [0.0] * 3]]
