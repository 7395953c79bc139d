"""``python -m benchmarks report``: tables and figures of results, and the tables of README.md and docs/benchmarks.md."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import figures, frames, machine, providers, results, targets
from .cases import CASES, PARTS
from .frames import pivot
from .results import Document, UsageError
from .text import duration, size

README, GUIDE = machine.ROOT / "README.md", machine.ROOT / "docs" / "benchmarks.md"


def _spread(q: Mapping[str, float]) -> str:
    return f"{duration(q['median'])} ({duration(q['q20'])}–{duration(q['q80'])})"


times = "{:.3g}x".format
FORMATS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(PARTS, _spread),
    **dict.fromkeys(("speed-up over eager", "speed-up over aten"), times),
    **dict.fromkeys(("GB/s", "TFLOP/s", "target", "measured"), "{:.3g}".format),
    "% of roofline": "{:.3g}%".format,
    "samples/s": "{:,.0f}".format,
    "host": duration,
    "rounds": "{:.0f}".format,
}


def markdown(rows: pd.DataFrame | Sequence[Mapping[str, object]]) -> str:
    """A Markdown table, its columns formatted by name; missing values are empty.  Of no rows an empty string."""
    frame = pd.DataFrame(rows).astype(object)
    for name in FORMATS.keys() & set(frame):
        frame[name] = frame[name].map(FORMATS[name], na_action="ignore")
    return (
        str(frame.astype(object).fillna("").to_markdown(index=False, disable_numparse=True))
        if len(frame)
        else ""
    )


def tables(document: Document) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Title, table and rows of every suite and mode: each provider's time, and vicreg_fast's speed-ups and rates."""
    frame = frames.frame(document)
    for (suite, mode), rows in frame[frame["mode"] != ""].groupby(["suite", "mode"], sort=False):
        table, medians = pivot(rows, "time"), pivot(rows, "median")
        table = table.loc[:, (table.fillna("–") != "–").any()]
        us = rows[rows["ours"]].set_index("shape")
        for name in ("eager", "aten") if "triton" in table else ("eager",):
            if name in table:
                table[f"speed-up over {name}"] = medians[name] / us["median"]
        table["samples/s"] = us["samples"] / us["median"]
        table["GB/s"] = us["bytes"] / us["median"] / 1e9
        table["TFLOP/s"] = us["operations"] / us["median"] / 1e12
        table["% of roofline"] = 100 * us["seconds"] / us["median"]
        yield f"Suite {suite}, mode {mode}", markdown(table.reset_index()), rows


def not_timed(document: Document) -> str:
    """Every shape and provider without a time, grouped by the reason."""
    shapes = pd.DataFrame(document["cases"], columns=["name", "status", "reason"]).rename(
        columns={"name": "shape"}
    )
    columns = ["shape", "provider", "status", "reason"]
    frame = pd.concat([shapes.assign(provider="all"), frames.frame(document)[columns]]).dropna(subset="reason")
    grouped = frame.groupby(columns[1:], sort=False)["shape"].agg(
        **{"first shape": "first", "shapes": "nunique"}
    )
    return markdown(grouped.reset_index())


def summary(document: Document) -> str:
    """What a run prints."""
    parts = [f"{title}\n\n{table}" for title, table, _ in tables(document)] or ["Nothing was timed."]
    if table := not_timed(document):
        parts.append(f"Not timed\n\n{table}")
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
        details = rows.dropna(subset="median")[["shape", "provider", *PARTS, "host", "rounds"]]
        words = "<details><summary>medians, 20 % and 80 % quantiles, host time</summary>"
        sections[title] = f"{table}\n\n{words}\n\n{markdown(details)}\n\n</details>"
    sections["Other libraries, each beside vicreg_fast with the library's definition"] = _libraries(document)
    frame = frames.frame(document).drop_duplicates(["shape", "provider"]).dropna(subset="peak")
    peaks = pivot(frame, "peak").map(size, na_action="ignore")
    sections["Peak memory beyond inputs and gradients"] = markdown(peaks.reset_index())
    sections["Not timed"] = not_timed(document)
    yield from (f"## {title}\n\n{body}" for title, body in sections.items() if body)


def _about(document: Document) -> str:
    """What was measured on: every known key of machine, commit and sessions."""
    sessions = {f"session {index}": session for index, session in enumerate(document["sessions"])}
    facts = {"machine": document["machine"], "commit": document["commit"]} | sessions
    flat = pd.json_normalize(facts).iloc[0].dropna()
    words = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in flat]
    return markdown(pd.DataFrame({"": flat.index, "value": words}))


