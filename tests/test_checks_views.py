"""Bad views are refused by name: by VICRegLoss, by the functions and by the published static methods."""

import pytest
import torch

from vicreg_fast import VICRegLLoss, VICRegLoss, functional

from .check_arguments import BACKENDS, BAD, NOT_FLOATING, B, C, P, of_type
from .data import seeded_randn

VIEW_ERRORS = {
    "x-list": ([[1.0], [2.0]], seeded_randn(2, 1), r"x needs a tensor of shape \(N, D\), got list"),
    "x-none": (None, seeded_randn(2, 1), r"x needs a tensor of shape \(N, D\), got NoneType"),
    "y-float": (seeded_randn(2, 1), 1.0, r"y needs a tensor of shape \(N, D\), got float"),
    "y-other-features": (
        seeded_randn(4, 3),
        seeded_randn(4, 2),
        r"y needs the shape of x, \(4, 3\), got \(4, 2\)",
    ),
    "y-other-samples": (
        seeded_randn(4, 3),
        seeded_randn(5, 3),
        r"y needs the shape of x, \(4, 3\), got \(5, 3\)",
    ),
    "y-would-broadcast": (
        seeded_randn(4, 3),
        seeded_randn(1, 3),
        r"y needs the shape of x, \(4, 3\), got \(1, 3\)",
    ),
    "x-one-dimension": (seeded_randn(4), seeded_randn(4), r"x needs shape \(N, D\), got \(4,\)"),
    "x-three-dimensions": (
        seeded_randn(2, 4, 3),
        seeded_randn(2, 4, 3),
        r"x needs shape \(N, D\), got \(2, 4, 3\)",
    ),
    "y-three-dimensions": (
        seeded_randn(4, 3),
        seeded_randn(1, 4, 3),
        r"y needs shape \(N, D\), got \(1, 4, 3\)",
    ),
    "one-sample": (seeded_randn(1, 3), seeded_randn(1, 3), r"x needs at least 2 samples .*, got 1"),
    "no-sample": (seeded_randn(0, 3), seeded_randn(0, 3), r"x needs at least 2 samples .*, got 0"),
    "no-feature": (seeded_randn(4, 0), seeded_randn(4, 0), r"x needs at least 1 feature, got shape \(4, 0\)"),
    "y-meta": (seeded_randn(4, 3), torch.empty(4, 3, device="meta"), r"y needs the device of x, cpu, got meta"),
    "x-meta": (torch.empty(4, 3, device="meta"), seeded_randn(4, 3), r"y needs the device of x, meta, got cpu"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("x", "y", "message"), VIEW_ERRORS.values(), ids=VIEW_ERRORS.keys())
def test_vicreg_refuses_views(x, y, message, backend):
    with pytest.raises(BAD, match=message):
        VICRegLoss(backend=backend)(x, y)


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("dtype", NOT_FLOATING, ids=str)
def test_vicreg_refuses_dtype(dtype, name):
    views = {"x": seeded_randn(4, 3), "y": seeded_randn(4, 3)} | {name: of_type(dtype, 4, 3)}
    with pytest.raises(TypeError, match=rf"{name} needs dtype .*float32.*, got {str(dtype)[6:]}"):
        VICRegLoss()(**views)


def test_vicreg_takes_two_samples_of_one_feature():
    losses = VICRegLoss()(seeded_randn(2, 1), seeded_randn(2, 1, seed=1))
    assert losses["loss"].isfinite()


def not_dense(z):
    """The same values in layouts that are not strided."""
    nested = torch.nested.nested_tensor(list(z))
    return {"sparse": z.to_sparse(), "mkldnn": z.float().to_mkldnn(), "nested": nested}


@pytest.mark.parametrize("layout", ["sparse", "mkldnn", "nested"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_refuses_a_layout_that_is_not_strided(layout):
    z = not_dense(seeded_randn(4, 3))[layout]
    with pytest.raises(ValueError, match="x needs a dense tensor, got layout"):
        VICRegLoss()(z, seeded_randn(4, 3))
    with pytest.raises(ValueError, match="y needs a dense tensor, got layout"):
        functional.vicreg_terms(seeded_randn(4, 3), z)


# -- functions and static methods -----------------------------------------------------------------------------


ONE_VIEW_ERRORS = {
    "list": ([[1.0], [2.0]], "needs a tensor of shape .*, got list"),
    "one-dimension": (seeded_randn(4), r"needs shape \(..., N, D\), got \(4,\)"),
    "one-sample": (seeded_randn(2, 1, 3), "needs at least 2 samples .*, got 1"),
    "no-feature": (seeded_randn(4, 0), r"needs at least 1 feature, got shape \(4, 0\)"),
    "no-problem": (seeded_randn(0, 4, 3), r"needs at least 1 problem .*, got \(0, 4, 3\)"),
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
    "y-none": (seeded_randn(4, 3), None, "y needs a tensor of shape .*, got NoneType"),
    "x-list": ([[1.0]], seeded_randn(4, 3), "x needs a tensor of shape .*, got list"),
    "shapes": (seeded_randn(4, 3), seeded_randn(4, 2), r"y needs the shape of x, \(4, 3\), got \(4, 2\)"),
    "would-broadcast": (
        seeded_randn(2, 4, 3),
        seeded_randn(4, 3),
        r"y needs the shape of x, \(2, 4, 3\), got \(4, 3\)",
    ),
    "y-meta": (seeded_randn(4, 3), torch.empty(4, 3, device="meta"), "y needs the device of x, cpu, got meta"),
    "y-int64": (seeded_randn(4, 3), of_type(torch.int64, 4, 3), "y needs dtype .*, got int64"),
    "x-bool": (of_type(torch.bool, 4, 3), seeded_randn(4, 3), "x needs dtype .*, got bool"),
}


@pytest.mark.parametrize("function", TWO_VIEW_FUNCTIONS.values(), ids=TWO_VIEW_FUNCTIONS.keys())
@pytest.mark.parametrize(("x", "y", "message"), TWO_VIEW_ERRORS.values(), ids=TWO_VIEW_ERRORS.keys())
def test_function_refuses_views(x, y, message, function):
    with pytest.raises(BAD, match=message):
        function(x, y)


LOCAL_VICREG_ERRORS = {
    "none": (None, seeded_randn(B, P, C), "x needs a tensor of shape .*, got NoneType"),
    "2d": (seeded_randn(P, C), seeded_randn(P, C), r"x needs shape .*, got \(6, 5\)"),
    "shapes": (
        seeded_randn(B, P, C),
        seeded_randn(B, P, 4),
        r"y needs the shape of x, \(3, 6, 5\), got \(3, 6, 4\)",
    ),
    "one-match": (seeded_randn(B, 1, C), seeded_randn(B, 1, C), "x needs at least 2 samples .*, got 1"),
    "int64": (of_type(torch.int64, B, P, C), seeded_randn(B, P, C), "x needs dtype .*, got int64"),
}


@pytest.mark.parametrize(("x", "y", "message"), LOCAL_VICREG_ERRORS.values(), ids=LOCAL_VICREG_ERRORS.keys())
def test_local_vicreg_loss_refuses_matches(x, y, message):
    with pytest.raises(BAD, match=message):
        VICRegLLoss().local_vicreg_loss(x, y)
