"""Launches the forward pass: the smaller side's product and the terms."""

import torch
from torch import Tensor

from ...kernels import gram as kernels
from ...kernels import moments as moments_kernels
from ...multiview import Plan
from ...rows import FEW_SAMPLES
from . import configs
from .launch import Products, Views


def terms(views: Views, plan: Plan, products: Products) -> list[Tensor]:
    """[weighted inv, var, cov, their sum, moments, M, operand]: three kernels on the dual side, two on the primal."""
    config = configs.choose(products.dot)
    P, N, D = views.shape
    V = views.count
    device = views.first.source.device
    side, inner = (N, D) if views.dual else (D, N)
    count = -(-side // config.tile)
    tiles = count * (count + 1) // 2
    length, parts = configs.split(inner, tiles * V * P, config)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    product = empty(parts, V * P, tiles, config.tile, config.tile)
    moments = empty(4 if views.dual else 3, P, V, D)
    M = empty(V * P, side, side)
    strips = config.tile // config.strip
    found = empty(V * P * tiles * strips, 2, dtype=torch.float64)
    ticket = empty(1, dtype=torch.int32)
    blocks = {
        "BLOCK_M": config.tile,
        "BLOCK_K": config.inner if views.dual else config.primal_inner,
        "num_warps": config.warps,
    }
    if views.dual:
        operand = empty(V, P, N, D)
        programs = -(-D // config.moments_columns)
        partial = empty(programs * P, 3, dtype=torch.float64)
        energy = empty(V * P, programs, N, dtype=torch.float64)
        moments_kernels._moments_forward_kernel[(programs, P)](
            *views.pointers, operand, moments, energy, partial, ticket, P, N, D, plan.gamma, plan.eps, *views.strides,
            **views.constants, ROUND=products.round, BLOCK_N=config.moments_rows, BLOCK_D=config.moments_columns,
            num_warps=config.warps,
        )  # fmt: skip
        kernels._gram_forward_kernel[(tiles, parts, V * P)](
            operand, product, N, D, length, PRECISION=products.dot, enable_fp_fusion=False, **blocks
        )
        sums = moments  # not read
        partials = programs * P
        energies = programs
    else:
        operand = empty(0)
        energy, energies = moments, 0  # not read
        sums = empty(parts, V * P, 3, D)
        partials = parts * P * tiles if V == 2 else 0
        partial = empty(partials, dtype=torch.float64)
        kernels._second_moment_forward_kernel[(tiles, parts, V * P)](
            *views.pointers, product, sums, partial, ticket, P, N, D, length, *views.strides, **views.constants,
            ROUND=products.round, PRECISION=products.dot, FEW=N < FEW_SAMPLES, **blocks,
        )  # fmt: skip
    outputs = [empty() for _ in range(4)]
    kernels._combine_forward_kernel[(tiles * strips, V * P)](
        product, sums, energy, moments, M, found, partial, ticket, *outputs,
        P, N, D, length, parts, partials, energies, plan.gamma, plan.eps, *plan.weights,
        VIEWS=V, DUAL=views.dual, BLOCK_M=config.tile, BLOCK_R=config.strip,
        enable_fp_fusion=False, num_warps=config.warps,
    )  # fmt: skip
    return [*outputs, moments, M, operand]
