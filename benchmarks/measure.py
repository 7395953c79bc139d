"""Measures one shape: judges, warms up and times its providers.  ``run`` and ``test_speed.py`` both come here.

Every result is written into an entry that ``results/schema.json`` describes.
"""

import gc
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from . import gate, graphs, providers
from .cases import PARTS, Case, Inputs
from .libraries import Definition
from .providers import Provider
from .timing import Bench, Effort, Step, Times

Record = dict[str, Any]
Truths = dict[Definition, gate.Evaluation]  # the float64 answer by definition
# The CPU allocator raises a plain RuntimeError; so do the driver, when it builds a graph, Triton and cuBLAS.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def provider_record(provider: Provider) -> Record:
    """The entry of a provider before it is judged."""
    status = "unavailable" if provider.losses is None else "right"
    record = {"status": status, "reason": provider.reason, "definition": provider.definition._asdict()}
    return record | {"errors": None, "peak_bytes": dict.fromkeys(PARTS), "modes": {}}


def mode_record(mode: str, provider: Record) -> Record:
    """The entry of a provider's mode, added where there is none."""
    keys = ("status", "reason", "rounds", *PARTS, "host")
    entry: Record = provider["modes"].setdefault(mode, dict.fromkeys(keys))
    return entry


@contextmanager
def recorded(entry: Record) -> Iterator[None]:
    """Write an exception into the entry and continue after the block."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        # The message of a failed rank ends with the rank's own exception.
        line = lines[-1 if isinstance(error, ProcessRaisedException) else 0].strip()
        entry.update(status="error", reason=f"{type(error).__name__}: {line}")
        # A capture that runs out of memory raises a second exception where it ends: the first is its context.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) or any(words in str(cause) for words in _OUT_OF_MEMORY):
                entry.update(status="out of memory", reason=line)
            cause = cause.__context__


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The median, and the values that 20 % and 80 % of the rounds do not exceed."""
    return dict(zip(("q20", "median", "q80"), np.quantile(values, (0.2, 0.5, 0.8)).tolist(), strict=True))


def write_times(entry: Record, rounds: Sequence[Mapping[str, Times]], with_host: bool) -> None:
    """Write the quantiles of every part.  On a CPU the host's time is the device's."""
    entry.update(status="timed", rounds=len(rounds), host=dict.fromkeys(PARTS) if with_host else None)
    for part in rounds[0]:
        entry[part] = quantiles([times[part].device for times in rounds])
        if with_host:
            entry["host"][part] = quantiles([times[part].host for times in rounds])


def _guard(bench: Bench, entry: Record) -> AbstractContextManager[None]:
    """Record exceptions.  Of several ranks one that raised ends them all, or the other ranks would wait."""
    return recorded(entry) if bench.ranks == 1 else nullcontext()


def _truth(truths: Truths, case: Case, definition: Definition, inputs: Inputs, bench: Bench) -> gate.Evaluation:
    """The float64 answer of a definition, computed once."""
    if definition not in truths:
        try:
            truths[definition] = gate.truth(case, definition, inputs, bench.rank, bench.ranks)
        except Exception as error:
            error.args = (f"float64 reference: {error}",)
            raise
    return truths[definition]


def prepare(
    case: Case, provider: Provider, bench: Bench, sets: Sequence[Inputs], truths: Truths, entry: Record
) -> list[Step]:
    """Judge a provider on the first set, warm it up on all sets, and measure its memory.

    Returns no step where it cannot be timed; ``entry`` then has the status and the reason.
    """
    if provider.losses is None:
        return []
    errors: dict[str, float] = {}
    with recorded(entry):
        exact = _truth(truths, case, provider.definition, sets[0], bench)
        bench.free()
        errors = gate.errors(gate.evaluate(case, provider.losses, sets[0]), exact)
    # All ranks need one verdict: a rank that went on alone would wait for the other ranks.
    verdicts = bench.agree((entry["status"], entry["reason"]))
    if failed := [verdict for verdict in verdicts if verdict[0] != "right"]:
        entry["status"], entry["reason"] = min(failed)  # "error" before "out of memory"
        return []
    errors = dict(zip(errors, bench.largest([*errors.values()]), strict=True))
    entry["errors"] = {what: error if math.isfinite(error) else None for what, error in errors.items()}
    if reason := gate.wrong(errors, gate.BOUNDS[case.matmul]):
        entry.update(status="wrong", reason=reason)
        return []
    with _guard(bench, entry):
        steps = [Step(provider.losses, inputs) for inputs in sets]
        entry["peak_bytes"].update(steps[0].peak_bytes(bench))
        return steps
    return []


