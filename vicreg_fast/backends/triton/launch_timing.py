"""Times the kernels of a pass, each alone, on the device: the host that launches them takes longer than a small kernel.

A pass runs once while its launches are recorded.  Each recorded launch is captured into a CUDA graph of its own, and the
graphs are replayed in turn, many times.  Events inside of the graph stand right before and right after the kernel.  Before
each replay a buffer larger than the L2 cache is read, so that the kernel finds a cold one.  The buffer is not written: a
dirty cache would be written back while the kernel runs.

Replaying one launch alone is legal.  It reads the buffers that the pass left and writes the same values again, with two
exceptions: an arrival counter is set to zero before each replay, as the kernel before leaves it; and a scatter that adds to
its gradient adds once more, so the results of a recorded pass are not to be used.
"""

import gc
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
from torch import Tensor

# The name, within a kernel's arguments, of the counter that must be zero when the kernel starts: kernels/epilogue.py.
_COUNTER = "arrival_counter_ptr"


class Launch(NamedTuple):
    """A launch that was made: Triton's function, the programs, the arguments by name, and what Triton compiled."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # with Triton's options; tensors stay allocated as long as the launch
    compiled: Any = None  # None in the interpreter, and where launches are recorded only

    @property
    def name(self) -> str:
        """The kernel's name, without what all kernels have in it."""
        return kernel_name(self.kernel)

    def run(self) -> None:
        """Launch again."""
        self.kernel.run(grid=self.grid, warmup=False, **self.arguments)

    @property
    def work(self) -> Hashable:
        """Equal for launches of equal work: the kernel, the programs, and the arguments but for the tensors' addresses."""
        described = [(name, *_described(value)) for name, value in self.arguments.items()]
        return (self.name, self.grid, *described)

    def sharing(self, tensors: dict[Hashable, Tensor]) -> "Launch":
        """This launch on the tensors that an earlier launch of its kernel had at the same place, where they fit.

        ``tensors`` has those of earlier launches, and gets the others.  Many configurations of one pass then need hardly more
        memory than one.
        """
        return self._replace(
            arguments={
                name: _shared(value, (self.name, name), tensors) for name, value in self.arguments.items()
            }
        )


def kernel_name(kernel: Any) -> str:
    """A kernel's name, without what all kernels have in it."""
    return str(kernel.fn.__name__).strip("_").removesuffix("_kernel")


def _described(value: Any) -> tuple[Hashable, ...]:
    """An argument without its address."""
    if isinstance(value, Tensor):
        return ("tensor", value.dtype, value.shape, value.stride())
    if isinstance(value, tuple):
        return tuple(_described(member) for member in value)
    return (type(value).__name__, str(value))


