"""The drop-in's interface: arguments, keys, values, gradients, overriding.

The truth is composed here from the formulas (DESIGN.md section 4, row "vicreg_loss 1.0.0"), in float64; the first
of equal distances is the match.
"""

import copy
import inspect
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import vicreg_fast
from vicreg_fast import VICReg, VICRegLLoss, VICRegLoss, functional

BACKENDS = ("aten", "reference")
both_backends = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("inv", "var", "cov")
KEYS = ("inv-loss", "var-loss", "cov-loss", "loss")
PARTS = ("global", "location", "feature")
# The closed forms and the formulas differ by rounding only: a few hundred units of 2^-53, and sums that cancel.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
B, P1, P2, C, D, M = 3, 9, 11, 6, 5, 4


def randn(*shape, seed=0, dtype=torch.float64, grad=False):
    z = 0.7 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z.to(dtype).requires_grad_(grad)


def two_views(N=12, D=5, dtype=torch.float64, grad=False):
    return randn(N, D, seed=1, dtype=dtype, grad=grad), randn(N, D, seed=2, dtype=dtype, grad=grad)


def local_arguments(dtype=torch.float64, grad=False):
    return {
        "x1_maps": randn(B, P1, C, seed=1, dtype=dtype, grad=grad),
        "x2_maps": randn(B, P2, C, seed=2, dtype=dtype, grad=grad),
        "x1_glob": randn(B, D, seed=3, dtype=dtype, grad=grad),
        "x2_glob": randn(B, D, seed=4, dtype=dtype, grad=grad),
        "x1_locations": randn(B, P1, 2, seed=5),
        "x2_locations": randn(B, P2, 2, seed=6),
    }


def values(losses):
    return {name: loss.item() for name, loss in losses.items()}


def gradients(loss, inputs, **options):
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True, **options)


# -- the truth --------------------------------------------------------------------------------------------------


def true_terms(x, y, gamma=1.0, eps=0.0):
    """Unweighted (inv, var, cov) of problems (..., N, D)."""
    var, cov = [], []
    for z in (x, y):
        N, D = z.shape[-2:]
        c = z - z.sum(-2, keepdim=True) / N
        covariance = c.transpose(-1, -2) @ c / (N - 1)
        std = (torch.diagonal(covariance, dim1=-2, dim2=-1) + eps).sqrt()
        var.append((gamma - std).clamp(min=0).mean())
        off = covariance * (1 - torch.eye(D, dtype=z.dtype))
        cov.append((off**2).sum((-2, -1)).mean() / D)
    return ((x - y) ** 2).mean(), (var[0] + var[1]) / 2, (cov[0] + cov[1]) / 2


def true_losses(x, y, coefficients=(25.0, 15.0, 1.0), gamma=1.0, eps=0.0):
    weighted = [w * t for w, t in zip(coefficients, true_terms(x, y, gamma, eps), strict=True)]
    return dict(zip(KEYS, (*weighted, sum(weighted)), strict=True))


def true_matches(a, b, m, order="distance"):
    """Rows of the m queries of a (P1, C) nearest to their candidates in b, and these candidates."""
    distances = [[((q - c) ** 2).sum().item() for c in b] for q in a]
    candidates = [row.index(min(row)) for row in distances]
    queries = sorted(range(len(a)), key=lambda q: min(distances[q]))[:m]
    queries = sorted(queries) if order == "patch" else queries
    return queries, [candidates[q] for q in queries]


def true_direction(x, y, a, b, m, statistics, order):
    """Matched rows of x and y, problems first, where a is matched with b."""
    rows = [true_matches(a[k].detach(), b[k].detach(), m, order) for k in range(len(x))]
    q = torch.stack([x[k][queries] for k, (queries, _) in enumerate(rows)])
    c = torch.stack([y[k][candidates] for k, (_, candidates) in enumerate(rows)])
    return (q.transpose(0, 1), c.transpose(0, 1)) if statistics == "slot" else (q, c)


