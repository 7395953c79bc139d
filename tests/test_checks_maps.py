"""Bad maps, locations and global embeddings of VICRegLLoss are refused by name, unless alpha makes them unused."""

import pytest
import torch

from .check_arguments import BACKENDS, BAD, NOT_FLOATING, B, C, D, P, local_arguments, local_loss, of_type
from .data import seeded_randn

LOCAL_ERRORS = {
    "x1_maps-none": ({"x1_maps": None}, r"x1_maps needs a tensor of shape \(B, P, C\), got NoneType"),
    "x2_maps-list": ({"x2_maps": [1.0]}, r"x2_maps needs a tensor of shape \(B, P, C\), got list"),
    "x1_locations-none": ({"x1_locations": None}, r"x1_locations needs a tensor of shape .*, got NoneType"),
    "x2_locations-float": ({"x2_locations": 0.5}, r"x2_locations needs a tensor of shape .*, got float"),
    "x1_glob-none": ({"x1_glob": None}, r"x1_glob needs a tensor of shape \(N, D\), got NoneType"),
    "x2_glob-list": ({"x2_glob": [1.0]}, r"x2_glob needs a tensor of shape \(N, D\), got list"),
    "x1_maps-2d": ({"x1_maps": seeded_randn(B, P)}, r"x1_maps needs shape \(B, P, C\), got \(3, 6\)"),
    "x2_maps-4d": (
        {"x2_maps": seeded_randn(B, C, 2, 3)},
        r"x2_maps needs shape \(B, P, C\), got \(3, 5, 2, 3\)",
    ),
    "x2_maps-other-images": (
        {"x2_maps": seeded_randn(2, P, C)},
        r"x2_maps needs the images.*x1_maps.*, got .*\(2, 6, 5\)",
    ),
    "x2_maps-other-channels": (
        {"x2_maps": seeded_randn(B, P, 4)},
        r"x2_maps needs .*x1_maps.*, got .*\(3, 6, 4\)",
    ),
    "maps-no-image": (
        {"x1_maps": seeded_randn(0, P, C), "x2_maps": seeded_randn(0, P, C)},
        r"x1_maps needs at least 1 image.*, got shape \(0, 6, 5\)",
    ),
    "maps-no-channel": (
        {"x1_maps": seeded_randn(B, P, 0), "x2_maps": seeded_randn(B, P, 0)},
        r"x1_maps needs at least 1 .*channel, got shape \(3, 6, 0\)",
    ),
    "x2_maps-no-patch": (
        {"x2_maps": seeded_randn(B, 0, C)},
        r"x2_maps needs at least 1 .*patch.*, got shape \(3, 0, 5\)",
    ),
    "x1_locations-2d": ({"x1_locations": seeded_randn(P, 2)}, r"x1_locations needs shape .*, got \(6, 2\)"),
    "x2_locations-4d": (
        {"x2_locations": seeded_randn(B, 2, 3, 2)},
        r"x2_locations needs shape .*, got \(3, 2, 3, 2\)",
    ),
    "x1_locations-other-images": (
        {"x1_locations": seeded_randn(1, P, 2)},
        r"x1_locations needs the images and patches of x1_maps.*, got .*\(1, 6, 2\)",
    ),
    "x2_locations-other-patches": (
        {"x2_locations": seeded_randn(B, 5, 2)},
        r"x2_locations needs the images and patches of x2_maps.*, got .*\(3, 5, 2\)",
    ),
    "locations-1-coordinate": (
        {"x1_locations": seeded_randn(B, P, 1), "x2_locations": seeded_randn(B, P, 1)},
        r"x1_locations needs 2 or 3 coordinates .*, got \(3, 6, 1\)",
    ),
    "locations-4-coordinates": (
        {"x1_locations": seeded_randn(B, P, 4), "x2_locations": seeded_randn(B, P, 4)},
        r"x1_locations needs 2 or 3 coordinates .*, got \(3, 6, 4\)",
    ),
    "locations-2-and-3-coordinates": (
        {"x2_locations": seeded_randn(B, P, 3)},
        r"x2_locations needs the coordinates of x1_locations.*, got .*\(3, 6, 3\)",
    ),
    "x2_maps-meta": (
        {"x2_maps": torch.empty(B, P, C, device="meta")},
        r"x2_maps needs .*x1_maps, cpu, got meta",
    ),
    "x1_locations-meta": (
        {"x1_locations": torch.empty(B, P, 2, device="meta")},
        r"x1_locations needs the device of x1_maps, cpu, got meta",
    ),
    "x2_locations-meta": (
        {"x2_locations": torch.empty(B, P, 2, device="meta")},
        r"x2_locations needs the device of x1_maps, cpu, got meta",
    ),
    "x2_glob-meta": ({"x2_glob": torch.empty(B, D, device="meta")}, r"x2_glob needs .*x1_glob, cpu, got meta"),
    "x2_glob-other-features": (
        {"x2_glob": seeded_randn(B, 3)},
        r"x2_glob needs .*x1_glob, \(3, 4\), got \(3, 3\)",
    ),
    "globals-3d": (
        {"x1_glob": seeded_randn(1, B, D), "x2_glob": seeded_randn(1, B, D)},
        r"x1_glob needs shape \(N, D\), got \(1, 3, 4\)",
    ),
    "globals-one-sample": (
        {"x1_glob": seeded_randn(1, D), "x2_glob": seeded_randn(1, D)},
        r"x1_glob needs at least 2 samples .*, got 1",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("changed", "message"), LOCAL_ERRORS.values(), ids=LOCAL_ERRORS.keys())
def test_vicregl_refuses_argument(changed, message, backend):
    with pytest.raises(BAD, match=message):
        local_loss(backend=backend)(**local_arguments(**changed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vicregl_refuses_globals_on_another_device(backend):
    globals_ = {name: torch.empty(B, 4, device="meta") for name in ("x1_glob", "x2_glob")}
    with pytest.raises(ValueError, match="x1_glob needs the device of x1_maps, cpu, got meta"):
        local_loss(backend=backend)(**local_arguments(**globals_))


@pytest.mark.parametrize("name", ["x1_maps", "x2_maps", "x1_glob", "x2_glob"])
@pytest.mark.parametrize("dtype", NOT_FLOATING, ids=str)
def test_vicregl_refuses_dtype(name, dtype):
    arguments = local_arguments()
    arguments[name] = of_type(dtype, *arguments[name].shape)
    with pytest.raises(TypeError, match=rf"{name} needs dtype .*float32.*, got {str(dtype)[6:]}"):
        local_loss()(**arguments)


@pytest.mark.parametrize("name", ["x1_locations", "x2_locations"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64], ids=str)
def test_vicregl_refuses_dtype_of_locations(name, dtype):
    with pytest.raises(TypeError, match=rf"{name} needs dtype .*, got {str(dtype)[6:]}"):
        local_loss()(**local_arguments(**{name: of_type(dtype, B, P, 2)}))


# -- arguments that alpha makes unused --------------------------------------------------------------------------


UNUSED = {"none": None, "string": "unused", "wrong-shape": seeded_randn(1)}


@pytest.mark.parametrize("value", UNUSED.values(), ids=UNUSED.keys())
def test_alpha_0_ignores_globals(value):
    expected = local_loss(alpha=0.0)(**local_arguments())["loss"]
    actual = local_loss(alpha=0.0)(**local_arguments(x1_glob=value, x2_glob=value))["loss"]
    assert actual.item() == expected.item()


def test_alpha_0_globals_may_be_left_out():
    arguments = {k: v for k, v in local_arguments().items() if "glob" not in k}
    assert local_loss(alpha=0.0)(**arguments)["loss"].isfinite()


@pytest.mark.parametrize("value", UNUSED.values(), ids=UNUSED.keys())
def test_alpha_1_ignores_maps_and_locations(value):
    names = ("x1_maps", "x2_maps", "x1_locations", "x2_locations")
    expected = local_loss(alpha=1.0)(**local_arguments())["loss"]
    actual = local_loss(alpha=1.0)(**local_arguments(**dict.fromkeys(names, value)))["loss"]
    assert actual.item() == expected.item()


def test_alpha_1_maps_and_locations_may_be_left_out():
    arguments = {k: v for k, v in local_arguments().items() if "glob" in k}
    assert local_loss(alpha=1.0)(**arguments)["loss"].isfinite()
