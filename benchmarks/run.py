"""``python -m benchmarks run``: every provider of every shape, timed on one device, into a JSON file.

What is measured stands in ``cases.py``, by whom in ``providers.py``, how in ``timing.py``; ``docs/benchmarks.md`` says
how to read it.
"""

import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from . import distributed, libraries, machine, providers, records, report, results, timing
from .cases import CASES, QUICK, SUITES, Case, Distributed
from .memory import tensor_bytes
from .results import RefusedError
from .timing import Bench, Effort, Times

# Seconds that a run of all shapes may take, and a quick one: on a GPU eight minutes and one, some being left to start and to
# end; of a CPU, on which one step may take seven seconds, more.
_BUDGET = {"cuda": (440.0, 45.0), "cpu": (800.0, 90.0)}
_TIMED = 0.5  # the share that is timed; the rest goes to inputs, the float64 truth, compilation and the gate
# What torch.compile may take, and a shape without it: who comes when less is left is not compiled.
_COMPILATION, _SHAPE = 30.0, 2.0
_IDLE = 0.5  # processes that want a CPU, beside this one


class Options(NamedTuple):
    """What ``python -m benchmarks run`` was asked for; None: all that the device has."""

    device: str | None = None
    suites: Sequence[str] | None = None
    shapes: Sequence[str] | None = None
    providers: Sequence[str] | None = None
    quick: bool = False
    fresh: bool = False
    out: str | None = None
    command: str = ""


def measure(
    case: Case,
    record: dict[str, Any],
    bench: Bench,
    effort: Effort,
    wanted: Sequence[str] | None = None,
    late: bool = False,
    tell: Callable[[str], None] = lambda doing: None,
) -> None:
    """Gate and time every provider of a case; fills ``record`` and tells what it is at."""
    bench.free()
    inputs = [case.inputs(0, bench.device)]
    inputs += [case.inputs(seed, bench.device) for seed in range(1, bench.sets(tensor_bytes(*inputs[0])))]
    truths: dict[Any, providers.Evaluation | Exception] = {}
    steps: dict[str, list[timing.Step]] = {}
    for name, provider in providers.providers(case, bench.device, wanted, late):
        entry = record["providers"][name] = records.provider_entry(provider)
        if provider.losses is None:
            continue
        tell(f"judging {name}")
        with records.recorded(entry):
            true = _truth(truths, case, provider, inputs[0])
            bench.free()
            found = providers.errors(providers.evaluate(case, provider.losses, inputs[0]), true)
            if not records.judged(entry, found, record["bound"]):
                continue
            ready = [timing.Step(provider.losses, tensors) for tensors in inputs]
            entry["peak_bytes"].update(ready[0].peak_bytes(bench.peak_bytes))
            steps[name] = ready
    runs = {name: timing.launched(bench, ready) for name, ready in steps.items()}
    tell("timing")
    _timed("launch", runs, record, bench, effort)
    if bench.on_gpu:
        # Launches first: a capture empties the cache of memory that they draw on.
        graphs: dict[str, list[timing.Graphs]] = {}
        for name, ready in steps.items():
            mode = records.mode_entry("graph", record["providers"][name])
            launched = record["providers"][name]["modes"]["launch"]
            if launched["status"] != "timed":
                mode.update(status=launched["status"], reason=launched["reason"])
                continue
            exact = truths[libraries.Definition(**record["providers"][name]["definition"])]
            assert isinstance(exact, providers.Evaluation)
            with records.recorded(mode), timing.collected():
                graphs[name] = _captured(case, ready, exact, record["bound"], bench, mode)
            # A boolean mask waits for the host, and code that does so cannot be captured.
            if mode["status"] == "error" and not providers.is_ours(name):
                mode["status"] = "not captured"
        tell("timing graphs")
        runs = {name: timing.replayed(bench, captured) for name, captured in graphs.items() if captured}
        _timed("graph", runs, record, bench, effort)


def _truth(
    truths: dict[Any, providers.Evaluation | Exception], case: Case, provider: providers.Provider, inputs: Any
) -> providers.Evaluation:
    """The float64 answer of a definition; where there is no memory for it, it is asked for once."""
    assert provider.definition is not None
    if provider.definition not in truths:
        try:
            truths[provider.definition] = providers.truth(case, provider.definition, inputs)
        except Exception as error:
            error.args = (f"float64 reference: {error}",)
            # Not its traceback, whose frames hold the tensors for which there was no memory.
            truths[provider.definition] = error.with_traceback(None)
    found = truths[provider.definition]
    if isinstance(found, Exception):
        raise found
    return found


