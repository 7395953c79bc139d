"""The rule of parity.py for VICRegL's local loss, on any device: at the kernels' own matches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vicreg_fast import operators, reference
from vicreg_fast.autograd import weighted_terms
from vicreg_fast.plan import Plan, local_views

from .data import TERMS, U
from .parity import LAYOUTS, SINGLE, Floors, twice

PARTS = ("location", "feature")
Counts = tuple[int, int]


class Evaluation:
    """Terms of both losses and the gradients of both maps for each, in float64."""

    def __init__(self, values: Sequence[Tensor], maps: Sequence[Tensor], scale: float = 1.0) -> None:
        self.values = torch.stack([value.detach() for value in values]).double()
        self.grads = []
        for value in values:
            grads = torch.autograd.grad(value * scale, maps, retain_graph=True)
            self.grads.append([g.detach().double() / scale for g in grads])


def of_kernels(plan: Plan, maps: Sequence[Tensor], locations: Sequence[Tensor], scale: float) -> Evaluation:
    """Six terms: of the matches by location, then of those by feature."""
    maps = [z.detach().requires_grad_() for z in maps]
    losses, total = weighted_terms(plan, (1.0, 1.0, 1.0), maps, locations)
    assert abs(total - sum(loss.total for loss in losses)) <= 4 * U * abs(total)
    return Evaluation([term for loss in losses for term in loss[:3]], maps, scale)


def matches_of(plan: Plan, maps: Sequence[Tensor], locations: Sequence[Tensor]) -> list[reference.Matches]:
    """The kernels' matches: by location from x to y and from y to x, then by feature; (B, m) each."""
    _, outputs = operators.terms(plan._replace(save_for_backward=False), maps, locations)
    sets = plan.match_sets(outputs[plan.outputs], maps[0].shape[0])
    directions = [views for views_of_group in sets for views in views_of_group.split(2)]
    return [reference.Matches(*(views.mT if plan.per_slot else views).unbind()) for views in directions]


def of_reference(
    maps: Sequence[Tensor], sets: Sequence[reference.Matches], per_slot: bool, dtype: torch.dtype
) -> Evaluation:
    maps = [z.detach().to(dtype).requires_grad_() for z in maps]
    statistics = "slot" if per_slot else "image"
    values = []
    for x_to_y, y_to_x in (sets[:2], sets[2:]):
        both = (
            reference.matched_terms(*maps, x_to_y, 1.0, 0.0, statistics),
            reference.matched_terms(*reversed(maps), y_to_x, 1.0, 0.0, statistics),
        )
        values += [(s + t) / 2 for s, t in zip(*both, strict=True)]
    return Evaluation(values, maps)


class LocalFloors:
    """Floors (parity.py) of a loss's covariance: of its four views, which are rows of two maps.

    Equal rows add up in a map's gradient, and so may their roundings: the norm grows by the root of their number at most.
    """

    def __init__(
        self, maps: Sequence[Tensor], sets: Sequence[reference.Matches], per_slot: bool, unit: float
    ) -> None:
        self.value, self.gradient = 0.0, [0.0, 0.0]
        for direction, matches in enumerate(sets):
            which = (direction, 1 - direction)  # map of the queries, map of the candidates
            rows = [
                reference.gather_rows(maps[k].detach().double(), index)
                for k, index in zip(which, matches, strict=True)
            ]
            rows = [(z.transpose(0, 1) if per_slot else z).requires_grad_() for z in rows]
            cov = reference.vicreg_terms(*rows).cov
            grads = torch.autograd.grad(cov, rows)
            for k, index, z, grad in zip(which, matches, rows, grads, strict=True):
                floors = Floors(z, unit, grad)
                often = max(int(torch.bincount(image).max()) for image in index)
                self.value += floors.value / 2
                self.gradient[k] += floors.gradient / 2 * often**0.5


def assert_parity(
    maps: Sequence[Tensor],
    locations: Sequence[Tensor],
    counts: Counts,
    per_slot: bool,
    precision: str | None,
    unit: float,
    scale: float = 1.0,
    order: str = "distance",
) -> None:
    """error(fast) <= 2 * error(eager float32) + floors, for each term and its gradients."""
    plan = local_views(counts)._replace(
        backend="triton", precision=precision, per_slot=per_slot, match_order=order
    )
    sets = matches_of(plan, maps, locations)
    fast = of_kernels(plan, maps, locations, scale)
    eager = of_reference(maps, sets, per_slot, SINGLE)
    truth = of_reference(maps, sets, per_slot, torch.float64)
    for part, name in enumerate(PARTS):
        floors = LocalFloors(maps, sets[2 * part : 2 * part + 2], per_slot, unit)
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
