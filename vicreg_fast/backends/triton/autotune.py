"""Configurations that a search found on the machine where the library runs.

``VICREG_FAST_AUTOTUNE=1``: the first call with a new shape compiles and times candidates for each of its kernels (search.py).
The fastest is used from then on and appended to a file, ``VICREG_FAST_AUTOTUNE_FILE`` or
``~/.cache/vicreg_fast/configs.jsonl``.  ``VICREG_FAST_AUTOTUNE_FILE`` alone: the rows of that file are used, and nothing is
searched.

A line of the file is a row for tables.py: its key, its configuration, and the milliseconds on the device of
the pass's kernels with it and with the table's own.  In a job of several processes, let one process search first: the others
would wait for it at their next collective.
"""

import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import candidates, configs, search
from .launch_timing import GraphTimer, Timer

Result = TypeVar("Result")
# Searches for the configurations of keys by running a pass, whose results that must agree the last argument returns.
Tuner = Callable[[list[configs.Key], Callable[[], Any], Callable[[Any], list[Tensor]]], None]

_FILE = "VICREG_FAST_AUTOTUNE_FILE"
_files_read: set[Path] = set()
_tuner: Tuner | None = None  # that of searching()
# Only one thread searches at a time: timings would disturb each other.
_LOCK = threading.Lock()


def enabled() -> bool:
    """Whether a search was requested."""
    return os.environ.get("VICREG_FAST_AUTOTUNE", "0") not in ("", "0")


def file() -> Path:
    """The file that rows are written to and read from."""
    path = os.environ.get(_FILE)
    return Path(path) if path else Path.home() / ".cache" / "vicreg_fast" / "configs.jsonl"


@contextmanager
def searching(tuner: Tuner) -> Iterator[None]:
    """Every pass calls this tuner first, whatever the environment says."""
    global _tuner
    before, _tuner = _tuner, tuner
    try:
        yield
    finally:
        _tuner = before


def tuned(
    keys: Callable[[], list[configs.Key]],
    run: Callable[[], Result],
    values: Callable[[Result], list[Tensor]] = search.tensors_in,
) -> Result:
    """``run()``, with the fastest configuration of every key if a search was requested or its file is named.

    ``values``: tensors of the result that agree, up to rounding, for all configurations.
    """
    if _tuner is not None:
        _tuner(keys(), run, values)
    elif enabled():
        _read()
        _search_missing(keys(), run, values)
    elif os.environ.get(_FILE):
        _read()
    return run()


def _read() -> None:
    """Use the rows of the file, which is read once."""
    path = file()
    if path in _files_read:
        return
    _files_read.add(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        if not (enabled() and isinstance(error, FileNotFoundError)):  # a search makes the file
            warnings.warn(f"no row of {path} is used, because it cannot be read: {error}", stacklevel=4)
        return
    configs.tuned_configs.update(_rows(path, text))


def _rows(path: Path, text: str) -> dict[configs.Key, Any]:
    """The rows of a file, the last one of each key."""
    configurations = {}
    for line_number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            key = configs.Key(*row["key"])
            configurations[key] = configs.KERNELS[key.kernel].config(**row["config"])
        except (ValueError, TypeError, LookupError):
            warnings.warn(f"{path}, line {line_number}, is no row of a search and is left out", stacklevel=2)
    return configurations


def _timer() -> Timer | None:
    """What times launches on the current device; None where a search cannot run now."""
    # A search synchronises, which is not allowed while a graph is captured.
    if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None
    return GraphTimer(torch.device("cuda", torch.cuda.current_device()))


def _search_missing(
    keys: list[configs.Key], run: Callable[[], Any], values: Callable[[Any], list[Tensor]]
) -> None:
    """Search for the configuration of each key that has none, one after the other, and write it to the file."""
    if all(key in configs.tuned_configs for key in keys):
        return
    with _LOCK:
        timer = _timer()
        if timer is None:
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for key in keys:
            if key not in configs.tuned_configs:
                trials = search.search(key, candidates.candidates(key), run, timer, device, values)
                _keep(key, trials)


def _keep(key: configs.Key, trials: list[search.Trial]) -> None:
    """Use the fastest of the trials from now on, and append it to the file.  Warn of wrong results, which nothing explains."""
    best = search.fastest(trials)
    configs.tuned_configs[key] = best.config
    wrong = [trial for trial in trials if trial.reason is not None and trial.reason.startswith("wrong")]
    if wrong:
        warnings.warn(
            f"{len(wrong)} of {len(trials)} configurations of {key.kernel} are left out, such as {wrong[0].config}: "
            f"{wrong[0].reason}",
            stacklevel=2,
        )
    try:
        append(file(), key, best, trials[0])
    except OSError as error:
        words = f"what a search finds is kept in this process alone, because {file()} cannot be written to"
        warnings.warn(f"{words}: {error}", stacklevel=2)


def append(path: Path, key: configs.Key, best: search.Trial, table: search.Trial) -> None:
    """Append a row to a file: a key's best trial, and that of the table's configuration."""
    assert best.time is not None
    assert table.time is not None
    ms, table_ms = 1e3 * best.time.median, 1e3 * table.time.median
    line = {"key": key, "config": best.config._asdict(), "ms": ms, "table_ms": table_ms}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lines:
        lines.write(json.dumps(line) + "\n")
