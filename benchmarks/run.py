"""``python -m benchmarks run``: VICReg's forward and backward on a GPU, by every provider, into a JSON file.

What is measured stands in ``providers.py``, how in ``timing.py``; ``results/README.md`` says what the file holds.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import machine, providers, report, timing
from .memory import tensor_bytes
from .providers import SHAPES, Shape
from .timing import Bench, Effort, Times

SCHEMA, VERSION = "vicreg_fast.benchmark", 1
RESULTS = Path(__file__).resolve().parent / "results"
_PARTS = ("forward", "backward", "both")
_SMALL = 1 << 21  # elements of a view that a CPU measures without being asked: seconds a shape
_FAILED = ("wrong", "error")  # what makes the exit status 1; no memory and no such provider do not


class RefusedError(ValueError):
    """An argument that cannot be met; the message names it and what there is."""


@contextmanager
def recorded(entry: dict[str, Any]) -> Iterator[None]:
    """Write down what is raised, and go on."""
    try:
        yield
    except Exception as error:
        memory = _for_memory(error)
        words = str(error).strip().partition("\n")[0]
        entry["status"] = "out of memory" if memory else "error"
        entry["reason"] = words if memory else f"{type(error).__name__}: {words}"


def _for_memory(error: BaseException | None) -> bool:
    # A capture that runs out of memory fails a second time where it ends.
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__context__
    return False


def measure(shape: Shape, case: dict[str, Any], bench: Bench, effort: Effort) -> None:
    """Gate and time every provider of a shape; fills ``case``."""
    bench.free()
    inputs = [shape.inputs(0, bench.device)]
    inputs += [shape.inputs(seed, bench.device) for seed in range(1, bench.sets(tensor_bytes(*inputs[0])))]
    true = providers.truth(inputs[0])
    bench.free()
    steps: dict[str, list[timing.Step]] = {}
    for name, losses in providers.providers(shape, bench.device).items():
        entry: dict[str, Any] = {"status": "right", "reason": None, "errors": None, "peak_bytes": None}
        case["providers"][name] = entry
        entry["modes"] = {}
        if isinstance(losses, str):
            entry.update(status="unavailable", reason=losses)
            continue
        with recorded(entry):
            found = providers.errors(providers.evaluate(losses, inputs[0]), true)
            entry["errors"] = {what: error if math.isfinite(error) else None for what, error in found.items()}
            if reason := providers.wrong(found, shape.bound):
                entry.update(status="wrong", reason=reason)
                continue
            ready = [timing.Step(losses, views) for views in inputs]
            peak = bench.peak_bytes(ready[0].both) - tensor_bytes(*ready[0].gradients)
            ready[0].clear()
            entry["peak_bytes"] = peak
            steps[name] = ready
    runs = {name: timing.launched(bench, ready) for name, ready in steps.items()}
    _timed("launch", runs, case, bench, effort)
    if bench.on_gpu:
        # Launches first: a capture empties the cache of memory that they draw on.
        graphs: dict[str, list[timing.Graphs]] = {}
        for name, ready in steps.items():
            entry = _mode("graph", case, name)
            with recorded(entry), timing.collected():
                graphs[name] = _captured(ready, true, shape, bench, entry)
        runs = {name: timing.replayed(bench, captured) for name, captured in graphs.items() if captured}
        _timed("graph", runs, case, bench, effort)


def _mode(mode: str, case: dict[str, Any], name: str) -> dict[str, Any]:
    entry: dict[str, Any] = case["providers"][name]["modes"].setdefault(mode, {})
    for key in ("status", "reason", "rounds", *_PARTS, "host"):
        entry.setdefault(key, None)
    return entry


def _captured(
    steps: Sequence[timing.Step],
    true: providers.Evaluation,
    shape: Shape,
    bench: Bench,
    entry: dict[str, Any],
) -> list[timing.Graphs]:
    """Graphs of every set; none where those of the first, which is judged, are wrong."""
    pool = torch.cuda.graph_pool_handle()
    captured: list[timing.Graphs] = []
    for number, step in enumerate(steps):
        graphs = timing.Graphs(step, pool, bench.stream)
        if number == 0:
            for loss, gradients in graphs.replayed():
                found = providers.Evaluation({"loss": loss}, {"loss": gradients})
                if reason := providers.wrong(providers.errors(found, true), shape.bound):
                    entry.update(status="wrong", reason=reason)
                    return []
        graphs.forget()
        captured.append(graphs)
    return captured


def _timed(
    mode: str,
    runs: dict[str, Callable[[int], dict[str, Times]]],
    case: dict[str, Any],
    bench: Bench,
    effort: Effort,
) -> None:
    """Time what runs in a mode, interleaved, and write down the quantiles."""

    def attempt(name: str, call: timing.Call) -> bool:
        entry = _mode(mode, case, name)
        with recorded(entry):
            call()
        return entry["status"] is None

    for name, parts in timing.interleaved(runs, effort, attempt).items():
        entry = _mode(mode, case, name)
        entry.update(status="timed", rounds=len(parts["both"].device))
        entry |= {part: timing.quantiles(parts[part].device) for part in _PARTS}
        if bench.on_gpu:  # on a CPU it is the same time
            entry["host"] = {part: timing.quantiles(parts[part].host) for part in _PARTS}


def _case(shape: Shape, ceilings: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": shape.name,
        "N": shape.N,
        "D": shape.D,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "precision": shape.precision,
        "bound": shape.bound,
        "status": "measured",
        "reason": None,
        "seconds": None,
        "floor": report.floor(shape, ceilings),
        "providers": {},
        "targets": {},
    }


def _chosen(names: Sequence[str] | None, device: torch.device) -> list[Shape]:
    if not names:
        return [s for s in SHAPES if device.type == "cuda" or s.N * s.D < _SMALL]
    known = {shape.name: shape for shape in SHAPES}
    for name in names:
        if name not in known:
            raise RefusedError(f"no shape {name!r}; known are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _device(name: str) -> torch.device:
    there = machine.devices()
    full = name if name in there else f"{name}:0"
    if full not in there:
        raise RefusedError(f"no device {name!r} here, only {', '.join(there)}")
    return torch.device(full)


def _reserve(folder: Path, date: datetime, device: str, commit: dict[str, Any]) -> Path:
    """A new file for the result: never one that is there."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    state = (commit["commit"] or "unknown") + ("-dirty" if commit["dirty"] else "")
    path = folder / f"{slug}-{date:%Y-%m-%d}-{state}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.open("x").close()
    except FileExistsError as error:
        raise RefusedError(
            f"{path} is there already; move it away, or give another folder with --out"
        ) from error
    except OSError as error:
        raise RefusedError(f"cannot write {path}: {error.strerror}") from error
    return path