def true_local_losses(
    x1_maps, x2_maps, x1_glob, x2_glob, x1_locations, x2_locations,
    alpha=0.75, m=M, coefficients=(25.0, 15.0, 1.0), gamma=1.0, eps=0.0, statistics="image", order="distance",
):  # fmt: skip
    losses = {}
    if alpha > 0:
        found = true_losses(x1_glob, x2_glob, coefficients, gamma, eps)
        losses |= {f"global/{name}": value for name, value in found.items()}
    if alpha < 1:
        places = {"location": (x1_locations, x2_locations), "feature": (x1_maps, x2_maps)}
        for part, (a, b) in places.items():
            there = true_direction(x1_maps, x2_maps, a, b, m, statistics, order)
            back = true_direction(x2_maps, x1_maps, b, a, m, statistics, order)
            there, back = (true_losses(*rows, coefficients, gamma, eps) for rows in (there, back))
            losses |= {f"{part}/{name}": (there[name] + back[name]) / 2 for name in KEYS}
    total = 0.0
    if alpha > 0:
        total = total + alpha * losses["global/loss"]
    if alpha < 1:
        total = total + (1 - alpha) * (losses["feature/loss"] + losses["location/loss"]) / 2
    return {"loss": total, **losses}


# -- names ------------------------------------------------------------------------------------------------------

OPTIONS = {"gather_distributed": False, "process_group": None, "backend": "auto", "precision": None}
WEIGHTS = {"inv_coeff": 25.0, "var_coeff": 15.0, "cov_coeff": 1.0, "gamma": 1.0}
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
LOSSES = {"VICRegLoss": VICRegLoss, "VICRegLLoss": VICRegLLoss}
both_losses = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())


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
    got = (loss.num_matches, loss.alpha, loss.inv_coeff, loss.var_coeff, loss.cov_coeff, loss.gamma)
    assert got == (7, 0.25, 1.0, 2.0, 3.0, 4.0)


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


def keys_of(*parts):
    return ["loss", *(f"{part}/{key}" for part in parts for key in KEYS)]


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


# -- values and gradients ---------------------------------------------------------------------------------------

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


def truth_arguments(setting):
    weights = {**WEIGHTS, "eps": 0.0, **setting}
    names = ("inv_coeff", "var_coeff", "cov_coeff")
    return {
        "coefficients": tuple(weights[n] for n in names), "gamma": weights["gamma"], "eps": weights["eps"],
    }  # fmt: skip


@both_backends
@settings
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_vicreg_values(shape, setting, backend):
    x, y = two_views(*shape)
    losses = VICRegLoss(backend=backend, **setting)(x, y)
    expected = true_losses(x, y, **truth_arguments(setting))
    assert values(losses) == pytest.approx(values(expected), rel=EXACT["rtol"], abs=EXACT["atol"])


@both_backends
@settings
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_vicreg_gradient_of_each_loss(shape, key, setting, backend):
    views = two_views(*shape, grad=True)
    losses = VICRegLoss(backend=backend, **setting)(*views)
    expected = true_losses(*views, **truth_arguments(setting))
    torch.testing.assert_close(gradients(losses[key], views), gradients(expected[key], views), **EXACT)


LOCAL_SETTINGS = SETTINGS | {
    "slot": {"statistics": "slot"},
    "patch-order": {"match_order": "patch"},
    "slot-patch-order": {"statistics": "slot", "match_order": "patch"},
}
alphas = pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])


def true_of(arguments, alpha, setting):
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
    expected = true_of(arguments, alpha, setting)
    assert values(losses) == pytest.approx(values(expected), rel=EXACT["rtol"], abs=EXACT["atol"])


@both_backends
@pytest.mark.parametrize("setting", LOCAL_SETTINGS.values(), ids=LOCAL_SETTINGS.keys())
@alphas
def test_vicregl_gradients_of_every_loss(alpha, setting, backend):
    arguments = local_arguments(grad=True)
    inputs = [t for t in arguments.values() if t.requires_grad]
    losses = VICRegLLoss(M, alpha, backend=backend, **setting)(**arguments)
    expected = true_of(arguments, alpha, setting)
    for key, loss in losses.items():
        got = gradients(loss, inputs, retain_graph=True)
        want = gradients(expected[key], inputs, retain_graph=True)
        torch.testing.assert_close(got, want, **EXACT, msg=lambda text, key=key: f"{key}: {text}")


TABLE = {  # DESIGN.md section 4: (weights of inv, var, cov), eps, constant; var and cov here are means of two views
    "official": ((25.0, 25.0, 2.0), 1e-4, 8.0389),  # the sum of both views' covariances
    "vicreg_loss": ((25.0, 15.0, 1.0), 0.0, 4.9020),
    "solo-learn": ((25.0, 50.0, 2.0), 1e-4, 15.6097),  # the sum of both views' variances, too
}


