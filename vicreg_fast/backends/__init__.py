"""The stages of the losses, once per backend, and the choice between them."""

from types import ModuleType

import torch

from .aten import stages as _aten

BACKENDS = ("auto", "triton", "aten", "reference")


def choose(backend: str, device: torch.device) -> str:
    """The backend that a request means on a device: "aten" or "reference".

    This version has no Triton kernels: "auto" is "aten" everywhere.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend needs one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "triton":
        raise ValueError(
            f"backend='triton' cannot run on {device}: this version has no Triton kernels; use 'auto' or 'aten'"
        )
    return "reference" if backend == "reference" else "aten"


def stages(backend: str) -> ModuleType:
    """The module of a chosen backend's stages."""
    return {"aten": _aten}[backend]
