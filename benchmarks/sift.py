"""Which configurations of a kernel are worth timing: what the compiler makes of them, and the estimate of their time.

This runs in processes that have no context of a GPU.  Kernels are compiled as Triton would at their launch, from the same
arguments, so what a process compiles is in Triton's cache when another process launches it.
"""

import math
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import MockTensor

from vicreg_fast.backends.triton import autotune, configs
from vicreg_fast.backends.triton.configs import Device, Key

from . import estimate, resources
from .cases import Case, case_of
from .estimate import Launch
from .variant import gpu_target

# The kernels that have a key's configuration, and those whose work changes with it.
_KERNELS = {
    "moments": ("moments_forward",),
    "gram": ("gram_forward", "splitk_reduction"),
    "second_moment": ("second_moment_forward", "narrow_second_moment_forward", "splitk_reduction"),
    "gradient": ("gradient",),
    "narrow_gradient": ("narrow_gradient",),
    "matching": ("match_forward", "select_forward"),
    "local": ("vicregl_forward",),
    "local_gradient": ("vicregl_gradient",),
}


class Goal(NamedTuple):
    """What kernels are compiled and chosen for: the target, as resources.py names it, and the GPU's size."""

    target: str
    device: Device


class Verdict(NamedTuple):
    """A configuration, and the microseconds of its kernels by the model; None, and the reason, where it is left out."""

    config: Any
    microseconds: float | None
    reason: str | None = None


class Table(NamedTuple):
    """A key, and what its kernels are with the table's configuration: microseconds by the model, and defects.

    A defect of the table's own is no reason against a candidate.
    """

    key: Key
    microseconds: float
    defects: tuple[str, ...]


class Outlook(NamedTuple):
    """A shape's keys, those with the longest kernels first, and the share of the roofline bound by the estimate."""

    shape: str
    share: float
    tables: tuple[Table, ...]


LATE = "not compiled in time"
_current: Any = None  # of this process: see start_process()


def start_process(current: Any) -> None:
    """Hide every GPU from this process, and leave Ctrl-C to the one that started it.

    ``current``: the position of the key that is waited for, shared by all processes.
    """
    global _current
    _current = current
    os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def outlook(shape: str, goal: Goal) -> Outlook:
    """What tuning a shape may gain, by the estimate of its kernels with the tables' configurations."""
    keys: list[Key] = []
    times: dict[str, float] = {}
    defects: dict[str, tuple[str, ...]] = {}

    def collect(asked: list[Key], run: Any, values: Any) -> None:
        keys.extend(asked)

    with autotune.searching(collect):
        launches = estimate.launches(case_of(shape), goal.target, goal.device)
    for launch in launches:
        compiled = compile_as_launched(launch, goal.target)
        record = estimate.kernel_record(launch._replace(compiled=compiled), goal.target)
        name = launch.variant.name
        times[name] = times.get(name, 0.0) + record["microseconds"]
        defects[name] = resources.examine(launch.variant, goal.target, compiled).defects
    share = estimate.floor_microseconds(case_of(shape), estimate.CARDS[goal.target]) / sum(times.values())
    tables = []
    for key in dict.fromkeys(keys):
        own = [name for name in _KERNELS[key.kernel] if name in times]
        found = [defect for name in own for defect in defects[name]]
        tables.append(Table(key, sum(times[name] for name in own), tuple(found)))
    return Outlook(shape, share, tuple(sorted(tables, key=lambda table: -table.microseconds)))


def sift_in_time(position: int, shape: str, goal: Goal, table: Table, group: Sequence[Any]) -> list[Verdict]:
    """As :func:`sift`, unless a key after the one at this position is waited for already."""
    if position < _current.value:
        return [Verdict(config, None, LATE) for config in group]
    return sift(shape, goal, table, group)


def sift(shape: str, goal: Goal, table: Table, group: Sequence[Any]) -> list[Verdict]:
    """The verdict on each configuration of a group, all of which compile to the same kernel."""
    verdicts = []
    for config in group:
        try:
            verdicts.append(_verdict(case_of(shape), goal, table, config))
        except Exception as error:  # of the compiler, which raises several kinds
            reason = f"does not compile: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            verdicts.append(Verdict(config, None, reason))
    return verdicts


def _verdict(case: Case, goal: Goal, table: Table, config: Any) -> Verdict:
    own, microseconds = _KERNELS[table.key.kernel], 0.0
    for launch in _launches_with(case, goal, table.key, config):
        # Every launch, because a configuration may also change what other kernels are compiled for.
        compiled = compile_as_launched(launch, goal.target)
        if launch.variant.name not in own:
            continue
        found = resources.examine(launch.variant, goal.target, compiled)
        defects = [defect for defect in found.defects if defect not in table.defects]
        planned = getattr(config, "ctas_per_sm", 1) if launch.variant.name != "splitk_reduction" else 1
        if planned > found.ctas_per_sm:
            defects.append(f"{planned} CTAs on an SM planned, {found.ctas_per_sm} fit")
        if defects:
            return Verdict(config, None, f"defect: {launch.variant.name}: {defects[0]}")
        record = estimate.kernel_record(launch._replace(compiled=compiled), goal.target)
        microseconds += record["microseconds"]
    return Verdict(config, microseconds)


def _launches_with(case: Case, goal: Goal, key: Key, config: Any) -> list[Launch]:
    """The launches of a step in which one key has this configuration."""
    before = dict(configs.tuned_configs)
    configs.tuned_configs.update({key: config})
    try:
        with autotune.searching(as_it_is):
            return estimate.launches(case, goal.target, goal.device)
    finally:
        configs.tuned_configs.clear()
        configs.tuned_configs.update(before)


def as_it_is(keys: Sequence[Key], run: Callable[[], Any], values: Any) -> None:
    """A tuner that searches nothing and reads no rows, whatever the environment asks for."""


class _NoGPU:
    """What Triton asks of a driver to compile a launch, for a GPU that this process does not see."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_as_launched(launch: Launch, target: str) -> Any:
    """What Triton compiles at this launch, from its cache if it is there."""
    driver.set_active(_NoGPU(gpu_target(target)))
    arguments = {name: _without_address(value) for name, value in launch.arguments.items() if name != "grid"}
    return launch.variant.kernel.run(grid=(launch.programs,), warmup=True, **arguments)


def _without_address(value: Any) -> Any:
    """An argument of a launch with Triton's stand-ins for tensors: aligned, as new tensors are."""
    if isinstance(value, Tensor):
        return MockTensor(value.dtype, list(value.shape))
    if isinstance(value, tuple):
        return type(value)(*map(_without_address, value))
    return value


def groups(candidates: Sequence[Any]) -> list[list[Any]]:
    """Candidates that differ in CTAs on an SM alone, which the compiler does not see, as one group each."""
    grouped: dict[Any, list[Any]] = {}
    for config in candidates:
        same = config._replace(ctas_per_sm=1) if hasattr(config, "ctas_per_sm") else config
        grouped.setdefault(same, []).append(config)
    return list(grouped.values())


def best(verdicts: Sequence[Verdict], count: int) -> list[Verdict]:
    """The verdicts of the least estimates, the given order deciding between equal ones."""
    usable = [verdict for verdict in verdicts if verdict.microseconds is not None]
    return sorted(usable, key=lambda verdict: verdict.microseconds or math.inf)[:count]
