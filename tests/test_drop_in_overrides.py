"""Published methods that a subclass, an instance or a patch overrides are called."""

import pytest
import torch
from torch import nn

from vicreg_fast import VICRegLLoss, VICRegLoss, backends

from .data import CLOSE
from .loss_formulas import (
    KEYS,
    P1,
    P2,
    B,
    M,
    SameLocalCovariance,
    both_backends,
    both_losses,
    gradients,
    local_arguments,
    randn,
    true_local_losses,
    true_losses,
    truth_arguments,
    two_views,
    values,
)


class Count:
    """Calls a published method, counts the calls and multiplies the results."""

    def __init__(self, method, factor=2.0):
        self.method, self.factor, self.calls = method, factor, 0

    def __call__(self, *arguments):
        self.calls += 1
        result = self.method(*arguments)
        if isinstance(result, dict):
            return {k: v * self.factor for k, v in result.items()}
        return result * self.factor


def in_subclass(make, name, function):
    return type("Overriding", (make,), {name: staticmethod(function)})


def in_subclass_as_method(make, name, function):
    return type("Overriding", (make,), {name: lambda self, *arguments: function(*arguments)})


def in_instance(make, name, function):
    def construct(*arguments, **options):
        loss = make(*arguments, **options)
        setattr(loss, name, function)
        return loss

    return construct


WAYS = {"static": in_subclass, "method": in_subclass_as_method, "instance": in_instance}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
OVERRIDES = {"representation_loss": "inv-loss", "variance_loss": "var-loss", "covariance_loss": "cov-loss"}


def doubled(expected, key):
    """Losses of one part with one term twice as large."""
    changed = {k: (2 if k == key else 1) * expected[k] for k in KEYS[:3]}
    return changed | {"loss": sum(changed.values())}


@both_backends
@ways
@pytest.mark.parametrize("setting", [{}, {"gamma": 0.6, "eps": 1e-2}], ids=["defaults", "gamma-eps"])
@pytest.mark.parametrize(("name", "key"), OVERRIDES.items(), ids=OVERRIDES.keys())
def test_vicreg_honours_an_override(name, key, setting, way, backend):
    x, y = two_views()
    count = Count(getattr(VICRegLoss, name))
    losses = way(VICRegLoss, name, count)(backend=backend, **setting)(x, y)
    if name == "variance_loss":
        setting = setting | {"eps": 0.0}  # the published method has no eps
    expected = doubled(true_losses(x, y, **truth_arguments(setting)), key)
    assert count.calls > 0
    assert values(losses) == pytest.approx(values(expected), rel=1e-10)


@pytest.mark.parametrize(("name", "key"), OVERRIDES.items(), ids=OVERRIDES.keys())
def test_vicreg_gradient_through_an_override(name, key):
    views = two_views(grad=True)
    losses = in_subclass(VICRegLoss, name, Count(getattr(VICRegLoss, name)))()(*views)
    expected = doubled(true_losses(*views), key)
    torch.testing.assert_close(gradients(losses["loss"], views), gradients(expected["loss"], views), **CLOSE)


@both_backends
@ways
@pytest.mark.parametrize("name", ["variance_loss", "covariance_loss"])
def test_vicregl_honours_an_override_of_a_term(name, way, backend):
    arguments = local_arguments()
    count = Count(getattr(VICRegLLoss, name))
    losses = way(VICRegLLoss, name, count)(M, 0.0, backend=backend)(**arguments)
    expected = true_local_losses(**arguments, alpha=0.0)
    assert count.calls > 0
    for part in ("location", "feature"):
        actual = {k: losses[f"{part}/{k}"].item() for k in KEYS}
        with_override = doubled({k: expected[f"{part}/{k}"].item() for k in KEYS}, OVERRIDES[name])
        assert actual == pytest.approx(with_override, rel=1e-10)


@ways
def test_vicregl_honours_an_override_of_local_vicreg_loss(way):
    arguments = local_arguments()
    count = Count(VICRegLLoss(M).local_vicreg_loss, factor=3.0)
    losses = way(VICRegLLoss, "local_vicreg_loss", count)(M, 0.0)(**arguments)
    expected = true_local_losses(**arguments, alpha=0.0)
    assert count.calls == 4  # two directions, by location and by feature
    assert values(losses) == pytest.approx({k: 3 * v.item() for k, v in expected.items()}, rel=1e-10)


@ways
def test_vicregl_honours_an_override_of_neirest_neighbores(way):
    arguments = local_arguments()
    calls = []

    def first_ones(input_maps, candidate_maps, distances, num_matches):
        calls.append(tuple(distances.shape))
        return input_maps[:, :num_matches], candidate_maps[:, :num_matches]

    losses = way(VICRegLLoss, "neirest_neighbores", first_ones)(M, 0.0)(**arguments)
    expected = true_losses(arguments["x1_maps"][:, :M], arguments["x2_maps"][:, :M])
    assert calls == [(B, P1, P2), (B, P2, P1)] * 2
    for part in ("location", "feature"):
        assert {k: losses[f"{part}/{k}"].item() for k in KEYS} == pytest.approx(values(expected), rel=1e-10)