def _targets(document: Document) -> str:
    words = {True: "met", False: "**missed**", None: "not measured"}
    verdicts = [
        (record["name"], mode, name, verdict["asked"], verdict["found"], words[verdict["met"]])
        for record in document["cases"]
        for mode, judged in record["targets"].items()
        for name, verdict in judged.items()
        if verdict["asked"] is not None
    ]
    frame = pd.DataFrame(verdicts, columns=["shape", "mode", "speed-up over", "target", "measured", "met"])
    return markdown(frame.replace("floor", "roofline bound"))


def _libraries(document: Document) -> str:
    """Every library's time beside that of vicreg_fast with the library's definition."""
    frame = frames.frame(document)
    frame = frame[(frame["mode"] != "") & (frame["status"] != "unavailable")]
    frame["library"] = frame["provider"].str.removeprefix(providers.AS)
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
    ours = [frame[frame["ours"]].set_index(["shape", "mode"]) for frame in map(frames.frame, documents)]
    index = pd.concat(ours).index.unique()
    first = ours[0].reindex(index)
    table = pd.DataFrame(index=index)
    for label, us in zip(labels, (us.reindex(index) for us in ours), strict=True):
        letter = label[0]
        table[letter] = us["time"] + ", " + us["provider"]
        if letter != "A":
            overlap = (us["q20"] <= first["q80"]) & (first["q20"] <= us["q80"])
            ratio = (first["median"] / us["median"]).map(times, na_action="ignore")
            table[f"A/{letter}"] = ratio + overlap.map({True: " ~", False: ""})
    yield markdown(table.reset_index())
    yield "A/B: the speed of B as a multiple of A's. ~: the 20 % and 80 % quantiles overlap."
    for label, document in zip(labels, documents, strict=True):
        yield f"## {label}\n\n{_about(document)}"


def write(files: Sequence[str], compare: bool, out: str | None, readme: bool) -> int:
    """Write a page with figures, or README's tables, and print the path.  Raises :class:`UsageError` for a bad file."""
    paths = list(map(Path, files)) or list(results.kept(results.RESULTS))[-2 if compare else -1 :]
    if not paths:
        raise UsageError(f"no result in {results.RESULTS}: name a file, or measure: python -m benchmarks run")
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
    source += f"`{session['command']}`; {figures.MODES[mode]}, medians, from `benchmarks/results/{path.name}`."
    if document["asked"]["providers"] is not None:
        return {"library table": f"{source}\n\n{_libraries(document)}"}
    frame = frames.frame(document)
    frame = frame[frame["has target"] & (frame["mode"] == mode)]
    eager, us = (frame[rows].set_index("shape") for rows in (frame["provider"] == "eager", frame["ours"]))

    def table(key: str, words: Callable[[float], str], ratio: str) -> str:
        columns = {"eager": eager[key].map(words), "vicreg_fast": us[key].map(words)}
        columns[ratio] = (eager[key] / us[key]).map("{:.1f}x".format)
        return f"{source}\n\n{markdown(pd.DataFrame(columns).reindex(us.index).reset_index())}"

    picture = figures.picture("docs/speed", f"Speed-up over eager code on {about['device']}")
    return {
        "speed table": f"{table('median', duration, 'speed-up')}\n\n{picture}",
        "memory table": table("peak", size, "eager / vicreg_fast"),
    }


def between(mark: str) -> re.Pattern[str]:
    """Matches the text between ``<!-- mark -->`` and ``<!-- end -->``."""
    return re.compile(rf"(?<=<!-- {mark} -->\n).*?(?=\n<!-- end -->)", re.DOTALL)


def _write_readme(document: Document, path: Path) -> int:
    if path.resolve().parent != results.RESULTS.resolve():
        raise UsageError(f"README shows the results of {results.RESULTS}; {path} is not there")
    everything = [case.name for case in CASES if document["machine"]["kind"] in case.devices]
    whole = document["asked"] == {"shapes": everything, "providers": None, "quick": False}
    with_libraries = document["asked"]["providers"] is not None and bool(_libraries(document))
    if not document["complete"] or not (whole or with_libraries) or "fixture" in document:
        raise UsageError(
            f"README shows complete runs, of all shapes or with other libraries; {path} is neither"
        )
    for file in (README, GUIDE):
        text = file.read_text()
        for mark, block in blocks(document, path).items():
            if found := between(mark).search(text):
                text = text[: found.start()] + block + text[found.end() :]
        file.write_text(text)
    if whole:
        figures.speed_ups([document], machine.ROOT / "docs" / "speed")
    print(f"{README}, {GUIDE}")
    return 0
