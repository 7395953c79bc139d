"""Launches the backward pass: one kernel for all views."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import gradient as kernels
from ...plan import Plan
from .configs import Gradient, Key, Machine, choose, launch_options
from .launch import Products, Views


def keys(views: Views, products: Products, machine: Machine) -> list[Key]:
    """What the backward pass's configuration is chosen by."""
    return [views.key(machine, "gradient", products.gradient_kind)]


def gradient(
    views: Views,
    plan: Plan,
    products: Products,
    machine: Machine,
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Of each source that needs one, the gradient of its views: (views of the source, P, N, D).

    In the source's type; float32 where rows are chosen by number, which a source's gradient adds up.
    """
    moments, M, operand = saved
    P, N, D = views.shape
    V, pairs = views.count, (views.count + 1) // 2
    (key,) = keys(views, products, machine)
    config: Gradient = choose(key)
    u_inv, u_var, u_cov = upstream
    w_inv, w_var, w_cov = plan.weights
    sources = (views.x.source, views.y.source)[: min(V, 2)]
    grads = [
        torch.empty(
            (pairs, P, N, D),
            dtype=torch.float32 if views.index is not None else source.dtype,
            device=source.device,
        )
        if need
        else None
        for source, need in zip(sources, needs, strict=True)
    ]
    # Views that need a gradient: all, or 0 and 3 (of x), or 1 and 2 (of y).
    first, step, count = (0, 1, V) if all(needs) else (0, 3, pairs) if needs[0] else (1, 1, pairs)
    # In the place of what is not there, a pointer of its type that is not used.
    outs = [grad for grad in grads if grad is not None]
    tiles = -(-N // config.rows) * -(-D // config.columns)
    kernels._gradient_kernel[(tiles * count * P,)](
        *views.pointers, operand, moments, M, outs[0], outs[-1],
        *(moments if u is None else u for u in upstream),
        P, N, D, first, step, plan.gamma, plan.eps,
        2 * w_inv / (pairs * P * N * D), w_var / (V * P * D * (N - 1)), 4 * w_cov / (V * P * D * (N - 1)),
        *views.strides, **views.constants,
        DUAL=views.dual, ROUND=products.round, PRECISION=products.dot,
        INV=u_inv is not None and V > 1, VAR=u_var is not None, COV=u_cov is not None,
        BLOCK_N=config.rows, BLOCK_D=config.columns, BLOCK_K=config.inner,
        **launch_options(machine, config.warps, config.stages),
    )  # fmt: skip
    return grads
