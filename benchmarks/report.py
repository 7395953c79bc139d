"""``python -m benchmarks report``: tables and figures of results, and the tables of README.md and docs/benchmarks.md."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import figures, machine, providers, results, targets
from .cases import CASES, PARTS
from .results import Document, UsageError
from .targets import duration, pivot, size

times = "{:.3g}x".format
README, GUIDE = machine.ROOT / "README.md", machine.ROOT / "docs" / "benchmarks.md"
SUITES = {
    "vicreg": "VICReg, forward and backward",
    "vicregl": "VICRegL, local loss, forward and backward",
    "matching": "Patch matching, forward",
    "distributed": "Several ranks, forward and backward",
}


def markdown(rows: pd.DataFrame | Sequence[Mapping[str, object]]) -> str:
    """A Markdown table; missing values are empty."""
    frame = pd.DataFrame(rows).astype(object)
    return str(frame.where(frame.notna(), "").to_markdown(index=False, disable_numparse=True))


def _texts(frame: pd.DataFrame) -> "pd.Series[Any]":
    """A time, or why there is none."""
    return frame["median"].map(duration, na_action="ignore").fillna(frame["status"].replace("unavailable", "–"))


def tables(document: Document) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Title, table and rows of every suite and mode: each provider's time, and vicreg_fast's speed-ups and rates."""
    frame = targets.frame(document)
    for suite, mode in itertools.product(SUITES, targets.MODES):
        rows = frame[(frame["suite"] == suite) & frame["mode"].isin([mode, ""])]
        if not (rows["mode"] == mode).any():
            continue
        shown = rows.groupby("provider")["status"].transform(lambda status: (status != "unavailable").any())
        table, medians = pivot(rows[shown], _texts(rows)), pivot(rows, rows["median"])
        us = rows[rows["ours"]].set_index("shape").reindex(table.index)
        others = ("eager", "aten") if "triton" in table else ("eager",)
        rates = {f"speed-up over {name}": (medians[name], "{:.3g}x") for name in others if name in medians}
        rates |= {"samples/s": (us["samples"], "{:,.0f}"), "GB/s": (us["bytes"] / 1e9, "{:.3g}")}
        rates["TFLOP/s"] = us["operations"] / 1e12, "{:.3g}"
        rates["% of roofline"] = 100 * us["seconds"], "{:.3g}%"
        for name, (amount, words) in rates.items():
            table[name] = (amount / us["median"]).map(words.format, na_action="ignore")
        yield f"{SUITES[suite]}, mode {mode}", markdown(table.reset_index()), rows[rows["mode"] == mode]


def not_timed(document: Document) -> str:
    """Every shape and provider without a time, grouped by the reason."""
    columns = ["shape", "provider", "status", "reason"]
    shapes = [(record["name"], "all", record["status"], record["reason"]) for record in document["cases"]]
    frame = pd.concat([pd.DataFrame(shapes, columns=columns), targets.frame(document)[columns]])
    frame = frame.dropna(subset="reason")
    grouped = frame.groupby(columns[1:], sort=False)["shape"].agg(["first", "size"]).reset_index()
    return markdown(grouped.rename(columns={"first": "first shape", "size": "shapes"})) if len(frame) else ""


def summary(document: Document) -> str:
    """What a run prints."""
    parts = [f"{title}\n\n{table}" for title, table, _ in tables(document)] or ["Nothing was timed."]
    parts += [f"Not timed\n\n{table}"] if (table := not_timed(document)) else []
    return "\n\n".join(parts)


def page(document: Document) -> Iterator[str]:
    """The sections of a result's page."""
    yield f"# VICReg on {document['machine']['device']}"
    if "fixture" in document:
        yield f"**Nothing here was measured:** {document['fixture']}"
    if not document["complete"]:
        done, requested = len(document["cases"]), len(document["asked"]["shapes"])
        yield f"**Stopped after {done} of {requested} shapes.** The same command continues it."
    yield _about(document)
    sections = {"Targets": _targets(document)}
    for title, table, rows in tables(document):
        details = rows[["shape", "provider", *PARTS, "host", "rounds"]].copy()
        formats: dict[str, Callable[[Any], str]] = {"host": duration, "rounds": "{:.0f}".format}
        for name, words_of in (dict.fromkeys(PARTS, _spread) | formats).items():
            details[name] = details[name].map(words_of, na_action="ignore")
        words = "<details><summary>medians, 20 % and 80 % quantiles, host time</summary>"
        sections[title] = f"{table}\n\n{words}\n\n{markdown(details)}\n\n</details>"
    sections["Other libraries, each beside vicreg_fast with the library's definition"] = _libraries(document)
    frame = targets.frame(document).drop_duplicates(["shape", "provider"]).dropna(subset="peak")
    peaks = pivot(frame, frame["peak"].map(size))
    sections["Peak memory beyond inputs and gradients"] = markdown(peaks.reset_index()) if len(frame) else ""
    sections["Not timed"] = not_timed(document)
    for title, body in sections.items():
        if body:
            yield f"## {title}\n\n{body}"


