"""``python -m benchmarks kernels``: the time of every kernel of a step, each alone, in a file of kernel_results.py.

A shape has a process of its own: an illegal access ends that process, and a kernel that hangs is ended with it.  The
processes compile at the same time and are timed one after the other.
"""

import math
import os
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import kernel_results, machine, results
from .cases import case_of, require_gpu_shapes
from .results import Document, UsageError
from .shapes import KERNEL_SHAPES
from .text import duration, table

# Seconds until all processes have compiled their kernels, and until one has timed them.
_COMPILATION, _TIMING = 75.0, 30.0
MADE_UP = "times made up to rehearse without a GPU: Triton's interpreter made the launches, and none was timed"


class MadeUpTimer:
    """In the place of a GPU's timer.  It times nothing."""

    def capture(self, launch: Any) -> Callable[[], float]:
        """A function that makes no launch and returns made-up seconds: 5 µs, and 10 ns a program."""
        return lambda: 5e-6 + 1e-8 * math.prod(launch.grid)


def _time_shape(name: str, device: str, made_up: bool, channel: Connection) -> None:
    """Prepare a shape, tell the other end of the channel, and send its kernels' times when told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's, which ends this one
    if made_up:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    try:
        import torch

        from vicreg_fast.backends.triton import launch_timing

        from . import providers
        from .timing import Step

        where = torch.device(device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        case = case_of(name)
        with providers.matmul_precision(case.precision, where):
            losses = providers.ours_of(case, "triton", providers.definition_of(case))
            step = Step(losses, case.inputs(0, where))
            channel.send(None)
            channel.recv()
            times = launch_timing.kernel_times(step.both, MadeUpTimer() if made_up else None)
        channel.send([kernel._asdict() for kernel in times])
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        channel.send(f"{type(error).__name__}: {lines[0]}")


class _Process:
    """A shape's process and this end of its channel."""

    def __init__(self, name: str, device: str, made_up: bool) -> None:
        context = get_context("spawn")  # a forked process cannot use a GPU that its parent uses
        self.name = name
        self._channel, other = context.Pipe()
        arguments = (name, device, made_up, other)
        self._process = context.Process(target=_time_shape, args=arguments, daemon=True)
        self._process.start()
        other.close()  # so that the end of the process is the end of the channel

    def message(self, seconds: float, during: str, begin: float | None = None) -> Any:
        """What the process sends within seconds of the beginning, or of now, or a line that says why it sends nothing."""
        left = seconds if begin is None else begin + seconds - time.monotonic()
        try:
            if self._channel.poll(max(0.0, left)):
                return self._channel.recv()
            return f"{during} took more than {seconds:.0f} s"
        except EOFError:
            self._process.join()
            return f"the process ended during {during} with exit status {self._process.exitcode}"

    def times(self) -> Any:
        """The kernels' times, or a line that says why there are none."""
        self._channel.send("go")
        return self.message(_TIMING, "timing")

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()


def shape_record(name: str, outcome: Any) -> dict[str, Any]:
    """The entry of a shape: its kernels' times, or the line that says why there are none."""
    if isinstance(outcome, str):
        return {"shape": name, "status": "error", "reason": outcome, "microseconds": None, "kernels": []}
    kernels = [
        {
            "kernel": kernel["kernel"],
            "programs": kernel["programs"],
            "rounds": kernel["rounds"],
            "microseconds": {key: 1e6 * kernel[key] for key in kernel_results.QUANTILES},
        }
        for kernel in outcome
    ]
    total = sum(kernel["microseconds"]["median"] for kernel in kernels)
    return {"shape": name, "status": "timed", "reason": None, "microseconds": total, "kernels": kernels}


def _measure(names: Sequence[str], device: str, made_up: bool, add: Callable[[dict[str, Any]], None]) -> None:
    at_once = os.cpu_count() or 1
    for first in range(0, len(names), at_once):
        processes = [_Process(name, device, made_up) for name in names[first : first + at_once]]
        try:
            begin = time.monotonic()
            ready = [process.message(_COMPILATION, "compilation", begin) for process in processes]
            for process, failure in zip(processes, ready, strict=True):
                add(shape_record(process.name, failure or process.times()))
                process.end()
        finally:
            for process in processes:
                process.end()


def run(arguments: Namespace, command: str) -> int:
    """Time, write and print.  Returns the exit status; raises :class:`UsageError` for unusable arguments."""
    names = arguments.shape or [*KERNEL_SHAPES]
    require_gpu_shapes(names)
    device = machine.device(arguments.device)
    if (device.type == "cpu") != arguments.made_up:
        need = "--made-up needs --device cpu" if arguments.made_up else "kernels are timed on a GPU"
        raise UsageError(f"{need}, got device {device}; --device cpu --made-up rehearses, and times nothing")
    path = Path(arguments.json)
    document: Document = {
        "schema": kernel_results.SCHEMA,
        "version": kernel_results.VERSION,
        **({"fixture": MADE_UP} if arguments.made_up else {}),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        **machine.facts(device, path.parent),
        "asked": names,
        "complete": False,
        "shapes": [],
    }
    results.save(document, path)
    print(f"{document['machine']['device']}, writing {path}", flush=True)
    if arguments.made_up:
        print(f"NOT MEASURED: {MADE_UP}", flush=True)

    def add(record: dict[str, Any]) -> None:
        document["shapes"].append(record)
        document["complete"] = len(document["shapes"]) == len(names)
        results.save(document, path)
        print(_words(record), flush=True)

    _measure(names, str(device), arguments.made_up, add)
    return int(any(record["status"] == "error" for record in document["shapes"]))


def _words(record: dict[str, Any]) -> str:
    """A shape's kernels as a table."""
    if record["status"] == "error":
        return f"\n{record['shape']}: {record['reason']}"
    rows = []
    for kernel in record["kernels"]:
        q20, median, q80 = (duration(kernel["microseconds"][key] * 1e-6) for key in kernel_results.QUANTILES)
        rows.append((kernel["kernel"], kernel["programs"], f"{median} ({q20}–{q80})", kernel["rounds"]))
    words = table(("kernel", "programs", "time", "rounds"), rows)
    return f"\n{record['shape']}: {duration(record['microseconds'] * 1e-6)}\n{words}"
