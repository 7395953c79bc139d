"""What every launcher needs: the views as kernel arguments, the products, the device and the pinned options."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import precision
from ...rows import Rows, uses_dual


class Products(NamedTuple):
    """How operands, float32 numbers, are rounded and multiplied."""

    round: str  # "none", "tf32" or "bf16": as the kernels call it
    dot: str  # Triton's input_precision


def products(plan_precision: str | None, sources: Sequence[Tensor]) -> Products:
    """The products that a precision means for these sources.

    In the interpreter, on CPU tensors, a precision means what it would on a GPU.
    """
    on_cpu = sources[0].device.type == "cpu"
    device = torch.device("cuda") if on_cpu else sources[0].device
    product = precision.resolve_product(plan_precision, device, [source.dtype for source in sources])
    # Three TF32 products are accurate to float32 and run on tensor cores; AMD's multiply float32 themselves.
    exact = "ieee" if on_cpu or torch.version.hip is not None else "tf32x3"
    return {
        "ieee": Products("none", exact),
        "tf32": Products("tf32", "tf32"),
        # bfloat16 operands are multiplied as float32 numbers: TF32 has their mantissa.
        "bf16": Products("bf16", "tf32"),
    }[product]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launch on a tensor's device, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Views:
    """One view, or the two of a pair, as kernel arguments: pointers, row numbers and strides."""

    first: Rows
    second: Rows
    count: int
    index: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, N, D)."""
        return self.first.shape

    @property
    def dual(self) -> bool:
        """Whether M is N x N."""
        return uses_dual(*self.shape)

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, y, and the row numbers, or in their place a pointer that is not read."""
        x, y = self.first.source, self.second.source
        return x, y, x if self.index is None else self.index

    @property
    def strides(self) -> tuple[int, ...]:
        """Of x and of y: the steps of problem, row, patch and feature."""
        return (*_strides(self.first), *_strides(self.second))

    @property
    def constants(self) -> dict[str, Any]:
        """What every kernel is compiled for."""
        return {"VIEWS": self.count, "HAS_INDEX": self.index is not None, "enable_fp_fusion": False}


def _strides(rows: Rows) -> tuple[int, int, int, int]:
    """(s_p, s_n, s_i, s_d) of the addressing formula in rows.py."""
    first, second, features = rows.source.stride()
    if rows.patch is None:
        return (second, first, 0, features) if rows.across else (first, second, 0, features)
    return (0, first, second, features) if rows.across else (first, 0, second, features)


def views(group: Sequence[tuple[int, Rows]]) -> Views:
    """A group of one view or of one pair, ready for kernels."""
    rows = [r for _, r in group]
    patches = [r.patch for r in rows if r.patch is not None]
    index = torch.stack(patches).contiguous() if patches else None
    return Views(rows[0], rows[-1], len(rows), index)
