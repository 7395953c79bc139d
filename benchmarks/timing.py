"""Time and memory of calls on a device: events, eviction of the cache, CUDA graphs, interleaved rounds.

Two modes.  *launch*: Python calls the loss while the device is idle, so that what the device waits for the host is part
of the time, as for a caller who waits for the result.  *graph*: the same kernels replayed as CUDA graphs; the host is
ahead and the time is the device's alone.

Inputs rotate over several sets, and before every timed call more is read than the L2 cache holds.  Rotation alone would
need thousands of sets at 64 x 64.  It is read, not written, because a dirty cache is written back in the time of the
call that follows; and reading four times 50 MB, 67 microseconds at 3 TB/s, keeps the device busy while the host
enqueues two graphs behind it.  A graph has fixed addresses: one is captured for each set, because copying a set to those
addresses would leave it in the cache.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import memory
from .cases import PARTS, Inputs
from .libraries import Losses
from .providers import differentiated, products_of

Call = Callable[[], object]
_CPU_CACHE = 1 << 25  # no interface tells a CPU's: 32 MiB, a common size of the last level


class Effort(NamedTuple):
    """How long a mode of a case is timed: rounds until the seconds are over, at least and at most so many."""

    least: int
    most: int
    seconds: float


# The seconds of all modes together; run.py shares out what a run may take, and never more than these.
FULL, QUICK = Effort(7, 200, 9.0), Effort(3, 20, 0.9)


class Times(NamedTuple):
    """Seconds of the calls of one repetition, each on the device and on the host until it returned."""

    device: list[float]
    host: list[float]


def is_gpu(device: torch.device) -> bool:
    """Whether a device has events, graphs and an L2 cache that torch tells of."""
    return device.type == "cuda"


class Bench:
    """A device with its clock and its cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = is_gpu(device)
        self.cache_bytes = _CPU_CACHE
        if self.on_gpu:
            torch.cuda.set_device(device)
            self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            # Four times over: replacement is not strictly of the oldest.  And long enough to hide a graph's launch, and
            # to fill a last level that torch does not tell of: 256 MiB.
            self._evictor = torch.ones(max(self.cache_bytes, 1 << 26), device=device)
            self._sink = torch.empty((), device=device)
            self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
            # Captures warm up on the stream that they are made on: cuBLAS has a workspace for every stream.
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for mark in self._marks:  # the first record creates the event
                mark.record()
            self.synchronize()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give memory back that nobody uses, and wait: a device that can no longer be used raises here."""
        self.synchronize()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def time(self, calls: Sequence[Call], idle: bool) -> Times:
        """Up to two calls, one after the other; ``idle``: the device waits for the first."""
        host: list[float] = []
        if self.on_gpu:
            torch.sum(self._evictor, 0, out=self._sink)
            if idle:
                self.synchronize()
            self._marks[0].record()
        for number, call in enumerate(calls, start=1):
            start = time.perf_counter()
            call()
            host.append(time.perf_counter() - start)
            if self.on_gpu:
                self._marks[number].record()
        if not self.on_gpu:
            return Times(host, host)
        self.synchronize()
        marks = self._marks[: len(calls) + 1]
        return Times([a.elapsed_time(b) * 1e-3 for a, b in pairwise(marks)], host)

    def peak_bytes(self, *calls: Call) -> list[int]:
        """Most bytes allocated at once during each of the calls, one after the other, beyond those before the first."""
        if not self.on_gpu:
            return memory.peak_bytes(*calls)
        self.synchronize()
        before, peaks = torch.cuda.memory_allocated(self.device), []
        for call in calls:
            torch.cuda.reset_peak_memory_stats(self.device)
            call()
            peaks.append(torch.cuda.max_memory_allocated(self.device) - before)
        return peaks

    def sets(self, set_bytes: int) -> int:
        """How many sets of inputs exceed the cache; two at least, so that they rotate, four at most."""
        return min(4, max(2, self.cache_bytes // set_bytes + 2))


class Step:
    """A training step of a loss on one set of inputs, warmed up; where no input needs a gradient, the forward alone.

    The upstream gradient is given: making it is not the loss's work.  Gradients are not accumulated: embeddings are no
    leaves.
    """

    def __init__(self, losses: Losses, inputs: Inputs) -> None:
        self._losses, self.inputs = losses, inputs
        self._wanted = differentiated(inputs)
        self.results: dict[str, Tensor] = {}
        self.gradients: tuple[Tensor, ...] = ()
        self._upstream: Tensor | None = None
        self.both()
        self._upstream = torch.ones_like(self.results["loss"]) if self._wanted else None
        self.clear()

    @property
    def parts(self) -> list[Call]:
        """What follows one another: forward, and backward where there is one."""
        return [self.forward, self.backward] if self._wanted else [self.forward]

    def forward(self) -> None:
        """The values, and what is kept for the backward pass."""
        self.results = self._losses(*self.inputs)

    def backward(self) -> None:
        """The gradients of the inputs that need one."""
        self.gradients = torch.autograd.grad(self.results["loss"], self._wanted, self._upstream)

    def both(self) -> None:
        """All parts."""
        for part in self.parts:
            part()

    def peak_bytes(self, measure: Callable[..., list[int]]) -> dict[str, int]:
        """By part, the most bytes held at once beyond the inputs, and in the backward pass beyond the gradients too.

        Both: the larger.  Before the backward pass there are no gradients that could be taken off.
        """
        peaks = measure(*self.parts)
        gradients = memory.tensor_bytes(*self.gradients)
        self.clear()
        if len(peaks) == 1:
            return {"forward": peaks[0]}
        forward, backward = peaks[0], peaks[1] - gradients
        return {"forward": forward, "backward": backward, "both": max(forward, backward)}

    def clear(self) -> None:
        """Free the results."""
        self.results, self.gradients = {}, ()


class Outputs(NamedTuple):
    """Where a captured step leaves its results."""

    results: dict[str, Tensor]
    gradients: tuple[Tensor, ...]


class Graphs:
    """A step as CUDA graphs: each part, and where there are two, both in one.

    Graphs of one pool share memory: a backward pass is replayed right after its forward pass, never later.
    """

    def __init__(self, step: Step, pool: Any, stream: torch.cuda.Stream) -> None:
        def captured(*calls: Call) -> torch.cuda.CUDAGraph:
            graph = torch.cuda.CUDAGraph()
            current = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    for call in calls:
                        call()
            finally:  # a capture that fails leaves its stream the current one
                torch.cuda.set_stream(current)
            return graph

        try:
            _warm_up(step, stream)
            parts = [captured(part) for part in step.parts]
            self._ways = [(parts, _outputs(step))]
            if len(parts) > 1:
                self._ways.append(([captured(step.both)], _outputs(step)))
        finally:
            step.clear()

    @property
    def ways(self) -> list[list[Call]]:
        """The parts one after the other; and where there are two, the graph of both."""
        return [[graph.replay for graph in graphs] for graphs, _ in self._ways]

    def replayed(self) -> list[Outputs]:
        """Results of all ways, written over NaN (numbers of patches: zero): a graph that leaves work out is seen."""
        with torch.no_grad():  # a gradient may be a view, which autograd lets nobody else write to
            for _, outputs in self._ways:
                for tensor in (*outputs.results.values(), *outputs.gradients):
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        for graphs, _ in self._ways:
            for graph in graphs:
                graph.replay()
        torch.cuda.synchronize()
        return [outputs for _, outputs in self._ways]

    def forget(self) -> None:
        """Let other graphs of the pool have the results' memory."""
        self._ways = [(graphs, Outputs({}, ())) for graphs, _ in self._ways]


