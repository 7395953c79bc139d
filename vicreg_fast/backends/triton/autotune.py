"""Search for configurations where the library runs: ``VICREG_FAST_AUTOTUNE=1``.

The first call with a new shape compiles and tries every candidate of each of its kernels; what was fastest is used from
then on and written to a file, ``VICREG_FAST_AUTOTUNE_FILE`` or ``~/.cache/vicreg_fast/configs.jsonl``, from which later
processes with the variable set read it.  A line is a row for the tables of configs.py: its key, its configuration, and the
milliseconds that the pass took with it and with the table's own.  Of many processes, let one search first: others would
wait for it at their next collective.
"""

import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from triton.errors import TritonError
from triton.testing import do_bench

from . import configs

Result = TypeVar("Result")

_read: set[Path] = set()


def enabled() -> bool:
    """Whether a search is asked for."""
    return os.environ.get("VICREG_FAST_AUTOTUNE", "0") not in ("", "0")


def file() -> Path:
    """Where rows are written to and read from."""
    given = os.environ.get("VICREG_FAST_AUTOTUNE_FILE")
    return Path(given) if given else Path.home() / ".cache" / "vicreg_fast" / "configs.jsonl"


def tuned(keys: Callable[[], list[configs.Key]], run: Callable[[], Result]) -> Result:
    """``run()``, with the fastest configuration of every key where a search is asked for."""
    if not enabled():
        return run()
    if file() not in _read:
        configs.found.update(rows())
        _read.add(file())
    # A search synchronises, which a graph that is being captured must not.
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        for key in keys():
            if key not in configs.found:
                _search(key, run)
    return run()


def rows() -> dict[configs.Key, Any]:
    """The rows of the file, the last one of each key; none where there is no file."""
    found = {}
    lines = file().read_text().splitlines() if file().exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key = configs.Key(*row["key"])
            found[key] = configs.KINDS[key.kernel](**row["config"])
        except (ValueError, TypeError, LookupError):
            warnings.warn(f"{file()}, line {number}, is no row of a search and is left out", stacklevel=2)
    return found


def candidates(kernel: str) -> Iterator[Any]:
    """Every configuration that a search tries."""
    if kernel == "moments":
        for rows, columns, warps in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8)):
            if 1024 <= rows * columns <= 8192:
                yield configs.Moments(rows, columns, warps)
    elif kernel == "matching":
        for tile, inner, warps, stages in itertools.product((32, 64, 128), (16, 32, 64), (4, 8), (2, 3, 4)):
            yield configs.Matching(tile, inner, warps, stages)
    elif kernel == "local":
        for columns, warps in itertools.product((16, 32, 64, 128), (4, 8)):
            yield configs.Local(columns, warps)
    elif kernel == "local_gradient":
        for patches, columns, warps in itertools.product((32, 64, 128, 256), (16, 32, 64, 128), (4, 8)):
            if patches * columns <= 8192:
                yield configs.LocalGradient(patches, columns, warps)
    elif kernel == "gradient":
        tiles = ((32, 64), (64, 64), (64, 128), (128, 64), (128, 128))
        for (rows, columns), inner, warps, stages in itertools.product(tiles, (16, 32, 64), (4, 8), (2, 3, 4)):
            yield configs.Gradient(rows, columns, inner, warps, stages)
    else:
        for tile, inner, warps, stages in itertools.product((32, 64, 128), (16, 32, 64), (4, 8), (2, 3, 4)):
            for resident in (1, 2, 4) if tile < 128 else (1, 2):
                yield configs.Product(tile, inner, warps, stages, resident)


def _search(key: configs.Key, run: Callable[[], object]) -> None:
    """Find the fastest configuration of a key, use it from now on, and write it down."""
    before = _milliseconds(run)
    best, fastest = configs.from_table(key), before
    try:
        for candidate in candidates(key.kernel):
            configs.found[key] = candidate
            try:
                time = _milliseconds(run)
            except (TritonError, RuntimeError):  # more shared memory, registers or memory than there is
                continue
            if time < fastest:
                best, fastest = candidate, time
    finally:  # an interrupted search leaves nothing behind
        configs.found.pop(key, None)
    configs.found[key] = best
    line = {"key": key, "config": best._asdict(), "ms": fastest, "table_ms": before}
    file().parent.mkdir(parents=True, exist_ok=True)
    with file().open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def _milliseconds(run: Callable[[], object]) -> float:
    return float(do_bench(run, warmup=5, rep=20, return_mode="median"))
