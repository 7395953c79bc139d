"""The process that runs candidates on a GPU: the only one with a context of it, and the only one that an illegal access ends.

It announces every configuration before it compiles, launches or times it, so that the process that waits for it knows which
one was the last.
"""

import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_fast.backends.triton import autotune, configs, launch_timing, search
from vicreg_fast.backends.triton.configs import Key
from vicreg_fast.backends.triton.launch_timing import Effort, GraphTimer, Launch, Timer
from vicreg_fast.backends.triton.search import Trial

from . import kernel_pass, sift
from .cases import Inputs, case_of


class Search(NamedTuple):
    """Time a key's candidates in the step of a shape; all other keys have the tables' configurations."""

    shape: str
    key: Key
    candidates: tuple[Any, ...]
    seconds: float  # of the timing itself


class Together(NamedTuple):
    """Time the step of a shape with the tables' configurations and with these."""

    shape: str
    rows: dict[Key, Any]
    seconds: float


class Next(NamedTuple):
    """Announces a configuration; None: the rows of a :class:`Together`."""

    config: Any


class Failed(NamedTuple):
    """A job's error.  ``device``: nothing runs on the device any more, and the process ends."""

    reason: str
    device: bool


def serve(
    connection: Connection,
    device_name: str = "cuda",
    make_timer: Callable[[torch.device], Timer] = GraphTimer,
) -> None:
    """Send the device's target and size, then answer each job by announcements and a list of trials, until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    configs.tuned_configs.clear()
    device = torch.device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    timer = make_timer(device)
    connection.send(goal_of(device))
    work = _Work(device, timer, lambda config: connection.send(Next(config)))
    while (job := connection.recv()) is not None:
        try:
            connection.send(work.search(job) if isinstance(job, Search) else work.together(job))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            try:
                search.require_device(device)
            except search.DeviceError:
                connection.send(Failed(reason, device=True))
                return
            connection.send(Failed(reason, device=False))


def goal_of(device: torch.device) -> sift.Goal:
    """What this device compiles for."""
    chosen = configs.device_of(device)
    if device.type != "cuda":
        return sift.Goal("interpreter", chosen)
    if torch.version.hip is not None:
        return sift.Goal(
            f"hip:{torch.cuda.get_device_properties(device).gcnArchName.partition(':')[0]}", chosen
        )
    major, minor = torch.cuda.get_device_capability(device)
    return sift.Goal(f"cuda:{10 * major + minor}", chosen)


class _Work:
    """Jobs on one device."""

    def __init__(self, device: torch.device, timer: Timer, announce: Callable[[Any], None]) -> None:
        self._device, self._timer, self._announce = device, timer, announce
        self._inputs: tuple[str, Inputs] | None = None  # of one shape: several might not fit the memory

    def _inputs_of(self, shape: str) -> Inputs:
        if self._inputs is None or self._inputs[0] != shape:
            self._inputs = None
            inputs = case_of(shape).inputs(0, self._device)
            self._inputs = (shape, tuple(z.detach() for z in inputs))
        return self._inputs[1]

    def search(self, job: Search) -> list[Trial]:
        """Trials of the table's configuration and of the candidates."""
        found: list[list[Trial]] = []

        def tuner(keys: list[Key], run: Callable[[], Any], values: Callable[[Any], list[Tensor]]) -> None:
            if job.key in keys and not found:
                found.append(
                    search.search(
                        job.key, job.candidates, run, self._timer, self._device, values,
                        _effort(job.seconds), self._announce,
                    )
                )  # fmt: skip

        inputs = self._inputs_of(job.shape)
        with autotune.searching(tuner), torch.no_grad():
            kernel_pass.make(case_of(job.shape), inputs)
        if not found:
            raise LookupError(f"no pass of {job.shape} asks for {job.key}")
        return found[0]

    def together(self, job: Together) -> list[Trial]:
        """Trials of the whole step: with the tables' configurations, and with the rows."""
        case, inputs = case_of(job.shape), self._inputs_of(job.shape)
        results: list[list[Tensor]] = []
        made: dict[int, list[Launch]] = {}
        for position, rows in enumerate(({}, job.rows)):
            self._announce(None)
            configs.tuned_configs.update(rows)
            try:
                with launch_timing.recorded() as launches, autotune.searching(sift.as_it_is), torch.no_grad():
                    results.append(kernel_pass.make(case, inputs))
                search.require_device(self._device)
            finally:
                configs.tuned_configs.clear()
            made[position] = list(launches)
        reason = search.disagreement(results[1], results[0])
        trials = [Trial(None), Trial(None, reason=reason)]
        if reason is not None:
            del made[1]
        return search.timed(trials, made, self._timer, _effort(job.seconds), self._announce)


def _effort(seconds: float) -> Effort:
    return launch_timing.FULL._replace(seconds=seconds)