@pytest.mark.parametrize("order", ["distance", "patch"])
@pytest.mark.parametrize("statistics", ["image", "slot"])
def test_an_override_that_changes_nothing_changes_nothing(statistics, order):
    arguments = local_arguments()
    losses = SameLocalCovariance(M, 0.25, statistics=statistics, match_order=order)(**arguments)
    expected = true_local_losses(**arguments, alpha=0.25, statistics=statistics, order=order)
    assert values(losses) == pytest.approx(values(expected), rel=1e-10)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((VICRegLoss, name) for name in OVERRIDES),
        (VICRegLLoss, "variance_loss"),
        (VICRegLLoss, "covariance_loss"),
    ],
)
def test_what_is_not_overridden_keeps_its_backend(make, name, monkeypatch):
    chosen = []
    choose = backends.choose
    monkeypatch.setattr(
        backends, "choose", lambda *args, **kwargs: chosen.append(args[0]) or choose(*args, **kwargs)
    )
    overriding = in_subclass(make, name, lambda x, *_: x.sum())
    if make is VICRegLoss:
        overriding(backend="reference")(*two_views())
    else:
        overriding(M, 0.0, backend="reference")(**local_arguments())
    assert set(chosen) == {"reference"}


@both_losses
def test_an_override_does_not_hide_a_backend_that_cannot_run(make):
    loss = in_subclass(make, "variance_loss", lambda x, gamma: x.sum())(backend="triton")
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu"):
        loss(*two_views()) if make is VICRegLoss else loss(**local_arguments())


@pytest.mark.parametrize("name", OVERRIDES)
def test_vicreg_honours_a_patched_class(name, monkeypatch):
    count = Count(getattr(VICRegLoss, name))
    x, y = two_views()
    expected = doubled(true_losses(x, y), OVERRIDES[name])
    monkeypatch.setattr(VICRegLoss, name, staticmethod(count))
    assert values(VICRegLoss()(x, y)) == pytest.approx(values(expected), rel=1e-10)


def test_an_override_may_return_a_python_float():
    x, y = two_views()
    losses = in_subclass(VICRegLoss, "covariance_loss", lambda x: 0.5)()(x, y)
    assert losses["cov-loss"].item() == 0.5


def test_vicregl_gradient_through_an_override():
    arguments = local_arguments(grad=True)
    inputs = [t for t in arguments.values() if t.requires_grad]
    losses = SameLocalCovariance(M, 0.25)(**arguments)
    expected = true_local_losses(**arguments, alpha=0.25)
    torch.testing.assert_close(gradients(losses["loss"], inputs), gradients(expected["loss"], inputs), **CLOSE)


@pytest.mark.parametrize("name", ["local_loss", "global_loss"])
def test_vicregl_calls_its_own_parts(name):
    arguments = local_arguments()
    loss = VICRegLLoss(M, 0.5)
    count = Count(getattr(loss, name), factor=1.0)
    expected = values(loss(**arguments))
    setattr(loss, name, count)
    assert values(loss(**arguments)) == expected
    assert count.calls == 1


def test_a_subclass_that_overrides_nothing_published_is_the_same():
    class Named(VICRegLLoss):
        def name(self):
            return "mine"

    arguments = local_arguments()
    assert values(Named(M)(**arguments)) == values(VICRegLLoss(M)(**arguments))


class OtherLoss(nn.Module):
    """Any module that returns a dictionary with ``loss`` may be the global part."""

    def forward(self, x, y):
        return {"distance": (x - y).abs().mean(), "loss": 3 * (x - y).abs().mean()}


def test_another_global_part():
    arguments = local_arguments(grad=True)
    loss = VICRegLLoss(M, 0.25)
    loss.global_vicreg_loss = OtherLoss()
    losses = loss(**arguments)
    expected = true_local_losses(**arguments, alpha=0.0)
    distance = (arguments["x1_glob"] - arguments["x2_glob"]).abs().mean()
    total = 0.25 * 3 * distance + 0.75 * expected.pop("loss")
    expected |= {"loss": total, "global/distance": distance, "global/loss": 3 * distance}
    assert values(losses) == pytest.approx(values(expected), rel=1e-10)


def test_another_global_part_may_take_other_inputs():
    arguments = local_arguments() | {"x1_glob": randn(B), "x2_glob": randn(B, seed=1)}
    loss = VICRegLLoss(M, 0.25)
    loss.global_vicreg_loss = OtherLoss()
    assert loss(**arguments)["loss"].isfinite()
