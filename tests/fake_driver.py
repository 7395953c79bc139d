"""A GPU's driver that is a FAKE: it lets Triton compile for a GPU that is not there, and load what it compiled, up to an error.

``python -m tests.fake_driver`` produces each failure of FAILURES below a loss with ``backend="auto"``, in a process in which
Triton is no interpreter, and prints what came of it as JSON.  The errors themselves are Triton's own, but for texts of the
driver.
"""

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import compiler
from triton.runtime import build

from vicreg_fast import VICRegLoss, backends
from vicreg_fast.backends import kernel_failures
from vicreg_fast.kernels import vicreg_primal


class FakeDriver:
    """What Triton's launcher asks of a driver.  Nothing is launched."""

    def __init__(self, arch: int = 90, shared_bytes: int = 1 << 20, load_error: str = "") -> None:
        self.arch, self.shared_bytes, self.load_error = arch, shared_bytes, load_error
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_bytes}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None

    def load_binary(self, *args: Any) -> None:
        raise RuntimeError(f"Triton Error [CUDA]: {self.load_error}")


class DriverThatIsBuilt(FakeDriver):
    """The fake, but for the part of Triton's driver that its C compiler builds."""

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return nvidia.CudaUtils()


Patch = pytest.MonkeyPatch


def no_driver(patch: Patch, folder: Path) -> None:
    patch.setattr(triton.runtime.driver, "_active", None)


def no_compiler(patch: Patch, folder: Path) -> None:
    triton.runtime.driver.set_active(DriverThatIsBuilt())
    patch.setattr(nvidia, "library_dirs", list)  # there is no libcuda to find
    patch.setenv("PATH", "")
    patch.delenv("CC", raising=False)
    if hasattr(build, "_find_compiler"):
        build._find_compiler.cache_clear()


def compiler_fails(patch: Patch, folder: Path) -> None:
    no_compiler(patch, folder)
    failing = folder / "cc"
    failing.write_text("#!/bin/sh\nexit 7\n")
    failing.chmod(0o700)
    patch.setenv("CC", str(failing))


def compiler_is_absent(patch: Patch, folder: Path) -> None:
    no_compiler(patch, folder)
    patch.setenv("CC", str(folder / "absent"))


def cache_cannot_be_written(patch: Patch, folder: Path) -> None:
    triton.runtime.driver.set_active(FakeDriver())
    (folder / "file").touch()
    patch.setenv("TRITON_CACHE_DIR", str(folder / "file" / "cache"))


def fake(**options: Any) -> Callable[[Patch, Path], None]:
    return lambda patch, folder: triton.runtime.driver.set_active(FakeDriver(**options))


FAILURES: dict[str, Callable[[Patch, Path], None]] = {
    "no driver": no_driver,
    "no C compiler": no_compiler,
    "C compiler that fails": compiler_fails,
    "C compiler that is absent": compiler_is_absent,
    "cache that cannot be written": cache_cannot_be_written,
    "too little shared memory": fake(shared_bytes=1),
    "unknown architecture": fake(arch=999),
    "no kernel image": fake(load_error="no kernel image is available for execution on the device"),
    "PTX of a newer version": fake(load_error="the provided PTX was compiled with an unsupported toolchain."),
    "earlier illegal access": fake(load_error="an illegal memory access was encountered"),
    "out of memory": fake(load_error="out of memory"),
}


def run(backend: str) -> dict[str, Any]:
    """The outcome of a loss and its gradient."""
    x = torch.linspace(-1, 1, 96).view(16, 6).sin().requires_grad_()
    y = x.detach().square()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            losses = [VICRegLoss(backend=backend)(x, y)["loss"] for _ in range(2)]
            raised = None
        except Exception as error:
            return {"raised": f"{type(error).__name__}: {error}", "remembered": bool(kernel_failures.reasons)}
        for loss in losses:
            loss.backward()
    assert x.grad is not None
    texts = [str(warning.message) for warning in caught]
    return {
        "raised": raised,
        "loss": losses[1].item(),
        "gradient": x.grad.tolist(),
        "warnings": texts,
        "remembered": bool(kernel_failures.reasons),
    }


@contextlib.contextmanager
def failing(make: Callable[[Patch, Path], None]) -> Iterator[None]:
    """A fresh process's state, and a failure."""
    for kernel in vars(vicreg_primal).values():
        if isinstance(kernel, triton.JITFunction):
            kernel.device_caches.clear()
    compiler.max_shared_mem.cache_clear()
    kernel_failures.reasons.clear()
    kernel_failures._warned.clear()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        make(patch, Path(folder))
        yield


def main() -> None:
    backends._ALWAYS_ATEN = ()
    backends._obstacle = lambda device, dtypes: None  # CPU tensors pass for those of a GPU
    outcomes = {}
    # A cache without kernels and drivers of other runs.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for name, make in FAILURES.items():
            with failing(make):
                outcomes[name] = {"triton": run("triton"), "auto": run("auto")}
    json.dump({"aten": run("aten"), **outcomes}, sys.stdout)


if __name__ == "__main__":
    main()
