"""The precision of matmuls, and the types of sums.

``precision`` is the public argument.  It is resolved to a *matmul precision* for given inputs on a given device:

    "ieee"   as accurate as the operands' type
    "tf32"   operands rounded to 10 bits of mantissa, to nearest
    "bf16"   operands rounded to 7 bits of mantissa

Only CUDA devices have matmuls of reduced precision.  On other devices every ``precision`` means "ieee".  The operand is
rounded explicitly, because the hardware truncates.  The dual side would then subtract the squares of other operands than
those of the matmul (140 % wrong on decorrelated features at N = D = 1024; 1e-4 when rounded to nearest).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

PRECISIONS = (None, "highest", "high", "medium")


def accumulation_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The type of sums, means, variances and losses: float64 if an input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The type in which scalars are summed: float64, or float32 on a device without float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def resolve_matmul_precision(precision: str | None, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """The matmul precision that ``precision`` means for inputs of these types on this device.

    It reads torch's global setting, which is a graph break in traced code.  It is therefore called inside an operator.
    """
    if device.type != "cuda" or torch.float64 in dtypes or precision == "highest":
        return "ieee"
    if precision == "medium":
        return "bf16"
    # TF32 has as many bits of mantissa as float16 and more than bfloat16, so it rounds neither.
    if precision == "high" or all(dtype.itemsize == 2 for dtype in dtypes):
        return "tf32"
    if precision is None and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def round_operand(c: Tensor, matmul_precision: str) -> Tensor:
    """The operand of a matmul of that precision; ``c`` itself for "ieee"."""
    if matmul_precision == "bf16":
        return c.to(torch.bfloat16).to(c.dtype)
    if matmul_precision == "tf32":
        # Half of the last kept bit is added to the magnitude, and the 13 dropped bits are cleared: to nearest, ties away
        # from zero.  The addition could turn a NaN into a number, so values that are not finite stay as they are.
        bits = c.view(torch.int32)
        rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
        return torch.where(c.isfinite(), rounded, c)
    return c


def set_matmul_precision(matmul_precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context manager: matmuls of that precision, independent of autocast and of torch's global setting."""
    if not torch.amp.is_autocast_available(device.type):  # a device without arithmetic, such as meta
        return nullcontext()
    if device.type != "cuda" and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.autocast(device.type, enabled=False))
    if device.type == "cuda":
        stack.enter_context(_cublas_precision("ieee" if matmul_precision == "ieee" else "tf32"))
    return stack


@contextmanager
def _cublas_precision(setting: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    previous = matmul.fp32_precision
    if previous == setting:
        yield
        return
    matmul.fp32_precision = setting
    try:
        yield
    finally:
        # "none" inherits torch's global setting.  An inherited value is not written back, or a later change of the global
        # setting would have no effect.
        matmul.fp32_precision = "none"
        if matmul.fp32_precision != previous:
            matmul.fp32_precision = previous
