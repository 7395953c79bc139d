"""Launches the sum of gradients of rows by number, for one source."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import scatter as kernels
from .configs import INTERPRETER, Machine, launch_options
from .launch import Products, Views, block_of

# Patches, matches at a time and columns of a program.  The interpreter wants few programs, and more than one of the 130
# columns that tests have.
_PATCHES, _MATCHES, _COLUMNS, _COLUMNS_INTERPRETED = 64, 32, 32, 128


def scatter(
    views: Views,
    which: int,
    grads: Tensor | None,
    shape: Sequence[int],
    total: Tensor | None,
    products: Products,
    machine: Machine,
) -> Tensor:
    """The sum of gradients (views of the source, P, N, D), float32, in a source of a shape (images, patches, D).

    ``which``: 0, the source of the first view, or 1, that of the second.  ``total``: what is added to, in place.
    """
    assert grads is not None
    assert views.index is not None
    _, P, N, D = grads.shape
    images, patches, _ = shape
    add = total is not None
    if total is None:
        total = torch.empty(shape, dtype=torch.float32, device=grads.device)
    across = views.x.across
    m, image_stride, match_stride = (P, 1, N) if across else (N, N, 1)
    first, step = (
        (0, 3) if which == 0 else (1, 1)
    )  # of the four views as kernels/rows.py has them; of two, the one
    block_p = block_of(patches, _PATCHES)
    block_d = block_of(D, _COLUMNS_INTERPRETED if machine == INTERPRETER else _COLUMNS)
    tiles = -(-patches // block_p) * -(-D // block_d)
    kernels._scatter_backward_kernel[(images * tiles,)](
        grads, views.index, total, m, patches, D, first, step, image_stride, match_stride, P * N,
        VIEWS=len(grads), ADD=add, PRECISION=products.exact,
        BLOCK_P=block_p, BLOCK_K=_MATCHES, BLOCK_D=block_d, **launch_options(machine, warps=4),
    )  # fmt: skip
    return total