def _spread(q: Mapping[str, float]) -> str:
    return f"{duration(q['median'])} ({duration(q['q20'])}–{duration(q['q80'])})"


def _about(document: Document) -> str:
    """What was measured on: every known key of machine, commit and sessions."""
    facts = {"machine": document["machine"], "commit": document["commit"]}
    facts |= {f"session {index}": session for index, session in enumerate(document["sessions"])}
    flat = pd.json_normalize(facts).iloc[0].dropna()
    words = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in flat]
    return markdown(pd.DataFrame({"": flat.index, "value": words}))


def _targets(document: Document) -> str:
    verdicts = [
        (record["name"], mode, f"speed-up over {name}", *verdict.values())
        for record in document["cases"]
        for mode, judged in record["targets"].items()
        for name, verdict in judged.items()
        if verdict["asked"] is not None
    ]
    frame = pd.DataFrame(verdicts, columns=["shape", "mode", "what", "target", "measured", "met"])
    frame["what"] = frame["what"].replace("speed-up over floor", "share of the roofline bound")
    for column in ("target", "measured"):
        frame[column] = frame[column].astype(float).map("{:.3g}".format, na_action="ignore")
    frame["met"] = frame["met"].map({True: "met", False: "**missed**"}).fillna("not measured")
    return markdown(frame) if verdicts else ""


def _libraries(document: Document) -> str:
    """Every library's time beside that of vicreg_fast with the library's definition."""
    frame = targets.frame(document)
    frame = frame[frame["mode"] != ""]
    if not frame["provider"].isin(providers.LIBRARIES).any():
        return ""
    frame["library"], frame["time"] = frame["provider"].str.removeprefix(providers.AS), _texts(frame)
    theirs = frame[frame["provider"].isin(providers.LIBRARIES)]
    ours = frame[frame["provider"].str.startswith(providers.AS)]
    table = theirs.merge(ours, "left", on=["library", "shape", "mode"], suffixes=("", " of ours"))
    table["library"] += " " + table["library"].map(document["libraries"]).astype(str)
    table["speed-up"] = (table["median"] / table["median of ours"]).map(times, na_action="ignore")
    table = table.rename(columns={"time": "library's time", "time of ours": "vicreg_fast"})
    return markdown(table[["library", "shape", "mode", "library's time", "vicreg_fast", "speed-up"]])


def comparison(documents: Sequence[Document]) -> Iterator[str]:
    """vicreg_fast's time at every shape in every result, and its speed relative to the first."""
    yield "# VICReg: " + " against ".join(document["machine"]["device"] for document in documents)
    labels = figures.labels(documents)
    yield "\n".join(f"- {label}" for label in labels)
    frames = [targets.frame(document) for document in documents]
    ours = [frame[frame["ours"]].set_index(["shape", "mode"]) for frame in frames]
    columns: dict[str, Any] = {}
    for label, us in zip(labels, ours, strict=True):
        first = ours[0].reindex(us.index)
        overlap = (us["q20"] <= first["q80"]) & (first["q20"] <= us["q80"]) & (label != labels[0])
        columns[label[0]] = us["median"].map(duration) + ", " + us["provider"]
        ratio = (first["median"] / us["median"]).map(times, na_action="ignore")
        columns[f"A/{label[0]}"] = ratio + overlap.map({True: " ~", False: ""})
    yield markdown(pd.DataFrame(columns).reindex(pd.concat(ours).index.unique()).reset_index())
    last = labels[-1][0]
    yield f"A/{last}: the speed of {last} as a multiple of A's. ~: the 20 % and 80 % quantiles overlap."
    for label, document in zip(labels, documents, strict=True):
        yield f"## {label}\n\n{_about(document)}"


