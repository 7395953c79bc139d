"""In which precision products are formed, and in which type sums are kept.

``precision`` is what a user asks for; a *product* is what is done:

    "ieee"   operands and products accurate to the operand's type
    "tf32"   operands rounded to 10 bits of mantissa, to nearest, before the product
    "bf16"   operands rounded to 7 bits of mantissa before the product

Only CUDA devices have a faster product to offer; everywhere else every precision is "ieee".  The operand is
rounded here, explicitly, because the hardware truncates: the dual form then subtracts the diagonal of a product
that was never formed (140 % wrong on decorrelated features at N = D = 1024; 1e-4 when rounded to nearest).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

PRECISIONS = (None, "highest", "high", "medium")


def accumulation_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The type of sums, means, variances and losses: float64 as soon as one input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The type in which scalars are summed: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def resolve_product(precision: str | None, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """The product that a precision means for inputs of these types on this device.

    Reads torch's global setting, so it belongs inside an operator: in traced code the read is a graph break.
    """
    if device.type != "cuda" or torch.float64 in dtypes or precision == "highest":
        return "ieee"
    if precision == "medium":
        return "bf16"
    # A product in the input's own type: TF32 has the mantissa of float16 and more than that of bfloat16.
    if precision == "high" or all(dtype.itemsize == 2 for dtype in dtypes):
        return "tf32"
    if precision is None and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def round_operand(c: Tensor, product: str) -> Tensor:
    """The operand that a product really uses; ``c`` itself for "ieee"."""
    if product == "bf16":
        return c.to(torch.bfloat16).to(c.dtype)
    if product == "tf32":
        # Half of the last kept bit is added to the magnitude and the 13 dropped bits are cleared: to nearest,
        # ties away from zero.  Adding to the bits of a NaN could turn it into a number, so those stay.
        bits = c.view(torch.int32)
        rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
        return torch.where(c.isfinite(), rounded, c)
    return c


def exact_products(product: str, device: torch.device) -> AbstractContextManager[object]:
    """Form products as ``product`` says, whatever autocast and torch's global setting would make of them."""
    if not torch.amp.is_autocast_available(device.type):  # a device without arithmetic, such as meta
        return nullcontext()
    if device.type != "cuda" and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.autocast(device.type, enabled=False))
    if device.type == "cuda":
        stack.enter_context(_cublas("ieee" if product == "ieee" else "tf32"))
    return stack


@contextmanager
def _cublas(setting: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if before == setting:
        yield
        return
    matmul.fp32_precision = setting
    try:
        yield
    finally:
        # "none" inherits torch's global setting: writing down what was inherited would stop it from being followed.
        matmul.fp32_precision = "none"
        if matmul.fp32_precision != before:
            matmul.fp32_precision = before
