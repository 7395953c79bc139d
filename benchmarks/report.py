"""``python -m benchmarks report``: tables and figures of results, and the tables of README.md and docs/benchmarks.md."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import figures, machine, providers, results, targets
from .cases import CASES, PARTS
from .results import Document, UsageError
from .targets import duration, size

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


def _pivot(frame: pd.DataFrame, values: "pd.Series[Any]") -> pd.DataFrame:
    """A row for each shape and a column for each provider, both in order."""
    wide = frame.assign(values=values).pivot(index="shape", columns="provider", values="values")
    order = [name for name in providers.names() if name in wide]
    return wide.reindex(index=frame["shape"].unique(), columns=order)


def tables(document: Document) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Title, table and rows of every suite and mode: each provider's time, and vicreg_fast's speed-ups and rates."""
    frame = targets.frame(document)
    for suite, mode in ((suite, mode) for suite in SUITES for mode in targets.MODES):
        rows = frame[(frame["suite"] == suite) & frame["mode"].isin([mode, ""])]
        if not (rows["mode"] == mode).any():
            continue
        shown = rows.groupby("provider")["status"].transform(lambda status: (status != "unavailable").any())
        table, medians = _pivot(rows[shown], _texts(rows)), _pivot(rows, rows["median"])
        us = rows[rows["ours"]].set_index("shape").reindex(table.index)
        rates = {
            f"speed-up over {name}": (medians[name], "{:.3g}x") for name in ("eager", "aten") if name in medians
        }
        if "triton" not in table:
            rates.pop("speed-up over aten", None)
        rates |= {"samples/s": (us["samples"], "{:,.0f}"), "GB/s": (us["bytes"] / 1e9, "{:.3g}")}
        rates |= {
            "TFLOP/s": (us["operations"] / 1e12, "{:.3g}"),
            "% of roofline": (100 * us["bound"], "{:.3g}%"),
        }
        for name, (amount, words) in rates.items():
            table[name] = (amount / us["median"]).map(words.format, na_action="ignore")
        yield f"{SUITES[suite]}, mode {mode}", markdown(table.reset_index()), rows[rows["mode"] == mode]


def not_timed(document: Document) -> str:
    """Every shape and provider without a time, grouped by the reason."""
    columns = ["shape", "provider", "status", "reason"]
    shapes = pd.DataFrame(
        [(r["name"], "all", r["status"], r["reason"]) for r in document["cases"]], columns=columns
    )
    frame = pd.concat([shapes, targets.frame(document)[columns]]).dropna(subset="reason")
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
        details = rows[["shape", "provider"]].copy()
        for part in PARTS:
            details[part] = rows[part].map(_spread, na_action="ignore")
        details["host"] = rows["host"].map(duration, na_action="ignore")
        details["rounds"] = rows["rounds"].map("{:.0f}".format, na_action="ignore")
        words = "<details><summary>medians, 20 % and 80 % quantiles, host time</summary>"
        sections[title] = f"{table}\n\n{words}\n\n{markdown(details)}\n\n</details>"
    sections["Other libraries, each beside vicreg_fast with the library's definition"] = _libraries(document)
    frame = targets.frame(document).drop_duplicates(["shape", "provider"]).dropna(subset="peak")
    peaks = _pivot(frame, frame["peak"].map(size))
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
        (
            record["name"],
            mode,
            "share of the roofline bound" if name == "floor" else f"speed-up over {name}",
            *v.values(),
        )
        for record in document["cases"]
        for mode, judged in record["targets"].items()
        for name, v in judged.items()
        if v["asked"] is not None
    ]
    frame = pd.DataFrame(verdicts, columns=["shape", "mode", "what", "target", "measured", "met"])
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
    both = theirs.merge(
        frame[frame["provider"].str.startswith(providers.AS)], "left", on=["library", "shape", "mode"]
    )
    table = both[["library", "shape", "mode"]].assign(
        library=[f"{n} {document['libraries'][n]}" for n in both["library"]]
    )
    table["library's time"], table["vicreg_fast"] = both["time_x"], both["time_y"]
    return markdown(
        table.assign(**{"speed-up": (both["median_x"] / both["median_y"]).map(times, na_action="ignore")})
    )


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
    paths = [Path(name) for name in files]
    if not paths:
        paths = list(results.kept(results.RESULTS))[-2 if compare else -1 :]
    if not paths:
        raise UsageError(
            f"no result in {results.RESULTS}: name a file, or measure one with: python -m benchmarks run"
        )
    documents = [results.load(path) for path in paths]
    if compare and len(documents) < 2:
        raise UsageError("--compare needs two result files or more")
    if readme:
        if len(documents) > 1 or out is not None or compare:
            raise UsageError("--readme takes one result file and neither --out nor --compare")
        return _write_readme(documents[0], paths[0])
    folder, prefix = Path(out or "benchmark-report"), "compare-" if compare else ""
    path = folder / ("compare.md" if compare else "report.md")
    pages = (
        comparison(documents) if compare else (section for document in documents for section in page(document))
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = figures.draw(documents, folder, prefix)
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
        f"`{session['command']}`; {'CUDA graphs' if mode == 'graph' else 'called from Python'}, medians, from "
    )
    source += f"`benchmarks/results/{path.name}`.\n\n"
    if document["asked"]["providers"] is not None:
        return {"library table": source + _libraries(document)}
    frame = targets.frame(document)
    frame = frame[frame["has target"] & (frame["mode"] == mode)]
    eager, us = (frame[rows].set_index("shape") for rows in (frame["provider"] == "eager", frame["ours"]))
    texts = {}
    for mark, key, words, ratio in (
        ("speed", "median", duration, "speed-up"),
        ("memory", "peak", size, "eager / vicreg_fast"),
    ):
        table = pd.DataFrame({"eager": eager[key].map(words), "vicreg_fast": us[key].map(words)})
        table[ratio] = (eager[key] / us[key]).map("{:.1f}x".format)
        texts[f"{mark} table"] = source + markdown(table.reindex(us.index).reset_index())
    picture = figures.picture("docs/speed", f"Speed-up over eager code on {about['device']}")
    return texts | {"speed table": f"{texts['speed table']}\n\n{picture}"}


def between(text: str, mark: str, new: str | None = None) -> str | None:
    """The text between ``<!-- mark -->`` and ``<!-- end -->``; with ``new``, the whole text with that in its place.

    None where there is no such marker.
    """
    found = re.search(rf"(<!-- {mark} -->\n)(.*?)(<!-- end -->)", text, re.DOTALL)
    if found is None:
        return None
    return found[2].rstrip("\n") if new is None else f"{text[: found.start(2)]}{new}\n{text[found.end(2) :]}"


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
            text = between(text, mark, block) or text
        file.write_text(text)
    if whole:
        figures.speed_ups([document], machine.ROOT / "docs" / "speed", path.name)
    print(f"{README}, {GUIDE}")
    return 0
