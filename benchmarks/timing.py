"""Times calls on a device and measures their memory: events, a cold cache, interleaved rounds.

Mode *launch*: Python calls the loss while the device is idle.  The time includes the device's waits for the host, as for
a caller who needs the result.  Mode *graph*: the same kernels replayed as CUDA graphs (``graphs.py``).  The host runs
ahead, and the time is the device's alone.

Inputs rotate over several sets, and before each timed call a buffer larger than the L2 cache is read.  Rotation alone
would need thousands of sets at 64 x 64.  The buffer is read, not written: a dirty cache would be written back during the
next call.  Reading four times 50 MB takes 67 microseconds at 3 TB/s, which also keeps the device busy while the host
enqueues two graphs.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from . import gate
from .cases import PARTS, Case, Inputs
from .libraries import Definition, Losses
from .providers import matmul_precision

Call = Callable[[], object]
_CPU_CACHE = 1 << 25  # 32 MiB, a common last-level cache: torch does not report a CPU's


class Effort(NamedTuple):
    """How long one mode of a shape is timed: until the seconds are over, within ``least`` and ``most`` rounds."""

    least: int
    most: int
    seconds: float


# The seconds are for all modes together.  run.py may shorten them.
FULL, QUICK = Effort(7, 200, 9.0), Effort(3, 20, 0.9)


class Times(NamedTuple):
    """Seconds of one call: on the device, and on the host until the call returned."""

    device: float
    host: float


Run = Callable[[int], dict[str, Times]]  # from the index of the round to the times of every part


class Bench:
    """A device with its clock and its cache.  ``distributed.py`` has that of one rank of several."""

    rank, ranks = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu, self.cache_bytes = device, device.type == "cuda", _CPU_CACHE
        if self.on_gpu:
            torch.cuda.set_device(device)
            self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            # float32, so four times the L2 cache: its replacement is not strictly LRU.  At least 256 MiB: a last-level
            # cache that torch does not report, and long enough to hide the launch of a graph.
            self._evictor = torch.ones(max(self.cache_bytes, 1 << 26), device=device)
            self._sink = torch.empty((), device=device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
            # Graphs warm up on the stream of their capture: cuBLAS has a workspace for each stream.
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for event in self._events:  # the first record creates the event
                event.record()
            self.synchronize()

    @property
    def has_graphs(self) -> bool:
        """Whether mode graph is measured, and the host's time beside the device's: on one GPU."""
        return self.on_gpu and self.ranks == 1

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Release unused memory and wait.  Raises where the device has failed."""
        self.synchronize()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def time(self, calls: Sequence[Call], idle: bool) -> list[Times]:
        """Time up to two successive calls.  ``idle``: the device has finished all earlier work before the first."""
        host: list[float] = []
        if self.on_gpu:
            torch.sum(self._evictor, 0, out=self._sink)
            if idle:
                self.synchronize()
            self._events[0].record()
        for index, call in enumerate(calls, start=1):
            start = time.perf_counter()
            call()
            host.append(time.perf_counter() - start)
            if self.on_gpu:
                self._events[index].record()
        if not self.on_gpu:
            return [Times(seconds, seconds) for seconds in host]
        self.synchronize()
        events = pairwise(self._events[: len(calls) + 1])
        return [Times(a.elapsed_time(b) * 1e-3, h) for (a, b), h in zip(events, host, strict=True)]

    def peak_bytes(self, *calls: Call) -> list[int]:
        """The most bytes allocated at once during each of successive calls, beyond those before the first."""
        if not self.on_gpu:
            return peak_bytes_on_cpu(*calls)
        self.synchronize()
        before, peaks = torch.cuda.memory_allocated(self.device), []
        for call in calls:
            torch.cuda.reset_peak_memory_stats(self.device)
            call()
            peaks.append(torch.cuda.max_memory_allocated(self.device) - before)
        return peaks

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each value on any rank."""
        return list(values)

    def agree(self, value: Any) -> list[Any]:
        """The value of every rank."""
        return [value]

    def truth(self, case: Case, definition: Definition, inputs: Inputs) -> gate.Evaluation:
        """The float64 answer."""
        return gate.truth(case, definition, inputs)

    def sets(self, set_bytes: int) -> int:
        """How many sets of inputs exceed the cache: at least two, so that they rotate, and at most four."""
        return min(4, max(2, self.cache_bytes // set_bytes + 2))


def peak_bytes_on_cpu(*calls: Call) -> list[int]:
    """As :meth:`Bench.peak_bytes`, from the record of the CPU's allocator."""
    held, peaks = 0, []
    for call in calls:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            call()
        assert record.profiler is not None
        events = record.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        assert changes, "the profiler recorded no allocation: this measure does not work on this build of torch"
        levels = list(accumulate((size for _, size in changes), initial=held))
        held = levels[-1]
        peaks.append(max(levels))
    return peaks