def _save(document: dict[str, Any], path: Path) -> None:
    """Write the whole document: a reader, or an interruption, finds the old one or the new one."""
    new = path.with_suffix(".json.new")
    new.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(new, path)


def run(device: str, shapes: Sequence[str] | None, quick: bool, out: str | None, command: str) -> int:
    """Measure, write and print; the exit status.  Raises :class:`RefusedError` for an argument that cannot be met."""
    where = _device(device)
    chosen = _chosen(shapes, where)
    commit, date = machine.commit(), datetime.now(timezone.utc)
    about = machine.machine(where)
    path = _reserve(Path(out) if out else RESULTS, date, about["device"], commit)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "version": VERSION,
        "complete": False,
        "date": date.isoformat(timespec="seconds"),
        "command": command,
        "commit": commit,
        "machine": about,
        "clocks": {"before": machine.clocks(where), "after": None},
        "providers": providers.PROVIDERS,
        "ceilings": None,
        "cases": [],
    }
    print(f"{about['device']}, torch {about['torch']}, Triton {about['triton']}; writing {path}", flush=True)
    status, modes = 0, ("graph", "launch") if where.type == "cuda" else ("launch",)
    try:
        _save(document, path)
        bench = Bench(where)
        document["ceilings"] = timing.ceilings(bench)
        for number, shape in enumerate(chosen, start=1):
            print(f"{number} of {len(chosen)}: {shape.name}", flush=True)
            case = _case(shape, document["ceilings"])
            begin = time.perf_counter()
            with recorded(case), providers.products_of(shape.precision, where):
                measure(shape, case, bench, timing.QUICK if quick else timing.FULL)
            case["seconds"] = time.perf_counter() - begin
            case["targets"] = {mode: report.judge(shape, case, mode, held=mode == modes[0]) for mode in modes}
            document["cases"].append(case)
            _save(document, path)
            for line in _failures(case):
                status = 1
                print(f"  {line}", flush=True)
        document["complete"] = True
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    finally:
        document["clocks"]["after"] = machine.clocks(where)
        _save(document, path)
    print("\n" + report.table(document["cases"]), flush=True)
    return status


def _failures(case: dict[str, Any]) -> Iterator[str]:
    """What was wrong or raised, in words."""
    entries = {"": case}
    for name, provider in case["providers"].items():
        entries |= {name: provider} | {f"{name}, {mode}": entry for mode, entry in provider["modes"].items()}
    for name, entry in entries.items():
        if entry["status"] in _FAILED:
            yield f"{name} {entry['status']}: {entry['reason']}".lstrip()
