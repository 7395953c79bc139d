"""What every launcher needs: a group's views as a kernel argument, the matmul policy, and the device."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ... import precision
from ...kernels.views import Views
from ...plan import Plan
from ...rows import Rows
from ...sides import uses_dual
from .configs import Device, Key

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# The scaled float16 formats that are as accurate as others, and their kinds in tables.py.
_SCALED = {"fp32": "scaled_fp16_pair", "tf32": "scaled_fp16", "fp16": "scaled_fp16"}
_SCALED_KINDS = {"fp32": "pair", "tf32": "half", "fp16": "half"}


class MatmulPolicy(NamedTuple):
    """How operands are rounded, stored and multiplied."""

    format: str  # the operand's number format, as kernels/numerics.py names it
    dot_precision: str  # Triton's input_precision, of float32 operands
    dtype: torch.dtype  # of the operand in memory
    kind: str  # of the rows in tables.py
    exact_precision: str  # Triton's input_precision of float32-accurate matmuls, whatever the precision

    @property
    def scaled(self) -> bool:
        """Whether columns of the operand are divided by a power of two, and M by another."""
        return self.format.startswith("scaled")

    @property
    def parts(self) -> int:
        """The numbers that an element of the operand and of M is the sum of."""
        return 2 if self.format == "scaled_fp16_pair" else 1

    @property
    def moments(self) -> int:
        """The numbers of a column that the dual side keeps: mean in two parts, slope, vhat, and a scaled operand's scale."""
        return 5 if self.scaled else 4

    @property
    def matrix_dtype(self) -> torch.dtype:
        """The type of M, which the backward pass multiplies: float16 lacks the range for it, if it is not scaled."""
        return torch.float32 if self.dtype == torch.float16 and not self.scaled else self.dtype

    @property
    def gradient_kind(self) -> str:
        """The kind of the backward pass: beside a float32 M the operand is float32 too."""
        return "tf32" if self.format == "fp16" else self.kind

    def of_side(self, dual: bool, gathered: bool) -> "MatmulPolicy":
        """The policy on a side: the dual side multiplies float16 in the place of TF32, float32 and float16, unless it gathers rows.

        The moments kernel divides its columns by powers of two.  The primal side reads rows before it knows their range.
        """
        if gathered or not dual or self.format not in _SCALED:
            return self
        return self._replace(format=_SCALED[self.format], dtype=torch.float16, kind=_SCALED_KINDS[self.format])

    @property
    def tl_dtype(self) -> Any:
        """The operand's type in Triton's language."""
        return _TRITON_DTYPES[self.dtype]


def matmul_policy(plan_precision: str | None, sources: Sequence[Tensor], device: Device) -> MatmulPolicy:
    """The policy that a precision means for these sources.

    16-bit inputs are multiplied in their own type unless another precision is requested by name.  In the interpreter, on CPU
    tensors, a precision means what it would on a GPU.
    """
    on_cpu = sources[0].device.type == "cpu"
    torch_device = torch.device("cuda") if on_cpu else sources[0].device
    dtypes = {source.dtype for source in sources}
    if plan_precision is None and dtypes in ({torch.float16}, {torch.bfloat16}):
        requested = "fp16" if dtypes == {torch.float16} else "bf16"
    else:
        requested = precision.resolve_matmul_precision(plan_precision, torch_device, list(dtypes))
    # gfx950 has no TF32: float32 matmuls of rounded operands give the same numbers.
    tf32 = "ieee" if device.arch == "gfx950" else "tf32"
    # Three TF32 matmuls are accurate to float32 and run on tensor cores; AMD GPUs multiply float32 natively.
    exact = "ieee" if on_cpu or device.arch.startswith("gfx") else "tf32x3"
    if requested == "bf16" and on_cpu:
        # Triton's interpreter computes bfloat16 wrong: the same numbers, held as float32.
        return MatmulPolicy("bf16_bits", tf32, torch.float32, "half", exact)
    return {
        "ieee": MatmulPolicy("fp32", exact, torch.float32, "fp32", exact),
        "tf32": MatmulPolicy("tf32", tf32, torch.float32, "tf32", exact),
        "bf16": MatmulPolicy("bf16", tf32, torch.bfloat16, "half", exact),
        "fp16": MatmulPolicy("fp16", tf32, torch.float16, "half", exact),
    }[requested]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launch on a tensor's device, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _source(rows: Rows) -> tuple[Tensor, int, int, int, int]:
    """A view's source as kernels address it, Source of kernels/views.py: the formula is that of rows.py."""
    first, second, features = rows.source.stride()
    if rows.patch is None:
        strides = (second, first, 0) if rows.per_slot else (first, second, 0)
    else:
        strides = (0, first, second) if rows.per_slot else (first, 0, second)
    return rows.source, *strides, features


class Group(NamedTuple):
    """One view, a pair, or two pairs in opposite directions, ready for the kernels."""

    V: int
    P: int
    N: int
    D: int
    per_slot: bool
    views: Views  # the kernels' argument: tensors and strides

    @property
    def match_index(self) -> Tensor | None:
        """Starts the (V, P, N) indices of the group's rows; None: every row is a sample."""
        return self.views.index_ptr  # type: ignore[no-any-return]  # Any: kernels take it as a pointer

    @property
    def pairs(self) -> int:
        """Number of pairs; 1 for a single view, whose invariance is zero."""
        return (self.V + 1) // 2

    @property
    def dual(self) -> bool:
        """Whether M is N x N."""
        return uses_dual(self.P, self.N, self.D)

    @property
    def aligned(self) -> bool:
        """Whether rows are contiguous, each at a multiple of 16 elements."""
        x, y = self.views[:5], self.views[5:10]
        steps = [*x[1:3], *y[1:3]]  # of problems and of rows
        starts = [source[0].storage_offset() for source in (x, y)]
        unit = x[4] == y[4] == 1  # of features
        return self.match_index is None and unit and not any(n % 16 for n in (*steps, *starts, self.D))

    def key(self, device: Device, kernel: str, kind: str = "") -> Key:
        """What the configuration of a kernel is chosen by."""
        return Key(*device, self.aligned, kernel, kind, self.P * self.V, self.N, self.D)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised memory on the views' device."""
        return torch.empty(shape, dtype=dtype, device=self.views.x_ptr.device)


def group_of(views: Sequence[tuple[int, Rows]]) -> Group:
    """A plan's group.  The indices of its views follow those of the first one in memory."""
    sources = [source for source, _ in views]
    if sources not in ([0], [0, 1], [1, 0], [0, 1, 1, 0]):
        raise NotImplementedError(f"kernels have no views of sources {sources}")
    x, y = views[0][1], views[min(1, len(views) - 1)][1]
    return Group(len(views), *x.shape, x.per_slot, Views(*_source(x), *_source(y), x.patch))


class Call(NamedTuple):
    """What a launcher is called for."""

    group: Group
    plan: Plan
    matmul: MatmulPolicy  # of the group's side
    device: Device


def call_of(group: Group, plan: Plan, matmul: MatmulPolicy, device: Device) -> Call:
    """The call for a group, with the policy of its side."""
    return Call(group, plan, matmul.of_side(group.dual, group.match_index is not None), device)


def is_aligned(z: Tensor) -> bool:
    """Whether the channels of a map are contiguous, and its patches start at multiples of 16 elements."""
    return z.stride(2) == 1 and z.stride(1) % 16 == 0


def block_of(count: int, largest: int) -> int:
    """The block that covers a count: a power of two, at least 16, which matmuls need."""
    return min(largest, max(16, 1 << (count - 1).bit_length()))