def _captured(
    case: Case,
    steps: Sequence[timing.Step],
    true: providers.Evaluation,
    bound: float,
    bench: Bench,
    entry: dict[str, Any],
) -> list[timing.Graphs]:
    """Graphs of every set, none where those of one are wrong; each was replayed once, as the first time takes longer.

    The first set's are judged by the truth, the others' by what the step, which was judged, finds without a graph.
    """
    pool = torch.cuda.graph_pool_handle()
    captured: list[timing.Graphs] = []
    for number, step in enumerate(steps):
        if number > 0:
            step.both()
            true = _found(case, step.results, step.gradients, step)
            step.clear()
        graphs = timing.Graphs(step, pool, bench.stream)
        for outputs in graphs.replayed():
            found = _found(case, *outputs, step)
            if reason := providers.wrong(providers.errors(found, true), bound):
                entry.update(status="wrong", reason=reason)
                return []
        graphs.forget()
        captured.append(graphs)
    return captured


def _found(
    case: Case, results: dict[str, Tensor], gradients: tuple[Tensor, ...], step: timing.Step
) -> providers.Evaluation:
    values = providers.values_of(case, results, step.inputs)
    return providers.Evaluation(values, {"loss": gradients} if gradients else {})


def _timed(
    mode: str,
    runs: dict[str, Callable[[int], dict[str, Times]]],
    record: dict[str, Any],
    bench: Bench,
    effort: Effort,
) -> None:
    """Time what runs in a mode, interleaved, and write down the quantiles."""

    def attempt(name: str, call: timing.Call) -> bool:
        entry = records.mode_entry(mode, record["providers"][name])
        with records.recorded(entry):
            call()
        return entry["status"] is None

    for name, parts in timing.interleaved(runs, effort, attempt).items():
        records.write_times(records.mode_entry(mode, record["providers"][name]), parts, bench.on_gpu)


