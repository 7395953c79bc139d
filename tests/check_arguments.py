"""Valid arguments of the losses, small and in float32, and the values with which the tests of the checks replace them."""

import math

import torch

from vicreg_fast import VICRegLLoss

from .data import seeded_randn

BAD = (TypeError, ValueError)
BACKENDS = ("aten", "reference")
NOT_FLOATING = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128)
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
B, P, C, D = 3, 6, 5, 4


def of_type(dtype, *shape):
    """Values of a type, for types that checks refuse."""
    return seeded_randn(*shape).abs().mul(10).to(dtype)


def local_arguments(**changed):
    """Valid arguments of VICRegLLoss, except those in ``changed``."""
    valid = {
        "x1_maps": seeded_randn(B, P, C, seed=1),
        "x2_maps": seeded_randn(B, P, C, seed=2),
        "x1_glob": seeded_randn(B, D, seed=3),
        "x2_glob": seeded_randn(B, D, seed=4),
        "x1_locations": seeded_randn(B, P, 2, seed=5),
        "x2_locations": seeded_randn(B, P, 2, seed=6),
    }
    return valid | changed


def local_loss(num_matches=2, alpha=0.5, **options):
    return VICRegLLoss(num_matches, alpha, **options)