@both_backends
@pytest.mark.parametrize(("weights", "eps", "constant"), TABLE.values(), ids=TABLE.keys())
def test_constants_of_the_published_losses(weights, eps, constant, backend):
    torch.manual_seed(0)
    x = 0.7 * torch.randn(64, 32, dtype=torch.float64)
    y = x + 0.1 * torch.randn_like(x)
    terms = functional.vicreg_terms(x, y, eps=eps, backend=backend)
    got = sum(w * t.item() for w, t in zip(weights, terms, strict=True))
    assert got == pytest.approx(constant, abs=5e-5)  # the constants have four decimals


def test_module_gives_the_drop_in_constant():
    torch.manual_seed(0)
    x = 0.7 * torch.randn(64, 32, dtype=torch.float64)
    y = x + 0.1 * torch.randn_like(x)
    assert VICRegLoss()(x, y)["loss"].item() == pytest.approx(4.9020, abs=5e-5)


@both_backends
def test_one_input_without_gradient(backend):
    x, y = two_views(grad=True)
    expected = gradients(true_losses(x, y)["loss"], [x])
    got = gradients(VICRegLoss(backend=backend)(x, y.detach())["loss"], [x])
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("shape", [(4, 7, 5), (2, 3, 6, 8)], ids=str)
def test_statics_average_over_leading_dimensions(shape):
    x, y = randn(*shape, seed=1), randn(*shape, seed=2)
    inv, var, cov = true_terms(x, y)
    got_var = (VICRegLoss.variance_loss(x, 1.0) + VICRegLoss.variance_loss(y, 1.0)) / 2
    got_cov = (VICRegLoss.covariance_loss(x) + VICRegLoss.covariance_loss(y)) / 2
    got = torch.stack((VICRegLoss.representation_loss(x, y), got_var, got_cov))
    torch.testing.assert_close(got, torch.stack((inv, var, cov)), **EXACT)


@both_losses
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2])
def test_static_variance_takes_gamma(make, gamma):
    x = randn(4, 7, 5)
    torch.testing.assert_close(make.variance_loss(x, gamma), true_terms(x, x, gamma)[1], **EXACT)


@both_losses
def test_statics_are_differentiable(make):
    x = randn(4, 7, 5, grad=True)
    _, var, cov = true_terms(x, x)
    got = make.variance_loss(x, 1.0) + 3 * make.covariance_loss(x)
    torch.testing.assert_close(gradients(got, [x]), gradients(var + 3 * cov, [x]), **EXACT)


@pytest.mark.parametrize("statistics", ["image", "slot"])
def test_local_vicreg_loss_values(statistics):
    x, y = randn(3, 4, 5, seed=1), randn(3, 4, 5, seed=2)
    got = VICRegLLoss(M, statistics=statistics).local_vicreg_loss(x, y)
    problems = (x, y) if statistics == "image" else (x.transpose(0, 1), y.transpose(0, 1))
    assert values(got) == pytest.approx(values(true_losses(*problems)), rel=1e-10)


# -- coefficients -----------------------------------------------------------------------------------------------


def test_vicreg_reads_coefficients_at_every_call():
    x, y = two_views()
    loss = VICRegLoss()
    loss(x, y)
    loss.inv_coeff, loss.var_coeff, loss.cov_coeff, loss.gamma, loss.eps = 2.0, 3.0, -4.0, 0.7, 1e-3
    expected = true_losses(x, y, (2.0, 3.0, -4.0), 0.7, 1e-3)
    assert values(loss(x, y)) == pytest.approx(values(expected), rel=1e-10)


def test_vicregl_reads_coefficients_of_its_local_part_at_every_call():
    arguments = local_arguments()
    loss = VICRegLLoss(M, 0.0)
    loss(**arguments)
    loss.inv_coeff, loss.var_coeff, loss.cov_coeff, loss.gamma = 2.0, 3.0, -4.0, 0.7
    expected = true_local_losses(**arguments, alpha=0.0, coefficients=(2.0, 3.0, -4.0), gamma=0.7)
    assert values(loss(**arguments)) == pytest.approx(values(expected), rel=1e-10)


def test_vicregl_global_coefficients_are_those_of_its_global_part():
    arguments = local_arguments()
    loss = VICRegLLoss(M, 1.0)
    loss.inv_coeff = 100.0  # of the local part
    loss.global_vicreg_loss.cov_coeff = 7.0
    expected = true_local_losses(**arguments, alpha=1.0, coefficients=(25.0, 15.0, 7.0))
    assert values(loss(**arguments)) == pytest.approx(values(expected), rel=1e-10)