def _known(kind: str, asked: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in asked or ():
        if name not in known:
            raise RefusedError(f"no {kind} {name!r}; known are {', '.join(known)}")


def chosen(options: Options, device: str) -> list[Case]:
    """The cases that were asked for: those named; else those of the device, in the suites that were named."""
    _known("suite", options.suites, SUITES)
    _known("shape", options.shapes, [case.name for case in CASES])
    _known("provider", options.providers, providers.names())
    if options.shapes:
        found = [case for case in CASES if case.name in options.shapes]
    elif options.quick:
        found = [case for case in CASES if case.name in QUICK[device]]
    else:
        found = [case for case in CASES if device in case.devices]
    found = [case for case in found if not options.suites or case.suite in options.suites]
    if options.providers is not None:
        able = [case for case in found if set(providers.names_of(case)) & set(options.providers)]
        if found and not able:
            who = ", ".join(dict.fromkeys(name for case in found for name in providers.names_of(case)))
            raise RefusedError(f"these shapes have no provider {', '.join(options.providers)}, only {who}")
        found = able
    if not found:
        raise RefusedError(f"no shape of suite {', '.join(options.suites or ())} on {device} was asked for")
    return found


def _begun(
    options: Options, document: results.Document, driver: str | None, folder: Path
) -> tuple[Path, results.Document, IO[str]] | None:
    """A result that was stopped and is of the same code, device, driver and question, held; nobody else measures it."""
    same = ("machine", "commit", "asked", "libraries")
    for path, other in reversed(results.kept(folder).items()):
        drivers = {session["clocks"]["before"]["driver"] for session in other["sessions"]}
        alike = drivers == {driver} and all(other[key] == document[key] for key in same)
        if alike and not other["complete"] and not options.fresh and (lock := results.hold(path)) is not None:
            return path, other, lock
    return None


def run(options: Options) -> int:
    """Measure, write and print; the exit status.  Raises :class:`RefusedError` for an argument that cannot be met."""
    device = machine.device(options.device)
    cases = chosen(options, device.type)
    folder = results.RESULTS if options.out is None else Path(options.out)
    about, commit = machine.machine(device), machine.commit(folder)
    left_out = [
        name for name in dict.fromkeys(options.shapes or ()) if name not in {case.name for case in cases}
    ]
    date = datetime.now(timezone.utc)
    document: results.Document = {
        "schema": results.SCHEMA,
        "version": results.VERSION,
        "complete": False,
        "commit": commit,
        "machine": about,
        "libraries": {name: libraries.version(name) for name in providers.LIBRARIES},
        "asked": {
            "shapes": [case.name for case in cases],
            "providers": None if options.providers is None else sorted(set(options.providers)),
            "quick": options.quick,
        },
        "providers": providers.PROVIDERS,
        "sessions": [],
        "cases": [],
    }
    clocks = machine.clocks(device)
    begun = _begun(options, document, clocks["driver"], folder)
    if begun is None:
        path = results.reserve(folder, about["device"], f"{date:%Y-%m-%d}", commit, options.quick)
        lock = results.hold(path)
        words = f"{about['device']}, torch {about['torch']}, Triton {about['triton']}; writing {path}"
    else:
        path, document, lock = begun
        done = {record["name"] for record in document["cases"]}
        words = f"continuing {path}: {len(done)} of {len(cases)} shapes are there"
        cases = [case for case in cases if case.name not in done]
    session: dict[str, Any] = {
        "date": date.isoformat(timespec="seconds"),
        "command": options.command,
        "clocks": {"before": clocks, "after": None},
        "load": machine.load(),
        "ceilings": None,
    }
    document["sessions"].append(session)
    try:
        results.save(document, path)
        print(words, flush=True)
        if device.type == "cpu" and (session["load"] or 0) > _IDLE:
            print(f"the machine is not idle (load {session['load']}): times will be longer than they need be")
        for name in left_out:
            print(f"{name}: of the providers asked for, none computes it")
        status = _run_cases(cases, document, path, options, device)
        document["complete"] = len(document["cases"]) == len(document["asked"]["shapes"])
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        status = 130
    finally:
        session["clocks"]["after"] = machine.clocks(device)
        results.save(document, path)
        if lock is not None:
            path.with_suffix(".lock").unlink(missing_ok=True)
            lock.close()
    print("\n" + report.table(document), flush=True)
    for line in report.absences(document):
        print(line)
    print(f"\npython -m benchmarks report {shlex.quote(str(path))}", flush=True)
    return status


def _run_cases(
    cases: Sequence[Case], document: results.Document, path: Path, options: Options, device: torch.device
) -> int:
    """Measure them all, saving after each; the exit status."""
    bench = Bench(device)
    session = document["sessions"][-1]
    session["ceilings"] = timing.ceilings(bench)
    modes = 2 if bench.on_gpu else 1
    full = timing.QUICK if options.quick else timing.FULL
    asked = len(document["asked"]["shapes"])
    end = time.perf_counter() + _BUDGET[device.type][options.quick] * len(cases) / asked
    status = 0
    columns, lines = shutil.get_terminal_size()  # also of a terminal that does not tell
    # Where nobody watches, a line a shape instead of a bar.
    with tqdm(cases, unit="shape", disable=None, ncols=columns, nrows=lines) as progress:
        for number, case in enumerate(progress):
            progress.set_postfix_str(case.name)
            if progress.disable:
                print(f"{number + 1} of {len(cases)}: {case.name}", flush=True)
            remaining = end - time.perf_counter()
            left = max(0.0, remaining) / (len(cases) - number)
            late = remaining < _COMPILATION + _SHAPE * (len(cases) - number)
            effort = full._replace(seconds=min(full.seconds, _TIMED * left) / modes)
            record = records.new_record(case, session["ceilings"], len(document["sessions"]) - 1)
            begin = time.perf_counter()
            with (
                records.recorded(record),
                providers.products_of(case.precision, device),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")  # Inductor has remarks on the machine and on torch
                if isinstance(case, Distributed):
                    distributed.measure(case, record, session["ceilings"], device, effort, options.providers)
                else:
                    tell = partial(_tell, progress, case)
                    measure(case, record, bench, effort, options.providers, late, tell)
            record["seconds"] = time.perf_counter() - begin
            record["targets"] = report.judge(case, record, device.type)
            document["cases"].append(record)
            results.save(document, path)
            for line in records.failures(record):
                status = 1
                progress.write(f"  {case.name}: {line}")
            if reason := _lost(bench):
                progress.write(f"the device can no longer be used: {reason}; the same command goes on")
                return 1
    return status


def _tell(progress: "tqdm[Case]", case: Case, doing: str) -> None:
    progress.set_postfix_str(f"{case.name}, {doing}")


def _lost(bench: Bench) -> str | None:
    """Why nothing more can be measured in this process, as after an illegal access or a capture that was broken off."""
    try:
        bench.free()
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None
