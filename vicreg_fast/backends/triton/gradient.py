"""Launches the backward pass: one kernel for all views."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import gradient as kernels
from ...multiview import Plan
from . import configs
from .launch import Products, Views


def gradient(
    views: Views,
    plan: Plan,
    products: Products,
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of each view that needs one, contiguous (P, N, D) in the view's type."""
    config = configs.choose(products.dot)
    moments, M, operand = saved
    P, N, D = views.shape
    V = views.count
    u_inv, u_var, u_cov = upstream
    w_inv, w_var, w_cov = plan.weights
    sources = (views.first.source, views.second.source)[:V]
    grads = [
        torch.empty((P, N, D), dtype=source.dtype, device=source.device) if need else None
        for source, need in zip(sources, needs, strict=True)
    ]
    first = 0 if needs[0] else 1
    unread = moments  # a pointer in the place of what is not there
    outs = [unread if grad is None else grad for grad in grads]
    programs = -(-N // config.gradient_rows) * -(-D // config.gradient_columns)
    kernels._gradient_kernel[(programs, sum(needs) * P)](
        *views.pointers, operand, moments, M, outs[0], outs[-1],
        *(unread if u is None else u for u in upstream),
        P, N, D, plan.gamma, plan.eps,
        2 * w_inv / (P * N * D), w_var / (V * P * D * (N - 1)), 4 * w_cov / (V * P * D * (N - 1)),
        *views.strides, **views.constants,
        FIRST=first, DUAL=views.dual, ROUND=products.round, PRECISION=products.dot,
        INV=u_inv is not None and V == 2, VAR=u_var is not None, COV=u_cov is not None and plan.covariance,
        BLOCK_N=config.gradient_rows, BLOCK_D=config.gradient_columns, BLOCK_K=config.inner, num_warps=config.warps,
    )  # fmt: skip
    return grads