def write(files: Sequence[str], compare: bool, out: str | None, readme: bool) -> int:
    """Write a page with figures, or README's tables, and print the path.  Raises :class:`UsageError` for a bad file."""
    paths = list(map(Path, files)) or list(results.kept(results.RESULTS))[-2 if compare else -1 :]
    if not paths:
        measure = "measure one with: python -m benchmarks run"
        raise UsageError(f"no result in {results.RESULTS}: name a file, or {measure}")
    documents = [results.load(path) for path in paths]
    if compare and len(documents) < 2:
        raise UsageError("--compare needs two result files or more")
    if readme:
        if len(documents) > 1 or out is not None or compare:
            raise UsageError("--readme takes one result file and neither --out nor --compare")
        return _write_readme(documents[0], paths[0])
    folder = Path(out or "benchmark-report")
    path = folder / ("compare.md" if compare else "report.md")
    pages = comparison(documents) if compare else itertools.chain.from_iterable(map(page, documents))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = figures.draw(documents, folder, "compare-" if compare else "")
        path.write_text("\n\n".join([*pages, *pictures]) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error
    print(f"{path}, {len(pictures)} figures")
    return 0


# -- README.md and docs/benchmarks.md -----------------------------------------------------------------------------


def blocks(document: Document, path: Path) -> dict[str, str]:
    """The texts between the markers that a kept result fills: the libraries' table, or speed and memory."""
    session, about, mode = document["sessions"][-1], document["machine"], targets.mode_of(document)
    threads = f", {about['threads']} threads" if about["kind"] == "cpu" else ""
    source = f"Measured on {about['device']}{threads}, torch {about['torch']}, on {session['date'][:10]} by "
    source += (
        f"`{session['command']}`; {figures.MODES[mode]}, medians, from `benchmarks/results/{path.name}`.\n\n"
    )
    if document["asked"]["providers"] is not None:
        return {"library table": source + _libraries(document)}
    frame = targets.frame(document)
    frame = frame[frame["has target"] & (frame["mode"] == mode)]
    eager, us = (frame[rows].set_index("shape") for rows in (frame["provider"] == "eager", frame["ours"]))

    def table(key: str, words: Callable[[float], str], ratio: str) -> str:
        columns = {"eager": eager[key].map(words), "vicreg_fast": us[key].map(words)}
        columns[ratio] = (eager[key] / us[key]).map("{:.1f}x".format)
        return source + markdown(pd.DataFrame(columns).reindex(us.index).reset_index())

    picture = figures.picture("docs/speed", f"Speed-up over eager code on {about['device']}")
    speed = f"{table('median', duration, 'speed-up')}\n\n{picture}"
    return {"speed table": speed, "memory table": table("peak", size, "eager / vicreg_fast")}


def between(text: str, mark: str, new: str | None = None) -> str | None:
    """The text between ``<!-- mark -->`` and ``<!-- end -->``; with ``new``, the whole text with that in its place.

    None where there is no such marker.
    """
    match = re.search(rf"<!-- {mark} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    if match is None:
        return None
    return match[1].rstrip("\n") if new is None else f"{text[: match.start(1)]}{new}\n{text[match.end(1) :]}"


def _write_readme(document: Document, path: Path) -> int:
    if path.resolve().parent != results.RESULTS.resolve():
        raise UsageError(f"README shows the results of {results.RESULTS}; {path} is not there")
    everything = [case.name for case in CASES if document["machine"]["kind"] in case.devices]
    whole = document["asked"] == {"shapes": everything, "providers": None, "quick": False}
    with_libraries = document["asked"]["providers"] is not None and bool(_libraries(document))
    if not document["complete"] or not (whole or with_libraries) or "fixture" in document:
        shown = "README shows complete runs, of all shapes or with other libraries"
        raise UsageError(f"{shown}; {path} is neither")
    for file in (README, GUIDE):
        text = file.read_text()
        for mark, block in blocks(document, path).items():
            text = between(text, mark, block) or text
        file.write_text(text)
    if whole:
        figures.speed_ups([document], machine.ROOT / "docs" / "speed", path.name)
    print(f"{README}, {GUIDE}")
    return 0