def test_vicregl_reads_alpha_and_num_matches_at_every_call():
    arguments = local_arguments()
    loss = VICRegLLoss(M)
    loss(**arguments)
    loss.alpha, loss.num_matches = 0.25, 6
    expected = true_local_losses(**arguments, alpha=0.25, m=6)
    assert values(loss(**arguments)) == pytest.approx(values(expected), rel=1e-10)


TENSORS = {
    "float64": lambda w: torch.tensor(w, dtype=torch.float64),
    "float32": lambda w: torch.tensor(w),
    "one-element": lambda w: torch.tensor([w]),
    "parameter": lambda w: nn.Parameter(torch.tensor(w)),
    "parameter-one-element": lambda w: nn.Parameter(torch.tensor([w])),
}
tensor_kinds = pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS.keys())


def tensor_coefficients(tensor):
    return {f"{n}_coeff": tensor(w) for n, w in zip(NAMES, (2.0, 3.0, 0.5), strict=True)}


@both_backends
@tensor_kinds
def test_tensor_coefficients_give_the_same_values(tensor, backend):
    x, y = two_views()
    losses = VICRegLoss(backend=backend, **tensor_coefficients(tensor))(x, y)
    expected = true_losses(x, y, (2.0, 3.0, 0.5))
    assert values(losses) == pytest.approx(values(expected), rel=1e-10)


@both_backends
@tensor_kinds
def test_tensor_coefficients_leave_shape_and_type(tensor, backend):
    losses = VICRegLoss(backend=backend, **tensor_coefficients(tensor))(*two_views(dtype=torch.float32))
    assert {k: (tuple(v.shape), v.dtype) for k, v in losses.items()} == dict.fromkeys(KEYS, ((), torch.float32))


@both_backends
@tensor_kinds
def test_tensor_coefficients_leave_shape_and_type_of_local_losses(tensor, backend):
    loss = VICRegLLoss(M, 0.5, backend=backend, **tensor_coefficients(tensor))
    losses = loss(**local_arguments(torch.float32))
    expected = dict.fromkeys(keys_of(*PARTS), ((), torch.float32))
    assert {k: (tuple(v.shape), v.dtype) for k, v in losses.items()} == expected


@both_backends
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one-element"])
@pytest.mark.parametrize("key", KEYS)
def test_gradient_of_a_trainable_coefficient_is_the_unweighted_term(key, shape, backend):
    x, y = two_views()
    weights = [nn.Parameter(torch.full(shape, w, dtype=torch.float64)) for w in (2.0, 3.0, 0.5)]
    losses = VICRegLoss(*weights, backend=backend)(x, y)
    expected = [
        t.expand(shape) if key in ("loss", f"{n}-loss") else torch.zeros(shape, dtype=torch.float64)
        for n, t in zip(NAMES, true_terms(x, y), strict=True)
    ]
    torch.testing.assert_close(list(gradients(losses[key].sum(), weights)), expected, **EXACT)


@both_backends
def test_gradient_of_a_trainable_coefficient_of_the_local_part(backend):
    arguments = local_arguments()
    weights = [nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in (2.0, 3.0, 0.5)]
    losses = VICRegLLoss(M, 0.25, *weights, backend=backend)(**arguments)
    coefficients = [w.detach().clone().requires_grad_() for w in weights]
    expected = true_local_losses(**arguments, alpha=0.25, coefficients=coefficients)["loss"]
    got = gradients(losses["loss"], weights)
    torch.testing.assert_close(got, gradients(expected, coefficients), **EXACT)


def test_inputs_and_coefficients_train_together():
    views = two_views(grad=True)
    weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    loss = VICRegLoss(cov_coeff=weight)(*views)["loss"]
    other = weight.detach().clone().requires_grad_()
    expected = true_losses(*views, (25.0, 15.0, other))["loss"]
    torch.testing.assert_close(gradients(loss, (*views, weight)), gradients(expected, (*views, other)), **EXACT)


def test_trainable_coefficients_are_parameters():
    loss = VICRegLoss(cov_coeff=nn.Parameter(torch.tensor(1.0)))
    assert [name for name, _ in loss.named_parameters()] == ["cov_coeff"]


# -- each loss by itself ----------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("key", KEYS)
def test_backward_of_one_loss_leaves_the_gradient_of_only_that(key, backend):
    x, y = two_views(grad=True)
    VICRegLoss(backend=backend)(x, y)[key].backward()
    expected = gradients(true_losses(x, y)[key], (x, y))
    torch.testing.assert_close((x.grad, y.grad), expected, **EXACT)


