"""``python -m benchmarks tune``: a sweep for the fastest block sizes of every kernel of some shapes, on a GPU.

1. Processes without a context of the GPU compile the candidates and estimate them (sift.py).  What spills, does not fit or
   has another defect is left out, and of the rest the best BEST by the estimate are kept.
2. One process times them (tune_device.py), each kernel alone, after their results were compared with the table's.  A
   candidate that ends the process is recorded as crashed, and the others go on in a new one.
3. What was found is written after every kernel (tune_results.py).

Shapes with the least share of the roofline bound come first, and within a shape the kernels that take longest, both by the
estimate.  Each kernel has an equal share of the time that is left.  While one is timed, the next are compiled.

Every key is searched with the tables' configurations of all others: the rows of a shape are timed together at its end.
Without a GPU the sweep compiles and estimates, and says that it did only that.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from vicreg_fast.backends.triton import candidates, configs
from vicreg_fast.backends.triton.configs import Key
from vicreg_fast.backends.triton.search import Trial

from . import machine, resources, sift
from .cases import require_gpu_shapes
from .results import UsageError
from .shapes import KERNEL_SHAPES
from .sift import Goal, Outlook, Verdict
from .tune_device import Failed, Search, Together
from .tune_process import NO_TIME, DeviceProcess, Lost
from .tune_results import Found, Writer, step_record

BEST = 24
# Of a kernel's share of the time: for waiting for the compiler, and for the rounds of the timing, within these seconds.
_COMPILING, _TIMING, _LONGEST_TIMING = 0.6, 0.2, 2.0
# Of all the time, at most, for the estimates that decide the order; more where no shape has one by then.
_PLANNING = 0.25
_RESERVE = 1.0  # seconds for the end
# Candidates of a kernel that may end the process.  To start it again takes about ten seconds, and a kernel of which more
# crash has a mistake of its own.
_MOST_CRASHES = 3


class Task(NamedTuple):
    """A key of a shape, and its candidates in groups that compile to one kernel each, with the answers to come."""

    shape: str
    table: sift.Table
    pending: list[tuple[list[Any], "AsyncResult[list[Verdict]]"]]
    last_of_shape: bool


class Sweep:
    """A run of the command: its processes, its time and its folder."""

    def __init__(
        self, shapes: Sequence[str], end: float, writer: Writer, goal: Goal, device: DeviceProcess | None,
        processes: int,
    ) -> None:  # fmt: skip
        self._shapes, self._writer, self._goal, self._device = shapes, writer, goal, device
        self._end = end - _RESERVE
        context = multiprocessing.get_context("spawn")
        # The position of the key that is waited for: groups of earlier keys are no longer compiled.
        self._current = context.Value("i", 0)
        self._pool = context.Pool(processes, sift.start_process, (self._current,))
        self.errors, self._late = 0, False  # late: something was left out because the time was over

    def run(self) -> None:
        """Search until all is done or the time is over."""
        tasks = self._plan()
        rows: dict[Key, Any] = {}
        for position, task in enumerate(tasks):
            if self._left() <= 0:
                names = ", ".join(f"{late.shape} {late.table.key.kernel}" for late in tasks[position:])
                print(f"{NO_TIME} for {names}", flush=True)
                return
            self._current.value = position
            found = self._search(task, self._left() / (len(tasks) - position))
            self._writer.add(found)
            self._count(found.error)
            print(found.summary(), flush=True)
            if found.status == "timed" and found.best is not found.trials[0]:
                rows[task.table.key] = found.best.config
            if task.last_of_shape:
                self._time_together(task.shape, rows)
                rows = {}
        self._writer.document["complete"] = self.errors == 0 and not self._late
        self._writer.save()

    def _count(self, error: str | None) -> None:
        """Count an error; that the time is over is none."""
        self._late |= error == NO_TIME
        self.errors += error not in (None, NO_TIME)

    def close(self) -> None:
        """End all processes."""
        self._pool.terminate()
        if self._device is not None:
            self._device.stop()

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _plan(self) -> list[Task]:
        """The keys of all shapes in the order of the search.  Compilation starts."""
        waiting = {shape: self._pool.apply_async(sift.outlook, (shape, self._goal)) for shape in self._shapes}
        until = time.monotonic() + _PLANNING * self._left()

        def waits() -> bool:
            ready = [answer.ready() for answer in waiting.values()]
            return not all(ready) and self._left() > 0 and (time.monotonic() < until or not any(ready))

        while waits():
            time.sleep(0.02)
        outlooks: list[Outlook] = []
        for shape, answer in waiting.items():
            try:
                outlooks.append(answer.get(0))
            except multiprocessing.TimeoutError:
                print(f"{shape}: the tables' own configurations were not compiled in time", flush=True)
                self._count(NO_TIME)
            except Exception as error:  # of the compiler, which raises several kinds
                print(f"{shape}: the tables' own configurations: {type(error).__name__}: {error}", flush=True)
                self._count(str(error))
        tasks: list[Task] = []
        for outlook in sorted(outlooks, key=lambda outlook: outlook.share):
            for count, table in enumerate(outlook.tables, start=1):
                groups = sift.groups(candidates.candidates(table.key))
                pending = [(group, self._sift(len(tasks), outlook.shape, table, group)) for group in groups]
                tasks.append(Task(outlook.shape, table, pending, count == len(outlook.tables)))
        return tasks

    def _sift(
        self, position: int, shape: str, table: sift.Table, group: list[Any]
    ) -> "AsyncResult[list[Verdict]]":
        return self._pool.apply_async(sift.sift_in_time, (position, shape, self._goal, table, group))

    def _search(self, task: Task, share: float) -> Found:
        """Wait for the compiler, then time the best candidates.  ``share``: the seconds of this key."""
        until = time.monotonic() + (share if self._device is None else _COMPILING * share)
        verdicts: list[Verdict] = []
        for group, answer in task.pending:
            try:
                verdicts += answer.get(max(0.0, until - time.monotonic()))
            except multiprocessing.TimeoutError:
                verdicts += [Verdict(config, None, sift.LATE) for config in group]
        key = task.table.key
        table = configs.from_table(key)
        estimates = {v.config: v.microseconds for v in verdicts if v.microseconds is not None}
        estimates[table] = task.table.microseconds
        best = [verdict.config for verdict in sift.best(verdicts, BEST)]
        others = [
            Trial(v.config, reason=v.reason or "slower by the estimate")
            for v in verdicts
            if v.config not in best
        ]
        if self._device is None:
            trials = [Trial(table), *map(Trial, best), *others]
            return Found(task.shape, key, trials, estimates)
        seconds = min(_LONGEST_TIMING, _TIMING * share)
        trials, error = time_candidates(self._device, task.shape, key, best, seconds, self._end)
        return Found(task.shape, key, [*trials, *others] if trials else [], estimates, error)

    def _time_together(self, shape: str, rows: dict[Key, Any]) -> None:
        """Time a shape's step with the rows, if there are any."""
        if not rows or self._device is None or self._left() <= 0:
            return
        answer = self._device.ask(Together(shape, rows, _LONGEST_TIMING), self._end)
        lost = isinstance(answer, (Failed, Lost))
        record = step_record(shape, [] if lost else answer, answer.reason if lost else None)
        self._writer.add_step(record)
        self._count(record["reason"])


