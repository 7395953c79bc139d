"""The stages of the losses, once per backend, and the choice between them."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "aten", "reference")
# TF32 and bfloat16 products need it.
_LEAST_CAPABILITY = (8, 0)


@functools.cache
def _installed() -> bool:
    """Whether there is a Triton, asked once: looking through the path takes as long as a launch."""
    return importlib.util.find_spec("triton") is not None


def _obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device; None where they can."""
    if not _installed():
        return "Triton is not installed; pip install 'vicreg_fast[triton]' or use 'aten'"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return "it needs a CUDA or ROCm device, or TRITON_INTERPRET=1; use 'auto' or 'aten'"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "it needs compute capability 8.0; use 'auto' or 'aten'"
    return None


def _refusal(device: torch.device, obstacle: str) -> ValueError:
    return ValueError(f"backend='triton' cannot run on {device}: {obstacle}")


def require(backend: str, device: torch.device) -> None:
    """Raise where a backend that was chosen in traced code cannot run on a device."""
    if backend == "triton" and (obstacle := _obstacle(device)) is not None:
        raise _refusal(device, obstacle)


def choose(
    backend: str, device: torch.device, dtypes: Sequence[torch.dtype] = (), *, patches: bool = False
) -> str:
    """The backend that a request means for inputs on a device: "aten", "triton" or "reference".

    "auto" is "aten" everywhere: the Triton kernels have not been measured on a GPU yet.  ``patches``: VICRegL's local
    part and its matching are asked for.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend needs one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend != "triton":
        return "reference" if backend == "reference" else "aten"
    obstacle = None
    if patches:
        obstacle = "it has no kernels for patches yet; use 'auto' or 'aten'"
    elif torch.float64 in dtypes:
        obstacle = "it has no float64; use 'auto' or 'aten'"
    elif not torch.compiler.is_compiling():  # else the operator asks, when it runs
        obstacle = _obstacle(device)
    if obstacle is not None:
        raise _refusal(device, obstacle)
    return "triton"


@functools.cache
def stages(backend: str) -> ModuleType:
    """The module of a chosen backend's stages, imported at its first use."""
    return importlib.import_module(f".{backend}.stages", __name__)
