"""The page of a part of first_card.py: Markdown, from the files that the part's steps have written so far.

A file that is missing or cut short leaves out its section; the table of steps says which step did not write it.
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import kernel_results, steps
from .text import duration, table

# Characters of the page: what still fits where only the end of an output is kept.
LIMIT = 10_000
_LINE = 220  # characters of a line that other programs wrote
_WORDS = {"passed": "passed", "skipped": "skipped"}  # any other status is marked


class Section(NamedTuple):
    """A heading, its text, and where the whole of it is."""

    title: str
    text: str
    source: str


def write(folder: Path, part: str, verdicts: Sequence[steps.Verdict], seconds: float, rehearsed: bool) -> None:
    """Write ``folder/page.md`` anew."""
    sections = [section for section in _sections(folder, verdicts) if section.text]
    head = _head(folder, part, verdicts, seconds, rehearsed)
    new = folder / "page.md.new"
    new.write_text(_fitted(head, sections) + "\n")
    new.replace(folder / "page.md")


def _fitted(head: str, sections: Sequence[Section]) -> str:
    """The page, within LIMIT: of the longest sections the last lines are left out."""
    lines = [section.text.splitlines() for section in sections]
    kept = [len(text) for text in lines]

    def page() -> str:
        parts = [head]
        for section, text, count in zip(sections, lines, kept, strict=True):
            rest = [] if count == len(text) else [f"\n… {len(text) - count} more lines: {section.source}"]
            parts.append("\n".join([f"## {section.title}\n", *text[:count], *rest]))
        return "\n\n".join(parts)

    while len(page()) > LIMIT and max(kept, default=0) > 3:
        sizes = [
            sum(map(len, text[:count])) if count > 3 else 0 for text, count in zip(lines, kept, strict=True)
        ]
        kept[sizes.index(max(sizes))] -= 1
    return page()


def _read(path: Path) -> Any:
    """A JSON file; None where it is missing or not complete."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _head(folder: Path, part: str, verdicts: Sequence[steps.Verdict], seconds: float, rehearsed: bool) -> str:
    facts = _read(folder / "machine.json")
    device = facts["machine"]["device"] if facts else "an unknown device"
    lines = [f"# First card, {part}: {device}"]
    if rehearsed:
        lines.append(
            "**A rehearsal without a GPU: small shapes, other tests, and kernels' times that are made up.**"
        )
    counts = Counter(verdict["status"] for verdict in verdicts)
    words = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines.append(f"{len(verdicts)} steps in {seconds:.0f} s: {words}.")
    if facts:
        lines.append(_facts(facts))
    return "\n\n".join(lines)


def _facts(facts: dict[str, Any]) -> str:
    about, clocks, commit, ceilings = (facts[key] for key in ("machine", "clocks", "commit", "ceilings"))
    words = [f"driver {clocks['driver']}", f"torch {about['torch']}", f"Triton {about['triton']}"]
    words += [f"Python {about['python']}", f"compute capability {about['capability']}"]
    words += [f"{about['multiprocessors']} SMs"] if about["multiprocessors"] else []
    words += [f"SM clock {clocks['sm_clock_mhz']:.0f} MHz"] if clocks["sm_clock_mhz"] else []
    unknown = f"commit unknown ({commit['reason']})"
    words.append(
        f"commit {commit['commit']}{' with changes' * commit['dirty']}" if commit["commit"] else unknown
    )
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceilings["operations_per_s"].items())
    words.append(f"copies {ceilings['copy_bytes_per_s'] / 1e12:.3g} TB/s, matmuls in TFLOP/s: {rates}")
    return "; ".join(words) + "."


def _sections(folder: Path, verdicts: Sequence[steps.Verdict]) -> Iterator[Section]:
    yield Section("Steps", _steps(verdicts), "steps.jsonl")
    for verdict in verdicts:
        if verdict["log"] and verdict["status"] not in _WORDS:
            yield Section(f"The end of {verdict['log']}", _tail(folder / verdict["log"]), verdict["log"])
    tests = [verdict for verdict in verdicts if verdict["step"].startswith("tests") and verdict["log"]]
    yield Section("Tests", "\n".join(_tests(folder, verdict) for verdict in tests), "*.xml, logs")
    yield Section("Kernels, estimated and measured", _kernels(folder), "kernels.json, estimate.json")
    yield Section("Rows for the tables", _rows(folder / "tune"), "tune/rows.txt")
    for path in sorted((folder / "results").glob("*.json")):
        document = _read(path)
        if document is not None:
            yield from _benchmark(document, f"results/{path.name}")
    profile = folder / "profile.txt"
    yield Section("Profile", profile.read_text() if profile.exists() else "", profile.name)