@both_backends
def test_backwards_of_all_losses_add_up(backend):
    x, y = two_views(grad=True)
    losses = VICRegLoss(backend=backend)(x, y)
    for key in KEYS[:3]:
        losses[key].backward(retain_graph=True)
    expected = gradients(true_losses(x, y)["loss"], (x, y))
    torch.testing.assert_close((x.grad, y.grad), expected, **EXACT)


@both_backends
def test_losses_in_any_combination(backend):
    x, y = two_views(grad=True)
    mine, true = VICRegLoss(backend=backend)(x, y), true_losses(x, y)
    got, expected = (d["loss"] * 1024 - d["inv-loss"] ** 2 + 3 * d["cov-loss"] for d in (mine, true))
    torch.testing.assert_close(gradients(got, (x, y)), gradients(expected, (x, y)), **EXACT)


def any_loss(make, backend="auto"):
    """A loss and its arguments, which require gradients."""
    if make is VICRegLoss:
        return make(backend=backend), dict(zip("xy", two_views(grad=True), strict=True))
    return make(M, backend=backend), local_arguments(grad=True)


@both_backends
@both_losses
def test_every_loss_owns_its_storage(make, backend):
    loss, arguments = any_loss(make, backend)
    losses = loss(**arguments)
    assert len({value.untyped_storage().data_ptr() for value in losses.values()}) == len(losses)


@both_backends
@both_losses
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_loss_divided_in_place_leaves_the_others(make, alpha, backend):
    loss, arguments = any_loss(make, backend)
    loss.alpha = alpha
    losses = loss(**arguments)
    for changed in losses:
        before = values(losses)
        losses[changed] /= 2
        assert values(losses) == before | {changed: before[changed] / 2}


@both_backends
@both_losses
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_backward_of_a_loss_divided_in_place(make, alpha, backend):
    loss, arguments = any_loss(make, backend)
    loss.alpha = alpha
    inputs = [t for t in arguments.values() if t.requires_grad]
    whole = loss(**arguments)["loss"]
    expected = [g / 4 for g in gradients(whole, inputs)]
    total = loss(**arguments)["loss"]
    total /= 4
    total.backward()
    got = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
    torch.testing.assert_close(got, expected, **EXACT)


def test_changing_a_loss_in_place_without_grad_mode_does_not_spoil_the_backward():
    x, y = two_views(grad=True)
    losses = VICRegLoss()(x, y)
    with torch.no_grad():
        losses["inv-loss"].zero_()
    losses["loss"].backward()
    expected = gradients(true_losses(x, y)["loss"], (x, y))
    torch.testing.assert_close((x.grad, y.grad), expected, **EXACT)


# -- types ------------------------------------------------------------------------------------------------------

TYPES = {
    "float16": (torch.float16, torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.float32),
    "float32": (torch.float32, torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64, torch.float64),
    "float16-float32": (torch.float16, torch.float32, torch.float32),
    "bfloat16-float16": (torch.bfloat16, torch.float16, torch.float32),
    "float32-float64": (torch.float32, torch.float64, torch.float64),
    "float64-float16": (torch.float64, torch.float16, torch.float64),
}
types = pytest.mark.parametrize(("first", "second", "of_loss"), TYPES.values(), ids=TYPES.keys())


class SameCovariance(VICRegLoss):
    """Overrides a published method and changes nothing."""

    @staticmethod
    def covariance_loss(x):
        return VICRegLoss.covariance_loss(x)


class SameLocalCovariance(VICRegLLoss):
    """Overrides a published method and changes nothing."""

    @staticmethod
    def covariance_loss(x):
        return VICRegLLoss.covariance_loss(x)


def typed_views(first, second):
    return randn(12, 5, seed=1, dtype=first, grad=True), randn(12, 5, seed=2, dtype=second, grad=True)


def typed_local(first, second):
    arguments = local_arguments()
    for name, dtype in (("x1_maps", first), ("x2_maps", second), ("x1_glob", first), ("x2_glob", second)):
        arguments[name] = arguments[name].to(dtype).requires_grad_()
    return arguments


@both_backends
@pytest.mark.parametrize("make", [VICRegLoss, SameCovariance], ids=["plain", "overridden"])
@types
def test_vicreg_type_of_losses(first, second, of_loss, make, backend):
    losses = make(backend=backend)(*typed_views(first, second))
    assert {k: v.dtype for k, v in losses.items()} == dict.fromkeys(KEYS, of_loss)


