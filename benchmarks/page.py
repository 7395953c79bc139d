"""``python -m benchmarks report``: a page of one result or several, what is held against what, and README's tables."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import figures, machine, report, results
from .cases import CASES, PARTS
from .report import Record, duration, size
from .results import Document, RefusedError

README = machine.ROOT / "README.md"
_WORDS = {
    "speedups": "Speed-up of every shape over eager code",
    "scaling": "Time of a step over N and over D, with the floor",
    "memory": "Peak memory of eager code and of vicreg_fast",
    "roofline": "Achieved operations per second under the device's ceilings",
}


def write(files: Sequence[str], compare: bool, out: str | None, readme: bool) -> int:
    """Write what was asked for and print where it lies; the exit status.  :class:`RefusedError` for a bad file."""
    paths = [Path(name) for name in files]
    if not paths:
        there = list(results.kept(results.RESULTS))
        if not there:
            raise RefusedError(
                f"no result in {results.RESULTS}: name a file, or measure one with: python -m benchmarks run"
            )
        paths = there[-2:] if compare else there[-1:]
    documents = [results.load(path) for path in paths]
    if compare and len(documents) < 2:
        raise RefusedError("--compare needs two result files or more")
    if readme:
        (document, *more) = documents
        if more:
            raise RefusedError("--readme takes one result file")
        if out is not None:
            raise RefusedError("--readme writes README.md; --out is for a page")
        return _write_readme(document, paths[0])
    folder = Path(out or "benchmark-report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = []
        for name, draw in figures.FIGURES.items():
            together = name in ("speedups", "scaling")
            for mark, shown_ in [("", documents)] if together else _each(documents):
                file = f"{'compare-' if compare else ''}{name}{mark}"
                if figures.save(lambda draw=draw, shown_=shown_: draw(shown_), folder, file):  # type: ignore[misc]  # bound here
                    drawn.append(figures.picture(".", file, _WORDS[name]))
        text = "\n\n".join([*(comparison(documents) if compare else pages(documents)), *drawn]) + "\n"
        path = folder / ("compare.md" if compare else "report.md")
        path.write_text(text)
    except OSError as error:
        raise RefusedError(f"cannot write to {folder}: {error.strerror}") from error
    print(f"{path}, {len(drawn)} figures")
    return 0


def _each(documents: Sequence[Document]) -> list[tuple[str, list[Document]]]:
    """Every document alone; where there are several, with its letter."""
    letters = [f"-{mark}" for mark in figures.marks(documents)] if len(documents) > 1 else [""]
    return [(letter, [document]) for letter, document in zip(letters, documents, strict=True)]


def pages(documents: Sequence[Document]) -> Iterator[str]:
    """Every result one after the other."""
    for document in documents:
        yield from _page(document)


def _page(document: Document) -> Iterator[str]:
    yield f"# VICReg on {document['machine']['device']}"
    if "fixture" in document:
        yield f"**Nothing here was measured:** {document['fixture']}"
    if not document["complete"]:
        done, all_ = len(document["cases"]), len(document["asked"]["shapes"])
        yield f"**Stopped after {done} of {all_} shapes.** The same command continues it."
    yield _about(document)
    if asked := _targets(document):
        yield "## What was asked of it"
        yield asked
    for suite, mode, records in report.by_suite(document):
        yield f"## {report.SUITES[suite]}, {'forward' if suite in report.WHOLE else 'forward and backward'}, mode {mode}"
        yield report.rows_of(records, mode)
        yield _details(records, mode)
    libraries = _libraries(document)
    if libraries:
        yield "## Other libraries, each beside vicreg_fast set to its definition"
        yield libraries
    if memory := _memory(document["cases"]):
        yield "## Peak memory beyond inputs and gradients"
        yield memory
    left_out = _without_time(document)
    if left_out:
        yield "## What got no time"
        yield left_out


def _about(document: Document) -> str:
    about, commit = document["machine"], document["commit"]
    state = commit["commit"] and commit["commit"] + (" with changes" if commit["dirty"] else "")
    rows = [
        ["device", about["device"]],
        ["torch, Triton", f"{about['torch']}, {about['triton']}"],
        ["CUDA, driver", f"{about['cuda']}, {document['sessions'][-1]['clocks']['before']['driver']}"],
        ["commit", state or f"unknown: {commit['reason']}"],
        ["threads", str(about["threads"])],
    ]
    for session in document["sessions"]:
        rows.append(["measured", f"{session['date']} by `{session['command']}`"])
        if session["load"] is not None:
            rows.append(["load of the CPU at its start", str(session["load"])])
        for when in ("before", "after"):
            clocks = session["clocks"][when] or {}
            if clocks.get("sm_clock_mhz") is not None:
                words = "{sm_clock_mhz} MHz, memory {memory_clock_mhz} MHz, {power_w} W of {power_limit_w} W, {temperature_c} °C"
                rows.append([f"clocks {when}", words.format(**clocks)])
        ceilings = session["ceilings"]
        if ceilings is not None:
            rates = ", ".join(
                f"{kind} {rate / 1e12:.3g}" for kind, rate in ceilings["operations_per_s"].items()
            )
            rows.append(
                ["ceilings", f"copy {ceilings['copy_bytes_per_s'] / 1e9:.4g} GB/s; products, TFLOP/s: {rates}"]
            )
    return report.markdown(["", ""], rows)


def _targets(document: Document) -> str:
    """Every target, met or not."""
    rows = []
    for record in document["cases"]:
        for mode, judged in record["targets"].items():
            for name, target in judged.items():
                if target["asked"] is None:
                    continue
                verdict = {True: "met", False: "**missed**", None: "not measured"}[target["met"]]
                against = "share of the floor" if name == "floor" else f"times as fast as {name}"
                found = "–" if target["found"] is None else f"{target['found']:.3g}"
                rows.append([record["name"], mode, against, f"{target['asked']:.3g}", found, verdict])
    return report.markdown(["shape", "mode", "what", "asked", "found", ""], rows) if rows else ""


def _details(records: Sequence[Record], mode: str) -> str:
    """Of every part the median and the quantiles, and the host's time."""
    rows = []
    for record in records:
        for name, provider in record["providers"].items():
            entry = provider["modes"].get(mode)
            if entry is None or entry["status"] != "timed":
                continue
            cells = [record["name"], name]
            for part in PARTS:
                q = entry[part]
                cells.append(
                    "" if q is None else f"{duration(q['median'])} ({duration(q['q20'])}–{duration(q['q80'])})"
                )
            host = (entry["host"] or {}).get(report.part_of(record))
            rows.append([*cells, "" if host is None else duration(host["median"]), str(entry["rounds"])])
    body = report.markdown(["shape", "provider", *PARTS, "host", "rounds"], rows)
    return f"<details><summary>medians, 20 % and 80 % quantiles, host time</summary>\n\n{body}\n\n</details>"


