"""A process that runs candidates in Triton's interpreter, with made-up times; one candidate ends it."""

import os
import signal
from collections.abc import Callable
from typing import Any

from vicreg_fast.backends.triton.configs import NarrowGradient

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