def _steps(verdicts: Sequence[steps.Verdict]) -> str:
    rows = []
    for verdict in verdicts:
        status = _WORDS.get(verdict["status"], f"**{verdict['status']}**")
        time = f"{verdict['seconds']:.0f} of {verdict['allowed']:.0f} s" if verdict["log"] else None
        rows.append((verdict["step"], status, time, verdict["reason"]))
    return table(("step", "status", "time", "reason"), rows)


def _tail(log: Path, count: int = 6) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line[:_LINE]}" for line in lines[-count:])


# -- tests ------------------------------------------------------------------------------------------------------------


def _tests(folder: Path, verdict: steps.Verdict) -> str:
    """Counts, and a line for each test that failed, was running when pytest was ended, or was skipped."""
    name, text = verdict["step"], (folder / verdict["log"]).read_text(errors="replace")
    outcomes, running = _of_log(text)
    try:
        lines = list(_of_report(folder / f"{name}.xml"))
        counts = Counter(status for status, *_ in lines)
    except (OSError, ElementTree.ParseError):  # ended before it was written
        lines = [(status, test, "") for test, status in outcomes.items()]
        counts = Counter(outcomes.values())
    if verdict["status"] != "passed":
        lines += [("running when it was ended:", test, "") for test in running]
    shown = [line for line in lines if line[0] not in ("passed", "skipped")]
    shown += [line for line in lines if line[0] == "skipped"]
    count = ", ".join(f"{number} {status}" for status, number in sorted(counts.items())) or "none ran"
    found = re.search(r"workers? \[(\d+) items?\]|^collect.* (\d+) (?:items?|selected)$", text, re.MULTILINE)
    selected = int(found[1] or found[2]) if found else counts.total()
    of = "" if selected == counts.total() else f" of {selected}"
    return "\n".join([f"{name}: {count}{of}.", *(_test_line(*line) for line in shown)])


def _test_line(status: str, test: str, message: str) -> str:
    return f"- {status} `{test}` {message.strip().partition(chr(10))[0]}".rstrip()[:_LINE]


def _of_report(path: Path) -> Iterator[tuple[str, str, str]]:
    """Outcome, test and message from JUnit's XML."""
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        test = f"{case.get('classname')}::{case.get('name')}"
        if found is None:
            yield "passed", test, ""
        else:
            yield {"failure": "failed"}.get(found.tag, found.tag), test, found.get("message", "")


def _of_log(text: str) -> tuple[dict[str, str], list[str]]:
    """Outcomes by test, and tests without one, from what ``pytest -v`` has printed, with or without xdist."""
    outcomes, started = dict[str, str](), dict[str, None]()
    for line in text.splitlines():
        if found := re.match(r"\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (\S+\.py::.*)", line):
            outcomes[found[2].strip()] = found[1].lower()
        elif found := re.match(r"(\S+\.py::.*?)(?: (PASSED|FAILED|ERROR|SKIPPED)\b.*)?\s*$", line):
            started[found[1].strip()] = None
            if found[2]:
                outcomes[found[1].strip()] = found[2].lower()
    return outcomes, [test for test in started if test not in outcomes]


# -- kernels, rows, benchmark -----------------------------------------------------------------------------------------


def _kernels(folder: Path) -> str:
    """Every kernel's time beside its estimate, and every shape's sum beside the bound."""
    measured, estimates = _read(folder / "kernels.json"), _read(folder / "estimate.json")
    if measured is None:
        return ""
    estimated = {entry["shape"]: entry for entry in (estimates or {"shapes": []})["shapes"]}
    lines = [f"**Nothing here was measured: {measured['fixture']}**", ""] if "fixture" in measured else []
    if not measured["complete"]:
        lines += [f"{len(measured['shapes'])} of {len(measured['asked'])} shapes.", ""]
    rows: list[tuple[object, ...]] = []
    for entry in measured["shapes"]:
        if entry["status"] == "error":
            rows.append((f"**{entry['shape']}**: {entry['reason'][:_LINE]}", None, None, None))
            continue
        known = estimated.get(entry["shape"], {"kernels": [], "microseconds": None})
        floor = known.get("floor_microseconds")
        share = "" if floor is None else f", {floor / entry['microseconds']:.0%} of the bound"
        rows.append((f"**{entry['shape']}**{share}", *kernel_results.sums(known, entry).cells()[1:]))
        rows += [tuple(pair.cells()) for pair in kernel_results.beside(known, entry)]
    return "\n".join([*lines, table(kernel_results.COLUMNS, rows)])


