"""Rows: which elements are read, and where gradients are added, in any layout and any blocks."""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from vicreg_fast import VICRegLLoss
from vicreg_fast.backends.aten import blocks
from vicreg_fast.rows import FULL_VIEW, Block, Rows
from vicreg_fast.sides import keeps_moments, uses_dual

from .data import assert_exact

IMAGES, PATCHES, MATCHES = 6, 15, 14
# (P, N) of the matched rows.  At 600 channels per slot the forward pass saves M and no moments.
PROBLEMS = {"image": (IMAGES, MATCHES), "slot": (MATCHES, IMAGES)}
CHANNELS = {"dual": 600, "primal": 4}


def test_shapes_are_of_both_sides() -> None:
    for P, N in PROBLEMS.values():
        for side, D in CHANNELS.items():
            assert uses_dual(P, N, D) == (side == "dual")
    saved = {statistics: keeps_moments(*PN, CHANNELS["dual"]) for statistics, PN in PROBLEMS.items()}
    assert saved == {"image": True, "slot": False}


def test_add_is_the_adjoint_of_read() -> None:
    source = torch.randint(-9, 10, (4, 6, 5)).float()  # sums of integers are exact
    patch = torch.tensor([[0, 3, 3], [5, 1, 0], [2, 2, 2], [4, 0, 1]])
    for rows in (Rows(source, patch), Rows(source, patch.t(), per_slot=True)):
        total = torch.zeros_like(source)
        rows.add(total, FULL_VIEW, rows.read(FULL_VIEW))
        counts = torch.zeros(4, 6).scatter_add_(1, patch, torch.ones(4, 3))
        assert torch.equal(total, source * counts[..., None])


def channels_first(z: Tensor) -> Tensor:
    return z.mT.contiguous().mT


def every_other_patch(z: Tensor) -> Tensor:
    return torch.stack((z, torch.full_like(z, torch.nan)), dim=2).flatten(1, 2)[:, ::2]


def part_of_the_channels(z: Tensor) -> Tensor:
    return torch.cat((z, torch.full_like(z, torch.nan)), dim=2)[..., : z.shape[2]]


LAYOUTS = {
    "contiguous": torch.clone,
    "channels-first": channels_first,
    "every other patch": every_other_patch,
    "part of the channels": part_of_the_channels,
}


@pytest.mark.parametrize("per_slot", [False, True], ids=["image", "slot"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_read_their_part(layout: str, per_slot: bool) -> None:
    z = torch.randn(4, 6, 10)
    patch = torch.randint(6, (4, 3))
    rows = Rows(LAYOUTS[layout](z), patch.t() if per_slot else patch, per_slot)
    whole = torch.stack([image[chosen] for image, chosen in zip(z, patch, strict=True)])
    whole = whole.transpose(0, 1) if per_slot else whole
    assert torch.equal(rows.read(FULL_VIEW), whole)
    block = Block(slice(1, 3), slice(0, 2), slice(4, 9))
    assert torch.equal(rows.read(block), whole[block])


@pytest.mark.parametrize(
    ("V", "P", "N", "D"), [(2, 1, 5, 3), (4, 300, 10, 512), (2, 3, 4000, 900), (1, 2, 9, 70000)]
)
def test_blocks_cover_every_element_once(V: int, P: int, N: int, D: int) -> None:
    groups = list(blocks.blocks(P, N, D, V, 0))
    seen = torch.zeros(P, N, D, dtype=torch.int8)
    for group, parts in groups:
        for part in parts:
            assert part.problems == group
            assert (part is FULL_VIEW) == (len(groups) == len(parts) == 1)
            seen[part.problems, part.rows, part.features] += 1
    assert (seen == 1).all()


@lru_cache
def inputs(channels: int) -> tuple[list[Tensor], list[Tensor]]:
    """Two maps and their patches' locations."""
    generator = torch.Generator().manual_seed(0)
    shape = {"generator": generator, "dtype": torch.float64}
    maps = [torch.randn(IMAGES, PATCHES, channels, **shape) for _ in range(2)]
    return maps, [torch.rand(IMAGES, PATCHES, 2, **shape) for _ in range(2)]


def evaluate(loss: VICRegLLoss, maps: list[Tensor], locations: list[Tensor]) -> list[Tensor]:
    """The local loss and its gradients of both maps."""
    leaves = [z.detach().requires_grad_() for z in maps]  # detach() keeps the layout
    value = loss(*leaves, None, None, *locations)["loss"]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@lru_cache
def truth(channels: int, statistics: str) -> list[Tensor]:
    loss = VICRegLLoss(MATCHES, alpha=0.0, statistics=statistics, backend="reference")
    return evaluate(loss, *inputs(channels))


@pytest.mark.parametrize("cut", [False, True], ids=["one block", "several"])
@pytest.mark.parametrize("side", CHANNELS)
@pytest.mark.parametrize("statistics", PROBLEMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_local_loss(
    layout: str, statistics: str, side: str, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = CHANNELS[side]
    if cut:
        monkeypatch.setattr(blocks, "CACHE_ELEMENTS", 64)
        monkeypatch.setattr(blocks, "MIN_INNER", 256 if side == "dual" else 4)
        parts = [parts for _, parts in blocks.blocks(*PROBLEMS[statistics], channels, 8, 0)]
        assert all(len(part) > 1 for part in parts)
    maps, locations = inputs(channels)
    loss = VICRegLLoss(MATCHES, alpha=0.0, statistics=statistics, backend="aten")
    actual = evaluate(loss, [LAYOUTS[layout](z) for z in maps], locations)
    assert_exact(actual, truth(channels, statistics))
