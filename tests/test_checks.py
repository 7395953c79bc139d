"""Bad input is refused by name; numbers that are not finite come out as such."""

import math

import pytest
import torch

from vicreg_fast import VICRegLLoss, VICRegLoss, functional
from vicreg_fast.backends.aten import blocks

BAD = (TypeError, ValueError)
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
BACKENDS = ("aten", "reference")
B, P, C, D = 3, 6, 5, 4


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_type(dtype, *shape):
    return randn(*shape).abs().mul(10).to(dtype)


def local_arguments(**changed):
    """Good arguments of VICRegLLoss with some replaced."""
    good = {
        "x1_maps": randn(B, P, C, seed=1),
        "x2_maps": randn(B, P, C, seed=2),
        "x1_glob": randn(B, D, seed=3),
        "x2_glob": randn(B, D, seed=4),
        "x1_locations": randn(B, P, 2, seed=5),
        "x2_locations": randn(B, P, 2, seed=6),
    }
    return good | changed


def local_loss(num_matches=2, alpha=0.5, **options):
    return VICRegLLoss(num_matches, alpha, **options)


# -- VICRegLoss: the two views ---------------------------------------------------------------------------------

VIEW_ERRORS = {
    "x-list": ([[1.0], [2.0]], randn(2, 1), r"x needs a tensor of shape \(N, D\), got list"),
    "x-none": (None, randn(2, 1), r"x needs a tensor of shape \(N, D\), got NoneType"),
    "y-float": (randn(2, 1), 1.0, r"y needs a tensor of shape \(N, D\), got float"),
    "y-other-features": (randn(4, 3), randn(4, 2), r"y needs the shape of x, \(4, 3\), got \(4, 2\)"),
    "y-other-samples": (randn(4, 3), randn(5, 3), r"y needs the shape of x, \(4, 3\), got \(5, 3\)"),
    "y-would-broadcast": (randn(4, 3), randn(1, 3), r"y needs the shape of x, \(4, 3\), got \(1, 3\)"),
    "x-one-dimension": (randn(4), randn(4), r"x needs shape \(N, D\), got \(4,\)"),
    "x-three-dimensions": (randn(2, 4, 3), randn(2, 4, 3), r"x needs shape \(N, D\), got \(2, 4, 3\)"),
    "y-three-dimensions": (randn(4, 3), randn(1, 4, 3), r"y needs shape \(N, D\), got \(1, 4, 3\)"),
    "one-sample": (randn(1, 3), randn(1, 3), r"x needs at least 2 samples .*, got 1"),
    "no-sample": (randn(0, 3), randn(0, 3), r"x needs at least 2 samples .*, got 0"),
    "no-feature": (randn(4, 0), randn(4, 0), r"x needs at least 1 feature, got shape \(4, 0\)"),
    "y-meta": (randn(4, 3), torch.empty(4, 3, device="meta"), r"y needs the device of x, cpu, got meta"),
    "x-meta": (torch.empty(4, 3, device="meta"), randn(4, 3), r"y needs the device of x, meta, got cpu"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("x", "y", "message"), VIEW_ERRORS.values(), ids=VIEW_ERRORS.keys())
def test_vicreg_refuses_views(x, y, message, backend):
    with pytest.raises(BAD, match=message):
        VICRegLoss(backend=backend)(x, y)


NOT_FLOATING = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128)


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("dtype", NOT_FLOATING, ids=str)
def test_vicreg_refuses_types_of_number(dtype, name):
    views = {"x": randn(4, 3), "y": randn(4, 3)} | {name: of_type(dtype, 4, 3)}
    with pytest.raises(TypeError, match=rf"{name} needs dtype .*float32.*, got {str(dtype)[6:]}"):
        VICRegLoss()(**views)


def test_vicreg_takes_two_samples_of_one_feature():
    losses = VICRegLoss()(randn(2, 1), randn(2, 1, seed=1))
    assert losses["loss"].isfinite()


# -- constructors and attributes --------------------------------------------------------------------------------

LOSSES = {"VICRegLoss": VICRegLoss, "VICRegLLoss": VICRegLLoss}
both_losses = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())

