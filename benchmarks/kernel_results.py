"""Files of kernels' times: JSON, written whole after every shape by ``python -m benchmarks kernels``.

    schema, version   SCHEMA and VERSION
    fixture           in a file in which nothing was measured, why: the times are made up
    date, machine, clocks, commit, ceilings   as in a result of ``run``; ceilings null without ``--ceilings``
    asked, complete   the names of the requested shapes, and whether all of them are in the file
    shapes            of each: shape, status ("timed" or "error"), reason of an error, kernels in the order of their
                      launches, and microseconds, the sum of the kernels' medians

A kernel has its name, its programs, how many rounds were timed, and microseconds: the median and the values that 20 % and
80 % of the rounds do not exceed, each launch alone with a cold L2 cache.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import results
from .results import Document, UsageError

SCHEMA, VERSION = "vicreg_fast.kernels", 1
_KEYS = {"schema", "version", "date", "machine", "clocks", "commit", "ceilings", "asked", "complete", "shapes"}
_SHAPE_KEYS = {"shape", "status", "reason", "microseconds", "kernels"}
_KERNEL_KEYS = {"kernel", "programs", "rounds", "microseconds"}
QUANTILES = ("q20", "median", "q80")


def load(path: Path) -> Document:
    """Read a file of kernels' times.  Raises :class:`UsageError` for a malformed file or another version."""
    document = results.read(path, SCHEMA, VERSION)
    _require(path, "$", document, _KEYS)
    for k, shape in enumerate(document["shapes"]):
        _require(path, f"$.shapes[{k}]", shape, _SHAPE_KEYS)
        for n, kernel in enumerate(shape["kernels"]):
            where = f"$.shapes[{k}].kernels[{n}]"
            _require(path, where, kernel, _KERNEL_KEYS)
            _require(path, f"{where}.microseconds", kernel["microseconds"], set(QUANTILES))
    return document


def _require(path: Path, where: str, value: Any, keys: set[str]) -> None:
    if not isinstance(value, dict) or (missing := sorted(keys - value.keys())):
        needed = f"needs the keys {', '.join(missing)}" if isinstance(value, dict) else "needs to be an object"
        raise UsageError(f"{path} breaks the format at {where}: {needed}")


def target_of(document: Mapping[str, Any], known: Collection[str]) -> str | None:
    """The target of a document's card, as cuda:90; None for a CPU.  Raises :class:`UsageError` if it is not known."""
    capability = document["machine"]["capability"]
    if capability is None:
        return None
    target = f"cuda:{capability.replace('.', '')}"
    if target not in known:
        raise UsageError(
            f"no rates of compute capability {capability}; --target needs one of {', '.join(known)}"
        )
    return target


class Pair(NamedTuple):
    """A kernel of a shape: microseconds by the model and as measured; None where one of the two lacks the launch."""

    kernel: str
    estimated: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over estimated."""
        return None if self.estimated is None or self.measured is None else self.measured / self.estimated

    def cells(self) -> list[str]:
        """The row of a table of COLUMNS."""
        numbers = [("–" if value is None else f"{value:.1f}") for value in (self.estimated, self.measured)]
        return [self.kernel, *numbers, "–" if self.ratio is None else f"{self.ratio:.2f}"]


COLUMNS = ("kernel", "estimated µs", "measured µs", "measured / estimated")


def beside(estimated: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Pair]:
    """The kernels of a shape's estimate and of its measurement, paired by name and by how often the name came before.

    Another configuration may launch other kernels: a sum over splits only where there are splits.
    """
    times = [
        _numbered((kernel["kernel"], kernel["microseconds"]) for kernel in estimated["kernels"]),
        _numbered((kernel["kernel"], kernel["microseconds"]["median"]) for kernel in measured["kernels"]),
    ]
    launches = dict.fromkeys([*times[0], *times[1]])
    return [Pair(launch[0], *(side.get(launch) for side in times)) for launch in launches]


def _numbered(kernels: Iterable[tuple[str, float]]) -> dict[tuple[str, int], float]:
    seen: Counter[str] = Counter()
    numbered = {}
    for name, time in kernels:
        numbered[name, seen[name]] = time
        seen[name] += 1
    return numbered


def sums(estimated: Mapping[str, Any], measured: Mapping[str, Any]) -> Pair:
    """The sums of all kernels of a shape."""
    return Pair("sum", estimated["microseconds"], measured["microseconds"])