def _libraries(document: Document) -> str:
    rows = []
    for record in document["cases"]:
        for name, version in document["libraries"].items():
            ours = f"ours as {name}"
            for mode in report.modes_of(record):
                theirs, mine = (report.seconds(record, who, mode) for who in (name, ours))
                if theirs is None and mine is None:
                    continue
                ratio = "" if theirs is None or mine is None else f"{theirs / mine:.3g}x"
                cells = [report.cell(record, who, mode) for who in (name, ours)]
                rows.append([f"{name} {version}", record["name"], mode, *cells, ratio])
    return report.markdown(["library", "shape", "mode", "it", "vicreg_fast", "faster"], rows) if rows else ""


def _memory(records: Sequence[Record]) -> str:
    names = list(
        dict.fromkeys(
            name for record in records for name in record["providers"] if report.peak(record, name) is not None
        )
    )
    rows = []
    for record in records:
        peaks = [report.peak(record, name) for name in names]
        rows.append([record["name"], *("" if peak is None else size(peak) for peak in peaks)])
    return report.markdown(["shape", *names], rows) if names else ""


def _without_time(document: Document) -> str:
    """Every case and provider without a time, grouped by the reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for record in document["cases"]:
        if record["status"] != "measured":
            reasons.setdefault(("all", record["status"], record["reason"]), []).append(record["name"])
        for name, provider in record["providers"].items():
            entries = [provider, *provider["modes"].values()]
            for entry in entries:
                if entry["reason"] is not None:
                    reasons.setdefault((name, entry["status"], entry["reason"]), []).append(record["name"])
    rows = [
        [who, status, reason, names[0] if len(names) == 1 else f"{len(names)} shapes, {names[0]} first"]
        for (who, status, reason), names in reasons.items()
    ]
    return report.markdown(["provider", "", "reason", "where"], rows) if rows else ""


def comparison(documents: Sequence[Document]) -> Iterator[str]:
    """Our time of every shape in every result, and as a multiple of the first's speed.

    Marked where the quantiles of both overlap: then the difference says nothing.
    """
    yield "# VICReg: " + " against ".join(document["machine"]["device"] for document in documents)
    marks = figures.marks(documents)
    yield "\n".join(
        f"- **{mark}**: {figures.label(document)}" for mark, document in zip(marks, documents, strict=True)
    )
    by_name = [{record["name"]: record for record in document["cases"]} for document in documents]
    rows = []
    for name in dict.fromkeys(name for found in by_name for name in found):
        for mode in report.MODES:
            cells, first = [], None
            for found in by_name:
                record = found.get(name)
                us = None if record is None else report.ours(record, mode)
                q = None if record is None or us is None else report.times(record, us, mode)
                if q is None:
                    cells += ["", ""]
                    continue
                first = first or q
                overlap = q is not first and q["q20"] <= first["q80"] and first["q20"] <= q["q80"]
                cells += [
                    f"{duration(q['median'])}, {us}",
                    f"{first['median'] / q['median']:.3g}x" + (" ~" if overlap else ""),
                ]
            if any(cells):
                rows.append([name, mode, *cells])
    header = ["shape", "mode", *(word for mark in marks for word in (mark, f"{marks[0]}/{mark}"))]
    yield report.markdown(header, rows)
    yield f"{marks[0]}/{marks[-1]}: how many times as fast as {marks[0]}. ~: the 20 % and 80 % quantiles overlap."
    for mark, document in zip(marks, documents, strict=True):
        yield f"## {mark}: {document['machine']['device']}"
        yield _about(document)


# -- README -------------------------------------------------------------------------------------------------------


def readme_speed(document: Document, path: Path) -> str:
    """README's table of speed."""
    names, mode = report.asked_of(document), report.mode_of(document)
    us = "vicreg_fast"
    rows = []
    for record in document["cases"]:
        if record["name"] not in names:
            continue
        mine = report.ours(record, mode)
        judged = record["targets"][mode]["eager"]
        cells = [report.cell(record, who, mode) if who else "" for who in ("eager", "compile", mine)]
        found = "" if judged["found"] is None else f"{judged['found']:.1f}x"
        cells += [f"**{found}**" if judged["met"] is False else found, f"{judged['asked']:g}x"]
        rows.append([record["title"], record["name"], *cells])
    header = ["loss, forward and backward", "shape", "eager", "compile", us, "faster than eager", "asked"]
    picture = figures.picture("docs", "speed", f"Speed-up over eager code on {document['machine']['device']}")
    return "\n\n".join([_source(document, path), report.markdown(header, rows), picture])