def _warm_up(step: Step, stream: torch.cuda.Stream) -> None:
    """Run twice on the stream of the capture; raises where the host waits for the device, as no capture may.

    A capture that is broken off is worse: torch 2.11 frees no memory afterwards, and the process is of no more use.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.both()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.both()
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _outputs(step: Step) -> Outputs:
    # Of losses the sum alone: the others share the pool's memory and are not read.
    names = ["loss"] if "loss" in step.results else list(step.results)
    outputs = Outputs({name: step.results[name].detach() for name in names}, step.gradients)
    step.clear()
    return outputs


@contextmanager
def collected() -> Iterator[None]:
    """Collect Python's garbage now and not inside.

    A collection takes longer than a call, and one that destroys a graph while another is captured may end the capture.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def launched(bench: Bench, steps: Sequence[Step]) -> Callable[[int], dict[str, Times]]:
    """What times a step in mode launch, by the number of the round.

    On a CPU a step runs once untimed before: the first call after another provider's pays for what that one left.
    Returning eager code's matrices to the system took 3 to 7 ms of our 8 at 256x2048, in a third of the rounds.  Where a
    step takes a second that is nothing beside it.
    """
    warm_up = not bench.on_gpu

    def run(number: int) -> dict[str, Times]:
        nonlocal warm_up
        step = steps[number % len(steps)]
        try:
            if warm_up:
                step.both()
                step.clear()
            times = bench.time(step.parts, idle=True)
        finally:  # what was raised on the way leaves the forward pass's memory
            step.clear()
        warm_up = not bench.on_gpu and sum(times.host) < 1
        return _parts([times, Times([sum(times.device)], [sum(times.host)])])

    return run


