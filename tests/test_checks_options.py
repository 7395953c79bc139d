"""Bad constructor arguments and attributes are refused by name: coefficients, gamma, eps and choices."""

import math

import pytest
import torch

from vicreg_fast import VICRegLLoss, VICRegLoss, functional

from .check_arguments import BAD, B, local_arguments, local_loss
from .data import seeded_randn
from .loss_formulas import LOSSES, both_losses

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
        loss(seeded_randn(4, 3), seeded_randn(4, 3))


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


@both_losses
@pytest.mark.parametrize("name", ["inv_coeff", "var_coeff", "cov_coeff"])
def test_refuses_coefficient_on_another_device(make, name):
    loss = make(**{name: torch.ones((), device="meta")})
    with pytest.raises(ValueError, match=f"{name} needs device cpu or that of the inputs, cpu, got meta"):
        loss(seeded_randn(B, 4), seeded_randn(B, 4)) if make is VICRegLoss else loss(**local_arguments())


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


# -- the functions ----------------------------------------------------------------------------------------------


FUNCTIONS_WITH_OPTIONS = {
    "vicreg_terms": lambda **options: functional.vicreg_terms(
        seeded_randn(4, 3), seeded_randn(4, 3), **options
    ),
    "variance_covariance": lambda **options: functional.variance_covariance(seeded_randn(4, 3), **options),
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
        make.variance_loss(seeded_randn(4, 3), gamma)


# -- backends that cannot run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_triton_on_the_cpu_vicregl(alpha, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' .*cpu"):
        local_loss(alpha=alpha, backend="triton")(**local_arguments())


TRITON_CALLS = {
    "VICRegLoss": lambda: VICRegLoss(backend="triton")(seeded_randn(4, 3), seeded_randn(4, 3)),
    "vicreg_terms": lambda: functional.vicreg_terms(seeded_randn(4, 3), seeded_randn(4, 3), backend="triton"),
    "variance_covariance": lambda: functional.variance_covariance(seeded_randn(4, 3), backend="triton"),
    "match_patches": lambda: functional.match_patches(
        seeded_randn(1, 4, 3), seeded_randn(1, 4, 3), backend="triton"
    ),
}


@pytest.mark.parametrize("call", TRITON_CALLS.values(), ids=TRITON_CALLS.keys())
def test_triton_on_the_cpu(call, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' .*cpu"):
        call()