def _shared(value: Any, place: tuple[Hashable, ...], tensors: dict[Hashable, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return tensors.setdefault((place, _described(value)), value)
    if isinstance(value, tuple):
        members = [_shared(member, (*place, k), tensors) for k, member in enumerate(value)]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    return value


def _counters(name: str, value: Any) -> Iterator[Tensor]:
    """The arrival counters among an argument and its members."""
    if name == _COUNTER and isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for field, member in zip(getattr(value, "_fields", ()), value, strict=False):
            yield from _counters(field, member)


@contextmanager
def recorded(every_thread: bool = False) -> Iterator[list[Launch]]:
    """The launches of this library's kernels that this thread makes while the context is open.

    ``every_thread``: those of other threads too, such as autograd's, which runs the backward pass on a GPU.
    """
    launches: list[Launch] = []
    listener = (None if every_thread else threading.get_ident(), launches)
    with _LOCK:
        if not _listeners:
            _hook.start()
        _listeners.append(listener)
    try:
        yield launches
    finally:
        with _LOCK:
            _listeners[:] = [other for other in _listeners if other is not listener]
            if not _listeners:
                _hook.stop()


class _Hook:
    """Tells the listeners of launches, in place of the method of Triton that makes them."""

    def __init__(self) -> None:
        self._patch: Any = None

    def start(self) -> None:
        """Listen."""
        from ... import kernels
        from ...kernels import vicreg_dual

        # Triton's JITFunction, or the interpreter's counterpart.
        kind = type(vicreg_dual._gram_forward_kernel)
        launch, package = kind.run, kernels.__name__

        def run(kernel: Any, *positional: Any, grid: Any, warmup: bool, **arguments: Any) -> Any:
            # Other code's kernels are launched in any way, this library's with keywords.
            compiled = launch(kernel, *positional, grid=grid, warmup=warmup, **arguments)
            if kernel.fn.__module__.startswith(package):
                made = Launch(kernel, tuple(grid), arguments, compiled)
                for thread, launches in list(_listeners):
                    if thread in (None, threading.get_ident()):
                        launches.append(made)
            return compiled

        self._patch = mock.patch.object(kind, "run", run)
        self._patch.start()

    def stop(self) -> None:
        """Put Triton's method back."""
        self._patch.stop()


_hook = _Hook()
_listeners: list[tuple[int | None, list[Launch]]] = []
_LOCK = threading.Lock()  # of the two above


class Timer(Protocol):
    """What times launches."""

    def capture(self, launch: Launch) -> Callable[[], float]:
        """A function that makes a launch and returns its seconds on the device."""
        ...


class GraphTimer:
    """Times launches on a CUDA or ROCm device by replaying graphs, each time with a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        # float32, so four times the L2 cache: its replacement is not strictly LRU.  At least 256 MiB: a last-level cache
        # that torch does not report, and long enough to hide the launch of a graph.
        self._evictor = torch.ones(max(cache_bytes, 1 << 26), device=device)
        self._sink = torch.empty((), device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # torch 2.11 refuses events inside of graphs on ROCm.  Around the replay they include the graph's launch.
        self._events_inside = torch.version.hip is None

    def capture(self, launch: Launch) -> Callable[[], float]:
        """See :class:`Timer`."""
        start, end = (self._event() for _ in range(2))
        graph = torch.cuda.CUDAGraph()
        counters = [c for name, value in launch.arguments.items() for c in _counters(name, value)]
        torch.cuda.synchronize(self._device)
        # A compiled kernel that is collected unloads its module, which breaks a capture.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                launch.run()  # a kernel is loaded at its first launch, which cannot be captured
                self._stream.synchronize()
                # Not torch.cuda.graph: it frees all unused memory each time, and other threads may use the device.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    if self._events_inside:
                        start.record()
                    launch.run()
                    if self._events_inside:
                        end.record()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()

        def seconds() -> float:
            for counter in counters:
                counter.zero_()
            torch.sum(self._evictor, 0, out=self._sink)
            if not self._events_inside:
                start.record()
            graph.replay()
            if not self._events_inside:
                end.record()
            torch.cuda.synchronize(self._device)
            return float(start.elapsed_time(end)) * 1e-3

        return seconds

    def _event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True, external=self._events_inside)  # type: ignore[no-untyped-call]


class Effort(NamedTuple):
    """How long launches are timed: until the seconds are over, within ``least`` and ``most`` rounds."""

    least: int
    most: int
    seconds: float


FULL = Effort(7, 100, 1.0)


def interleaved(
    launches: Sequence[Launch],
    timer: Timer,
    effort: Effort = FULL,
    before_each: Callable[[int], None] = lambda index: None,
) -> list[list[float]]:
    """The seconds of each launch in every round.  A round makes each launch once and starts at another one.

    The first round is not counted.  ``before_each``: called with the position of the launch that is made next.
    """
    calls = []
    for index, launch in enumerate(launches):
        before_each(index)
        calls.append(timer.capture(launch))
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + effort.seconds
    for turn in range(effort.most + 1):
        if turn > effort.least and time.perf_counter() > end:
            break
        for step in range(len(calls)):
            index = (step + turn) % len(calls)
            before_each(index)
            seconds = calls[index]()
            if turn > 0:
                times[index].append(seconds)
    return times


class Times(NamedTuple):
    """Seconds of many rounds: the median, and what 20 % and 80 % of them do not exceed."""

    median: float
    q20: float
    q80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        """Of these rounds."""
        q20, *_, q80 = quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else [*seconds] * 4
        return cls(median(seconds), q20, q80)

    @classmethod
    def sum(cls, times: Sequence["Times"]) -> "Times":
        """Of kernels one after the other: sums of each."""
        return cls(*map(sum, zip(*times, strict=True)))


class KernelTime(NamedTuple):
    """A kernel of a pass and its seconds on the device: the median, and what 20 % and 80 % of the rounds do not exceed."""

    kernel: str
    programs: int
    median: float
    q20: float
    q80: float
    rounds: int


def kernel_times(
    run: Callable[[], object], timer: Timer | None = None, effort: Effort = FULL
) -> list[KernelTime]:
    """The device time of each kernel of a pass, alone and with a cold L2 cache, in the order of the launches.

    ``run`` makes the pass, forward, backward or both, on the current device; it is called twice, the first time unrecorded.
    Launches of other kernels than this library's, as those of ATen, are not seen.  ``timer`` None: the current device's.

    >>> times = kernel_times(lambda: loss(x, y)["loss"].backward())  # doctest: +SKIP
    """
    run()  # compiles
    with recorded(every_thread=True) as launches:
        run()
    if timer is None:
        timer = GraphTimer(torch.device("cuda", torch.cuda.current_device()))
    rounds = interleaved(launches, timer, effort)
    return [
        KernelTime(launch.name, math.prod(launch.grid), *Times.of(seconds), len(seconds))
        for launch, seconds in zip(launches, rounds, strict=True)
    ]
