"""Launches the forward pass: the smaller side's product and the terms.

Dual: moments, products, and the sum of split products if there are any: two kernels or three.  Primal: products with
the moments, and their sum: two.  The last kernel weighs and adds the terms.
"""

import torch
from torch import Tensor

from ...kernels import combine as combine_kernels
from ...kernels import gram as gram_kernels
from ...kernels import moments as moments_kernels
from ...kernels import second_moment as second_moment_kernels
from ...plan import Plan
from ...sides import FEW_SAMPLES, uses_dual
from .configs import INTERPRETER, Key, Machine, Moments, Product, Split, choose, launch_options, split
from .launch import Products, Views

# Of a program of the combination: parts at a time, and elements of a tile.  Its registers hold both: the most that no
# target spilled of those tried.
_FEW_PARTS, _MANY_PARTS = (4, 512), (8, 128)


def keys(views: Views, products: Products, machine: Machine) -> list[Key]:
    """What the forward pass's configurations are chosen by: of the moments (dual) and of the product."""
    if views.dual:
        return [views.key(machine, "moments"), views.key(machine, "gram", products.kind)]
    return [views.key(machine, "second_moment", products.kind)]


def terms(views: Views, plan: Plan, products: Products, machine: Machine) -> list[Tensor]:
    """[weighted inv, var, cov, their sum, moments, M, operand]; the last three are empty where ``plan.keep`` is not set."""
    return _Forward(views, plan, products, machine).run()


