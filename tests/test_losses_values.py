"""Values and gradients of the losses, and of their published static methods, equal the formulas."""

import pytest
import torch

from vicreg_fast import VICRegLLoss, VICRegLoss, functional

from .data import CLOSE
from .loss_formulas import (
    KEYS,
    M,
    both_backends,
    both_losses,
    gradients,
    local_arguments,
    randn,
    true_local_losses,
    true_losses,
    true_terms,
    truth_arguments,
    two_views,
    values,
)

SHAPES = {
    "primal": (12, 5),
    "dual": (5, 70),
    "square": (8, 8),
    "two-samples": (2, 7),
    "one-feature": (9, 1),
    "smallest": (2, 1),
    "odd": (33, 17),
}
SETTINGS = {
    "defaults": {},
    "weights": {"inv_coeff": 2.0, "var_coeff": -3.0, "cov_coeff": 0.5},
    "gamma": {"gamma": 0.6},
    "eps": {"eps": 1e-2},
    "zero-weights": {"inv_coeff": 0.0, "var_coeff": 0.0, "cov_coeff": 0.0},
}
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


@both_backends
@settings
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_vicreg_values(shape, setting, backend):
    x, y = two_views(*shape)
    losses = VICRegLoss(backend=backend, **setting)(x, y)
    expected = true_losses(x, y, **truth_arguments(setting))
    assert values(losses) == pytest.approx(values(expected), rel=CLOSE["rtol"], abs=CLOSE["atol"])


@both_backends
@settings
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_vicreg_gradient_of_each_loss(shape, key, setting, backend):
    views = two_views(*shape, grad=True)
    losses = VICRegLoss(backend=backend, **setting)(*views)
    expected = true_losses(*views, **truth_arguments(setting))
    torch.testing.assert_close(gradients(losses[key], views), gradients(expected[key], views), **CLOSE)


LOCAL_SETTINGS = SETTINGS | {
    "slot": {"statistics": "slot"},
    "patch-order": {"match_order": "patch"},
    "slot-patch-order": {"statistics": "slot", "match_order": "patch"},
}
alphas = pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])


def true_local_losses_of(arguments, alpha, setting):
    """The truth for keywords of VICRegLLoss."""
    options = {
        "statistics": setting.get("statistics", "image"),
        "order": setting.get("match_order", "distance"),
    }
    weights = {k: v for k, v in setting.items() if k not in ("statistics", "match_order")}
    return true_local_losses(**arguments, alpha=alpha, **truth_arguments(weights), **options)


@both_backends
@pytest.mark.parametrize("setting", LOCAL_SETTINGS.values(), ids=LOCAL_SETTINGS.keys())
@alphas
def test_vicregl_values(alpha, setting, backend):
    arguments = local_arguments()
    losses = VICRegLLoss(M, alpha, backend=backend, **setting)(**arguments)
    expected = true_local_losses_of(arguments, alpha, setting)
    assert values(losses) == pytest.approx(values(expected), rel=CLOSE["rtol"], abs=CLOSE["atol"])


@both_backends
@pytest.mark.parametrize("setting", LOCAL_SETTINGS.values(), ids=LOCAL_SETTINGS.keys())
@alphas
def test_vicregl_gradients_of_every_loss(alpha, setting, backend):
    arguments = local_arguments(grad=True)
    inputs = [t for t in arguments.values() if t.requires_grad]
    losses = VICRegLLoss(M, alpha, backend=backend, **setting)(**arguments)
    expected = true_local_losses_of(arguments, alpha, setting)
    for key, loss in losses.items():
        actual = gradients(loss, inputs, retain_graph=True)
        truth = gradients(expected[key], inputs, retain_graph=True)
        torch.testing.assert_close(actual, truth, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


# (weights of inv, var, cov), eps, total loss.  Here var and cov are means of the two views; the weights of terms that the
# published code sums over the views are doubled.
PUBLISHED = {
    "official": ((25.0, 25.0, 2.0), 1e-4, 8.0389),  # sums the covariance
    "vicreg_loss": ((25.0, 15.0, 1.0), 0.0, 4.9020),
    "solo-learn": ((25.0, 50.0, 2.0), 1e-4, 15.6097),  # sums both
}


def published_views():
    """The views that the constants are of."""
    torch.manual_seed(0)
    x = 0.7 * torch.randn(64, 32, dtype=torch.float64)
    return x, x + 0.1 * torch.randn_like(x)


@both_backends
@pytest.mark.parametrize(("weights", "eps", "constant"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_constants_of_the_published_losses(weights, eps, constant, backend):
    x, y = published_views()
    terms = functional.vicreg_terms(x, y, eps=eps, backend=backend)
    actual = sum(w * t.item() for w, t in zip(weights, terms, strict=True))
    assert actual == pytest.approx(constant, abs=5e-5)  # the constants have four decimals


def test_module_gives_the_drop_in_constant():
    x, y = published_views()
    assert VICRegLoss()(x, y)["loss"].item() == pytest.approx(4.9020, abs=5e-5)


@both_backends
def test_one_input_without_gradient(backend):
    x, y = two_views(grad=True)
    expected = gradients(true_losses(x, y)["loss"], [x])
    actual = gradients(VICRegLoss(backend=backend)(x, y.detach())["loss"], [x])
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("shape", [(4, 7, 5), (2, 3, 6, 8)], ids=str)
def test_statics_average_over_leading_dimensions(shape):
    x, y = randn(*shape, seed=1), randn(*shape, seed=2)
    inv, var, cov = true_terms(x, y)
    actual_var = (VICRegLoss.variance_loss(x, 1.0) + VICRegLoss.variance_loss(y, 1.0)) / 2
    actual_cov = (VICRegLoss.covariance_loss(x) + VICRegLoss.covariance_loss(y)) / 2
    actual = torch.stack((VICRegLoss.representation_loss(x, y), actual_var, actual_cov))
    torch.testing.assert_close(actual, torch.stack((inv, var, cov)), **CLOSE)


@both_losses
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2])
def test_static_variance_takes_gamma(make, gamma):
    x = randn(4, 7, 5)
    torch.testing.assert_close(make.variance_loss(x, gamma), true_terms(x, x, gamma)[1], **CLOSE)


@both_losses
def test_statics_are_differentiable(make):
    x = randn(4, 7, 5, grad=True)
    _, var, cov = true_terms(x, x)
    actual = make.variance_loss(x, 1.0) + 3 * make.covariance_loss(x)
    torch.testing.assert_close(gradients(actual, [x]), gradients(var + 3 * cov, [x]), **CLOSE)


@pytest.mark.parametrize("statistics", ["image", "slot"])
def test_local_vicreg_loss_values(statistics):
    x, y = randn(3, 4, 5, seed=1), randn(3, 4, 5, seed=2)
    actual = VICRegLLoss(M, statistics=statistics).local_vicreg_loss(x, y)
    problems = (x, y) if statistics == "image" else (x.transpose(0, 1), y.transpose(0, 1))
    assert values(actual) == pytest.approx(values(true_losses(*problems)), rel=1e-10)
