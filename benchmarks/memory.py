"""Peak memory of calls on the CPU, from the allocator's own record."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(*calls: Callable[[], object]) -> list[int]:
    """Most bytes allocated at once during each of the calls, one after the other, beyond those before the first."""
    held, peaks = 0, []
    for call in calls:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            call()
        assert record.profiler is not None
        results = record.profiler.kineto_results
        changes = sorted(
            (event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"
        )
        assert changes, "the profiler recorded no allocation: this measure does not work on this build of torch"
        peak = held
        for _, size in changes:
            held += size
            peak = max(peak, held)
        peaks.append(peak)
    return peaks


def tensor_bytes(*tensors: torch.Tensor) -> int:
    """Size of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