NUMBER_ERRORS = {
    "nan": (math.nan, ValueError, "needs a finite number.*, got nan"),
    "inf": (math.inf, ValueError, "needs a finite number.*, got inf"),
    "beyond-floats": (10**400, ValueError, "needs a finite number.*, got inf"),
    "-inf": (-math.inf, ValueError, "needs a finite number.*, got -inf"),
    "string": ("25", TypeError, "needs a number.*, got str '25'"),
    "none": (None, TypeError, "needs a number.*, got NoneType None"),
    "bool": (True, TypeError, "needs a number.*, got bool True"),
    "complex": (1j, TypeError, "needs a number.*, got complex 1j"),
}
COEFFICIENT_ERRORS = NUMBER_ERRORS | {
    "nan-tensor": (torch.tensor(math.nan), ValueError, "needs a finite number, got nan"),
    "inf-tensor": (torch.tensor(math.inf), ValueError, "needs a finite number, got inf"),
    "two-elements": (torch.ones(2), ValueError, r"needs .*one element, got a tensor of shape \(2,\)"),
    "complex-tensor": (torch.tensor(1j), ValueError, "needs .*, got .* of torch.complex64"),
}
GAMMA_EPS_ERRORS = NUMBER_ERRORS | {
    "negative": (-0.1, ValueError, "needs a finite number >= 0, got -0.1"),
    "tensor": (torch.tensor(1.0), TypeError, r"needs a Python number, got a tensor of shape \(\)"),
}


@both_losses
@pytest.mark.parametrize("name", ["inv_coeff", "var_coeff", "cov_coeff"])
@pytest.mark.parametrize(
    ("value", "error", "message"), COEFFICIENT_ERRORS.values(), ids=COEFFICIENT_ERRORS.keys()
)
def test_constructor_refuses_coefficient(make, name, value, error, message):
    with pytest.raises(error, match=f"{name} {message}"):
        make(**{name: value})


@both_losses
@pytest.mark.parametrize("name", ["gamma", "eps"])
@pytest.mark.parametrize(("value", "error", "message"), GAMMA_EPS_ERRORS.values(), ids=GAMMA_EPS_ERRORS.keys())
def test_constructor_refuses_gamma_and_eps(make, name, value, error, message):
    with pytest.raises(error, match=f"{name} {message}"):
        make(**{name: value})


CHOICE_ERRORS = {
    "backend-unknown": ("backend", "cuda", r"backend needs one of 'auto', .*, got 'cuda'"),
    "backend-none": ("backend", None, r"backend needs one of 'auto', .*, got None"),
    "precision-unknown": ("precision", "low", r"precision needs one of None, .*, got 'low'"),
    "precision-number": ("precision", 1, r"precision needs one of None, .*, got 1"),
}
LOCAL_CHOICE_ERRORS = {
    "statistics-unknown": ("statistics", "batch", r"statistics needs one of 'image', 'slot', got 'batch'"),
    "statistics-none": ("statistics", None, r"statistics needs one of 'image', 'slot', got None"),
    "order-unknown": ("match_order", "random", r"match_order needs one of 'distance', 'patch', got 'random'"),
    "order-none": ("match_order", None, r"match_order needs one of 'distance', 'patch', got None"),
}


@both_losses
@pytest.mark.parametrize(("name", "value", "message"), CHOICE_ERRORS.values(), ids=CHOICE_ERRORS.keys())
def test_constructor_refuses_choice(make, name, value, message):
    with pytest.raises(ValueError, match=message):
        make(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"), LOCAL_CHOICE_ERRORS.values(), ids=LOCAL_CHOICE_ERRORS.keys()
)
def test_local_constructor_refuses_choice(name, value, message):
    with pytest.raises(ValueError, match=message):
        VICRegLLoss(**{name: value})


ATTRIBUTE_ERRORS = {
    "inv_coeff-nan": ("inv_coeff", math.nan, "inv_coeff needs a finite number, got nan"),
    "var_coeff-inf": ("var_coeff", math.inf, "var_coeff needs a finite number, got inf"),
    "cov_coeff-nan-tensor": ("cov_coeff", torch.tensor(math.nan), "cov_coeff needs a finite number, got nan"),
    "cov_coeff-string": ("cov_coeff", "1", "cov_coeff needs a number or a tensor, got str '1'"),
    "gamma-negative": ("gamma", -1.0, "gamma needs a finite number >= 0, got -1.0"),
    "gamma-nan": ("gamma", math.nan, "gamma needs a finite number >= 0, got nan"),
    "eps-negative": ("eps", -1e-4, "eps needs a finite number >= 0, got -0.0001"),
    "backend-unknown": ("backend", "cuda", "backend needs one of .*, got 'cuda'"),
    "precision-unknown": ("precision", "low", "precision needs one of .*, got 'low'"),
}
LOCAL_ATTRIBUTE_ERRORS = ATTRIBUTE_ERRORS | {
    "alpha-large": ("alpha", 1.5, r"alpha needs a number in \[0, 1\], got 1.5"),
    "alpha-nan": ("alpha", math.nan, r"alpha needs a number in \[0, 1\], got nan"),
    "num_matches-one": ("num_matches", 1, "num_matches needs to be at least 2 .*, got 1"),
    "num_matches-fraction": (
        "num_matches",
        2.5,
        "num_matches needs a whole number, a pair of them or None, got float 2.5",
    ),
    "statistics-unknown": ("statistics", "batch", "statistics needs one of .*, got 'batch'"),
    "order-unknown": ("match_order", "random", "match_order needs one of .*, got 'random'"),
}


