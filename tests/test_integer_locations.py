"""Integer locations give the same losses and matches as floating ones, and stay exact where float32 would not."""

import pytest
import torch

from vicreg_fast import VICRegLLoss, functional

from .check_arguments import BACKENDS, B, C, P, local_arguments, local_loss
from .data import seeded_randn

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def integer_locations(seed, coordinates=2):
    return torch.randint(0, 9, (B, P, coordinates), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("coordinates", [2, 3])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_locations_equal_float_locations(dtype, coordinates, backend):
    l1, l2 = integer_locations(7, coordinates), integer_locations(8, coordinates)
    loss = local_loss(3, backend=backend)
    as_integers = loss(**local_arguments(x1_locations=l1.to(dtype), x2_locations=l2.to(dtype)))
    as_floats = loss(**local_arguments(x1_locations=l1.float(), x2_locations=l2.float()))
    assert {k: v.item() for k, v in as_integers.items()} == {k: v.item() for k, v in as_floats.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_locations_stay_exact(backend):
    # Neighbours that are equal in float32: 2^24 + 1 has 25 binary digits.
    place = torch.tensor([[[2**24, 0], [2**24 + 1, 0], [0, 2**24]]])
    maps = [seeded_randn(1, 3, C, seed=seed) for seed in (1, 2)]
    loss = VICRegLLoss(3, alpha=0.0, backend=backend)
    invariance = loss(*maps, None, None, place, place)["location/inv-loss"]
    expected = 25 * (maps[0] - maps[1]).double().square().mean()
    # The loss is in float32; wrong matches change it by a third.
    assert invariance.item() == pytest.approx(expected.item(), rel=1e-6)


def test_integer_and_float_locations_mix():
    l1, l2 = integer_locations(7), integer_locations(8)
    loss = local_loss(3)
    mixed = loss(**local_arguments(x1_locations=l1, x2_locations=l2.double()))
    floats = loss(**local_arguments(x1_locations=l1.float(), x2_locations=l2.float()))
    assert {k: v.item() for k, v in mixed.items()} == {k: v.item() for k, v in floats.items()}


def test_match_patches_takes_integers():
    places = integer_locations(7), integer_locations(8)
    expected = functional.match_patches(*(place.double() for place in places))
    for actual, truth in zip(functional.match_patches(*places), expected, strict=True):
        assert torch.equal(actual, truth)
