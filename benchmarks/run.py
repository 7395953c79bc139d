"""``python -m benchmarks run``: measures every shape on one device and writes a JSON file.

``docs/benchmarks.md`` says how to read it.
"""

import shlex
import shutil
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from . import distributed, libraries, machine, providers, results, targets, timing
from .cases import CASES, QUICK, SUITES, Case
from .measure import Record, measure, recorded
from .results import Document, UsageError
from .timing import Bench

# Seconds for a run of all shapes and for a quick run.  On a GPU eight minutes and one, less start and end.  More on a CPU,
# where one step may take seven seconds.
_BUDGET = {"cuda": (440.0, 45.0), "cpu": (800.0, 90.0)}
_TIMED = 0.5  # the share of timing; inputs, the float64 answer, compilation and the gate take the rest
# Seconds of one torch.compile, and of one shape without it.  torch.compile is skipped where less is left.
_COMPILATION, _SHAPE = 30.0, 2.0
_IDLE = 0.5  # processes on the CPU beside this one


def chosen(arguments: Namespace, device: str) -> list[Case]:
    """The named shapes, or those of the device type, in the named suites.  Raises :class:`UsageError` for none."""
    suites = [name.strip() for names in arguments.suite or () for name in names.split(",")]
    names, only = arguments.shape or (), arguments.provider or ()
    known = {"suite": (suites, SUITES), "shape": (names, [case.name for case in CASES])}
    for kind, (requested, available) in {**known, "provider": (only, providers.names())}.items():
        if unknown := [name for name in requested if name not in available]:
            raise UsageError(f"no {kind} {unknown[0]!r}; known are {', '.join(available)}")
    names = names or (QUICK[device] if arguments.quick else ())
    cases = [case for case in CASES if (case.name in names if names else device in case.devices)]
    cases = [case for case in cases if not suites or case.suite in suites]
    if not cases:
        raise UsageError(f"no shape of suite {', '.join(suites)} on {device} was requested")
    able = [case for case in cases if not only or set(only) & set(providers.names_of(case))]
    if not able:
        others = dict.fromkeys(name for case in cases for name in providers.names_of(case))
        raise UsageError(f"these shapes have no provider {', '.join(only)}, only {', '.join(others)}")
    return able


def run(arguments: Namespace, command: str) -> int:
    """Measure, write and print.  Returns the exit status; raises :class:`UsageError` for unusable arguments."""
    device = machine.device(arguments.device)
    cases = chosen(arguments, device.type)
    folder = Path(arguments.out or results.RESULTS)
    about, clocks, date = machine.machine(device), machine.clocks(device), datetime.now(timezone.utc)
    document: Document = {
        "schema": results.SCHEMA,
        "version": results.VERSION,
        "complete": False,
        "commit": machine.commit(folder),
        "machine": about,
        "libraries": {name: libraries.version(name) for name in providers.LIBRARIES},
        "asked": {
            "shapes": [case.name for case in cases],
            "providers": None if arguments.provider is None else sorted(set(arguments.provider)),
            "quick": arguments.quick,
        },
        "providers": providers.PROVIDERS,
        "sessions": [],
        "cases": [],
    }
    resumable = None if arguments.fresh else results.find_resumable(folder, document, clocks["driver"])
    if resumable is None:
        name = f"{about['device']}-{date:%Y-%m-%d}"
        path = results.new_path(folder, name, document["commit"], arguments.quick)
        words = f"{about['device']}, torch {about['torch']}, Triton {about['triton']}; writing {path}"
    else:
        path, document = resumable
        words = f"continuing {path}: {len(document['cases'])} of {len(cases)} shapes are measured"
    session: dict[str, Any] = {
        "date": date.isoformat(timespec="seconds"),
        "command": command,
        "clocks": {"before": clocks, "after": None},
        "load": machine.load(),
        "ceilings": None,
    }
    document["sessions"].append(session)
    try:
        results.save(document, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    print(words, flush=True)
    if device.type == "cpu" and (session["load"] or 0) > _IDLE:
        print(f"the machine is not idle (load {session['load']}): the times will be too long")
    if missing := set(arguments.shape or ()) - set(document["asked"]["shapes"]):
        print(f"none of the requested providers computes {', '.join(sorted(missing))}")
    try:
        status = _measure_all(document, path, arguments, Bench(device))
        document["complete"] = len(document["cases"]) == len(document["asked"]["shapes"])
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        status = 130
    finally:
        session["clocks"]["after"] = machine.clocks(device)
        results.save(document, path)
    print(f"\n{_summary(document)}\n\npython -m benchmarks report {shlex.quote(str(path))}", flush=True)
    return status


def _summary(document: Document) -> str:
    """The tables of a result, where what makes tables is installed."""
    try:
        from . import report

        return report.summary(document)
    except ImportError as error:
        return f"No tables here: {error}. The file has all times."


def _progress(cases: Sequence[Case]) -> Iterator[tuple[int, Case, Callable[[str], object]]]:
    """The shapes with their positions and a function that prints a line.  On a terminal tqdm shows a bar, where it is installed."""
    columns, lines = shutil.get_terminal_size()  # has a default for terminals that report no size
    try:
        from tqdm import tqdm

        bar = tqdm(cases, unit="shape", disable=None, ncols=columns, nrows=lines)
    except ImportError:
        bar = None
    if bar is None or bar.disable:
        for index, case in enumerate(cases):
            print(f"{index + 1} of {len(cases)}: {case.name}", flush=True)
            yield index, case, partial(print, flush=True)
        return
    with bar:
        for index, case in enumerate(bar):
            bar.set_postfix_str(case.name)
            yield index, case, bar.write


def _measure_all(document: Document, path: Path, arguments: Namespace, bench: Bench) -> int:
    """Measure the remaining shapes and save after each.  Returns the exit status."""
    ceilings = document["sessions"][-1]["ceilings"] = timing.ceilings(bench)
    shapes, done = document["asked"]["shapes"], {record["name"] for record in document["cases"]}
    cases = [case for case in CASES if case.name in shapes and case.name not in done]
    full = timing.QUICK if arguments.quick else timing.FULL
    seconds = 60 * (arguments.minutes or 0) or _BUDGET[bench.device.type][arguments.quick]
    end = time.perf_counter() + seconds * len(cases) / len(shapes)
    status = 0
    for index, case, say in _progress(cases):
        left, begin = end - time.perf_counter(), time.perf_counter()
        seconds = _TIMED * max(0.0, left) / (len(cases) - index)
        effort = full._replace(seconds=min(full.seconds, seconds) / (2 if bench.on_gpu else 1))
        skip_compile = left < _COMPILATION + _SHAPE * (len(cases) - index)
        record = targets.shape_record(case, ceilings, len(document["sessions"]) - 1)
        precision = providers.matmul_precision(case.precision, bench.device)
        with recorded(record), precision, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor warns about the machine and about torch
            if case.suite == "distributed":
                distributed.measure_ranks(case, record, ceilings, bench.device, effort, arguments.provider)
            else:
                measure(case, record, bench, effort, arguments.provider, skip_compile)
        record["seconds"] = time.perf_counter() - begin
        record["targets"] = targets.judge(case, record, bench.device.type)
        document["cases"].append(record)
        results.save(document, path)
        for line in targets.failures(record):
            status = 1
            say(f"  {case.name}: {line}")
        failure: Record = {}
        with recorded(failure):  # as after an illegal access or a broken capture
            bench.free()
        if failure:
            say(f"the device has failed: {failure['reason']}; the same command continues")
            return 1
    return status
