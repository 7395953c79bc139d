"""Rows that problems are made of: what is read, where gradients go, in any layout and in any blocks."""

import pytest
import torch
from torch import Tensor

from vicreg_fast import VICRegLLoss
from vicreg_fast.backends.aten import blocks
from vicreg_fast.rows import WHOLE, Block, Rows

IMAGES, PATCHES, CHANNELS, MATCHES = 6, 9, 600, 4


def test_what_is_read_is_added_back() -> None:
    source = torch.randn(4, 6, 5)
    patch = torch.tensor([[0, 3, 3], [5, 1, 0], [2, 2, 2], [4, 0, 1]])
    for rows in (Rows(source, patch), Rows(source, patch.t(), across=True)):
        total = torch.zeros_like(source)
        rows.add(total, WHOLE, rows.read(WHOLE))
        times = torch.zeros(4, 6).scatter_add_(1, patch, torch.ones(4, 3))
        torch.testing.assert_close(total, source * times[..., None], rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("across", [False, True], ids=["image", "slot"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_read_their_part(layout: str, across: bool) -> None:
    z = torch.randn(4, 6, 10)
    patch = torch.randint(6, (4, 3))
    rows = Rows(LAYOUTS[layout](z), patch.t() if across else patch, across)
    whole = torch.stack([image[chosen] for image, chosen in zip(z, patch, strict=True)])
    whole = whole.transpose(0, 1) if across else whole
    assert torch.equal(rows.read(WHOLE), whole)
    block = Block(slice(1, 3), slice(0, 2), slice(4, 9))
    assert torch.equal(rows.read(block), whole[block])


@pytest.mark.parametrize("small", [False, True], ids=["one block", "several"])
@pytest.mark.parametrize("statistics", ["image", "slot"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_local_loss(layout: str, statistics: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:
        monkeypatch.setattr(blocks, "CACHE_ELEMENTS", 1 << 12)
        assert any(len(parts) > 1 for _, parts in blocks.blocks(IMAGES, MATCHES, CHANNELS, 9, 0))
    maps = [torch.randn(IMAGES, PATCHES, CHANNELS, dtype=torch.float64) for _ in range(2)]
    places = [torch.rand(IMAGES, PATCHES, 2, dtype=torch.float64) for _ in range(2)]
    results = []
    for backend, arrange in (("reference", torch.clone), ("aten", LAYOUTS[layout])):
        loss = VICRegLLoss(MATCHES, alpha=0.0, statistics=statistics, backend=backend)
        inputs = [arrange(z).detach().requires_grad_() for z in maps]
        value = loss(*inputs, None, None, *places)["loss"]
        results.append([value.detach(), *torch.autograd.grad(value, inputs)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
