"""The backends, and the choice between them.

``<name>_backend.py`` is a backend: ``terms``, ``gradient``, ``match``, ``match_distances`` and ``saved``.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import torch

from . import kernel_failures

BACKENDS = ("auto", "triton", "aten", "reference")
# Devices on which "auto" is ATen without a look at Triton: its interpreter, which runs on them, is slow.
_ALWAYS_ATEN = ("cpu",)
# TF32 and bfloat16 matmuls need this compute capability.
_LEAST_CAPABILITY = (8, 0)


@functools.cache
def _installed() -> bool:
    """Whether Triton is installed.  Cached, because searching the path takes as long as a launch."""
    return importlib.util.find_spec("triton") is not None


def _obstacle(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why Triton kernels cannot run on tensors of these types on a device; None where they can."""
    if torch.float64 in dtypes:
        return "it has no float64; use 'auto' or 'aten'"
    if not _installed():
        return "Triton is not installed; pip install 'vicreg_fast[triton]' or use 'aten'"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return "it needs a CUDA or ROCm device, or TRITON_INTERPRET=1; use 'auto' or 'aten'"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "it needs compute capability 8.0; use 'auto' or 'aten'"
    return None


@functools.cache
def _import_failure() -> str | None:
    """Why the kernels cannot be imported, where Triton is installed; None where they can."""
    try:
        module("triton")
    except Exception as error:
        # A module of this library that is missing is no fault of Triton.
        if (
            isinstance(error, ImportError)
            and (error.name or "").partition(".")[0] == __name__.partition(".")[0]
        ):
            raise
        return kernel_failures.describe(error)
    return None


def failure(device: torch.device) -> str | None:
    """Why the kernels failed on a device that should run them; None where they did not, or should not."""
    if device.type in _ALWAYS_ATEN or _obstacle(device, ()):
        return None
    return _import_failure() or kernel_failures.reasons.get(device)


def resolve(backend: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """The backend "aten" for "auto" where kernels cannot run on tensors of these types on a device; any other name unchanged.

    What remains "auto" means: the kernels, and ATen from the first of them that fails.  The answer is the same during the
    whole process, whatever fails in it: what an operator saves was promised by it when the operator was traced.
    """
    if backend != "auto":
        return backend
    if _obstacle(device, dtypes):
        return "aten"
    if reason := _import_failure():
        kernel_failures.warn("", reason)
        return "aten"
    return "auto"


def require(backend: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    """Raise if a backend cannot run on tensors of these types on a device."""
    if backend == "triton" and (obstacle := _obstacle(device, dtypes)):
        raise ValueError(f"backend='triton' cannot run on {device}: {obstacle}")


def choose(
    backend: str,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (),
    *,
    covariance: bool = True,
) -> str:
    """The backend that a request means for inputs on a device: "aten", "triton" or "reference", or "auto" unchanged.

    "auto" then means: the kernels, and ATen from the first of them that fails.  Traced code must not query a device, so
    "auto" and "triton" are returned unchanged there, and the operator resolves them when it runs.  ``covariance=False``
    means ATen: a variance alone is one reduction, with nothing to fuse.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend needs one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    # Traced code is guarded by what has failed: it is traced again after a failure.
    if backend == "auto" and (device.type in _ALWAYS_ATEN or device in kernel_failures.reasons):
        return "aten"
    if not torch.compiler.is_compiling():
        backend = resolve(backend, device, dtypes)
        require(backend, device, dtypes)
    return "aten" if backend in ("auto", "triton") and not covariance else backend


@functools.cache
def module(backend: str) -> ModuleType:
    """The module of a chosen backend, imported at its first use."""
    return importlib.import_module(f".{backend}_backend", __name__)
