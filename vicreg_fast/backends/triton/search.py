"""Finds the fastest configuration of a kernel by device time: for a search on request (autotune.py) and for the benchmarks.

A configuration also changes the grids and buffers of the kernels beside its own: the side of a tile and the splits decide
how the split-K reduction runs.  So a trial's time is the sum over all kernels of its pass, each timed alone.  Launches of
equal work are timed once and have one time, so two trials differ only by the launches that their configurations change.

A trial is timed only if its results agree with those of the table's configuration.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from . import configs, launch_timing
from .configs import Key
from .launch_timing import Effort, Launch, Timer, Times

# The largest norm of the difference to the table's results, relative to that of the results.  Configurations add in other
# orders.  Tensor cores truncate a sum by 0.3 of 2^-24 at each step of 8 or more, 1.5e-4 for the 2^16 elements that a program
# may accumulate (splitk.py).  A 16-bit result whose rounding flips changes by 2^-8, but few do.  One unwritten tile of the
# 81,250 of a gradient of 2.6 million rows is a difference of 3.5e-3, and fewer tiles give more.
TOLERANCE = 1e-3


class Trial(NamedTuple):
    """A configuration, and the times of its pass on the device; None, and the reason, where it was not timed."""

    config: Any
    time: Times | None = None
    kernels: tuple[tuple[str, Times], ...] = ()  # the pass's kernels in order
    reason: str | None = None


class DeviceError(RuntimeError):
    """The device no longer runs a trivial kernel, as after an illegal access: nothing that follows can be believed."""


def tensors_in(result: Any) -> list[Tensor]:
    """The floating-point tensors of a result that have elements."""
    return [t for t in flattened(result) if t.is_floating_point() and t.numel()]


def flattened(value: Any) -> Iterator[Tensor]:
    """The tensors of a value: of tuples and lists those of their members."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for member in value:
            yield from flattened(member)


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest norm of a difference, relative to that of the expected tensor; NaN if one is NaN."""
    found = 0.0
    for a, e in zip(actual, expected, strict=True):
        wide = torch.promote_types(e.dtype, torch.float32)
        error, size = (float(torch.linalg.vector_norm(z, dtype=wide)) for z in (a - e, e))
        if math.isnan(error):
            return error
        found = max(found, error / size if size else error)
    return found


def does_not_fit(error: Exception) -> bool:
    """Whether an error says that a configuration needs more than there is, or that Triton cannot compile it."""
    failed_pass = isinstance(error, RuntimeError) and "PassManager::run failed" in str(error)
    return failed_pass or isinstance(error, (TritonError, torch.OutOfMemoryError))


def require_device(device: torch.device, cause: Exception | None = None) -> None:
    """Raise :class:`DeviceError` if a trivial kernel fails.  An error belongs to whatever ran before."""
    try:
        torch.zeros(1, device=device).add_(1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceError(f"{device} no longer runs a trivial kernel: {cause or error}") from (cause or error)


def search(
    key: Key,
    candidates: Sequence[Any],
    run: Callable[[], Any],
    timer: Timer,
    device: torch.device,
    values: Callable[[Any], list[Tensor]] = tensors_in,
    effort: Effort = launch_timing.FULL,
    before_each: Callable[[Any], None] = lambda config: None,
) -> list[Trial]:
    """Trials of the table's configuration of a key, the first, and of the candidates, in their order.

    ``run`` makes the pass; ``values`` are the tensors of its result that must agree.  ``before_each`` is called with the
    configuration that is compiled, launched or timed next.  Raises :class:`DeviceError` where the device fails, and whatever
    ``run`` raises that does not mean that a configuration does not fit.
    """
    table = configs.from_table(key)
    before = configs.tuned_configs.get(key)
    trials: list[Trial] = []
    made: dict[int, list[Launch]] = {}  # the launches of each trial that can be timed
    tensors: dict[Hashable, Tensor] = {}
    expected: list[Tensor] = []
    try:
        for config in [table, *candidates]:
            before_each(config)
            configs.tuned_configs[key] = config
            position = len(trials)
            try:
                with launch_timing.recorded() as launches:
                    result = run()
                require_device(device)
            except Exception as error:
                require_device(device, error)
                if position == 0 or not does_not_fit(error):
                    raise
                trials.append(Trial(config, reason=f"does not fit: {_first_line(error)}"))
                continue
            if position == 0:
                expected = values(result)
            reason = _objection(launches, values(result), expected, is_table=position == 0)
            trials.append(Trial(config, reason=reason))
            if reason is None:
                made[position] = [launch.sharing(tensors) for launch in launches]
    finally:  # an interrupted search leaves nothing behind
        if before is None:
            configs.tuned_configs.pop(key, None)
        else:
            configs.tuned_configs[key] = before
    return timed(trials, made, timer, effort, before_each)


def _objection(
    launches: Sequence[Launch], actual: list[Tensor], expected: list[Tensor], is_table: bool
) -> str | None:
    """Why a trial is not timed; None if it is.  The table's configuration always is."""
    if is_table:
        return None
    spilled = {launch.name: getattr(launch.compiled, "n_spills", 0) for launch in launches}
    for name, count in spilled.items():
        if count:
            return f"{name} spills {count} registers"
    return disagreement(actual, expected)


def disagreement(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """How far results are from those of the table's configuration, where that is too far; None where they agree."""
    error = difference(actual, expected)
    if error <= TOLERANCE:
        return None
    return f"wrong: {error:.1e} from the table's results, {TOLERANCE:.0e} allowed"


def timed(
    trials: Sequence[Trial],
    made: dict[int, list[Launch]],
    timer: Timer,
    effort: Effort,
    before_each: Callable[[Any], None],
) -> list[Trial]:
    """The trials with their times; ``made``: the launches of those, by position, that are timed."""
    owners: dict[Hashable, Any] = {}
    distinct: dict[Hashable, Launch] = {}
    for position, launches in made.items():
        for launch in launches:
            owners.setdefault(launch.work, trials[position].config)
            distinct.setdefault(launch.work, launch)
    configurations = list(owners.values())
    rounds = launch_timing.interleaved(
        list(distinct.values()), timer, effort, lambda index: before_each(configurations[index])
    )
    times = {work: Times.of(seconds) for work, seconds in zip(distinct, rounds, strict=True)}
    done = list(trials)
    for position, launches in made.items():
        kernels = tuple((launch.name, times[launch.work]) for launch in launches)
        done[position] = trials[position]._replace(
            time=Times.sum([time for _, time in kernels]), kernels=kernels
        )
    return done


def fastest(trials: Sequence[Trial]) -> Trial:
    """The trial of the least median; the table's, the first, unless their ranges of 20 to 80 % of the rounds lie apart."""
    with_times = [(trial.time.median, trial) for trial in trials if trial.time is not None]
    table, (_, best) = trials[0], min(with_times, key=lambda item: item[0])
    assert table.time is not None
    assert best.time is not None
    return best if best.time.q80 < table.time.q20 else table


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