@both_backends
@pytest.mark.parametrize("make", [VICRegLLoss, SameLocalCovariance], ids=["plain", "overridden"])
@types
def test_vicregl_type_of_losses(first, second, of_loss, make, backend):
    losses = make(M, 0.5, backend=backend)(**typed_local(first, second))
    assert {k: v.dtype for k, v in losses.items()} == dict.fromkeys(keys_of(*PARTS), of_loss)


@types
def test_type_of_static_losses(first, second, of_loss):
    x, y = typed_views(first, second)
    assert VICRegLoss.representation_loss(x, y).dtype == of_loss
    for z in (x, y):
        own = torch.float64 if z.dtype == torch.float64 else torch.float32
        assert [VICRegLoss.variance_loss(z, 1.0).dtype, VICRegLoss.covariance_loss(z).dtype] == [own, own]


@both_backends
@types
def test_vicreg_values_in_other_types(first, second, of_loss, backend):
    x, y = typed_views(first, second)
    expected = true_losses(x.detach().double(), y.detach().double())  # of the rounded inputs
    losses = VICRegLoss(backend=backend)(x, y)
    # Sums of at most 60 float32 products: a few units of 2^-24 each.
    assert values(losses) == pytest.approx(values(expected), rel=1e-5)


@both_backends
@types
def test_vicreg_gradients_come_in_the_inputs_type(first, second, of_loss, backend):
    x, y = typed_views(first, second)
    VICRegLoss(backend=backend)(x, y)["loss"].backward()
    wide = [z.detach().double().requires_grad_() for z in (x, y)]
    expected = gradients(true_losses(*wide)["loss"], wide)
    for z, e in zip((x, y), expected, strict=True):
        assert z.grad.dtype == z.dtype
        # One rounding to the input's type, and to the smallest of its numbers; sums in float32.
        info = torch.finfo(z.dtype)
        torch.testing.assert_close(z.grad.double(), e, rtol=max(info.eps, 1e-5), atol=max(info.tiny, 1e-5))


@both_backends
@types
def test_vicregl_gradients_come_in_the_inputs_type(first, second, of_loss, backend):
    arguments = typed_local(first, second)
    VICRegLLoss(M, 0.5, backend=backend)(**arguments)["loss"].backward()
    got = {n: t.grad.dtype for n, t in arguments.items() if t.requires_grad}
    assert got == {n: t.dtype for n, t in arguments.items() if t.requires_grad}


# -- the module as an nn.Module ---------------------------------------------------------------------------------

CONFIGURED = {
    "VICRegLoss": lambda: VICRegLoss(2.0, 3, -0.5, 0.9, eps=1e-4, backend="aten", precision="high"),
    "VICRegLLoss": lambda: VICRegLLoss(
        4, 0.25, 2.0, 3, -0.5, 0.9, eps=1e-4, statistics="slot", match_order="patch", backend="reference"
    ),
}
configured = pytest.mark.parametrize("make", CONFIGURED.values(), ids=CONFIGURED.keys())


def arguments_of(loss):
    if isinstance(loss, VICRegLoss):
        return dict(zip("xy", two_views(), strict=True))
    return local_arguments()


@configured
def test_extra_repr_gives_the_constructor_arguments(make):
    loss = make()
    again = type(loss)(**eval(f"dict({loss.extra_repr()})"))
    assert values(again(**arguments_of(loss))) == values(loss(**arguments_of(loss)))


@configured
def test_repr_names_class_and_arguments(make):
    loss = make()
    assert repr(loss).startswith(type(loss).__name__ + "(")
    assert loss.extra_repr() in repr(loss)


@both_losses
def test_repr_of_tensor_coefficients(make):
    assert "cov_coeff=" in repr(make(cov_coeff=nn.Parameter(torch.tensor(1.5))))


ROUND_TRIPS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "to-float64": lambda loss: loss.to(torch.float64),
    "to-cpu": lambda loss: loss.to("cpu"),
    "cpu": lambda loss: loss.cpu(),
    "double": lambda loss: loss.double(),
    "train": lambda loss: loss.train(),
    "eval": lambda loss: loss.eval(),
    "requires_grad_": lambda loss: loss.requires_grad_(False),
}


