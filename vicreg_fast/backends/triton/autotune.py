"""A search for configurations on the machine where the library runs: ``VICREG_FAST_AUTOTUNE=1``.

The first call with a new shape compiles and times every candidate of each of its kernels.  The fastest is used from then on
and appended to a file, ``VICREG_FAST_AUTOTUNE_FILE`` or ``~/.cache/vicreg_fast/configs.jsonl``, which later processes with
the variable set read.  A line is a row for the tables of configs.py: its key, its configuration, and the milliseconds that
the pass took with it and with the table's own.  In a job of several processes, let one process search first: the others
would wait for it at their next collective.
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

_files_read: set[Path] = set()


def enabled() -> bool:
    """Whether a search was requested."""
    return os.environ.get("VICREG_FAST_AUTOTUNE", "0") not in ("", "0")


def file() -> Path:
    """The file that rows are written to and read from."""
    path = os.environ.get("VICREG_FAST_AUTOTUNE_FILE")
    return Path(path) if path else Path.home() / ".cache" / "vicreg_fast" / "configs.jsonl"


def tuned(keys: Callable[[], list[configs.Key]], run: Callable[[], Result]) -> Result:
    """``run()``, with the fastest configuration of every key if a search was requested."""
    if not enabled():
        return run()
    if file() not in _files_read:
        configs.tuned_configs.update(rows())
        _files_read.add(file())
    # A search synchronises, which is not allowed while a graph is captured.
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        for key in keys():
            if key not in configs.tuned_configs:
                _search(key, run)
    return run()


def rows() -> dict[configs.Key, Any]:
    """The rows of the file, the last one of each key; none without a file."""
    configurations = {}
    lines = file().read_text().splitlines() if file().exists() else []
    for line_number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key = configs.Key(*row["key"])
            configurations[key] = configs.KERNELS[key.kernel].config(**row["config"])
        except (ValueError, TypeError, LookupError):
            warnings.warn(f"{file()}, line {line_number}, is no row of a search and is left out", stacklevel=2)
    return configurations


def candidates(kernel: str) -> Iterator[Any]:
    """Every configuration that a search tries."""
    if kernel == "moments":
        for block_n, block_d, warps in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8)):
            if 1024 <= block_n * block_d <= 8192:
                yield configs.Moments(block_n, block_d, warps)
    elif kernel == "matching":
        for tile, block_k, warps, stages in itertools.product((32, 64, 128), (16, 32, 64), (4, 8), (2, 3, 4)):
            yield configs.Matching(tile, block_k, warps, stages)
    elif kernel == "local":
        for block_d, warps in itertools.product((16, 32, 64, 128), (4, 8)):
            yield configs.Local(block_d, warps)
    elif kernel == "local_gradient":
        for block_l, block_d, warps in itertools.product((32, 64, 128, 256), (16, 32, 64, 128), (4, 8)):
            if block_l * block_d <= 8192:
                yield configs.LocalGradient(block_l, block_d, warps)
    elif kernel == "gradient":
        tiles = ((32, 64), (64, 64), (64, 128), (128, 64), (128, 128))
        for (block_n, block_d), block_k, warps, stages in itertools.product(
            tiles, (16, 32, 64), (4, 8), (2, 3, 4)
        ):
            yield configs.Gradient(block_n, block_d, block_k, warps, stages)
    elif kernel == "narrow_gradient":
        for block_n, warps, stages, ctas_per_sm in itertools.product(
            (32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 4)
        ):
            yield configs.NarrowGradient(block_n, warps, stages, ctas_per_sm)
    else:
        for block_m, block_k, warps, stages in itertools.product(
            (32, 64, 128), (16, 32, 64), (4, 8), (2, 3, 4)
        ):
            for ctas_per_sm in (1, 2, 4) if block_m < 128 else (1, 2):
                yield configs.Product(block_m, block_k, warps, stages, ctas_per_sm)


def _search(key: configs.Key, run: Callable[[], object]) -> None:
    """Find the fastest configuration of a key, use it from now on, and write it to the file."""
    before = _milliseconds(run)
    best, fastest = configs.from_table(key), before
    try:
        for candidate in candidates(key.kernel):
            configs.tuned_configs[key] = candidate
            try:
                time = _milliseconds(run)
            except (TritonError, RuntimeError):
                continue  # it needs more shared memory, registers or memory than there is
            if time < fastest:
                best, fastest = candidate, time
    finally:  # an interrupted search leaves nothing behind
        configs.tuned_configs.pop(key, None)
    configs.tuned_configs[key] = best
    line = {"key": key, "config": best._asdict(), "ms": fastest, "table_ms": before}
    file().parent.mkdir(parents=True, exist_ok=True)
    with file().open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def _milliseconds(run: Callable[[], object]) -> float:
    return float(do_bench(run, warmup=5, rep=20, return_mode="median"))
