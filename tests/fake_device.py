"""Processes that run candidates, one of which ends them: in Triton's interpreter, with made-up times, and on a GPU."""

import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from vicreg_fast.backends.triton.configs import NarrowGradient
from vicreg_fast.backends.triton.launch_timing import GraphTimer

FATAL = NarrowGradient(32, warps=8)
FASTEST = NarrowGradient(32, warps=2)


class MadeUpTimer:
    """Ends the process at FATAL's launch; FASTEST takes a third of what others take."""

    def __init__(self, device: Any) -> None: ...

    def capture(self, launch: Any) -> Callable[[], float]:
        warps = launch.arguments["num_warps"] if launch.name == "narrow_gradient" else 0
        if warps == FATAL.warps:
            os.kill(os.getpid(), signal.SIGKILL)
        return lambda: 1e-6 if warps == FASTEST.warps else 3e-6


def serve(connection: Any) -> None:
    """Answer jobs on the CPU."""
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    from benchmarks import tune_device

    tune_device.serve(connection, "cpu", MadeUpTimer)


class BreakingTimer(GraphTimer):
    """Times on the GPU, and reads out of bounds at FATAL's launch."""

    def capture(self, launch: Any) -> Callable[[], float]:
        if launch.name == "narrow_gradient" and launch.arguments["num_warps"] == FATAL.warps:
            one = torch.ones(1, device="cuda", dtype=torch.int64)
            one[one * 1000].sum()
        return super().capture(launch)


def serve_gpu(connection: Any) -> None:
    """Answer jobs on the GPU."""
    from benchmarks import tune_device

    tune_device.serve(connection, "cuda", BreakingTimer)
