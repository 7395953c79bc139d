"""What is written of a case while it is measured: entries of ``results/schema.json``, and their statuses."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from . import providers, report, timing
from .cases import PARTS, Case
from .timing import Times

_FAILED = ("wrong", "error")  # what makes the exit status 1; no memory and no such provider do not


def new_record(case: Case, ceilings: dict[str, Any], session: int) -> dict[str, Any]:
    """What is written of a case, to be filled."""
    return {
        "name": case.name,
        "suite": case.suite,
        "title": case.title,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "precision": case.precision,
        "bound": providers.BOUNDS[case.products],
        "samples": case.samples,
        "session": session,
        "status": "measured",
        "reason": None,
        "seconds": None,
        "floor": report.floor(case, ceilings),
        "providers": {},
        "targets": {},
    }


@contextmanager
def recorded(entry: dict[str, Any]) -> Iterator[None]:
    """Write down what is raised, and go on."""
    try:
        yield
    except Exception as error:
        memory = _for_memory(error)
        lines = str(error).strip().splitlines() or [""]
        # A rank's failure ends with what it raised, others begin with it.
        words = lines[-1 if isinstance(error, ProcessRaisedException) else 0].strip()
        entry["status"] = "out of memory" if memory else "error"
        entry["reason"] = words if memory else f"{type(error).__name__}: {words}"


def _for_memory(error: BaseException | None) -> bool:
    # A capture that runs out of memory fails a second time where it ends.
    while error is not None:
        # The CPU's allocator has no error of its own; nor have the driver, as where a graph is made, and cuBLAS.
        words = (
            "can't allocate memory",
            "out of memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
        )
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error) for w in words):
            return True
        error = error.__context__
    return False


def provider_entry(provider: providers.Provider) -> dict[str, Any]:
    """What is written of a provider, to be filled."""
    entry: dict[str, Any] = {
        "status": "right",
        "reason": None,
        "definition": (provider.definition or providers.DROP_IN)._asdict(),
    }
    entry |= {"errors": None, "peak_bytes": dict.fromkeys(PARTS), "modes": {}}
    if provider.losses is None:
        entry.update(status="unavailable", reason=provider.reason)
    return entry


def judged(entry: dict[str, Any], found: Mapping[str, float], bound: float) -> bool:
    """Write down a provider's errors, and whether it is right."""
    entry["errors"] = {what: error if math.isfinite(error) else None for what, error in found.items()}
    reason = providers.wrong(dict(found), bound)
    if reason:
        entry.update(status="wrong", reason=reason)
    return reason is None


def mode_entry(mode: str, provider: dict[str, Any]) -> dict[str, Any]:
    """What is written of a mode of a provider, to be filled."""
    entry: dict[str, Any] = provider["modes"].setdefault(mode, {})
    for key in ("status", "reason", "rounds", *PARTS, "host"):
        entry.setdefault(key, None)
    return entry


def write_times(entry: dict[str, Any], parts: Mapping[str, Times], with_host: bool) -> None:
    """Quantiles of every part."""
    rounds = len(next(iter(parts.values())).device)
    entry.update(status="timed", rounds=rounds)
    entry |= {part: timing.quantiles(times.device) for part, times in parts.items()}
    if with_host:  # on a CPU it is the same time
        host: dict[str, Any] = dict.fromkeys(PARTS)
        entry["host"] = host | {part: timing.quantiles(times.host) for part, times in parts.items()}


def failures(record: dict[str, Any]) -> Iterator[str]:
    """What was wrong or raised, in words."""
    entries = {"": record}
    for name, provider in record["providers"].items():
        entries |= {name: provider} | {f"{name}, {mode}": entry for mode, entry in provider["modes"].items()}
    for name, entry in entries.items():
        if entry["status"] in _FAILED:
            yield f"{name} {entry['status']}: {entry['reason']}".lstrip()