def tensor_bytes(*tensors: Tensor) -> int:
    """The size of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Step:
    """The loss of a training step on one set of inputs, warmed up; forward alone where no input needs a gradient.

    The upstream gradient is made once: making it is not the loss's work.  Gradients are not accumulated: embeddings
    are not leaves of the graph.
    """

    def __init__(self, losses: Losses, inputs: Inputs) -> None:
        self._losses, self.inputs = losses, inputs
        self._differentiated = [z for z in inputs if z.requires_grad]
        self._upstream: Tensor | None = None
        self.results: dict[str, Tensor]
        self.gradients: tuple[Tensor, ...]
        self.parts: list[Call] = [self.forward, self.backward] if self._differentiated else [self.forward]
        self.clear()
        self.both()
        self._upstream = torch.ones_like(self.results["loss"]) if self._differentiated else None
        self.clear()

    def forward(self) -> None:
        """Compute the losses and what the backward pass needs."""
        self.results = self._losses(*self.inputs)

    def backward(self) -> None:
        """Compute the gradients of the inputs that need one."""
        self.gradients = torch.autograd.grad(self.results["loss"], self._differentiated, self._upstream)

    def both(self) -> None:
        """Run all parts."""
        for part in self.parts:
            part()

    def peak_bytes(self, measure: Callable[..., list[int]]) -> dict[str, int]:
        """By part, the most bytes held at once beyond the inputs, in the backward pass also beyond the gradients.

        "both" is the larger of the two.
        """
        forward, *backward = measure(*self.parts)
        gradients = tensor_bytes(*self.gradients)
        self.clear()
        if not backward:
            return {"forward": forward}
        beyond = backward[0] - gradients
        return {"forward": forward, "backward": beyond, "both": max(forward, beyond)}

    def clear(self) -> None:
        """Free the results."""
        self.results, self.gradients = {}, ()


@contextmanager
def collected() -> Iterator[None]:
    """Collect Python's garbage now and not inside the block.

    A collection takes longer than a call, and one that destroys a graph may end the capture of another.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def by_part(times: Sequence[Times]) -> dict[str, Times]:
    """The times of forward, backward and both; of forward alone where there is no backward."""
    return dict(zip(PARTS, times, strict=False))


def launched(bench: Bench, steps: Sequence[Step]) -> Run:
    """A run that times a step in mode launch.

    On a CPU a step first runs once untimed, because the first call pays for memory that the previous provider freed:
    returning eager code's matrices to the system took 3 to 7 ms of vicreg_fast's 8 ms at 256x2048, in a third of the
    rounds.  Steps of a second and more skip it.
    """
    warm_up = not bench.on_gpu

    def run(index: int) -> dict[str, Times]:
        nonlocal warm_up
        step = steps[index % len(steps)]
        try:
            if warm_up:
                step.both()
                step.clear()
            times = bench.time(step.parts, idle=True)
        finally:  # an exception between the parts would leave the memory of the forward pass
            step.clear()
        both = Times(sum(t.device for t in times), sum(t.host for t in times))
        slowest = [Times(*bench.largest(t)) for t in (*times, both)]
        warm_up = not bench.on_gpu and slowest[-1].host < 1
        return by_part(slowest if len(times) > 1 else slowest[:1])

    return run


def interleaved(
    runs: Mapping[str, Run],
    effort: Effort,
    guard: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    stop: Callable[[bool], bool] = bool,
) -> dict[str, list[dict[str, Times]]]:
    """The times of every run in rounds.  Every round times each run once, and each round starts at another run.

    The first round is not counted.  ``guard(name)`` wraps each turn; a run whose exception it suppresses is dropped.
    ``stop`` maps this rank's vote to stop to that of all ranks.
    """
    samples: dict[str, list[dict[str, Times]]] = {name: [] for name in runs}
    with collected():
        begin, rounds, over = time.perf_counter(), 0, not samples
        while not over:
            names = list(samples)
            first = rounds % len(names)
            for name in names[first:] + names[:first]:
                with guard(name):
                    samples[name].append(runs[name](rounds))
                if len(samples[name]) <= rounds:
                    del samples[name]
            late = rounds >= effort.most or time.perf_counter() - begin >= effort.seconds
            over = stop(not samples or (rounds >= effort.least and late))
            rounds += 1
    return {name: times[1:] for name, times in samples.items()}


def ceilings(bench: Bench) -> dict[str, Any]:
    """The device's highest rates: bytes per second of a copy, operations per second of matmuls.

    A copy counts the bytes read and those written; a multiplication and an addition are two operations.  The numbers are
    random: matmuls of zeros take less power and run faster.  The minimum of the times counts: a busy moment in a median
    would lower the ceiling, and later results would exceed it.
    """

    def fastest(call: Call) -> float:
        for _ in range(3):
            call()
        return min(bench.time([call], idle=False)[0].device for _ in range(15))

    def copy_rate(size: int) -> float:
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        return 2 * size / fastest(lambda: target.copy_(source))

    def matmul_rate(dtype: torch.dtype, precision: str) -> float:
        a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        with matmul_precision(precision, bench.device):
            return 2 * side**3 / fastest(lambda: torch.mm(a, b, out=out))

    size, side = (min(1 << 30, torch.cuda.mem_get_info()[0] // 4), 8192) if bench.on_gpu else (1 << 26, 1024)
    copy, high = copy_rate(size), matmul_rate(torch.float32, "high")
    rates = {"bf16": high, "high": high, "highest": high}  # a CPU multiplies everything in float32
    if bench.on_gpu:
        # Three TF32 matmuls reach float32 accuracy; on some cards float32 matmuls are faster than that.
        rates["highest"] = max(high / 3, matmul_rate(torch.float32, "highest"))
        rates["bf16"] = matmul_rate(torch.bfloat16, "high")
    return {"copy_bytes": size, "copy_bytes_per_s": copy, "product_side": side, "operations_per_s": rates}
