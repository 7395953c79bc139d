"""What was measured, held against the floor of its device and the targets, as Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .cases import Case
from .providers import OURS, PROVIDERS
from .providers import names as provider_names

Record = dict[str, Any]
MODES = ("graph", "launch")
_ABSENT = {"status": "unavailable"}
# What a suite's rows show of each step: its longest part.
WHOLE = {"matching": "forward"}
SUITES = {
    "vicreg": "VICReg",
    "vicregl": "VICRegL, local part",
    "matching": "Patch matching",
    "distributed": "Several ranks",
}


def floor(case: Case, ceilings: Mapping[str, Any], ranks: int = 1) -> dict[str, Any]:
    """The time in which the device could do what each part needs at least; of all ``ranks`` together."""
    found: dict[str, Any] = {}
    rates, work = ceilings["operations_per_s"], case.work()
    for part in case.parts:
        arithmetic = sum(count / rates[kind] for kind, count in work[part].items()) / ranks
        traffic = case.bytes()[part] / ceilings["copy_bytes_per_s"] / ranks
        found[part] = {
            "operations": sum(work[part].values()),
            "bytes": case.bytes()[part],
            "seconds": max(arithmetic, traffic),
            "bound_by": "operations" if arithmetic > traffic else "bytes",
        }
    return found


def part_of(record: Record) -> str:
    """The part that a record is compared by."""
    return WHOLE.get(record["suite"], "both")


def times(record: Record, name: str, mode: str, part: str | None = None) -> dict[str, float] | None:
    """Quantiles of a provider's seconds; None where there is no time."""
    entry = record["providers"].get(name, {}).get("modes", {}).get(mode, {})
    found: dict[str, float] | None = entry.get(part or part_of(record))
    return found


def seconds(record: Record, name: str, mode: str, part: str | None = None) -> float | None:
    """The median."""
    found = times(record, name, mode, part)
    return None if found is None else found["median"]


def peak(record: Record, name: str) -> int | None:
    """A provider's peak memory in the part that a record is compared by; None where it was not measured."""
    found: int | None = record["providers"].get(name, {}).get("peak_bytes", {}).get(part_of(record))
    return found


def ours(record: Record, mode: str) -> str | None:
    """The backend that "auto" takes there, if it was timed: another's time would not be ours."""
    there = (name for name in OURS if record["providers"].get(name, _ABSENT)["status"] != "unavailable")
    name = next(there, None)
    return None if name is None or seconds(record, name, mode) is None else name


def modes_of(record: Record) -> list[str]:
    """The modes in which anybody was timed."""
    timed = {mode for provider in record["providers"].values() for mode in provider["modes"]}
    return [mode for mode in MODES if mode in timed]


def asked_of(document: Mapping[str, Any]) -> list[str]:
    """The shapes of which more is asked than to be no slower than eager code."""
    return [
        record["name"]
        for record in document["cases"]
        if any((judged.get("eager", {}).get("asked") or 0) > 1 for judged in record["targets"].values())
    ]


def judge(case: Case, record: Record, device: str) -> dict[str, Any]:
    """By mode, our speed as a multiple of each provider's and as a share of the floor, and what was asked.

    A call from Python is not held to the floor where there is a graph.
    """
    asked_of, modes = case.asked(device), modes_of(record)
    judged: dict[str, Any] = {}
    for mode in modes:
        us = ours(record, mode)
        mine = None if us is None else seconds(record, us, mode)
        judged[mode] = {}
        for name in [*(name for name in PROVIDERS if name in record["providers"] and name != us), "floor"]:
            theirs = (
                record["floor"][part_of(record)]["seconds"] if name == "floor" else seconds(record, name, mode)
            )
            found = None if mine is None or theirs is None else theirs / mine
            asked = asked_of.get(name)
            if name == "floor" and mode != modes[0]:
                asked = None
            met = None if found is None or asked is None else found >= asked
            judged[mode][name] = {"asked": asked, "found": found, "met": met}
    return judged


def mode_of(document: Mapping[str, Any]) -> str:
    """What a device is compared by: its graphs, where it has them."""
    return "graph" if any("graph" in modes_of(record) for record in document["cases"]) else "launch"