def measure(
    case: Case, record: Record, bench: Bench, effort: Effort, only: Sequence[str] | None, skip_compile: bool
) -> None:
    """Judge and time every provider of a shape.  Fills ``record``."""
    bench.free()
    sets = [case.inputs(bench.rank, bench.device)]
    count = bench.sets(sum(z.nbytes for z in sets[0]))
    sets += [case.inputs(bench.rank + index * bench.ranks, bench.device) for index in range(1, count)]
    truths: Truths = {}
    steps: dict[str, list[Step]] = {}
    for name, provider in providers.providers(case, bench.device, only, skip_compile):
        entry = record["providers"][name] = provider_record(provider)
        if ready := prepare(case, provider, bench, sets, truths, entry):
            steps[name] = ready
    # A collection of garbage takes longer than a call, and one that destroys a graph may end the capture of another.
    gc.collect()
    gc.disable()
    try:
        interleaved("launch", steps, record["providers"], bench, effort)
        if bench.has_graphs:
            # After the launches: a capture empties the cache of memory that they draw on.
            captured = {name: _captured(case, name, steps[name], truths, bench, record) for name in steps}
            interleaved("graph", captured, record["providers"], bench, effort)
    finally:
        gc.enable()


def interleaved(
    mode: str,
    steps: Mapping[str, Sequence[Step | graphs.Graphs]],
    entries: Mapping[str, Record],
    bench: Bench,
    effort: Effort,
) -> None:
    """Time the providers that have steps, in rounds of which the first is not counted.  One that raises is dropped."""
    order, begin = deque(name for name in steps if steps[name]), time.perf_counter()
    samples: dict[str, list[dict[str, Times]]] = {name: [] for name in order}
    for index in range(effort.most + 1):
        for name in tuple(order):
            entry = mode_record(mode, entries[name])
            with _guard(bench, entry):
                samples[name].append(steps[name][index % len(steps[name])].time(bench))
            if entry["status"]:
                order.remove(name)
        order.rotate(-1)
        over = index >= effort.least and time.perf_counter() - begin >= effort.seconds
        if not order or bench.agree(over)[0]:  # the first rank's clock decides for all
            break
    for name in order:
        write_times(entries[name]["modes"][mode], samples[name][1:], bench.has_graphs)


def _captured(
    case: Case, name: str, steps: Sequence[Step], truths: Truths, bench: Bench, record: Record
) -> list[graphs.Graphs]:
    """Judged graphs of every set, each replayed once; none where one is wrong or cannot be captured.

    Those of the first set are judged against float64, those of the other sets against the step without a graph.
    """
    provider, captured = record["providers"][name], []
    launch, entry = provider["modes"]["launch"], mode_record("graph", provider)
    if launch["status"] != "timed":
        entry.update(status=launch["status"], reason=launch["reason"])
        return []
    exact = truths[Definition(**provider["definition"])]
    gc.collect()
    with recorded(entry):
        pool = torch.cuda.graph_pool_handle()
        for index, step in enumerate(steps):
            if index > 0:
                step.both()
                exact = gate.evaluation(case, step.inputs, step.results, step.gradients)
                step.clear()
            graph = graphs.Graphs(step, pool, bench.stream)
            for outputs in graph.first_replay():
                errors = gate.errors(gate.evaluation(case, step.inputs, *outputs), exact)
                if reason := gate.wrong(errors, gate.BOUNDS[case.matmul]):
                    entry.update(status="wrong", reason=reason)
                    return []
            del outputs  # their memory is the pool's
            captured.append(graph)
        return captured
    # Other code may wait for the host, as a boolean mask does, and cannot be captured.  In vicreg_fast that is an error.
    if entry["status"] == "error" and not (name in providers.OURS or name.startswith(providers.AS)):
        entry["status"] = "not captured"
    return []