def replayed(bench: Bench, graphs: Sequence[Graphs]) -> Callable[[int], dict[str, Times]]:
    """What times a step in mode graph, by the number of the round."""

    def run(number: int) -> dict[str, Times]:
        ways = graphs[number % len(graphs)].ways
        return _parts([bench.time(calls, idle=False) for calls in ways])

    return run


def _parts(ways: Sequence[Times]) -> dict[str, Times]:
    """By part: of the first way each, of the second the one that is both."""
    singles = [Times([d], [h]) for d, h in zip(*ways[0], strict=True)]
    return dict(zip(PARTS, [*singles, *ways[1:]] if len(singles) > 1 else singles, strict=False))


def interleaved(
    runs: Mapping[str, Callable[[int], dict[str, Times]]],
    effort: Effort,
    attempt: Callable[[str, Call], bool],
) -> dict[str, dict[str, Times]]:
    """Seconds of every part of every run, in rounds in which each has its turn.

    Who begins changes from round to round, and the first round is not counted.  ``attempt`` makes a call in a run's
    name and says whether it went well; a run that fails has no further turn and no times.
    """
    samples: dict[str, list[dict[str, Times]]] = {name: [] for name in runs}
    with collected():
        begin, rounds = time.perf_counter(), -1
        while samples and (
            rounds < effort.least or (rounds < effort.most and time.perf_counter() - begin < effort.seconds)
        ):
            rounds += 1
            names = list(samples)
            first = rounds % len(names)
            for name in names[first:] + names[:first]:
                if not attempt(name, partial(_take, samples[name], runs[name], rounds)):
                    del samples[name]
    return {
        name: {part: _joined([round_[part] for round_ in taken[1:]]) for part in taken[0]}
        for name, taken in samples.items()
    }


def _take(samples: list[dict[str, Times]], run: Callable[[int], dict[str, Times]], number: int) -> None:
    samples.append(run(number))


def _joined(times: Sequence[Times]) -> Times:
    return Times([t.device[0] for t in times], [t.host[0] for t in times])


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The median, and what a fifth and four fifths of the values do not exceed."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else list(values) * 4
    return {"q20": fifths[0], "median": statistics.median(values), "q80": fifths[3]}


def _fastest(bench: Bench, call: Call, repetitions: int = 15) -> float:
    """Not the median: a busy moment would lower the ceiling, and what runs later would seem to reach more than all."""
    for _ in range(3):
        call()
    return min(bench.time([call], idle=False).device[0] for _ in range(repetitions))


def _copy_rate(bench: Bench, size: int) -> float:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(bench, lambda: target.copy_(source))


def _product_rate(bench: Bench, side: int, dtype: torch.dtype, precision: str = "high") -> float:
    a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with products_of(precision, bench.device):
        return 2 * side**3 / _fastest(bench, lambda: torch.mm(a, b, out=out))


def ceilings(bench: Bench) -> dict[str, Any]:
    """What this device reaches at best: bytes per second of a copy, operations per second of products.

    Bytes are those read and those written; a multiplication and an addition are two operations.  On random numbers:
    products of zeros take less power and are faster.
    """
    size, side = (min(1 << 30, torch.cuda.mem_get_info()[0] // 4), 8192) if bench.on_gpu else (1 << 26, 1024)
    copy = _copy_rate(bench, size)
    float32 = _product_rate(bench, side, torch.float32)
    rates = {"bf16": float32, "high": float32, "highest": float32}  # a CPU multiplies all in float32
    if bench.on_gpu:
        # Three products of TF32 operands are accurate to float32; on some cards float32's own are faster.
        highest = max(float32 / 3, _product_rate(bench, side, torch.float32, "highest"))
        rates |= {"bf16": _product_rate(bench, side, torch.bfloat16), "highest": highest}
    return {"copy_bytes": size, "copy_bytes_per_s": copy, "product_side": side, "operations_per_s": rates}
