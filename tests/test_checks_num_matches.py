"""Values of alpha and num_matches that are refused by name, and values that are accepted."""

import math

import pytest
import torch

from vicreg_fast import VICRegLLoss

from .check_arguments import BACKENDS, B, C, P, local_arguments, local_loss
from .data import seeded_randn


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, -math.inf], ids=str)
def test_alpha_outside_its_interval(value):
    with pytest.raises(ValueError, match=rf"alpha needs a number in \[0, 1\], got {value}"):
        VICRegLLoss(alpha=value)


@pytest.mark.parametrize(
    "value", [torch.tensor(0.5), "0.5", None, True], ids=["tensor", "string", "none", "bool"]
)
def test_alpha_of_another_type(value):
    with pytest.raises(TypeError, match=r"alpha needs a .*number in \[0, 1\], got"):
        VICRegLLoss(alpha=value)


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0])
def test_alpha_may_be_an_end_of_its_interval(value):
    assert VICRegLLoss(alpha=value).alpha == value


@pytest.mark.parametrize("statistics", ["image", "slot"])
@pytest.mark.parametrize(
    "value",
    [2.5, 2.0, "3", True, torch.tensor(3), torch.tensor([3, 4]), (3, 2.5), [True, 3], (None, 3)],
    ids=["2.5", "2.0", "str", "bool", "tensor", "tensor-of-two", "pair", "list", "none-in-pair"],
)
def test_num_matches_of_another_type(value, statistics):
    with pytest.raises(TypeError, match="num_matches needs a whole number, a pair of them or None, got"):
        VICRegLLoss(num_matches=value, statistics=statistics)


@pytest.mark.parametrize("value", [(), (3,), [2, 3, 4]], ids=str)
def test_num_matches_of_other_than_two_directions(value):
    with pytest.raises(ValueError, match=rf"num_matches needs .* a pair of them .*, got {len(value)} numbers"):
        VICRegLLoss(num_matches=value)


@pytest.mark.parametrize("value", [(1, 4), (4, 1)], ids=str)
def test_num_matches_of_one_direction_below_two(value):
    with pytest.raises(ValueError, match=r"num_matches needs to be at least 2 .*image.*, got 1"):
        VICRegLLoss(num_matches=value)


@pytest.mark.parametrize("value", [1, 0, -3])
def test_num_matches_below_two_samples_an_image(value):
    with pytest.raises(ValueError, match=f"num_matches needs to be at least 2 .*image.*, got {value}"):
        VICRegLLoss(num_matches=value)


@pytest.mark.parametrize("value", [0, -1])
def test_num_matches_below_one_match_slot(value):
    with pytest.raises(ValueError, match=f"num_matches needs to be at least 1, got {value}"):
        VICRegLLoss(num_matches=value, statistics="slot")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_match_slot_is_enough(backend):
    losses = local_loss(1, statistics="slot", backend=backend)(**local_arguments())
    assert losses["loss"].isfinite()


@pytest.mark.parametrize("side", ["1", "2"])
@pytest.mark.parametrize("statistics", ["image", "slot"])
def test_fewer_patches_than_matches(side, statistics):
    small = {f"x{side}_maps": seeded_randn(B, 4, C), f"x{side}_locations": seeded_randn(B, 4, 2)}
    with pytest.raises(ValueError, match=rf"num_matches=5 needs .*x{side}_maps, got shape \(3, 4, 5\)"):
        local_loss(5, statistics=statistics)(**local_arguments(**small))


@pytest.mark.parametrize("statistics", ["image", "slot"])
def test_fewer_patches_than_a_direction_has_matches(statistics):
    fewer = {"x2_maps": seeded_randn(B, 4, C), "x2_locations": seeded_randn(B, 4, 2)}
    local_loss((5, 4), statistics=statistics)(**local_arguments(**fewer))
    with pytest.raises(ValueError, match=r"num_matches=5 needs .*x2_maps, got shape \(3, 4, 5\)"):
        local_loss((4, 5), statistics=statistics)(**local_arguments(**fewer))


def test_all_matches_of_one_patch_an_image():
    one = {"x2_maps": seeded_randn(B, 1, C), "x2_locations": seeded_randn(B, 1, 2)}
    local_loss(None, statistics="slot")(**local_arguments(**one))
    with pytest.raises(ValueError, match=r"x2_maps needs at least 2 patches .*image.*, got \(3, 1, 5\)"):
        local_loss(None)(**local_arguments(**one))


def test_as_many_patches_as_matches():
    assert local_loss(P)(**local_arguments())["loss"].isfinite()


def test_slot_statistics_need_two_images():
    one = {name: tensor[:1] for name, tensor in local_arguments().items()}
    with pytest.raises(ValueError, match=r"x1_maps needs at least 2 samples .*, got 1"):
        local_loss(alpha=0.0, statistics="slot")(**one)


def test_image_statistics_need_one_image():
    one = {name: tensor[:1] for name, tensor in local_arguments().items()}
    assert local_loss(alpha=0.0)(**one)["loss"].isfinite()