# -- tables -------------------------------------------------------------------------------------------------------


def duration(value: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            return f"{value * scale:.3g} {unit}" if value * scale < 999.5 else f"{value * scale:.0f} {unit}"
    raise AssertionError


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def _count(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def cell(record: Record, name: str, mode: str) -> str:
    """A time, or why there is none."""
    if (found := seconds(record, name, mode)) is not None:
        return duration(found)
    provider = record["providers"].get(name)
    if provider is None:
        return ""
    entry = provider["modes"].get(mode) or provider
    return "–" if entry["status"] == "unavailable" else str(entry["status"])


def _ratio(judged: Mapping[str, Any] | None, unit: str = "x") -> str:
    """Found, and what was asked; bold where it is missed."""
    if judged is None or judged["found"] is None:
        return "" if judged is None or judged["asked"] is None else f"– ({judged['asked']:.3g}{unit})"
    scale = 100 if unit == "%" else 1
    words = f"{judged['found'] * scale:.3g}{unit}"
    if judged["asked"] is not None:
        words += f" ({judged['asked'] * scale:.3g}{unit})"
    return f"**{words}**" if judged["met"] is False else words


def _timed_names(records: Sequence[Record], mode: str) -> list[str]:
    """The providers that were timed, or failed, in a mode, in order."""
    shown = ("right", "wrong", "error", "out of memory")

    def there(record: Record, name: str) -> bool:
        entry = record["providers"].get(name)
        return (
            entry is not None
            and entry["status"] in shown
            and (bool(entry["modes"]) or entry["status"] != "right")
        )

    return [name for name in provider_names() if any(there(record, name) for record in records)]


def rows_of(records: Sequence[Record], mode: str) -> str:
    """Records of one suite in a mode: everybody's time, and of ours the speed-up and the rates."""
    names = _timed_names(records, mode)
    header = ["shape", *names, "faster than eager", *(["than aten"] if "triton" in names else [])]
    header += ["samples/s", "GB/s", "TFLOP/s", "of the floor"]
    rows = []
    for record in records:
        judged, us, part = record["targets"].get(mode, {}), ours(record, mode), part_of(record)
        cells = [record["name"], *(cell(record, name, mode) for name in names), _ratio(judged.get("eager"))]
        if "triton" in names:
            cells.append(_ratio(judged.get("aten")))
        mine = None if us is None else seconds(record, us, mode)
        if mine is None:
            cells += ["", "", ""]
        else:
            least = record["floor"][part]
            cells += [f"{_count(record['samples'] / mine)}", f"{least['bytes'] / mine / 1e9:.3g}"]
            cells.append(f"{least['operations'] / mine / 1e12:.3g}")
        rows.append([*cells, _ratio(judged.get("floor"), "%")])
    return markdown(header, rows)


def by_suite(document: Mapping[str, Any]) -> Iterator[tuple[str, str, list[Record]]]:
    """Suite, mode, and the records that have it."""
    for suite in SUITES:
        records = [record for record in document["cases"] if record["suite"] == suite]
        for mode in MODES:
            having = [record for record in records if mode in modes_of(record)]
            if having:
                yield suite, mode, having


def absences(document: Mapping[str, Any]) -> Iterator[str]:
    """Which providers could not be asked, and why: a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for record in document["cases"]:
        if record["status"] == "left out":
            reasons.setdefault(record["reason"], []).append(record["name"])
        for name, provider in record["providers"].items():
            if provider["status"] == "unavailable":
                reasons.setdefault(provider["reason"], []).append(name)
    for reason, names in reasons.items():
        yield f"not measured: {', '.join(dict.fromkeys(names))}: {reason}"


def table(document: Mapping[str, Any]) -> str:
    """Every suite and mode of a result, as Markdown tables."""
    parts = [
        f"{SUITES[suite]}, {'forward' if suite in WHOLE else 'forward and backward'}, mode {mode}\n\n"
        + rows_of(records, mode)
        for suite, mode, records in by_suite(document)
    ]
    if not parts:
        return "Nothing was timed."
    return "\n\n".join([*parts, "In brackets: asked; bold: less than that. –: not measured here."])