@pytest.mark.parametrize(("name", "value", "message"), ATTRIBUTE_ERRORS.values(), ids=ATTRIBUTE_ERRORS.keys())
def test_vicreg_refuses_attribute_set_later(name, value, message):
    loss = VICRegLoss()
    setattr(loss, name, value)
    with pytest.raises(BAD, match=message):
        loss(randn(4, 3), randn(4, 3))


@pytest.mark.parametrize(
    ("name", "value", "message"), LOCAL_ATTRIBUTE_ERRORS.values(), ids=LOCAL_ATTRIBUTE_ERRORS.keys()
)
def test_vicregl_refuses_attribute_set_later(name, value, message):
    loss = local_loss()
    setattr(loss, name, value)
    with pytest.raises(BAD, match=message):
        loss(**local_arguments())


@both_losses
@pytest.mark.parametrize("name", ["inv_coeff", "var_coeff", "cov_coeff"])
@pytest.mark.parametrize("value", [-2.0, 0.0, 3, torch.tensor(-2.0)], ids=["negative", "zero", "int", "tensor"])
def test_constructor_takes_finite_coefficient(make, name, value):
    assert getattr(make(**{name: value}), name) is value


@both_losses
@pytest.mark.parametrize("name", ["gamma", "eps"])
@pytest.mark.parametrize("value", [0.0, 0, 2])
def test_constructor_takes_nonnegative_gamma_and_eps(make, name, value):
    assert getattr(make(**{name: value}), name) == value


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
def test_alpha_may_be_the_ends_of_its_interval(value):
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


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_triton_on_the_cpu_vicregl(alpha, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' .*cpu"):
        local_loss(alpha=alpha, backend="triton")(**local_arguments())


TRITON_CALLS = {
    "VICRegLoss": lambda: VICRegLoss(backend="triton")(randn(4, 3), randn(4, 3)),
    "vicreg_terms": lambda: functional.vicreg_terms(randn(4, 3), randn(4, 3), backend="triton"),
    "variance_covariance": lambda: functional.variance_covariance(randn(4, 3), backend="triton"),
    "match_patches": lambda: functional.match_patches(randn(1, 4, 3), randn(1, 4, 3), backend="triton"),
}


@pytest.mark.parametrize("call", TRITON_CALLS.values(), ids=TRITON_CALLS.keys())
def test_triton_on_the_cpu(call, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' .*cpu"):
        call()


# -- VICRegLLoss: maps, locations, globals ----------------------------------------------------------------------

LOCAL_ERRORS = {
    "x1_maps-none": ({"x1_maps": None}, r"x1_maps needs a tensor of shape \(B, P, C\), got NoneType"),
    "x2_maps-list": ({"x2_maps": [1.0]}, r"x2_maps needs a tensor of shape \(B, P, C\), got list"),
    "x1_locations-none": ({"x1_locations": None}, r"x1_locations needs a tensor of shape .*, got NoneType"),
    "x2_locations-float": ({"x2_locations": 0.5}, r"x2_locations needs a tensor of shape .*, got float"),
    "x1_glob-none": ({"x1_glob": None}, r"x1_glob needs a tensor of shape \(N, D\), got NoneType"),
    "x2_glob-list": ({"x2_glob": [1.0]}, r"x2_glob needs a tensor of shape \(N, D\), got list"),
    "x1_maps-2d": ({"x1_maps": randn(B, P)}, r"x1_maps needs shape \(B, P, C\), got \(3, 6\)"),
    "x2_maps-4d": ({"x2_maps": randn(B, C, 2, 3)}, r"x2_maps needs shape \(B, P, C\), got \(3, 5, 2, 3\)"),
    "x2_maps-other-images": (
        {"x2_maps": randn(2, P, C)},
        r"x2_maps needs the images.*x1_maps.*, got .*\(2, 6, 5\)",
    ),
    "x2_maps-other-channels": ({"x2_maps": randn(B, P, 4)}, r"x2_maps needs .*x1_maps.*, got .*\(3, 6, 4\)"),
    "maps-no-image": (
        {"x1_maps": randn(0, P, C), "x2_maps": randn(0, P, C)},
        r"x1_maps needs at least 1 image.*, got shape \(0, 6, 5\)",
    ),
    "maps-no-channel": (
        {"x1_maps": randn(B, P, 0), "x2_maps": randn(B, P, 0)},
        r"x1_maps needs at least 1 .*channel, got shape \(3, 6, 0\)",
    ),
    "x2_maps-no-patch": (
        {"x2_maps": randn(B, 0, C)},
        r"x2_maps needs at least 1 .*patch.*, got shape \(3, 0, 5\)",
    ),
    "x1_locations-2d": ({"x1_locations": randn(P, 2)}, r"x1_locations needs shape .*, got \(6, 2\)"),
    "x2_locations-4d": (
        {"x2_locations": randn(B, 2, 3, 2)},
        r"x2_locations needs shape .*, got \(3, 2, 3, 2\)",
    ),
    "x1_locations-other-images": (
        {"x1_locations": randn(1, P, 2)},
        r"x1_locations needs the images and patches of x1_maps.*, got .*\(1, 6, 2\)",
    ),
    "x2_locations-other-patches": (
        {"x2_locations": randn(B, 5, 2)},
        r"x2_locations needs the images and patches of x2_maps.*, got .*\(3, 5, 2\)",
    ),
    "locations-1-coordinate": (
        {"x1_locations": randn(B, P, 1), "x2_locations": randn(B, P, 1)},
        r"x1_locations needs 2 or 3 coordinates .*, got \(3, 6, 1\)",
    ),
    "locations-4-coordinates": (
        {"x1_locations": randn(B, P, 4), "x2_locations": randn(B, P, 4)},
        r"x1_locations needs 2 or 3 coordinates .*, got \(3, 6, 4\)",
    ),
    "locations-2-and-3-coordinates": (
        {"x2_locations": randn(B, P, 3)},
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
    "x2_glob-other-features": ({"x2_glob": randn(B, 3)}, r"x2_glob needs .*x1_glob, \(3, 4\), got \(3, 3\)"),
    "globals-3d": (
        {"x1_glob": randn(1, B, D), "x2_glob": randn(1, B, D)},
        r"x1_glob needs shape \(N, D\), got \(1, 3, 4\)",
    ),
    "globals-one-sample": (
        {"x1_glob": randn(1, D), "x2_glob": randn(1, D)},
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


@both_losses
@pytest.mark.parametrize("name", ["inv_coeff", "var_coeff", "cov_coeff"])
def test_refuses_coefficient_on_another_device(make, name):
    loss = make(**{name: torch.ones((), device="meta")})
    with pytest.raises(ValueError, match=f"{name} needs device cpu or that of the inputs, cpu, got meta"):
        loss(randn(B, 4), randn(B, 4)) if make is VICRegLoss else loss(**local_arguments())


@pytest.mark.parametrize("name", ["x1_maps", "x2_maps", "x1_glob", "x2_glob"])
@pytest.mark.parametrize("dtype", NOT_FLOATING, ids=str)
def test_vicregl_refuses_types_of_number(name, dtype):
    arguments = local_arguments()
    arguments[name] = of_type(dtype, *arguments[name].shape)
    with pytest.raises(TypeError, match=rf"{name} needs dtype .*float32.*, got {str(dtype)[6:]}"):
        local_loss()(**arguments)


@pytest.mark.parametrize("name", ["x1_locations", "x2_locations"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64], ids=str)
def test_vicregl_refuses_types_of_location(name, dtype):
    with pytest.raises(TypeError, match=rf"{name} needs dtype .*, got {str(dtype)[6:]}"):
        local_loss()(**local_arguments(**{name: of_type(dtype, B, P, 2)}))


@pytest.mark.parametrize("side", ["1", "2"])
@pytest.mark.parametrize("statistics", ["image", "slot"])
def test_fewer_patches_than_matches(side, statistics):
    small = {f"x{side}_maps": randn(B, 4, C), f"x{side}_locations": randn(B, 4, 2)}
    with pytest.raises(ValueError, match=rf"num_matches=5 needs .*x{side}_maps, got shape \(3, 4, 5\)"):
        local_loss(5, statistics=statistics)(**local_arguments(**small))


@pytest.mark.parametrize("statistics", ["image", "slot"])
def test_fewer_patches_than_a_direction_has_matches(statistics):
    fewer = {"x2_maps": randn(B, 4, C), "x2_locations": randn(B, 4, 2)}
    local_loss((5, 4), statistics=statistics)(**local_arguments(**fewer))
    with pytest.raises(ValueError, match=r"num_matches=5 needs .*x2_maps, got shape \(3, 4, 5\)"):
        local_loss((4, 5), statistics=statistics)(**local_arguments(**fewer))


def test_all_matches_of_one_patch_an_image():
    one = {"x2_maps": randn(B, 1, C), "x2_locations": randn(B, 1, 2)}
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


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def integer_locations(seed, coordinates=2):
    return torch.randint(0, 9, (B, P, coordinates), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("coordinates", [2, 3])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_locations_are_numbers(dtype, coordinates, backend):
    l1, l2 = integer_locations(7, coordinates), integer_locations(8, coordinates)
    loss = local_loss(3, backend=backend)
    as_integers = loss(**local_arguments(x1_locations=l1.to(dtype), x2_locations=l2.to(dtype)))
    as_floats = loss(**local_arguments(x1_locations=l1.float(), x2_locations=l2.float()))
    assert {k: v.item() for k, v in as_integers.items()} == {k: v.item() for k, v in as_floats.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_locations_stay_exact(backend):
    # Neighbours that float32 cannot tell apart: 2^24 + 1 has 25 digits.
    place = torch.tensor([[[2**24, 0], [2**24 + 1, 0], [0, 2**24]]])
    maps = [randn(1, 3, C, seed=seed) for seed in (1, 2)]
    loss = VICRegLLoss(3, alpha=0.0, backend=backend)
    found = loss(*maps, None, None, place, place)["location/inv-loss"]
    expected = (
        25 * (maps[0] - maps[1]).double().square().mean()
    )  # of float32: wrong matches change it by a third
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_match_patches_takes_whole_numbers():
    places = integer_locations(7), integer_locations(8)
    expected = functional.match_patches(*(place.double() for place in places))
    for found, true in zip(functional.match_patches(*places), expected, strict=True):
        assert torch.equal(found, true)


def not_dense(z):
    """The same numbers in the layouts that are no strided memory."""
    nested = torch.nested.nested_tensor(list(z))
    return {"sparse": z.to_sparse(), "mkldnn": z.float().to_mkldnn(), "nested": nested}


@pytest.mark.parametrize("layout", ["sparse", "mkldnn", "nested"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_refuses_what_is_not_dense(layout):
    z = not_dense(randn(4, 3))[layout]
    with pytest.raises(ValueError, match="x needs a dense tensor, got layout"):
        VICRegLoss()(z, randn(4, 3))
    with pytest.raises(ValueError, match="y needs a dense tensor, got layout"):
        functional.vicreg_terms(randn(4, 3), z)


def test_refuses_sparse_coefficient():
    with pytest.raises(ValueError, match="inv_coeff needs a dense tensor, got layout sparse_coo"):
        VICRegLoss(torch.ones(1).to_sparse())


@both_losses
@pytest.mark.parametrize("value", ["no", 1, None, torch.ones(2)], ids=["string", "number", "none", "tensor"])
def test_refuses_gather_distributed(make, value):
    with pytest.raises(TypeError, match="gather_distributed needs True or False, got"):
        make(gather_distributed=value)


@both_losses
def test_refuses_process_group(make):
    with pytest.raises(
        TypeError, match=r"process_group needs a torch\.distributed process group or None, got 'abc'"
    ):
        make(process_group="abc")


def test_integer_and_float_locations_mix():
    l1, l2 = integer_locations(7), integer_locations(8)
    loss = local_loss(3)
    mixed = loss(**local_arguments(x1_locations=l1, x2_locations=l2.double()))
    floats = loss(**local_arguments(x1_locations=l1.float(), x2_locations=l2.float()))
    assert {k: v.item() for k, v in mixed.items()} == {k: v.item() for k, v in floats.items()}


# -- only what alpha uses is checked ----------------------------------------------------------------------------

UNUSED = {"none": None, "string": "unused", "wrong-shape": randn(1)}


@pytest.mark.parametrize("value", UNUSED.values(), ids=UNUSED.keys())
def test_alpha_0_does_not_look_at_globals(value):
    expected = local_loss(alpha=0.0)(**local_arguments())["loss"]
    got = local_loss(alpha=0.0)(**local_arguments(x1_glob=value, x2_glob=value))["loss"]
    assert got.item() == expected.item()


def test_alpha_0_globals_may_be_left_out():
    arguments = {k: v for k, v in local_arguments().items() if "glob" not in k}
    assert local_loss(alpha=0.0)(**arguments)["loss"].isfinite()


@pytest.mark.parametrize("value", UNUSED.values(), ids=UNUSED.keys())
def test_alpha_1_does_not_look_at_maps_and_locations(value):
    names = ("x1_maps", "x2_maps", "x1_locations", "x2_locations")
    expected = local_loss(alpha=1.0)(**local_arguments())["loss"]
    got = local_loss(alpha=1.0)(**local_arguments(**dict.fromkeys(names, value)))["loss"]
    assert got.item() == expected.item()


def test_alpha_1_maps_and_locations_may_be_left_out():
    arguments = {k: v for k, v in local_arguments().items() if "glob" in k}
    assert local_loss(alpha=1.0)(**arguments)["loss"].isfinite()


# -- functions --------------------------------------------------------------------------------------------------

ONE_VIEW_ERRORS = {
    "list": ([[1.0], [2.0]], "needs a tensor of shape .*, got list"),
    "one-dimension": (randn(4), r"needs shape \(..., N, D\), got \(4,\)"),
    "one-sample": (randn(2, 1, 3), "needs at least 2 samples .*, got 1"),
    "no-feature": (randn(4, 0), r"needs at least 1 feature, got shape \(4, 0\)"),
    "no-problem": (randn(0, 4, 3), r"needs at least 1 problem .*, got \(0, 4, 3\)"),
    "int64": (of_type(torch.int64, 4, 3), "needs dtype .*, got int64"),
    "bool": (of_type(torch.bool, 4, 3), "needs dtype .*, got bool"),
    "complex64": (of_type(torch.complex64, 4, 3), "needs dtype .*, got complex64"),
}
ONE_VIEW_FUNCTIONS = {
    "variance_covariance": ("z", functional.variance_covariance),
    "vicreg_terms": ("x", lambda z: functional.vicreg_terms(z, z)),
    "VICRegLoss.variance_loss": ("x", lambda z: VICRegLoss.variance_loss(z, 1.0)),
    "VICRegLoss.covariance_loss": ("x", VICRegLoss.covariance_loss),
    "VICRegLLoss.variance_loss": ("x", lambda z: VICRegLLoss.variance_loss(z, 1.0)),
    "VICRegLLoss.covariance_loss": ("x", VICRegLLoss.covariance_loss),
}


@pytest.mark.parametrize(("name", "function"), ONE_VIEW_FUNCTIONS.values(), ids=ONE_VIEW_FUNCTIONS.keys())
@pytest.mark.parametrize(("z", "message"), ONE_VIEW_ERRORS.values(), ids=ONE_VIEW_ERRORS.keys())
def test_function_refuses_view(z, message, name, function):
    with pytest.raises(BAD, match=f"{name} {message}"):
        function(z)


TWO_VIEW_FUNCTIONS = {
    "vicreg_terms": functional.vicreg_terms,
    "representation_loss": VICRegLoss.representation_loss,
}
TWO_VIEW_ERRORS = {
    "y-none": (randn(4, 3), None, "y needs a tensor of shape .*, got NoneType"),
    "x-list": ([[1.0]], randn(4, 3), "x needs a tensor of shape .*, got list"),
    "shapes": (randn(4, 3), randn(4, 2), r"y needs the shape of x, \(4, 3\), got \(4, 2\)"),
    "would-broadcast": (randn(2, 4, 3), randn(4, 3), r"y needs the shape of x, \(2, 4, 3\), got \(4, 3\)"),
    "y-meta": (randn(4, 3), torch.empty(4, 3, device="meta"), "y needs the device of x, cpu, got meta"),
    "y-int64": (randn(4, 3), of_type(torch.int64, 4, 3), "y needs dtype .*, got int64"),
    "x-bool": (of_type(torch.bool, 4, 3), randn(4, 3), "x needs dtype .*, got bool"),
}


@pytest.mark.parametrize("function", TWO_VIEW_FUNCTIONS.values(), ids=TWO_VIEW_FUNCTIONS.keys())
@pytest.mark.parametrize(("x", "y", "message"), TWO_VIEW_ERRORS.values(), ids=TWO_VIEW_ERRORS.keys())
def test_function_refuses_views(x, y, message, function):
    with pytest.raises(BAD, match=message):
        function(x, y)


FUNCTIONS_WITH_OPTIONS = {
    "vicreg_terms": lambda **options: functional.vicreg_terms(randn(4, 3), randn(4, 3), **options),
    "variance_covariance": lambda **options: functional.variance_covariance(randn(4, 3), **options),
}
OPTION_ERRORS = {
    "gamma-negative": ({"gamma": -1.0}, "gamma needs a finite number >= 0, got -1.0"),
    "gamma-nan": ({"gamma": math.nan}, "gamma needs a finite number >= 0, got nan"),
    "gamma-tensor": ({"gamma": torch.tensor(1.0)}, "gamma needs a Python number, got a tensor"),
    "eps-negative": ({"eps": -1e-4}, "eps needs a finite number >= 0, got -0.0001"),
    "eps-string": ({"eps": "0"}, "eps needs a number, got str '0'"),
    "backend-unknown": ({"backend": "cuda"}, "backend needs one of .*, got 'cuda'"),
    "precision-unknown": ({"precision": "low"}, "precision needs one of .*, got 'low'"),
}


@pytest.mark.parametrize("function", FUNCTIONS_WITH_OPTIONS.values(), ids=FUNCTIONS_WITH_OPTIONS.keys())
@pytest.mark.parametrize(("options", "message"), OPTION_ERRORS.values(), ids=OPTION_ERRORS.keys())
def test_function_refuses_option(function, options, message):
    with pytest.raises(BAD, match=message):
        function(**options)


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("gamma", [-1.0, math.nan, None], ids=str)
def test_variance_loss_refuses_gamma(make, gamma):
    with pytest.raises(BAD, match=r"gamma needs a .*number.*, got"):
        make.variance_loss(randn(4, 3), gamma)


MATCH_ERRORS = {
    "queries-list": ({"queries": [1.0]}, r"queries needs a tensor of shape \(B, P, C\), got list"),
    "candidates-none": ({"candidates": None}, r"candidates needs a tensor of shape \(B, P, C\), got NoneType"),
    "queries-2d": ({"queries": randn(P, C)}, r"queries needs shape \(B, P, C\), got \(6, 5\)"),
    "candidates-4d": ({"candidates": randn(B, C, 2, 3)}, r"candidates needs shape .*, got \(3, 5, 2, 3\)"),
    "other-images": (
        {"candidates": randn(1, P, C)},
        r"candidates needs the images.*queries.*, got .*\(1, 6, 5\)",
    ),
    "other-channels": (
        {"candidates": randn(B, P, 2)},
        r"candidates needs .*channels.*queries.*, got .*\(3, 6, 2\)",
    ),
    "no-candidate": ({"candidates": randn(B, 0, C)}, r"candidates needs at least 1 .*, got shape \(3, 0, 5\)"),
    "no-query": ({"queries": randn(B, 0, C)}, r"queries needs at least 1 .*, got shape \(3, 0, 5\)"),
    "candidates-meta": (
        {"candidates": torch.empty(B, P, C, device="meta")},
        "candidates needs the device of queries, cpu, got meta",
    ),
    "queries-complex": (
        {"queries": of_type(torch.complex64, B, P, C)},
        "queries needs dtype .*integer type, got complex64",
    ),
    "candidates-bool": ({"candidates": of_type(torch.bool, B, P, C)}, "candidates needs dtype .*, got bool"),
    "too-many": ({"num_matches": P + 1}, r"num_matches=7 needs .*queries, got shape \(3, 6, 5\)"),
    "num_matches-zero": ({"num_matches": 0}, "num_matches needs to be at least 1, got 0"),
    "num_matches-fraction": ({"num_matches": 2.5}, "num_matches needs a whole number, got float 2.5"),
    "num_matches-bool": ({"num_matches": True}, "num_matches needs a whole number, got bool True"),
    "num_matches-string": ({"num_matches": "3"}, "num_matches needs a whole number, got str '3'"),
    "backend-unknown": ({"backend": "cuda"}, "backend needs one of .*, got 'cuda'"),
}


@pytest.mark.parametrize(("changed", "message"), MATCH_ERRORS.values(), ids=MATCH_ERRORS.keys())
def test_match_patches_refuses_argument(changed, message):
    arguments = {"queries": randn(B, P, C), "candidates": randn(B, P, C)} | changed
    with pytest.raises(BAD, match=message):
        functional.match_patches(**arguments)


NEAREST_ERRORS = {
    "input_maps-list": ({"input_maps": [1.0]}, r"input_maps needs a tensor of shape .*, got list"),
    "candidate_maps-2d": ({"candidate_maps": randn(P, C)}, r"candidate_maps needs shape .*, got \(6, 5\)"),
    "candidate_maps-other": (
        {"candidate_maps": randn(B, P, 2)},
        r"candidate_maps needs .*input_maps.*, got .*\(3, 6, 2\)",
    ),
    "input_maps-int64": ({"input_maps": of_type(torch.int64, B, P, C)}, "input_maps needs dtype .*, got int64"),
    "distances-none": ({"distances": None}, r"distances needs a tensor of shape .*, got NoneType"),
    "distances-2d": ({"distances": randn(P, P)}, r"distances needs shape .*, got \(6, 6\)"),
    "distances-other": ({"distances": randn(B, P, 5)}, r"distances needs shape \(3, 6, 6\), got \(3, 6, 5\)"),
    "distances-int64": ({"distances": of_type(torch.int64, B, P, P)}, "distances needs dtype .*, got int64"),
    "distances-meta": (
        {"distances": torch.empty(B, P, P, device="meta")},
        "distances needs the device of input_maps, cpu, got meta",
    ),
    "num_matches-too-many": ({"num_matches": 7}, r"num_matches=7 needs .*input_maps, got shape \(3, 6, 5\)"),
    "num_matches-zero": ({"num_matches": 0}, "num_matches needs to be at least 1, got 0"),
    "num_matches-none": ({"num_matches": None}, "num_matches needs a whole number, got NoneType None"),
}


@pytest.mark.parametrize(("changed", "message"), NEAREST_ERRORS.values(), ids=NEAREST_ERRORS.keys())
def test_neirest_neighbores_refuses_argument(changed, message):
    arguments = {
        "input_maps": randn(B, P, C),
        "candidate_maps": randn(B, P, C),
        "distances": randn(B, P, P),
        "num_matches": 3,
    } | changed
    with pytest.raises(BAD, match=message):
        VICRegLLoss.neirest_neighbores(**arguments)


LOCAL_VICREG_ERRORS = {
    "none": (None, randn(B, P, C), "x needs a tensor of shape .*, got NoneType"),
    "2d": (randn(P, C), randn(P, C), r"x needs shape .*, got \(6, 5\)"),
    "shapes": (randn(B, P, C), randn(B, P, 4), r"y needs the shape of x, \(3, 6, 5\), got \(3, 6, 4\)"),
    "one-match": (randn(B, 1, C), randn(B, 1, C), "x needs at least 2 samples .*, got 1"),
    "int64": (of_type(torch.int64, B, P, C), randn(B, P, C), "x needs dtype .*, got int64"),
}


@pytest.mark.parametrize(("x", "y", "message"), LOCAL_VICREG_ERRORS.values(), ids=LOCAL_VICREG_ERRORS.keys())
def test_local_vicreg_loss_refuses_matches(x, y, message):
    with pytest.raises(BAD, match=message):
        VICRegLLoss().local_vicreg_loss(x, y)


# -- NaN and infinity come out as such --------------------------------------------------------------------------

SHAPES = {"primal": (9, 3), "dual": (3, 90)}
# With a cache of 2^13 elements the ATen backend reads each of them in two blocks or more.
LARGE = {"primal-blocks": (600, 20), "dual-blocks": (20, 600)}
TERMS = ("inv-loss", "var-loss", "cov-loss", "loss")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
@pytest.mark.parametrize(
    "position", [(0, 0), (0, -1), (-1, 0), (-1, -1)], ids=["first", "right", "down", "last"]
)
@pytest.mark.parametrize("view", ["x", "y"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_vicreg_shows_what_is_not_finite(shape, view, position, value, backend):
    views = {"x": randn(*shape), "y": randn(*shape, seed=1)}
    views[view][position] = value
    losses = VICRegLoss(backend=backend)(**views)
    assert [name for name in TERMS if losses[name].isfinite()] == []


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
@pytest.mark.parametrize("position", [(0, 0), (-1, -1)], ids=["first", "last"])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE.keys())
def test_vicreg_shows_what_is_not_finite_in_any_block(shape, position, value, monkeypatch):
    monkeypatch.setattr(blocks, "CACHE_ELEMENTS", 1 << 13)
    assert len([part for _, parts in blocks.blocks(1, *shape, 3, 0) for part in parts]) > 1
    x, y = randn(*shape), randn(*shape, seed=1)
    y[position] = value
    losses = VICRegLoss(backend="aten")(x, y)
    assert [name for name in TERMS if losses[name].isfinite()] == []


@pytest.mark.parametrize("statistics", ["image", "slot"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
@pytest.mark.parametrize("patch", [0, -1], ids=["first-patch", "last-patch"])
@pytest.mark.parametrize("image", [0, -1], ids=["first-image", "last-image"])
@pytest.mark.parametrize("view", ["x1_maps", "x2_maps"])
def test_local_loss_shows_what_is_not_finite_in_a_query(view, image, patch, value, backend, statistics):
    arguments = local_arguments()
    arguments[view][image, patch, -1] = value
    # Every patch is a query that is kept, so the row is chosen in one direction at least.
    losses = local_loss(P, alpha=0.0, backend=backend, statistics=statistics)(**arguments)
    finite = [
        f"{part}/{name}"
        for part in ("location", "feature")
        for name in TERMS
        if losses[f"{part}/{name}"].isfinite()
    ]
    assert finite == []
    assert not losses["loss"].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_local_loss_shows_what_is_not_finite_in_a_row_chosen_by_location(value, backend):
    near = torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0], [60.0, 60.0]]).expand(B, 4, 2)
    arguments = local_arguments(
        x1_maps=randn(B, 4, C), x2_maps=randn(B, 4, C, seed=1), x1_locations=near, x2_locations=near.flip(1)
    )
    arguments["x1_maps"][1, 0, 2] = value  # query 0 is at distance zero from candidate 3
    losses = local_loss(2, alpha=0.0, backend=backend)(**arguments)
    assert not losses["location/loss"].isfinite()
    assert not losses["loss"].isfinite()
    assert losses["feature/loss"].isfinite()  # by feature it is farther than all others


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_local_loss_takes_locations_that_are_not_finite(value, backend):
    arguments = local_arguments()
    arguments["x1_locations"][0, 0] = value
    losses = local_loss(2, alpha=0.0, backend=backend)(**arguments)
    assert losses["loss"].isfinite()  # a location is no part of the loss, and two finite ones are nearer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_global_part_shows_what_is_not_finite(value, backend):
    arguments = local_arguments()
    arguments["x2_glob"][-1, -1] = value
    losses = local_loss(backend=backend)(**arguments)
    assert not losses["loss"].isfinite()
    assert losses["feature/loss"].isfinite()


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_backward_of_what_is_not_finite_does_not_raise(value):
    x, y = randn(9, 3), randn(9, 3, seed=1)
    x[2, 1] = value
    x.requires_grad_()
    VICRegLoss()(x, y)["loss"].backward()
    assert not x.grad.isfinite().all()