def _rows(folder: Path) -> str:
    """The rows that a search found, each below the name of its table, and the steps' times with and without them."""
    rows, document = folder / "rows.txt", _read(folder / "tune.json")
    if document is None or not rows.exists():
        return ""
    lines, table_name, kept = [], "", 0
    for line in rows.read_text().splitlines():
        if line.startswith("Row("):
            lines += [f"    {name}" for name in (table_name, line) if name]
            table_name = ""
        elif re.match(r"# \S+: ", line):  # a shape without a new row
            kept += 1
        else:
            table_name = line
    found = f"{len(document['kernels'])} kernels searched, {kept} without a new row."
    words = found if document["timed"] else f"{found} **Nothing was timed: ranked by the estimate alone.**"
    steps_of_shapes = [
        (step["shape"], step["reason"], *(_microseconds(step[key]) for key in ("table", "rows")))
        for step in document["steps"]
    ]
    columns = ("shape", "reason", "µs with the tables", "µs with the rows")
    return "\n\n".join(filter(None, [words, "\n".join(lines), table(columns, steps_of_shapes)]))


def _microseconds(times: dict[str, float] | None) -> str | None:
    return None if times is None else f"{times['median']:.1f}"


def _benchmark(document: dict[str, Any], source: str) -> Iterator[Section]:
    """The times, what was wrong, and the targets."""
    from . import targets  # imports torch, which no other section needs

    mode = targets.mode_of(document)
    words = f"**Nothing here was measured: {document['fixture']}**\n\n" if "fixture" in document else ""
    if not document["complete"]:
        words += f"{len(document['cases'])} of {len(document['asked']['shapes'])} shapes.\n\n"
    names = [name for name in ("eager", "compile", "aten", "triton") if name in document["providers"]]
    times = []
    for record in document["cases"]:
        seconds = [targets.seconds(record, name, mode) for name in names]
        times.append((record["name"], *("–" if time is None else duration(time) for time in seconds)))
    yield Section(f"Benchmark, mode {mode}", words + table(("shape", *names), times), source)
    wrong = [
        f"- {record['name']}: {line}"[:_LINE]
        for record in document["cases"]
        for line in targets.failures(record)
    ]
    yield Section("Wrong or failed providers", "\n".join(wrong), source)
    yield _targets({record["name"]: record["targets"].get(mode, {}) for record in document["cases"]}, source)


def _targets(judged: dict[str, dict[str, dict[str, Any]]], source: str) -> Section:
    """A row for each shape with a target: measured and required, missed ones in bold and their shapes first."""
    asked = {
        shape: {over: verdict for over, verdict in verdicts.items() if verdict["asked"] is not None}
        for shape, verdicts in judged.items()
    }
    columns = [over for over in ("eager", "compile", "cdist", "bmm", "aten", "floor")
               if any(over in verdicts for verdicts in asked.values())]  # fmt: skip
    counts = Counter(verdict["met"] for verdicts in asked.values() for verdict in verdicts.values())
    words = {False: "missed", None: "not measured", True: "met"}
    count = ", ".join(f"{counts[met]} {word}" for met, word in words.items() if counts[met])
    shapes = [shape for shape, verdicts in asked.items() if verdicts]
    shapes.sort(key=lambda shape: all(verdict["met"] is not False for verdict in asked[shape].values()))
    rows = [(shape, *(_target(asked[shape].get(over)) for over in columns)) for shape in shapes]
    text = table(("shape", *columns), rows)
    legend = "Measured of required: speed-ups, and the share of the roofline bound (floor).\n\n" if text else ""
    return Section(f"Targets: {count}", legend + text, source)


def _target(verdict: dict[str, Any] | None) -> str:
    if verdict is None:
        return ""
    found = "–" if verdict["found"] is None else f"{verdict['found']:.3g}"
    words = f"{found} of {verdict['asked']:.3g}"
    return f"**{words}**" if verdict["met"] is False else words
