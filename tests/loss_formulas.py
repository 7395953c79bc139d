"""Arguments of the two loss modules, and the losses that they must return, composed from the formulas in float64.

The truth uses no code of the library.  Of equal distances the first is the match.
"""

import pytest
import torch

from vicreg_fast import VICRegLLoss, VICRegLoss

from .data import seeded_randn

both_backends = pytest.mark.parametrize("backend", ["aten", "reference"])
LOSSES = {"VICRegLoss": VICRegLoss, "VICRegLLoss": VICRegLLoss}
both_losses = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
NAMES = ("inv", "var", "cov")
KEYS = ("inv-loss", "var-loss", "cov-loss", "loss")
PARTS = ("global", "location", "feature")
WEIGHTS = {"inv_coeff": 25.0, "var_coeff": 15.0, "cov_coeff": 1.0, "gamma": 1.0}  # the constructors' defaults
B, P1, P2, C, D, M = 3, 9, 11, 6, 5, 4


def randn(*shape, seed=0, dtype=torch.float64, grad=False):
    """Values of standard deviation 0.7, the same in every type."""
    return (0.7 * seeded_randn(*shape, seed=seed, dtype=torch.float64)).to(dtype).requires_grad_(grad)


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


def keys_of(*parts):
    return ["loss", *(f"{part}/{key}" for part in parts for key in KEYS)]


def any_loss(make, backend="auto"):
    """A loss and its arguments, which require gradients."""
    if make is VICRegLoss:
        return make(backend=backend), dict(zip("xy", two_views(grad=True), strict=True))
    return make(M, backend=backend), local_arguments(grad=True)


def float32_loss(make, backend="auto"):
    """A loss and float32 arguments whose matches bfloat16 products would change."""
    if issubclass(make, VICRegLoss):
        return make(backend=backend), dict(zip("xy", two_views(40, 24, torch.float32), strict=True))
    # Two distant clusters of patches: norms are many times the distances within a cluster.
    cluster = 20 * (-1.0) ** torch.arange(49)[:, None]
    maps = [randn(4, 49, 32, seed=k, dtype=torch.float32) + cluster for k in (1, 2)]
    globs = [randn(4, 16, seed=k, dtype=torch.float32) for k in (3, 4)]
    places = [randn(4, 49, 2, seed=k, dtype=torch.float32) for k in (5, 6)]
    names = ("x1_maps", "x2_maps", "x1_glob", "x2_glob", "x1_locations", "x2_locations")
    return make(10, backend=backend), dict(zip(names, (*maps, *globs, *places), strict=True))


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
    """Rows of x and of y, problems first, that are matched where a is matched with b."""
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
        part = true_losses(x1_glob, x2_glob, coefficients, gamma, eps)
        losses |= {f"global/{name}": value for name, value in part.items()}
    if alpha < 1:
        places = {"location": (x1_locations, x2_locations), "feature": (x1_maps, x2_maps)}
        for part, (a, b) in places.items():
            x_to_y = true_direction(x1_maps, x2_maps, a, b, m, statistics, order)
            y_to_x = true_direction(x2_maps, x1_maps, b, a, m, statistics, order)
            both = [true_losses(*rows, coefficients, gamma, eps) for rows in (x_to_y, y_to_x)]
            losses |= {f"{part}/{name}": (both[0][name] + both[1][name]) / 2 for name in KEYS}
    total = 0.0
    if alpha > 0:
        total = total + alpha * losses["global/loss"]
    if alpha < 1:
        total = total + (1 - alpha) * (losses["feature/loss"] + losses["location/loss"]) / 2
    return {"loss": total, **losses}


def truth_arguments(setting):
    """The arguments of the truth for keywords of a constructor."""
    weights = {**WEIGHTS, "eps": 0.0, **setting}
    names = ("inv_coeff", "var_coeff", "cov_coeff")
    return {
        "coefficients": tuple(weights[n] for n in names),
        "gamma": weights["gamma"],
        "eps": weights["eps"],
    }
