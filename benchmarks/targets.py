"""A shape's record: its roofline bound, and vicreg_fast's time against the targets."""

from collections.abc import Iterator, Mapping
from typing import Any

from . import gate
from .cases import Case
from .measure import Record
from .providers import OURS, PROVIDERS

MODES = ("graph", "launch")


def roofline(case: Case, ceilings: Mapping[str, Any], devices: int = 1) -> dict[str, Any]:
    """By part: operations, bytes, and the larger of the times that the ceilings of all devices allow for them."""
    bounds: dict[str, Any] = {}
    for part, operations in case.operations.items():
        rates, traffic = ceilings["operations_per_s"], case.bytes()[part]
        arithmetic = sum(count / rates[matmul] for matmul, count in operations.items()) / devices
        copying = traffic / ceilings["copy_bytes_per_s"] / devices
        bound, by = max((copying, "bytes"), (arithmetic, "operations"))
        bounds[part] = {"operations": operations.total(), "bytes": traffic, "seconds": bound, "bound_by": by}
    return bounds


def shape_record(case: Case, ceilings: Mapping[str, Any], session: int) -> Record:
    """The entry of a shape before it is measured."""
    record = {key: getattr(case, key) for key in ("name", "suite", "title", "shape", "precision", "samples")}
    record |= {"dtype": str(case.dtype).removeprefix("torch."), "bound": gate.BOUNDS[case.matmul]}
    record |= {"session": session, "status": "measured", "reason": None, "seconds": None}
    return record | {"floor": roofline(case, ceilings), "providers": {}, "targets": {}}


def failures(record: Record) -> Iterator[str]:
    """A line for everything that was wrong or raised.  Too little memory or a missing provider is no failure."""
    entries = {"": record}
    for name, provider in record["providers"].items():
        entries |= {name: provider} | {f"{name}, {mode}": entry for mode, entry in provider["modes"].items()}
    for name, entry in entries.items():
        if entry["status"] in ("wrong", "error"):
            yield f"{name} {entry['status']}: {entry['reason']}".lstrip()


def part_of(record: Record) -> str:
    """The part that a shape is compared by: its longest."""
    return "forward" if record["suite"] == "matching" else "both"


def seconds(record: Record, name: str | None, mode: str) -> float | None:
    """A provider's median; None where it was not timed."""
    modes = record["providers"].get(name, {"modes": {}})["modes"]
    quantiles = modes.get(mode, {}).get(part_of(record))
    return None if quantiles is None else float(quantiles["median"])


def ours(record: Record, mode: str) -> str | None:
    """The backend that "auto" selects, if it was timed.  A failed backend is not replaced by the other."""
    statuses = {name: entry["status"] for name, entry in record["providers"].items()}
    name = next((name for name in OURS if statuses.get(name, "unavailable") != "unavailable"), None)
    return None if seconds(record, name, mode) is None else name


def modes_of(record: Record) -> list[str]:
    """The modes in which any provider was timed."""
    return [mode for mode in MODES if any(mode in entry["modes"] for entry in record["providers"].values())]


def mode_of(document: Mapping[str, Any]) -> str:
    """The mode in which a result is compared: graphs, where the device has them."""
    return "graph" if any("graph" in modes_of(record) for record in document["cases"]) else "launch"


def judge(case: Case, record: Record, device: str) -> dict[str, Any]:
    """By mode and provider: the target ("asked"), the measured speed-up ("found") and whether it suffices ("met").

    "floor" is the share of the roofline bound.  Where there is a graph, a launch has no such target.
    """
    goals, modes = case.targets_on(device), modes_of(record)
    verdicts: dict[str, Any] = {mode: {} for mode in modes}
    for mode in modes:
        us = ours(record, mode)
        mine = seconds(record, us, mode)
        others = [name for name in PROVIDERS if name in record["providers"] and name != us]
        times = {name: seconds(record, name, mode) for name in others}
        for name, other in (times | {"floor": record["floor"][part_of(record)]["seconds"]}).items():
            speed_up = None if mine is None or other is None else other / mine
            target = None if name == "floor" and mode != modes[0] else goals.get(name)
            met = None if speed_up is None or target is None else speed_up >= target
            verdicts[mode][name] = {"asked": target, "found": speed_up, "met": met}
    return verdicts
