"""Peak memory of a call on the CPU, from the allocator's own record."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes allocated at once during ``call`` beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    assert record.profiler is not None
    results = record.profiler.kineto_results
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"
    )
    assert changes, "the profiler recorded no allocation: this measure does not work on this build of torch"
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak


def tensor_bytes(*tensors: torch.Tensor) -> int:
    """Size of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