def readme_libraries(document: Document, path: Path) -> str:
    """README's table of other libraries."""
    return f"{_source(document, path)}\n\n{_libraries(document)}"


def _source(document: Document, path: Path) -> str:
    """What a table in README was measured on, by which command, and where it is kept."""
    session, about = document["sessions"][-1], document["machine"]
    threads = f", {about['threads']} threads" if about["kind"] == "cpu" else ""
    source = f"Measured on {about['device']}{threads}, torch {about['torch']}, on {session['date'][:10]} by"
    how = "CUDA graphs" if report.mode_of(document) == "graph" else "called from Python"
    return f"{source} `{session['command']}`; {how}, medians, from `benchmarks/results/{path.name}`."


def readme_memory(document: Document) -> str:
    """README's table of memory."""
    names, mode, rows = report.asked_of(document), report.mode_of(document), []
    for record in document["cases"]:
        us = report.ours(record, mode)
        if record["name"] in names and us is not None:
            eager, mine = (report.peak(record, who) for who in ("eager", us))
            assert mine is not None
            ratio = "" if eager is None else f"{eager / mine:.1f}x"
            rows.append(
                [record["title"], record["name"], "" if eager is None else size(eager), size(mine), ratio]
            )
    header = ["peak memory beyond inputs and gradients", "shape", "eager", "vicreg_fast", "less"]
    return report.markdown(header, rows)


def between(text: str, mark: str, new: str | None = None) -> str:
    """What stands between ``<!-- mark -->`` and the next ``<!-- end -->``; with ``new``, the text with that in its place."""
    found = re.search(rf"(<!-- {mark} -->\n)(.*?)(\n<!-- end -->)", text, re.DOTALL)
    if found is None:
        raise RefusedError(f"README.md has no <!-- {mark} -->")
    return found[2] if new is None else text[: found.start(2)] + new + text[found.end(2) :]


def _write_readme(document: Document, path: Path) -> int:
    if path.resolve().parent != results.RESULTS.resolve():
        raise RefusedError(f"README shows what is kept in {results.RESULTS}; {path} is not")
    everything = [case.name for case in CASES if document["machine"]["kind"] in case.devices]
    whole = document["asked"] == {"shapes": everything, "providers": None, "quick": False}
    with_libraries = document["asked"]["providers"] is not None and bool(_libraries(document))
    if not document["complete"] or not (whole or with_libraries) or "fixture" in document:
        raise RefusedError(
            f"README shows complete runs, of all shapes or with other libraries; {path} is neither"
        )
    if with_libraries:
        README.write_text(between(README.read_text(), "library table", readme_libraries(document, path)))
        print(README)
        return 0
    text = between(README.read_text(), "speed table", readme_speed(document, path))
    README.write_text(between(text, "memory table", readme_memory(document)))
    names = report.asked_of(document)
    drawn = figures.save(
        lambda: figures.speedups([document], names), machine.ROOT / "docs", "speed", document["sha256"]
    )
    print(f"{README}, {', '.join(str(path.relative_to(machine.ROOT)) for path in drawn)}")
    return 0


def shown(text: str, mark: str) -> str:
    """The name of the result file that a table in README shows."""
    found = re.search(r"from `benchmarks/results/([^`]+)`", between(text, mark))
    if found is None:
        raise RefusedError("README.md names no result file")
    return found[1]
