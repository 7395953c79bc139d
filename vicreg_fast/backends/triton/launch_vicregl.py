"""Launches VICRegL's per-image statistics: one kernel forward, one backward, for both losses and both directions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import local as kernels
from ...plan import Plan
from ...sides import uses_dual
from .configs import Key, Local, LocalGradient, Machine, choose, launch_options
from .launch import Products, block_of, by_direction

# Matches that one program holds: more would not fit its registers.
MOST_MATCHES = 64


def fits(plan: Plan, indices: Sequence[Tensor]) -> bool:
    """Whether a plan is one for these kernels: an image's own statistics, of matches by location and by feature."""
    return (
        plan.losses == 2
        and not plan.across
        and plan.covariance
        and len(indices) >= len(plan.group_sizes)
        and max(index.shape[2] for index in indices[: len(plan.group_sizes)]) <= MOST_MATCHES
    )


class _Matches:
    """The match sets of both losses and what every launch is told of them."""

    def __init__(self, plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
        groups = len(plan.group_sizes)
        self.x, self.y = sources
        self.B, _, self.D = self.x.shape
        self.numbers = by_direction([index.contiguous() for index in indices[:groups]])
        self.m1, self.m2 = (numbers.shape[2] for numbers in self.numbers[:2])
        # One side for both directions: that of the one with more matches.
        self.dual = uses_dual(self.B, max(self.m1, self.m2), self.D)
        self.block_n = block_of(max(self.m1, self.m2), MOST_MATCHES)
        # Each direction has half of a loss, each of its two views half of that.
        w_inv, w_var, w_cov = (w * plan.averaged / 2 for w in plan.weights)
        self.factors = w_inv / (self.B * self.D), w_var / (2 * self.B * self.D), w_cov / (2 * self.B * self.D)
        # With many rows 32 columns more of them do not fit registers.
        self.block_f = block_of(self.D, 32 if self.block_n <= 32 else 16)

    def columns(self, most: int) -> int:
        """Columns of a program, no more than there are."""
        return block_of(self.D, most)


def keys(
    plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor], products: Products, machine: Machine
) -> list[Key]:
    """What the configurations are chosen by, of the forward pass and of the backward: matches and patches."""
    m = max(index.shape[2] for index in indices[: len(plan.group_sizes)])
    P = max(source.shape[1] for source in sources)
    B = sources[0].shape[0]
    return [
        Key(*machine, True, "local", products.kind, B, m, P),
        Key(*machine, True, "local_gradient", "", B, m, P),
    ]


def saved(
    plan: Plan, shape: Sequence[int], indices: Sequence[Tensor], products: Products
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what the backward pass reads of maps (B, P, D): G of every group on the dual side, else nothing."""
    B, _, D = shape
    views = [(index.shape[0], index.shape[2]) for index in indices[: len(plan.group_sizes)]]
    keep = plan.keep and uses_dual(B, max(m for _, m in views), D)
    return [((V, B, m, m) if keep else (0,), products.matrix_type) for V, m in views]


def terms(
    plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor], products: Products, machine: Machine
) -> list[Tensor]:
    """[the plan's outputs, then G of every group]."""
    matches = _Matches(plan, sources, indices)
    forward_key, _ = keys(plan, sources, indices, products, machine)
    config: Local = choose(forward_key)
    x, y = sources
    B, D = matches.B, matches.D
    G = [
        torch.empty(shape, dtype=dtype, device=x.device)
        for shape, dtype in saved(plan, x.shape, indices, products)
    ]
    ticket = indices[-1]
    if len(indices) == len(plan.group_sizes):  # matched elsewhere
        ticket = torch.zeros(1, dtype=torch.int32, device=x.device)
    sums = torch.empty(2, 4 * B, 3, dtype=torch.float64, device=x.device)
    outputs = [torch.empty((), dtype=torch.float32, device=x.device) for _ in range(plan.outputs)]
    kernels._local_forward_kernel[(8 * B,)](
        x, y, *matches.numbers, *_pointers(G, sums), sums, ticket, *outputs,
        B, D, matches.m1, matches.m2, plan.gamma, plan.eps, *matches.factors, *x.stride(), *y.stride(),
        DUAL=matches.dual, KEEP=plan.keep, ROUND=products.round, TYPE=products.language_type,
        PRECISION=products.dot, BLOCK_N=matches.block_n, BLOCK_D=matches.columns(config.columns), BLOCK_F=matches.block_f,
        **launch_options(machine, config.warps, registers=config.registers),
    )  # fmt: skip
    return [*outputs, *G]


def gradient(
    plan: Plan,
    sources: Sequence[Tensor],
    indices: Sequence[Tensor],
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
    products: Products,
    machine: Machine,
) -> list[Tensor | None]:
    """Gradients of the maps that need one, in their type; None for others."""
    matches = _Matches(plan, sources, indices)
    _, gradient_key = keys(plan, sources, indices, products, machine)
    config: LocalGradient = choose(gradient_key)
    x, y = sources
    B, D = matches.B, matches.D
    # Both directions of a loss have the same upstream gradients.
    reached = [*upstream[:3], *upstream[3 * plan.averaged :][:3]]
    inv, var, cov = (
        sum(1 << group for group in range(2) if reached[3 * group + k] is not None) for k in range(3)
    )
    grads = [
        torch.empty(source.shape, dtype=source.dtype, device=source.device) if need else None
        for source, need in zip(sources, needs, strict=True)
    ]
    # In the place of what is not there, a pointer of its type that is not used.
    outs = [grad for grad in grads if grad is not None]
    some = next(u for u in reached if u is not None)
    block_p = block_of(
        max(source.shape[1] for source, need in zip(sources, needs, strict=True) if need), config.patches
    )
    columns = matches.columns(config.columns)
    tiles = sum(-(-out.shape[1] // block_p) for out in outs)
    k_inv, k_var, k_cov = matches.factors
    kernels._local_gradient_kernel[(B * tiles * -(-D // columns),)](
        x, y, *matches.numbers, *_pointers(saved, some), outs[0], outs[-1], *(some if u is None else u for u in reached),
        B, x.shape[1], y.shape[1], D, matches.m1, matches.m2, plan.gamma, plan.eps, 2 * k_inv, k_var, 4 * k_cov,
        *x.stride(), *y.stride(), X=needs[0], Y=needs[1], INV=inv, VAR=var, COV=cov,
        DUAL=matches.dual, ROUND=products.round, TYPE=products.language_type,
        PRECISION=products.dot, EXACT=products.exact, BLOCK_P=block_p, BLOCK_N=matches.block_n, BLOCK_D=columns,
        BLOCK_F=matches.block_f,
        **launch_options(machine, config.warps),
    )  # fmt: skip
    return grads


def _pointers(G: Sequence[Tensor], other: Tensor) -> list[Tensor]:
    """G of each match set, there and back; where there is none, a pointer that is not used."""
    return by_direction(G) if G[0].numel() else [other] * 4
