"""What every launcher needs: the views as kernel arguments, the products, the device and the pinned options."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ... import precision
from ...rows import Rows
from ...sides import uses_dual
from .configs import Key, Machine

_LANGUAGE_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Products(NamedTuple):
    """How operands are rounded, stored and multiplied."""

    round: str  # the operand's grid, as kernels/rows.py names it
    dot: str  # Triton's input_precision, of float32 operands
    type: torch.dtype  # of the operand in memory
    kind: str  # the rows of configs.py
    exact: str  # Triton's input_precision of products as accurate as float32, whatever the precision

    @property
    def matrix_type(self) -> torch.dtype:
        """The type of M, which the backward pass multiplies: float16 has not the range for it."""
        return torch.float32 if self.type == torch.float16 else self.type

    @property
    def gradient_kind(self) -> str:
        """The rows of configs.py for the backward pass: beside a float32 M the operand is float32 too."""
        return "tf32" if self.type == torch.float16 else self.kind

    @property
    def language_type(self) -> Any:
        """The operand's type as kernels name it."""
        return _LANGUAGE_TYPES[self.type]


def products(plan_precision: str | None, sources: Sequence[Tensor], machine: Machine) -> Products:
    """The products that a precision means for these sources.

    Inputs of 16 bits are multiplied in their own type unless another precision is asked for by name.  In the
    interpreter, on CPU tensors, a precision means what it would on a GPU.
    """
    on_cpu = sources[0].device.type == "cpu"
    device = torch.device("cuda") if on_cpu else sources[0].device
    dtypes = {source.dtype for source in sources}
    if plan_precision is None and dtypes in ({torch.float16}, {torch.bfloat16}):
        product = "fp16" if dtypes == {torch.float16} else "bf16"
    else:
        product = precision.resolve_product(plan_precision, device, list(dtypes))
    # gfx950 has no TF32: float32 products of rounded operands are the same numbers.
    tf32 = "ieee" if machine.family == "gfx950" else "tf32"
    # Three TF32 products are accurate to float32 and run on tensor cores; AMD's multiply float32 themselves.
    exact = "ieee" if on_cpu or machine.family.startswith("gfx") else "tf32x3"
    if product == "bf16" and on_cpu:
        # Triton's interpreter computes bfloat16 wrong: the same numbers as float32.
        return Products("bf16_bits", tf32, torch.float32, "tf32", exact)
    return {
        "ieee": Products("none", exact, torch.float32, "fp32", exact),
        "tf32": Products("tf32", tf32, torch.float32, "tf32", exact),
        "bf16": Products("bf16", tf32, torch.bfloat16, "half", exact),
        "fp16": Products("fp16", tf32, torch.float16, "half", exact),
    }[product]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launch on a tensor's device, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Views:
    """One view, a pair, or two pairs as kernels/rows.py has them, as kernel arguments."""

    x: Rows
    y: Rows
    count: int
    index: Tensor | None  # (V, P, N)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, N, D)."""
        return self.x.shape

    @property
    def dual(self) -> bool:
        """Whether M is N x N."""
        return uses_dual(*self.shape)

    @property
    def aligned(self) -> bool:
        """Whether rows lie one after the other, each at a multiple of 16 elements."""
        steps = [stride for rows in (self.x, self.y) for stride in _strides(rows)[:2]]
        starts = [rows.source.storage_offset() for rows in (self.x, self.y)]
        unit = all(rows.source.stride(-1) == 1 for rows in (self.x, self.y))
        return self.index is None and unit and not any(n % 16 for n in (*steps, *starts, self.shape[2]))

    def key(self, machine: Machine, kernel: str, kind: str = "") -> Key:
        """What the configuration of a kernel is chosen by."""
        P, N, D = self.shape
        return Key(*machine, self.aligned, kernel, kind, P * self.count, N, D)

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, y, and the row numbers, or in their place a pointer that is not read."""
        x, y = self.x.source, self.y.source
        return x, y, x if self.index is None else self.index

    @property
    def strides(self) -> tuple[int, ...]:
        """Of x and of y: the steps of problem, row, patch and feature."""
        return (*_strides(self.x), *_strides(self.y))

    @property
    def constants(self) -> dict[str, Any]:
        """What every kernel that reads views is compiled for."""
        return {"VIEWS": self.count, "HAS_INDEX": self.index is not None}


def block_of(count: int, largest: int) -> int:
    """The block that covers a count: of 16 at least, which products need."""
    return min(largest, max(16, 1 << (count - 1).bit_length()))


def by_direction(found: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of match sets, (4, ...) a group or (2, ...) a direction, as four: of each group there and back.

    Of one group or one direction, others stand in the place of what is not there: they are not used.
    """
    sets = [half for views in found for half in (views.chunk(2) if len(views) == 4 else (views,))]
    return sets * (4 // len(sets))


def _strides(rows: Rows) -> tuple[int, int, int, int]:
    """(s_p, s_n, s_i, s_d) of the addressing formula in rows.py."""
    first, second, features = rows.source.stride()
    if rows.patch is None:
        return (second, first, 0, features) if rows.across else (first, second, 0, features)
    return (0, first, second, features) if rows.across else (first, 0, second, features)


def views(group: Sequence[tuple[int, Rows]], index: Tensor | None) -> Views:
    """A group, ready for kernels: one view, the two of a pair, or the four of two pairs that go opposite ways."""
    sources = [source for source, _ in group]
    if sources not in ([0], [0, 1], [1, 0], [0, 1, 1, 0]):
        raise NotImplementedError(f"kernels have no views of sources {sources}")
    rows = [r for _, r in group]
    return Views(rows[0], rows[min(1, len(rows) - 1)], len(rows), index)
