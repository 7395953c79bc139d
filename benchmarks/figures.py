"""Figures of results, each once on light ground and once on dark: speed-ups, scaling, memory, roofline."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from . import report
from .providers import PROVIDERS
from .report import Record

Document = Mapping[str, Any]
# Ground, text, grid.
_THEMES = {"light": ("#ffffff", "#1f2328", "#d0d7de"), "dark": ("#0d1117", "#e6edf3", "#30363d")}
# Seen well on both grounds, and told apart without red and green.
_COLOURS = {
    "eager": "#8c8c8c",
    "compile": "#d9822b",
    "cdist": "#c9648f",
    "bmm": "#9a7bd1",
    "aten": "#3b86cc",
    "triton": "#12a37f",
}
_SERIES = ("#12a37f", "#3b86cc", "#d9822b", "#c9648f", "#9a7bd1", "#8c8c8c")  # of several documents
_MARKS = {"highest": "o", "high": "s", "bf16": "^"}
_PRODUCTS = {"highest": "float32", "high": "TF32 products of float32", "bf16": "bfloat16"}
_NAMES = "names end with the products: highest float32, high TF32 of float32, bf16 of bfloat16 inputs"
_DPI = 130


@contextmanager
def _theme(name: str) -> Iterator[None]:
    ground, text, grid = _THEMES[name]
    settings: Any = {
        "figure.facecolor": ground,
        "axes.facecolor": ground,
        "savefig.facecolor": ground,
        "text.color": text,
        "axes.labelcolor": text,
        "axes.edgecolor": grid,
        "xtick.color": text,
        "ytick.color": text,
        "grid.color": grid,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "font.size": 10,
    }
    with plt.rc_context(settings):
        yield


def label(document: Document) -> str:
    """A result in a line: what it was measured on."""
    about, commit = document["machine"], document["commit"]
    versions = f"torch {about['torch']}"
    if about["kind"] == "cuda":
        versions += f", Triton {about['triton']}"
    state = "" if commit["commit"] is None else f", {commit['commit'][:7]}" + ("+" if commit["dirty"] else "")
    state += f", {document['sessions'][-1]['date'][:16].replace('T', ' ')}"  # two results may be of one day
    state += (", quick" if document["asked"]["quick"] else "") + ("" if document["complete"] else ", stopped")
    return ("NOT MEASURED: " if "fixture" in document else "") + f"{about['device']}, {versions}{state}"


def marks(documents: Sequence[Document]) -> list[str]:
    """A letter for each: two results may be of the same device and versions."""
    return [chr(ord("A") + k) for k in range(len(documents))]


def _marked(documents: Sequence[Document]) -> list[str]:
    return [f"{mark}: {label(document)}" for mark, document in zip(marks(documents), documents, strict=True)]


def products_of(record: Record) -> str:
    """How a record multiplies, as its name says."""
    return str(record["name"].rsplit("-", 1)[1])


def _times(value: float) -> str:
    return f"{value:.0f}×" if value >= 20 else f"{value:.1f}×" if value >= 2 else f"{value:.2f}×"


def _bars(
    axes: Axes,
    rows: Sequence[str],
    series: Mapping[str, Mapping[str, float]],
    colours: Sequence[str],
    words: Any,
) -> None:
    """Horizontal bars of each row, one for each series that has it, from 1; ``words`` writes the value behind it."""
    height = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        there = [row for row in rows if row in values]
        places = [rows.index(row) + (number - (len(series) - 1) / 2) * height for row in there]
        lengths = [values[row] - 1 for row in there]
        axes.barh(places, lengths, height, left=1, color=colours[number % len(colours)], label=name)
        for place, row in zip(places, there, strict=True):
            axes.annotate(
                words(values[row]), (max(values[row], 1), place), (3, 0), textcoords="offset points", va="center", fontsize=7
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)


def speedups(documents: Sequence[Document], names: Sequence[str] | None = None) -> Figure | None:
    """Bars: how many times as fast as eager code.

    Of one document by shape and kind of product, sweeps left out; of several, of the shapes of which a speed-up is asked.
    ``names``: of these shapes.
    """
    series: dict[str, dict[str, float]] = {}
    rows: list[str] = []
    for document, marked in zip(documents, _marked(documents), strict=True):
        mode = report.mode_of(document)
        alone = len(documents) == 1
        shapes = report.asked_of(document) if names is None and not alone else names
        for record in document["cases"]:
            found = record["targets"].get(mode, {}).get("eager", {}).get("found")
            if found is None or (shapes is None and record["title"] == "scaling"):
                continue
            if shapes is None or record["name"] in shapes:
                kind = products_of(record) if alone else marked
                row = record["name"].removesuffix(f"-{kind}")
                series.setdefault(kind, {})[row] = float(found)
                rows += [row] if row not in rows else []
    if not rows:
        return None
    series = {kind: series[kind] for kind in (*_MARKS, *series) if kind in series}
    if len(documents) == 1 and len(series) == 1:  # then nothing else says which
        ((kind, values),) = series.items()
        rows = [f"{row}-{kind}" for row in rows]
        series = {kind: dict(zip(rows, values.values(), strict=True))}
    figure, axes = plt.subplots(figsize=(8.4, max(3.0, 1.5 + 0.13 * len(rows) * (1 + len(series)))))
    _bars(axes, rows, series, _SERIES, _times)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.axvline(1, color=_COLOURS["eager"], linewidth=1)
    axes.set_xlabel("times as fast as eager code")
    words = "Speed-up over eager code"
    if not any(row.startswith("matching") for row in rows):
        words += ", forward and backward"
    if len(documents) == 1 and len(series) == 1:
        words += f", {_PRODUCTS[next(iter(series))]}"
    _title(figure, axes, documents, words, legend=len(series) > 1)
    return figure


def _title(figure: Figure, axes: Axes, documents: Sequence[Document], words: str, legend: bool) -> None:
    """What is shown, and of which device; the legend is below, where nothing is hidden."""
    how = {"graph": "CUDA graphs", "launch": "called from Python"}
    mode = " and ".join(dict.fromkeys(how[report.mode_of(document)] for document in documents))
    inch = 1 / figure.get_figheight()
    figure.suptitle(
        f"{words} ({mode})", fontsize=11, x=0.01, y=1 - 0.08 * inch, ha="left", va="top", fontweight="bold"
    )
    foot = [_NAMES] if len(documents) > 1 else [label(documents[0]), _NAMES]
    figure.text(0.01, 0.06 * inch, "\n".join(foot), fontsize=7.5, alpha=0.8)
    bottom = 0.45 * inch
    if legend:
        many = len(documents) > 1
        handles, names = axes.get_legend_handles_labels()
        figure.legend(
            handles, names, fontsize=8, loc="lower left", bbox_to_anchor=(0, bottom), ncols=1 if many else 6
        )
        bottom += (0.2 * (len(names) if many else 1) + 0.1) * inch
    figure.tight_layout(rect=(0, bottom, 1, 1 - 0.3 * inch))


def sweep(records: Sequence[Record], along: str) -> tuple[int, list[Record]]:
    """The records in which N (or D) varies most while the other stays, at one product: the other, and they."""
    other = "D" if along == "N" else "N"
    lines: dict[tuple[int, str], dict[int, Record]] = {}
    for record in records:
        if record["suite"] == "vicreg":
            line = lines.setdefault((record["shape"][other], products_of(record)), {})
            line[record["shape"][along]] = record
    (fixed, _), found = max(lines.items(), key=lambda item: len(item[1]), default=((0, ""), {}))
    return fixed, [found[key] for key in sorted(found)]


def scaling(documents: Sequence[Document]) -> Figure | None:
    """Time over N and over D, log-log, with the floor drawn in; one document, or ours of several.

    Of several those that have the lines and the mode of the first: others are not what this one is compared with.
    """

    def lines_of(document: Document) -> list[tuple[int, list[Record]]]:
        return [sweep(document["cases"], along) for along in ("N", "D")]

    def alike(document: Document) -> bool:
        def what(found: Document) -> Any:
            line = [(fixed, {products_of(record) for record in records}) for fixed, records in lines_of(found)]
            return report.mode_of(found), line

        return bool(what(document) == what(documents[0]))

    names = [name for name, document in zip(_marked(documents), documents, strict=True) if alike(document)]
    documents = [document for document in documents if alike(document)]
    lines = list(zip(*(lines_of(document) for document in documents), strict=True))
    if any(len(records) < 3 for sweeps in lines for _, records in sweeps):
        return None
    figure, both = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True)
    for axes, along, sweeps in zip(both, ("N", "D"), lines, strict=True):
        for number, (document, (_, records)) in enumerate(zip(documents, sweeps, strict=True)):
            mode = report.mode_of(document)
            alone = len(documents) == 1
            for name in (
                PROVIDERS if alone else (next(filter(None, (report.ours(r, mode) for r in records)), "aten"),)
            ):
                points = [(r["shape"][along], report.seconds(r, name, mode)) for r in records]
                points = [(x, y) for x, y in points if y is not None]
                if len(points) > 1:
                    colour = _COLOURS.get(name, _SERIES[4]) if alone else _SERIES[number % len(_SERIES)]
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=colour,
                              label=name if alone else names[number])  # fmt: skip
            floors = [(r["shape"][along], r["floor"]["both"]["seconds"]) for r in records]
            axes.plot(*zip(*floors, strict=True), linestyle="--", linewidth=1,
                      color=_COLOURS["eager"] if alone else colour,
                      label="floor" if alone else f"floor of {names[number].partition(':')[0]}")  # fmt: skip
        other = "D" if along == "N" else "N"
        fixed, records = sweeps[0]
        axes.axvline(fixed, linewidth=0.8, linestyle=":", color=_COLOURS["eager"])
        axes.annotate("N = D", (fixed, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=8,
                      xytext=(-11, 0), textcoords="offset points")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: report.duration(value)))
        axes.set_xlabel(f"{along}, at {other} = {fixed} ({records[0]['dtype']}, {records[0]['precision']})")
        axes.tick_params(axis="x", labelsize=8)
    both[0].set_ylabel("forward and backward")
    _title(figure, both[0], documents, "Time of a step over its size", legend=True)
    return figure


def memory(documents: Sequence[Document]) -> Figure | None:
    """Bars: peak memory beyond inputs and gradients, of eager code and of ours."""
    (document, *_) = documents
    mode = report.mode_of(document)
    series: dict[str, dict[str, float]] = {}
    shapes = report.asked_of(document) or [record["name"] for record in document["cases"]]
    for record in document["cases"]:
        us = report.ours(record, mode)
        peaks = {name: report.peak(record, name) for name in ("eager", us) if name is not None}
        if record["name"] in shapes and us is not None and all(peaks.values()):
            for name, peak in peaks.items():
                series.setdefault("eager" if name == "eager" else "vicreg_fast", {})[record["name"]] = peak or 0
    if not series:
        return None
    rows = list(series["eager"])
    figure, axes = plt.subplots(figsize=(8.4, max(3.0, 1.5 + 0.38 * len(rows))))
    _bars(axes, rows, series, (_COLOURS["eager"], _SERIES[0]), report.size)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: report.size(value)))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(left=min(min(values.values()) for values in series.values()) / 4)
    axes.set_xlabel("peak memory of a step beyond inputs and gradients")
    _title(figure, axes, documents[:1], "Peak memory", legend=True)
    return figure


def roofline(documents: Sequence[Document]) -> Figure | None:
    """Achieved operations per second over operations per byte, under the ceilings that the run measured."""
    (document, *_) = documents
    mode = report.mode_of(document)
    # A run that was continued found them once more: nearly the same.
    ceilings = next((found for s in reversed(document["sessions"]) if (found := s["ceilings"])), None)
    points: dict[str, list[tuple[float, float]]] = {}
    for record in document["cases"]:
        us = report.ours(record, mode)
        if us is None:
            continue
        least = record["floor"][report.part_of(record)]
        rate = least["operations"] / float(report.seconds(record, us, mode) or 1.0)
        points.setdefault(products_of(record), []).append((least["operations"] / least["bytes"], rate / 1e12))
    if not points or ceilings is None:
        return None
    figure, axes = plt.subplots(figsize=(7.2, 4.8))
    rates = ceilings["operations_per_s"]
    kinds = [kind for kind in rates if kind in points]
    copy = ceilings["copy_bytes_per_s"]
    every = [x for found in points.values() for x, _ in found]
    low, high = min(every) / 2, max([*every, max(rates.values()) / copy]) * 3
    colours = dict(zip(_MARKS, ("#12a37f", "#3b86cc", "#d9822b"), strict=True))
    for rate in dict.fromkeys(rates[kind] for kind in kinds):
        alike = [kind for kind in kinds if rates[kind] == rate]
        axes.plot([rate / copy, high], [rate / 1e12] * 2, color=colours[alike[0]], linewidth=1)
        axes.annotate(f"products, {', '.join(alike)}: {rate / 1e12:.3g} TFLOP/s", (high, rate / 1e12), (0, 3),
                      textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    steepest = max(rates[kind] for kind in kinds) / copy if kinds else high
    axes.plot(
        [low, steepest], [low * copy / 1e12, steepest * copy / 1e12], color=_COLOURS["eager"], linewidth=1
    )
    axes.annotate(
        f"copy: {copy / 1e9:.0f} GB/s",
        (steepest, steepest * copy / 1e12),
        (-10, -4),  # above the line, where no point can be
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    for kind, found in points.items():
        x, y = zip(*found, strict=True)
        axes.scatter(x, y, 22, marker=_MARKS[kind], color=colours[kind], label=kind)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("least operations per least byte")
    axes.set_ylabel("TFLOP/s of the least operations")
    _title(figure, axes, documents[:1], "Roofline of our backend, all shapes", legend=True)
    return figure


FIGURES: dict[str, Callable[[Sequence[Document]], Figure | None]] = {
    "speedups": speedups,
    "scaling": scaling,
    "memory": memory,
    "roofline": roofline,
}


def save(draw: Callable[[], Figure | None], folder: Path, name: str, source: str = "") -> list[Path]:
    """A figure on both grounds, ``<name>-light.png`` and ``<name>-dark.png``; nothing where there is nothing to draw.

    ``source`` is written into the files, as PNG's key of that name.
    """
    paths = []
    for theme in _THEMES:
        with _theme(theme):
            figure = draw()
            if figure is None:
                return []
            path = folder / f"{name}-{theme}.png"
            # No date and no version in the file: the same result gives the same bytes on one machine.
            figure.savefig(path, dpi=_DPI, metadata={"Software": None, "Source": source})
            plt.close(figure)
            paths.append(path)
    return paths


def picture(folder: str, name: str, words: str) -> str:
    """HTML that shows the one that suits the reader's ground."""
    return (
        f'<picture>\n<source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.png">\n'
        f'<img alt="{words}" src="{folder}/{name}-light.png">\n</picture>'
    )
