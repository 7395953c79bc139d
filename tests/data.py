"""Embeddings that break careless implementations, and the rule by which errors are judged.

The rule: against the float64 truth, a fast path may err twice as much as eager code in the same type, plus a floor
for the cases in which eager code is right by luck.
"""

from collections.abc import Callable

import torch
from torch import Tensor

U = 2.0**-24  # unit roundoff of float32


def normal(N: int, D: int) -> Tensor:
    return 0.7 * torch.randn(N, D, dtype=torch.float64)


def far_mean(N: int, D: int) -> Tensor:
    """Mean 1000 standard deviations from zero."""
    return normal(N, D) + 700.0


def decorrelated(N: int, D: int) -> Tensor:
    """Features of unit variance, as uncorrelated as N samples allow: orthonormal columns, or else rows (QR)."""
    z = normal(N, D)
    q = torch.linalg.qr(z - z.mean(0))[0] if N > D else torch.linalg.qr(z.T)[0].T * (D / N) ** 0.5
    return q * (N - 1) ** 0.5


def strong_and_weak(N: int, D: int) -> Tensor:
    """A few strong, orthonormal features before many weak ones."""
    q = torch.linalg.qr(normal(N, D) - 0.1)[0]
    out = normal(N, D) * 1e-3
    out[:, : q.shape[1]] = q * (N - 1) ** 0.5
    return out


def rank_one(N: int, D: int) -> Tensor:
    return torch.randn(N, 1, dtype=torch.float64) * torch.randn(1, D, dtype=torch.float64)


def constant_columns(N: int, D: int) -> Tensor:
    """Every second column is a non-dyadic constant, each another."""
    z = normal(N, D)
    z[:, ::2] = 0.1 + torch.arange((D + 1) // 2, dtype=torch.float64) / 3
    return z


def equal_rows(N: int, D: int) -> Tensor:
    return normal(1, D).expand(N, D).clone()


def outlier(N: int, D: int) -> Tensor:
    z = normal(N, D)
    z[N // 2] += 1e4
    return z


def first_row_outlier(N: int, D: int) -> Tensor:
    z = normal(N, D)
    z[0] += 1e4
    return z


def tiny(N: int, D: int) -> Tensor:
    return normal(N, D) * 1e-18


def huge(N: int, D: int) -> Tensor:
    return normal(N, D) * 1e9


HARD: tuple[Callable[[int, int], Tensor], ...] = (
    far_mean,
    decorrelated,
    strong_and_weak,
    rank_one,
    constant_columns,
    equal_rows,
    outlier,
    first_row_outlier,
    tiny,
    huge,
)
