"""The process that runs candidates (tune_device.py), seen from the one that waits for it: its jobs, its end, its silence."""

import multiprocessing
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from .sift import Goal
from .tune_device import Failed, Next, Search, Together, serve

# The longest time without an announcement: to compile one candidate takes up to five seconds, and on a busy machine ten
# times that.  A kernel that takes longer hangs.
_SILENCE = 60.0
NO_TIME = "no time left"
_START = 120.0  # to import torch and to set up a device


class Lost(NamedTuple):
    """The process ended or was ended: the configuration that it had announced last, and the reason."""

    config: Any
    reason: str
    in_time: bool = True  # False: there was no time left, and the configuration is not to blame


class DeviceProcess:
    """Runs jobs in a process, which is started at the first job and again after each loss."""

    def __init__(self, target: Callable[..., None] = serve, *arguments: Any) -> None:
        self._target, self._arguments = target, arguments
        self._process: Any = None
        self._connection: Any = None

    def start(self, limit: float = _START) -> Goal:
        """Start the process, within seconds; what its device compiles for.  Raises RuntimeError where it does not come up."""
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=self._target, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()  # the end of the process is the end of its messages
        with suppress(EOFError, OSError):
            if self._connection.poll(limit):
                goal: Goal = self._connection.recv()
                return goal
        self._process.kill()
        raise RuntimeError(f"the process that runs candidates did not start: {self._end()}")

    def ask(self, job: Search | Together, end: float) -> Any:
        """The trials of a job, or :class:`Failed` or :class:`Lost`; ``end``: the ``time.monotonic()`` to give up at."""
        last: Any = None
        if self._process is None:
            try:
                self.start(max(1.0, min(_START, end - time.monotonic())))
            except RuntimeError as error:
                return Lost(last, str(error))
        try:
            self._connection.send(job)
            while True:
                left = end - time.monotonic()
                if left <= 0 or not self._connection.poll(min(left, _SILENCE)):
                    in_time = left > _SILENCE
                    self.stop()
                    return Lost(last, f"no answer in {_SILENCE:.0f} s" if in_time else NO_TIME, in_time)
                message = self._connection.recv()
                if isinstance(message, Next):
                    last = message.config
                elif isinstance(message, Failed) and message.device:
                    self.stop()
                    return Lost(last, message.reason)
                else:
                    return message
        except (EOFError, OSError):
            return Lost(last, self._end())

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._end()

    def _end(self) -> str:
        """Wait for the end of the process; how it ended."""
        self._process.join(10)
        code = self._process.exitcode
        self._connection.close()
        self._process = None
        if code is not None and code < 0:
            return f"the process was ended by {signal.Signals(-code).name}"
        return f"the process ended with status {code}"
