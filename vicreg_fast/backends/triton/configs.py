"""The configuration that a kernel is launched with: looked up in tables.py by architecture and shape, without a search.

``VICREG_FAST_AUTOTUNE=1`` searches on the machine where the library runs, see autotune.py.
"""

import functools
from typing import Any, NamedTuple

import torch

from .config_types import (
    ANY,
    KERNELS,
    Config,
    Gradient,
    Local,
    LocalGradient,
    Matching,
    Moments,
    NarrowGradient,
    Product,
    Row,
    Rows,
    Table,
    Tables,
    Tuned,
)
from .tables import ARCHITECTURES

__all__ = [
    "ANY", "ARCHITECTURES", "INTERPRETER", "KERNELS", "Config", "Device", "Gradient", "Key", "Local", "LocalGradient",
    "Matching", "Moments", "NarrowGradient", "Product", "Row", "Rows", "Table", "Tables", "Tuned", "architecture", "choose",
    "device_of", "from_table", "launch_options", "tuned_configs",
]  # fmt: skip


class Device(NamedTuple):
    """What configurations depend on."""

    arch: str  # of ARCHITECTURES
    num_sms: int


def launch_options(device: Device, warps: int, stages: int = 1) -> dict[str, Any]:
    """Triton's options of a launch.

    FMA fusion is off, whatever Triton's default.  The register limit is always given: without one, NVIDIA's assembler spills
    a few bytes to fit one more CTA on an SM (in 42 of 520 variants for compute capability 8.0); with a limit of 255, the
    most there is, it does not.
    """
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if device.arch.startswith("sm"):
        options["maxnreg"] = 255
    return options


class Key(NamedTuple):
    """What a configuration is chosen by."""

    arch: str
    num_sms: int
    aligned: bool
    kernel: str  # of KERNELS
    kind: str  # of the matmul; empty for kernels without one
    problems: int  # P times V; images for VICRegL and matching
    first: int  # the sizes of KERNELS
    second: int


# Configurations that a search chose (autotune.py); empty without one.
tuned_configs: dict[Key, Any] = {}


def choose(key: Key) -> Any:
    """The configuration that the key's kernel is launched with."""
    return tuned_configs.get(key) or from_table(key)


def from_table(key: Key) -> Any:
    """The table's configuration: that of the first row whose limits hold."""
    tables = ARCHITECTURES[key.arch]
    rows = getattr(tables.aligned if key.aligned else tables.unaligned, key.kernel)
    if key.kind:
        rows = rows[key.kind]
    return next(row.config for row in rows if row.first >= key.first and row.second >= key.second)


# One SM: the interpreter is fastest with few programs.
INTERPRETER = Device("interpreter", 1)


def architecture(major: int, minor: int) -> str:
    """The architecture of a CUDA device of this compute capability."""
    exact = {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}
    return exact.get((major, minor), "sm86")


@functools.cache
def device_of(device: torch.device) -> Device:
    """A device's architecture and size.  Cached: looking up the properties takes as long as a launch."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        # Of AMD's GPUs only gfx942 has TF32.
        amd = "gfx942" if "gfx942" in properties.gcnArchName else "gfx950"
        return Device(amd, properties.multi_processor_count)
    return Device(architecture(properties.major, properties.minor), properties.multi_processor_count)
