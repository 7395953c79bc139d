"""The batch, the network and the loss of every rank; and the losses of one process with the whole batch, by formula."""

from typing import Any, NamedTuple

import torch
from torch import nn

from vicreg_fast import VICRegLLoss, VICRegLoss, reference

from .data import seeded_randn

KINDS = ("vicreg", "image", "slot")  # VICRegLoss, and VICRegLLoss by its statistics
# VICRegLoss of few features, and of so many that the covariance is N x N.
EMBEDDINGS = ("vicreg", "wide")
INPUTS, D, WIDE, P1, P2, M = 6, 5, 70, 7, 8, 3
COEFFICIENTS, GAMMA, EPS, ALPHA = (7.0, 5.0, 3.0), 0.8, 1e-4, 0.6
KEYS = ("inv-loss", "var-loss", "cov-loss", "loss")


class Case(NamedTuple):
    kind: str
    counts: tuple[int, ...]  # samples of each rank

    @property
    def world(self) -> int:
        return len(self.counts)

    def __str__(self) -> str:
        return f"{self.kind}-{'+'.join(map(str, self.counts))}"


CASES = [Case(k, c) for k in KINDS for c in ((4, 4), (5, 2), (1, 6), (1, 1), (3, 3, 3), (4, 1, 2))]
CASES += [Case("wide", c) for c in ((4, 4), (5, 2), (3, 3, 3), (4, 1, 2))]
# A rank without samples: only embeddings, because maps need one image.
CASES += [Case("vicreg", c) for c in ((0, 5), (3, 0, 2))]
UNEQUAL = {2: (3, 6), 3: (3, 1, 5)}  # samples of each rank, by the number of ranks


def randn(*shape: int, seed: int) -> torch.Tensor:
    return seeded_randn(*shape, seed=seed, dtype=torch.float64)


def whole_batch(B: int) -> list[torch.Tensor]:
    """Patches of both views before the network, and their locations."""
    return [randn(B, P1, INPUTS, seed=1), randn(B, P2, INPUTS, seed=2), *locations(B)]


def locations(B: int) -> list[torch.Tensor]:
    return [randn(B, P1, 2, seed=3), randn(B, P2, 2, seed=4)]


def views(N: int) -> list[torch.Tensor]:
    """Two views (N, D) of embeddings."""
    return [randn(N, D, seed=seed) for seed in (5, 6)]


def half_views(N: int, dtype: torch.dtype) -> list[torch.Tensor]:
    # Seven features: 14 bytes a row, no multiple of a word.
    return [(0.7 * randn(N, 7, seed=seed)).to(dtype) for seed in (5, 6)]


def part(tensors: list[torch.Tensor], counts: tuple[int, ...], rank: int) -> list[torch.Tensor]:
    """The rows of one rank."""
    start = sum(counts[:rank])
    return [t[start : start + counts[rank]] for t in tensors]


class Network(nn.Module):
    """Patches of two views -> two maps and their means, by one small network of fixed weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        features = WIDE if kind == "wide" else D
        self.layers = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, features)).double()
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(0.5 * randn(*parameter.shape, seed=10 + seed))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        B = a.shape[0]
        z = self.layers(torch.cat([a.flatten(0, 1), b.flatten(0, 1)]))
        maps = z[: B * P1].view(B, P1, z.shape[1]), z[B * P1 :].view(B, P2, z.shape[1])
        return *maps, maps[0].mean(1), maps[1].mean(1)


def make_loss(kind: str, coefficients: tuple[Any, Any, Any] = COEFFICIENTS, **options: Any) -> nn.Module:
    if kind in EMBEDDINGS:
        return VICRegLoss(*coefficients, GAMMA, eps=EPS, **options)
    options = {"alpha": ALPHA, **options}
    return VICRegLLoss(M, options.pop("alpha"), *coefficients, GAMMA, eps=EPS, statistics=kind, **options)


def call(loss: nn.Module, kind: str, outputs: Any, places: Any) -> dict[str, torch.Tensor]:
    return loss(*outputs[2:]) if kind in EMBEDDINGS else loss(*outputs, *places)


def arguments_of_one_rank(kind: str) -> dict[str, Any]:
    """Three samples, the same on every rank."""
    if kind == "vicreg":
        return dict(zip("xy", views(3), strict=True))
    maps = (randn(3, P, D, seed=P) for P in (P1, P2))
    names = ("x1_maps", "x2_maps", "x1_glob", "x2_glob", "x1_locations", "x2_locations")
    return dict(zip(names, (*maps, *views(3), *locations(3)), strict=True))


def true_terms(kind: str, outputs: Any, places: Any) -> dict[str, reference.VICRegTerms]:
    """The unweighted terms of every part, on the whole batch."""
    terms = {"global": reference.vicreg_terms(*outputs[2:], GAMMA, EPS)}
    if kind not in EMBEDDINGS:
        local = reference.local_terms(*outputs[:2], *places, M, GAMMA, EPS, statistics=kind)
        terms |= {"location": local.location, "feature": local.feature}
    return terms


def true_losses(kind: str, outputs: Any, places: Any) -> dict[str, torch.Tensor]:
    """The weighted losses by their keys, on the whole batch."""
    losses = {}
    for name, terms in true_terms(kind, outputs, places).items():
        weighted = [w * t for w, t in zip(COEFFICIENTS, terms, strict=True)]
        losses |= {f"{name}/{k}": v for k, v in zip(KEYS, (*weighted, sum(weighted)), strict=True)}
    if kind in EMBEDDINGS:
        return {k.removeprefix("global/"): v for k, v in losses.items()}
    local = (losses["location/loss"] + losses["feature/loss"]) / 2
    return {"loss": ALPHA * losses["global/loss"] + (1 - ALPHA) * local, **losses}