@configured
@pytest.mark.parametrize("convert", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_losses_survive(convert, make):
    loss = make()
    expected = values(loss(**arguments_of(loss)))
    converted = convert(loss)
    assert type(converted) is type(loss)
    assert values(converted(**arguments_of(loss))) == expected


@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
@both_losses
def test_trainable_coefficients_survive(make, name):
    loss = make(cov_coeff=nn.Parameter(torch.tensor(1.5)))
    converted = ROUND_TRIPS[name](loss)
    assert converted.cov_coeff.item() == 1.5
    assert converted.cov_coeff is not loss.cov_coeff


@configured
def test_a_deep_copy_is_another_module(make):
    loss = make()
    converted = copy.deepcopy(loss)
    converted.inv_coeff = 100.0
    assert loss.inv_coeff == 2.0


@both_losses
def test_a_deep_copy_keeps_its_process_group(make, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        loss = make(process_group=dist.group.WORLD)
        teacher = copy.deepcopy(nn.Sequential(loss))[0]
        assert teacher is not loss
        assert teacher.process_group is dist.group.WORLD
    finally:
        dist.destroy_process_group()


@both_losses
@both_backends
def test_gradient_through_a_checkpoint(make, backend):
    arguments = (
        local_arguments(grad=True)
        if make is VICRegLLoss
        else dict(zip("xy", two_views(grad=True), strict=True))
    )
    inputs = [z for z in arguments.values() if z.requires_grad]
    loss = make(M, backend=backend) if make is VICRegLLoss else make(backend=backend)
    saved = checkpoint(lambda: loss(**arguments)["loss"], use_reentrant=False)
    expected = gradients(loss(**arguments)["loss"], inputs)
    torch.testing.assert_close(gradients(saved, inputs), expected, rtol=0, atol=0)


@both_losses
def test_state_dict_is_empty(make):
    assert make().state_dict() == {}


@both_losses
def test_no_parameters_and_no_buffers(make):
    assert [*make().parameters(), *make().buffers()] == []


@both_losses
def test_loads_an_empty_state_dict(make):
    assert make().load_state_dict({}).missing_keys == []


# -- overriding -------------------------------------------------------------------------------------------------


class Count:
    """Calls a published method, counts and multiplies its result."""

    def __init__(self, method, factor=2.0):
        self.method, self.factor, self.calls = method, factor, 0

    def __call__(self, *arguments):
        self.calls += 1
        found = self.method(*arguments)
        return (
            {k: v * self.factor for k, v in found.items()} if isinstance(found, dict) else found * self.factor
        )


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
        setting = setting | {"eps": 0.0}  # the published method knows no eps
    expected = doubled(true_losses(x, y, **truth_arguments(setting)), key)
    assert count.calls > 0
    assert values(losses) == pytest.approx(values(expected), rel=1e-10)


@pytest.mark.parametrize(("name", "key"), OVERRIDES.items(), ids=OVERRIDES.keys())
def test_vicreg_gradient_through_an_override(name, key):
    views = two_views(grad=True)
    losses = in_subclass(VICRegLoss, name, Count(getattr(VICRegLoss, name)))()(*views)
    expected = doubled(true_losses(*views), key)
    torch.testing.assert_close(gradients(losses["loss"], views), gradients(expected["loss"], views), **EXACT)


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
        got = {k: losses[f"{part}/{k}"].item() for k in KEYS}
        want = doubled({k: expected[f"{part}/{k}"].item() for k in KEYS}, OVERRIDES[name])
        assert got == pytest.approx(want, rel=1e-10)


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
    choose = functional.backends.choose
    monkeypatch.setattr(
        functional.backends, "choose", lambda *asked, **how: chosen.append(asked[0]) or choose(*asked, **how)
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


def test_an_override_may_return_a_number():
    x, y = two_views()
    losses = in_subclass(VICRegLoss, "covariance_loss", lambda x: 0.5)()(x, y)
    assert losses["cov-loss"].item() == 0.5


def test_vicregl_gradient_through_an_override():
    arguments = local_arguments(grad=True)
    inputs = [t for t in arguments.values() if t.requires_grad]
    losses = SameLocalCovariance(M, 0.25)(**arguments)
    expected = true_local_losses(**arguments, alpha=0.25)
    torch.testing.assert_close(gradients(losses["loss"], inputs), gradients(expected["loss"], inputs), **EXACT)


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
    want = {"loss": 0.25 * 3 * distance + 0.75 * expected.pop("loss"), **expected}
    want |= {"global/distance": distance, "global/loss": 3 * distance}
    assert values(losses) == pytest.approx(values(want), rel=1e-10)


def test_another_global_part_may_take_other_inputs():
    arguments = local_arguments() | {"x1_glob": randn(B), "x2_glob": randn(B, seed=1)}
    loss = VICRegLLoss(M, 0.25)
    loss.global_vicreg_loss = OtherLoss()
    assert loss(**arguments)["loss"].isfinite()


# -- contexts ---------------------------------------------------------------------------------------------------

MAKERS = {
    "VICRegLoss": VICRegLoss,
    "VICRegLLoss": VICRegLLoss,
    "VICRegLoss-overridden": SameCovariance,
    "VICRegLLoss-overridden": SameLocalCovariance,
}


def float32_loss(make, backend="auto"):
    """A loss and float32 arguments large enough for bfloat16 products to change its matches."""
    if issubclass(make, VICRegLoss):
        return make(backend=backend), dict(zip("xy", two_views(40, 24, torch.float32), strict=True))
    # Two distant clusters of patches: their norms are many times the distances within one.
    cluster = 20 * (-1.0) ** torch.arange(49)[:, None]
    maps = [randn(4, 49, 32, seed=k, dtype=torch.float32) + cluster for k in (1, 2)]
    globs = [randn(4, 16, seed=k, dtype=torch.float32) for k in (3, 4)]
    places = [randn(4, 49, 2, seed=k, dtype=torch.float32) for k in (5, 6)]
    names = ("x1_maps", "x2_maps", "x1_glob", "x2_glob", "x1_locations", "x2_locations")
    return make(10, backend=backend), dict(zip(names, (*maps, *globs, *places), strict=True))


@both_backends
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_autocast_does_not_change_the_losses(make, backend):
    loss, arguments = float32_loss(make, backend)
    expected = loss(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = loss(**arguments)
    assert {v.dtype for v in losses.values()} == {torch.float32}
    assert values(losses) == values(expected)


def test_autocast_does_not_change_the_gradients():
    loss, arguments = float32_loss(VICRegLLoss)
    inputs = [arguments[n].requires_grad_() for n in ("x1_maps", "x2_maps", "x1_glob", "x2_glob")]
    expected = gradients(loss(**arguments)["loss"], inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(loss(**arguments)["loss"], inputs)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)


@both_backends
@both_losses
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_grad_mode(mode, make, backend):
    loss, arguments = any_loss(make, backend)
    expected = values(loss(**arguments))
    with mode():
        losses = loss(**arguments)
    assert values(losses) == expected
    assert not any(value.requires_grad for value in losses.values())


@both_losses
def test_inputs_without_grad_give_losses_without_grad(make):
    loss, arguments = any_loss(make)
    losses = loss(**{name: t.detach() for name, t in arguments.items()})
    assert not any(value.requires_grad for value in losses.values())


@both_backends
@both_losses
def test_backward_twice(make, backend):
    loss, arguments = any_loss(make, backend)
    inputs = [t for t in arguments.values() if t.requires_grad]
    total = loss(**arguments)["loss"]
    once = gradients(total, inputs, retain_graph=True)
    twice = gradients(total, inputs)
    torch.testing.assert_close(twice, once, rtol=0.0, atol=0.0)


@both_losses
def test_a_call_leaves_nothing_behind(make):
    loss, arguments = any_loss(make)
    expected = values(loss(**arguments))
    loss(**{name: t.detach() * 2 for name, t in arguments.items()})["loss"]
    assert values(loss(**arguments)) == expected


@both_losses
def test_two_calls_are_two_graphs(make):
    loss, arguments = any_loss(make)
    inputs = [t for t in arguments.values() if t.requires_grad]
    first, second = loss(**arguments)["loss"], loss(**arguments)["loss"]
    once = gradients(first, inputs)
    both = [g + h for g, h in zip(once, gradients(second, inputs), strict=True)]
    torch.testing.assert_close(both, [2 * g for g in once], rtol=0.0, atol=0.0)


@both_losses
def test_inputs_are_left_alone(make):
    loss, arguments = any_loss(make)
    before = {name: t.detach().clone() for name, t in arguments.items()}
    loss(**arguments)["loss"].backward()
    assert all(torch.equal(t, before[name]) for name, t in arguments.items())


@pytest.mark.parametrize("make", [VICRegLoss, VICRegLLoss], ids=["VICRegLoss", "VICRegLLoss"])
def test_two_runs_agree_bit_for_bit(make):
    runs = []
    for _ in range(2):
        loss, arguments = float32_loss(make)
        inputs = [t.clone().requires_grad_() for n, t in arguments.items() if "locations" not in n]
        arguments |= dict(zip([n for n in arguments if "locations" not in n], inputs, strict=True))
        losses = loss(**arguments)
        runs.append([*(v.detach() for v in losses.values()), *gradients(losses["loss"], inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
