"""The rule of parity.py for VICRegL's local loss, on any device: at the matches that the kernels found."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vicreg_fast import operators, reference
from vicreg_fast.autograd import weighted_terms
from vicreg_fast.plan import local_views

from .data import TERMS, U
from .parity import LAYOUTS, SINGLE, Floors, twice

PARTS = ("location", "feature")
Counts = tuple[int, int]


class Found:
    """Terms of both losses and the gradients of both maps for each, in float64."""

    def __init__(self, values: Sequence[Tensor], maps: Sequence[Tensor], scale: float = 1.0) -> None:
        self.values = torch.stack([value.detach() for value in values]).double()
        self.grads = []
        for value in values:
            found = torch.autograd.grad(value * scale, maps, retain_graph=True)
            self.grads.append([g.detach().double() / scale for g in found])


def of_kernels(
    maps: Sequence[Tensor],
    indices: Sequence[Tensor],
    counts: Counts,
    across: bool,
    precision: str | None,
    scale: float,
) -> Found:
    """Six terms: of the matches by location, then of those by feature."""
    maps = [z.detach().requires_grad_() for z in maps]
    plan = local_views(counts)._replace(backend="triton", precision=precision, across=across)
    losses, total = weighted_terms(plan, (1.0, 1.0, 1.0), maps, indices)
    assert abs(total - sum(loss.total for loss in losses)) <= 4 * U * abs(total)
    return Found([term for loss in losses for term in loss[:3]], maps, scale)


def match_sets(indices: Sequence[Tensor], across: bool) -> list[reference.Matches]:
    """By location there and back, by feature there and back; (B, m) each."""
    halves = [half for views in indices if views.ndim == 3 for half in views.split(2)]
    return [reference.Matches(*(half.mT if across else half).unbind()) for half in halves]


def of_reference(maps: Sequence[Tensor], indices: Sequence[Tensor], across: bool, dtype: torch.dtype) -> Found:
    maps = [z.detach().to(dtype).requires_grad_() for z in maps]
    statistics = "slot" if across else "image"
    values = []
    sets = match_sets(indices, across)
    for there, back in (sets[:2], sets[2:]):
        both = (
            reference.matched_terms(*maps, there, 1.0, 0.0, statistics),
            reference.matched_terms(*reversed(maps), back, 1.0, 0.0, statistics),
        )
        values += [(s + t) / 2 for s, t in zip(*both, strict=True)]
    return Found(values, maps)


class LocalFloors:
    """Floors (parity.py) of a loss's covariance: of its four views, which are rows of two maps.

    Equal rows add up in a map's gradient, and so may their roundings: the norm grows by the root of their number at most.
    """

    def __init__(
        self, maps: Sequence[Tensor], sets: Sequence[reference.Matches], across: bool, unit: float
    ) -> None:
        self.value, self.gradient = 0.0, [0.0, 0.0]
        for back, matches in enumerate(sets):
            numbers = (back, 1 - back)
            rows = [
                reference.gather_rows(maps[number].detach().double(), index)
                for number, index in zip(numbers, matches, strict=True)
            ]
            rows = [(z.transpose(0, 1) if across else z).requires_grad_() for z in rows]
            cov = reference.vicreg_terms(*rows).cov
            grads = torch.autograd.grad(cov, rows)
            for number, index, z, grad in zip(numbers, matches, rows, grads, strict=True):
                floors = Floors(z, unit, grad)
                often = max(int(torch.bincount(image).max()) for image in index)
                self.value += floors.value / 2
                self.gradient[number] += floors.gradient / 2 * often**0.5


def assert_parity(
    maps: Sequence[Tensor],
    locations: Sequence[Tensor],
    counts: Counts,
    across: bool,
    precision: str | None,
    unit: float,
    scale: float = 1.0,
    order: str = "distance",
) -> None:
    """error(fast) <= 2 * error(eager float32) + floors, for each term and its gradients."""
    indices = operators.match(maps, locations, counts, order, across, "triton")
    fast = of_kernels(maps, indices, counts, across, precision, scale)
    eager = of_reference(maps, indices, across, SINGLE)
    truth = of_reference(maps, indices, across, torch.float64)
    sets = match_sets(indices, across)
    for part, name in enumerate(PARTS):
        floors = LocalFloors(maps, sets[2 * part : 2 * part + 2], across, unit)
        for term, kind in enumerate(TERMS):
            k = 3 * part + term
            floor = {
                "inv": 8 * U * truth.values[k],
                "var": 8 * U,
                "cov": 8 * U * truth.values[k] + floors.value,
            }
            allowed = twice((eager.values[k] - truth.values[k]).abs()) + floor[kind] + 2.0**-149
            assert abs(fast.values[k] - truth.values[k]) <= allowed, f"{name} {kind}"
            for side, (g, e, t) in enumerate(zip(fast.grads[k], eager.grads[k], truth.grads[k], strict=True)):
                finfo = torch.finfo(maps[side].dtype)
                rounding = (8 * U + (finfo.eps / 2 if finfo.bits == 16 else 0.0)) * t.norm()
                underflow = (torch.finfo(SINGLE).tiny + finfo.tiny * finfo.eps / 2 / scale) * t.numel() ** 0.5
                allowed = twice((e - t).norm()) + rounding + underflow
                allowed += floors.gradient[side] if kind == "cov" else 0.0
                assert (g - t).norm() <= allowed, f"gradient of {name} {kind} for map {side}"


def maps_of(
    B: int, patches: tuple[int, int], C: int, layout: str = "contiguous", dtype: torch.dtype = SINGLE
) -> list[Tensor]:
    """Two maps; patches of the second resemble some of the first's."""
    P1, P2 = patches
    x = 0.7 * LAYOUTS[layout](B, P1, C) + 0.5
    near = reference.gather_rows(x, torch.randint(P1, (B, P2)))
    y = LAYOUTS[layout](B, P2, C)
    y = y.copy_(near + 0.2 * y) if layout != "expanded" else near + 0.2 * y
    return [x.to(dtype), y.to(dtype)]
