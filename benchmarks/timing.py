"""Times calls on a device and measures their memory.  ``docs/benchmarks.md`` says how.

Before each timed call a buffer larger than the L2 cache is read: rotating inputs alone would need thousands of sets at
64 x 64.  It is not written: a dirty cache would be written back during the next call.  Reading four times 50 MB takes 67
microseconds at 3 TB/s, which also keeps the device busy while the host enqueues two graphs.
"""

import gc
import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .cases import PARTS, Inputs
from .libraries import Losses
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


class Bench:
    """A device with its clock and its cache, of this process: one rank of several where they are initialized."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu, self.cache_bytes = device, device.type == "cuda", _CPU_CACHE
        several = dist.is_initialized()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        # Whether mode graph is measured, and the host's time beside the device's.
        self.has_graphs = self.on_gpu and not several
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
        if self.ranks > 1:
            dist.barrier()
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

    def peak_bytes(self, calls: Sequence[Call]) -> list[int]:
        """The most bytes allocated at once during each of successive calls, beyond those before the first."""
        peaks = []
        if self.on_gpu:
            self.synchronize()
            before = torch.cuda.memory_allocated(self.device)
            for call in calls:
                torch.cuda.reset_peak_memory_stats(self.device)
                call()
                peaks.append(torch.cuda.max_memory_allocated(self.device) - before)
            return peaks
        held = 0
        for call in calls:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
                call()
            assert record.profiler is not None
            events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
            assert events, "this build of torch records no allocations"
            events.sort(key=lambda event: (event.start_ns(), event.nbytes()))
            levels = list(accumulate((event.nbytes() for event in events), initial=held))
            held = levels[-1]
            peaks.append(max(levels))
        return peaks

    def agree(self, value: Any) -> list[Any]:
        """The value of every rank."""
        values = [value] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(values, value)
        return values

    def largest(self, values: Any) -> Any:
        """The largest of each number on any rank, as nested lists; NaN where one is NaN."""
        return np.max(self.agree(values), axis=0).tolist()

    def sets(self, set_bytes: int) -> int:
        """How many sets of inputs exceed the cache: at least two, so that they rotate, and at most four."""
        return min(4, max(2, self.cache_bytes // set_bytes + 2))


class Step:
    """The loss of a training step on one set of inputs, warmed up; forward alone where no input needs a gradient.

    Making the upstream gradient is not timed, and gradients are not accumulated: embeddings are not leaves of the graph.
    """

    def __init__(self, losses: Losses, inputs: Inputs) -> None:
        self._losses, self.inputs = losses, inputs
        self._differentiated = [z for z in inputs if z.requires_grad]
        self._upstream: Tensor | None = None
        self._slow = False
        self.results: dict[str, Tensor] = {}
        self.gradients: tuple[Tensor, ...] = ()
        self.parts: list[Call] = [self.forward, self.backward] if self._differentiated else [self.forward]
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

    def clear(self) -> None:
        """Free the results."""
        self.results, self.gradients = {}, ()

    def peak_bytes(self, bench: Bench) -> dict[str, int]:
        """By part, the most bytes held at once beyond the inputs, in the backward pass also beyond the gradients."""
        peaks = bench.largest(bench.peak_bytes(self.parts))
        if self._differentiated:
            peaks[1] -= sum(gradient.nbytes for gradient in self.gradients)
            peaks.append(max(peaks))
        self.clear()
        return dict(zip(PARTS, peaks, strict=False))

    def time(self, bench: Bench) -> dict[str, Times]:
        """The times of every part in mode launch; "both" is their sum.

        On a CPU the step first runs once untimed, unless it takes a second: returning the previous provider's memory to
        the system took 3 to 7 ms of vicreg_fast's 8 ms at 256x2048, in a third of the rounds.
        """
        try:
            if not bench.on_gpu and not self._slow:
                self.both()
                self.clear()
            times = bench.time(self.parts, idle=True)
        finally:  # an exception between the parts would leave the memory of the forward pass
            self.clear()
        if self._differentiated:
            times.append(Times(*map(sum, zip(*times, strict=True))))
        times = [Times(*t) for t in bench.largest(times)]
        self._slow = times[-1].host >= 1
        return dict(zip(PARTS, times, strict=False))


def ceilings(bench: Bench) -> dict[str, Any]:
    """The device's highest rates: bytes read and written per second by a copy, operations per second of matmuls.

    The numbers are random: matmuls of zeros take less power and run faster.  The minimum of the times counts: a busy
    moment in a median would lower the ceiling, and later results would exceed it.
    """
    size, side = (min(1 << 30, torch.cuda.mem_get_info()[0] // 4), 8192) if bench.on_gpu else (1 << 26, 1024)

    def fastest(call: Call) -> float:
        return min(bench.time([call], idle=False)[0].device for _ in range(18))

    def matmul_rate(dtype: torch.dtype, precision: str) -> float:
        a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        with matmul_precision(precision, bench.device):
            return 2 * side**3 / fastest(lambda: torch.mm(a, b, out=out))

    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy, high = 2 * size / fastest(lambda: target.copy_(source)), matmul_rate(torch.float32, "high")
    rates = {"bf16": high, "high": high, "highest": high}  # a CPU multiplies everything in float32
    if bench.on_gpu:
        # Three TF32 matmuls reach float32 accuracy; on some cards float32 matmuls are faster than that.
        rates["highest"] = max(high / 3, matmul_rate(torch.float32, "highest"))
        rates["bf16"] = matmul_rate(torch.bfloat16, "high")
    return {"copy_bytes": size, "copy_bytes_per_s": copy, "product_side": side, "operations_per_s": rates}