def time_candidates(
    device: DeviceProcess, shape: str, key: Key, tried: Sequence[Any], seconds: float, end: float
) -> tuple[list[Trial], str | None]:
    """Trials of the table's configuration and of these, or the reason why there are none.

    A configuration that ends the process is left out, and the others are tried again in a new one.
    """
    remaining, crashed = list(tried), list[Trial]()
    while True:
        answer = device.ask(Search(shape, key, tuple(remaining), seconds), end)
        if isinstance(answer, Failed):
            return [], answer.reason
        if not isinstance(answer, Lost):
            return [*answer, *crashed], None
        if not answer.in_time or answer.config not in remaining:
            return [], answer.reason
        remaining.remove(answer.config)
        crashed.append(Trial(answer.config, reason=f"crashed: {answer.reason}"))
        if len(crashed) > _MOST_CRASHES:
            named = ", ".join(repr(trial.config) for trial in crashed)
            return [], f"{len(crashed)} candidates ended the process: {named}; the last: {answer.reason}"


def tune(
    names: Sequence[str] | None, minutes: float, out: str | None, target: str | None = None,
    start_device: Callable[[], DeviceProcess] = DeviceProcess,
) -> int:  # fmt: skip
    """Search, write and print.  Returns the exit status; raises :class:`UsageError` for an unusable argument."""
    end = time.monotonic() + 60 * minutes
    names = list(dict.fromkeys(names or KERNEL_SHAPES))
    require_gpu_shapes(names)
    has_gpu = torch.cuda.is_available()
    if has_gpu and target is not None:
        raise UsageError(f"--target is for a machine without a GPU, got {target} on one with a GPU")
    device = start_device() if has_gpu else None
    target = target or "cuda:90"
    try:
        goal = Goal(target, resources.device_of(target)) if device is None else device.start()
    except RuntimeError as error:
        print(f"python -m benchmarks tune: {error}", file=sys.stderr)
        return 1
    if goal.target not in resources.SHARED_MEMORY:
        if device is not None:
            device.stop()
        raise UsageError(f"the estimate knows {', '.join(resources.SHARED_MEMORY)}, not {goal.target}")
    about = machine.machine(machine.device(None))
    writer = Writer(Path(out or "tuning"), {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": about,
        "commit": machine.commit(), "target": goal.target, "triton": triton.__version__, "timed": has_gpu,
        "asked": names,
    })  # fmt: skip
    writer.start()
    if not has_gpu:
        print(f"no GPU: candidates are compiled for {goal.target} and ranked by the estimate; nothing is timed")
    sweep = Sweep(names, end, writer, goal, device, max(1, (os.cpu_count() or 2) - 1))
    try:
        sweep.run()
        status = 1 if sweep.errors else 0
    except KeyboardInterrupt:
        print("\ninterrupted; what was found is written", file=sys.stderr)
        status = 130
    finally:
        sweep.close()
    print(f"\n{writer.rows()}", flush=True)
    return status