def saved(
    plan: Plan, products: Products, indexed: bool, V: int, P: int, N: int, D: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what the backward pass reads: moments, M and the dual's operand, if it is a copy."""
    dual = uses_dual(P, N, D)
    shapes: tuple[tuple[int, ...], ...] = ((0,), (0,), (0,))
    if plan.keep:
        copy = (0,) if indexed else (V, P, N, D)
        shapes = ((4, P, V, D), (V * P, N, N), copy) if dual else ((3, P, V, D), (V * P, D, D), (0,))
    types = (torch.float32, products.matrix_type, products.type)
    return list(zip(shapes, types, strict=True))


class _Forward:
    """The arguments that the kernels of one group's forward pass share."""

    def __init__(self, views: Views, plan: Plan, products: Products, machine: Machine) -> None:
        self.views, self.plan, self.products, self.machine = views, plan, products, machine
        self.shape = views.shape
        self.moments, self.M, self.operand = (
            self.empty(*shape, dtype=dtype)
            for shape, dtype in saved(plan, products, views.index is not None, views.count, *views.shape)
        )
        self.ticket = self.empty(1, dtype=torch.int32)
        self.outputs = [self.empty() for _ in range(4)]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.views.x.source.device)

    def run(self) -> list[Tensor]:
        if self.views.dual:
            self.dual()
        else:
            self.primal()
        return [*self.outputs, self.moments, self.M, self.operand]

    def tiles(self, side: int, config: Product) -> int:
        """Tiles on and below the diagonal of one M."""
        count = -(-side // config.tile)
        return count * (count + 1) // 2

    def combination(self, product: Product, parts: Split) -> tuple[int, int]:
        """(BLOCK_C, BLOCK_R): parts added at a time and rows of a tile, of a program of the combination."""
        block_c, elements = _MANY_PARTS if parts.parts > 8 else _FEW_PARTS
        if (
            self.machine == INTERPRETER
        ):  # as many registers as it likes; and yet more than one program of a tile, as on a GPU
            return block_c, product.tile // 2
        return block_c, max(1, elements // product.tile)

    def dual(self) -> None:
        views, products = self.views, self.products
        P, N, D = self.shape
        V = views.count
        moments_key, product_key = keys(views, products, self.machine)
        config: Moments = choose(moments_key)
        blocks = -(-D // config.columns)
        sums = self.empty(V * P * blocks, 3, dtype=torch.float64)
        energy = self.empty(V * P, blocks, N)
        indexed = views.index is not None
        operand, moments = self.operand, self.moments
        if not self.plan.keep and indexed:  # the product centres rows by number itself
            moments = self.empty(4, P, V, D)
        elif not self.plan.keep:
            operand = self.empty(V, P, N, D, dtype=products.type)
        moments_kernels._moments_forward_kernel[(V * P * blocks,)](
            *views.pointers, operand, moments, energy, sums, self.ticket,
            P, N, D, self.plan.gamma, self.plan.eps, *views.strides, **views.constants,
            KEEP=self.plan.keep or indexed, ROUND=products.round, BLOCK_N=config.rows, BLOCK_D=config.columns,
            **launch_options(self.machine, config.warps, config.stages),
        )  # fmt: skip

        product: Product = choose(product_key)
        tiles = self.tiles(N, product)
        parts = split(V * P * tiles, D, product, self.machine.processors, whole_tiles=True)
        rest = V * P * tiles - parts.whole
        _, block_r = self.combination(product, parts)
        found = parts.whole + rest * (product.tile // block_r)
        found_sums = self.empty(found, 2, dtype=torch.float64)
        partial = self.empty(rest * parts.parts, product.tile, product.tile)
        gram_kernels._gram_forward_kernel[(parts.programs(V * P * tiles),)](
            *views.pointers, operand, moments, partial, energy, self.M, found_sums, sums, self.ticket, *self.outputs,
            P, N, D, tiles, *parts, blocks, found, len(sums), *self.plan.weights, *views.strides, **views.constants,
            ROUND=products.round, TYPE=products.language_type, PRECISION=products.dot, KEEP=self.plan.keep, LAST=rest == 0,
            BLOCK_M=product.tile, BLOCK_K=product.inner,
            **launch_options(self.machine, product.warps, product.stages),
        )  # fmt: skip
        if rest:
            self.combine(product, parts, tiles, partial, energy, energy, found_sums, sums, blocks)

    def primal(self) -> None:
        views, products = self.views, self.products
        P, N, D = self.shape
        V, pairs = views.count, (views.count + 1) // 2
        (key,) = keys(views, products, self.machine)
        product: Product = choose(key)
        tiles = self.tiles(D, product)
        narrow = tiles == 1
        programs = pairs * P if narrow else V * P * tiles
        parts = split(programs, N, product, self.machine.processors, whole_tiles=False)
        partial = self.empty(V * P * tiles * parts.parts, product.tile, product.tile)
        sums = self.empty(parts.parts, V * P, 3, D)
        inv_sums = self.empty(programs * parts.parts if V > 1 else 0, dtype=torch.float64)
        options = {
            **views.constants, "ROUND": products.round, "TYPE": products.language_type, "PRECISION": products.dot,
            "BLOCK_M": product.tile, "BLOCK_K": product.inner,
            **launch_options(self.machine, product.warps, product.stages),
        }  # fmt: skip
        arguments = (*views.pointers, partial, sums, inv_sums, self.ticket, P, N, D)
        if narrow:
            second_moment_kernels._narrow_second_moment_forward_kernel[(programs * parts.parts,)](
                *arguments, parts.parts, parts.length, *views.strides, **options, FEW=N < FEW_SAMPLES
            )
        else:
            second_moment_kernels._second_moment_forward_kernel[(programs * parts.parts,)](
                *arguments, tiles, parts.parts, parts.length, *views.strides, **options
            )
        _, block_r = self.combination(product, parts)
        found_sums = self.empty(V * P * tiles * (product.tile // block_r), 2, dtype=torch.float64)
        # Neither is read on this side: energy is the dual's.
        self.combine(product, parts, tiles, partial, sums, sums, found_sums, inv_sums, 0)

    def combine(
        self,
        product: Product,
        parts: Split,
        tiles: int,
        partial: Tensor,
        sums: Tensor,
        energy: Tensor,
        found_sums: Tensor,
        term_sums: Tensor,
        blocks: int,
    ) -> None:
        """Add the parts of split products; ``sums`` is read on the primal side, ``energy`` on the dual."""
        P, N, D = self.shape
        block_c, block_r = self.combination(product, parts)
        strips = len(found_sums) - parts.whole
        combine_kernels._combine_forward_kernel[(strips,)](
            partial, sums, energy, self.moments, self.M, found_sums, term_sums, self.ticket, *self.outputs,
            P, N, D, tiles, *parts, blocks, len(found_sums), len(term_sums),
            self.plan.gamma, self.plan.eps, *self.plan.weights,
            VIEWS=self.views.count, DUAL=self.views.dual, ROUND=self.products.round, KEEP=self.plan.keep,
            BLOCK_M=product.tile, BLOCK_R=block_r, BLOCK_C=block_c,
            **launch_options(self.machine, warps=4),
        )  # fmt: skip
