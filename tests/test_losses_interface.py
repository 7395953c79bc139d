"""The interface of the losses is that of vicreg_loss 1.0.0: signatures, attributes, methods, keys."""

import inspect

import pytest

import vicreg_fast
from vicreg_fast import VICReg, VICRegLLoss, VICRegLoss

from .loss_formulas import KEYS, PARTS, WEIGHTS, M, both_backends, keys_of, local_arguments, two_views, values

OPTIONS = {"gather_distributed": False, "process_group": None, "backend": "auto", "precision": None}
CONSTRUCTORS = {
    "VICRegLoss": (VICRegLoss, WEIGHTS, {"eps": 0.0} | OPTIONS),
    "VICRegLLoss": (
        VICRegLLoss,
        {"num_matches": 10, "alpha": 0.75} | WEIGHTS,
        {"eps": 0.0, "statistics": "image", "match_order": "distance"} | OPTIONS,
    ),
}
constructors = pytest.mark.parametrize(
    ("make", "positional", "keywords"), CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys()
)


@constructors
def test_constructor_signature(make, positional, keywords):
    parameters = inspect.signature(make).parameters
    by_kind = {
        kind: {n: p.default for n, p in parameters.items() if p.kind is kind}
        for kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    assert list(by_kind.values()) == [positional, keywords]
    assert list(parameters) == [*positional, *keywords]


@constructors
def test_defaults_become_attributes(make, positional, keywords):
    loss = make()
    assert {n: getattr(loss, n) for n in positional | keywords} == positional | keywords


def test_vicreg_arguments_by_position():
    loss = VICRegLoss(1.0, 2.0, 3.0, 4.0)
    assert (loss.inv_coeff, loss.var_coeff, loss.cov_coeff, loss.gamma) == (1.0, 2.0, 3.0, 4.0)


def test_vicregl_arguments_by_position():
    loss = VICRegLLoss(7, 0.25, 1.0, 2.0, 3.0, 4.0)
    actual = (loss.num_matches, loss.alpha, loss.inv_coeff, loss.var_coeff, loss.cov_coeff, loss.gamma)
    assert actual == (7, 0.25, 1.0, 2.0, 3.0, 4.0)


def test_vicregl_hands_its_arguments_to_the_global_part():
    loss = VICRegLLoss(7, 0.25, 1.0, 2.0, 3.0, 4.0, eps=0.5, backend="aten", precision="high")
    part = loss.global_vicreg_loss
    assert isinstance(part, VICRegLoss)
    assert (part.inv_coeff, part.var_coeff, part.cov_coeff, part.gamma) == (1.0, 2.0, 3.0, 4.0)
    assert (part.eps, part.backend, part.precision) == (0.5, "aten", "high")


FORWARDS = {
    "VICRegLoss.forward": (VICRegLoss.forward, ["x", "y"]),
    "VICRegLLoss.forward": (
        VICRegLLoss.forward,
        ["x1_maps", "x2_maps", "x1_glob", "x2_glob", "x1_locations", "x2_locations"],
    ),
    "VICRegLLoss.local_loss": (
        VICRegLLoss.local_loss,
        ["x1_maps", "x2_maps", "x1_locations", "x2_locations"],
    ),
    "VICRegLLoss.global_loss": (VICRegLLoss.global_loss, ["x1_glob", "x2_glob"]),
    "VICRegLLoss.local_vicreg_loss": (VICRegLLoss.local_vicreg_loss, ["x", "y"]),
}


@pytest.mark.parametrize(("method", "names"), FORWARDS.values(), ids=FORWARDS.keys())
def test_method_keywords(method, names):
    assert list(inspect.signature(method).parameters) == ["self", *names]


STATICS = {
    "VICRegLoss.representation_loss": (VICRegLoss, "representation_loss", ["x", "y"]),
    "VICRegLoss.variance_loss": (VICRegLoss, "variance_loss", ["x", "gamma"]),
    "VICRegLoss.covariance_loss": (VICRegLoss, "covariance_loss", ["x"]),
    "VICRegLLoss.variance_loss": (VICRegLLoss, "variance_loss", ["x", "gamma"]),
    "VICRegLLoss.covariance_loss": (VICRegLLoss, "covariance_loss", ["x"]),
    "VICRegLLoss.neirest_neighbores": (
        VICRegLLoss,
        "neirest_neighbores",
        ["input_maps", "candidate_maps", "distances", "num_matches"],
    ),
}


@pytest.mark.parametrize(("make", "name", "names"), STATICS.values(), ids=STATICS.keys())
def test_static_methods(make, name, names):
    assert isinstance(inspect.getattr_static(make, name), staticmethod)
    assert list(inspect.signature(getattr(make, name)).parameters) == names


def test_vicreg_is_an_alias():
    assert VICReg is VICRegLoss
    assert vicreg_fast.VICReg is vicreg_fast.VICRegLoss


# -- keys -------------------------------------------------------------------------------------------------------


@both_backends
def test_vicreg_keys(backend):
    assert list(VICRegLoss(backend=backend)(*two_views())) == list(KEYS)


@both_backends
@pytest.mark.parametrize(
    ("alpha", "parts"),
    [(0.0, PARTS[1:]), (0.5, PARTS), (1.0, PARTS[:1]), (0, PARTS[1:]), (1, PARTS[:1])],
    ids=["0.0", "0.5", "1.0", "int-0", "int-1"],
)
def test_vicregl_keys(alpha, parts, backend):
    losses = VICRegLLoss(M, alpha, backend=backend)(**local_arguments())
    assert list(losses) == keys_of(*parts)


def test_local_and_global_keys():
    arguments = local_arguments()
    loss = VICRegLLoss(M)
    glob = loss.global_loss(arguments.pop("x1_glob"), arguments.pop("x2_glob"))
    assert list(glob) == keys_of("global")[1:]
    assert list(loss.local_loss(**arguments)) == keys_of("location", "feature")[1:]


def test_positional_and_keyword_arguments_agree():
    arguments = local_arguments()
    loss = VICRegLLoss(M)
    assert values(loss(*arguments.values())) == values(loss(**arguments))
