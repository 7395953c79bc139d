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
_MARKS = {"highest": "o", "high": "s", "bf16": "^", "fp16": "v"}
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
    return ("NOT MEASURED: " if "fixture" in document else "") + f"{about['device']}, {versions}{state}"


def products_of(record: Record) -> str:
    """How a record multiplies, as its name says."""
    return str(record["name"].rsplit("-", 1)[1])


def _speedup(record: Record, mode: str) -> float | None:
    found = record["targets"].get(mode, {}).get("eager", {}).get("found")
    return None if found is None else float(found)


def _times(value: float) -> str:
    return f"{value:.0f}×" if value >= 20 else f"{value:.1f}×"


def speedups(documents: Sequence[Document], names: Sequence[str] | None = None) -> Figure | None:
    """Bars: how many times as fast as eager code; ``names``: of these shapes, else of those that are no sweep's."""
    ratios: list[dict[str, float]] = []
    for document in documents:
        mode = report.mode_of(document)
        records = [
            record
            for record in document["cases"]
            if (record["name"] in names if names is not None else record["title"] != "scaling")
        ]
        found = {record["name"]: _speedup(record, mode) for record in records}
        ratios.append({name: ratio for name, ratio in found.items() if ratio is not None})
    shown = list(dict.fromkeys(name for found in ratios for name in found))
    if not shown:
        return None
    height = 0.8 / len(documents)
    figure, axes = plt.subplots(figsize=(8.4, 1.3 + 0.28 * len(shown) * max(1, len(documents) * 0.7)))
    for number, (document, faster) in enumerate(zip(documents, ratios, strict=True)):
        rows = [k for k, name in enumerate(shown) if name in faster]
        values = [faster[shown[k]] for k in rows]
        places = [k + (number - (len(documents) - 1) / 2) * height for k in rows]
        colour = _SERIES[number % len(_SERIES)]
        axes.barh(places, [v - 1 for v in values], height, left=1, color=colour, label=label(document))
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                _times(value),
                (max(value, 1), place),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.set_yticks(range(len(shown)), shown, fontsize=8)
    axes.invert_yaxis()
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.margins(x=0.12)
    axes.axvline(1, color=_COLOURS["eager"], linewidth=1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("times as fast as eager code")
    _title(figure, axes, documents, "Speed-up over eager code, forward and backward")
    return figure


def _title(figure: Figure, axes: Axes, documents: Sequence[Document], words: str) -> None:
    """What is shown, and of which device; several devices are in a legend."""
    mode = {"graph": "CUDA graphs", "launch": "called from Python"}[report.mode_of(documents[0])]
    figure.suptitle(f"{words} ({mode})", fontsize=11, x=0.01, ha="left", fontweight="bold")
    if len(documents) == 1:
        figure.text(0.01, 0.005, label(documents[0]), fontsize=7.5, alpha=0.8)
    else:
        axes.legend(fontsize=7.5, loc="lower right")
    figure.tight_layout(rect=(0, 0.03, 1, 1))


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
    """Time over N and over D, log-log, with the floor drawn in; one document, or ours of several."""
    lines = [[sweep(document["cases"], along) for document in documents] for along in ("N", "D")]
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
                    colour = _COLOURS[name] if alone else _SERIES[number % len(_SERIES)]
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=colour,
                              label=name if alone else label(document))  # fmt: skip
            floors = [(r["shape"][along], r["floor"]["both"]["seconds"]) for r in records]
            axes.plot(*zip(*floors, strict=True), linestyle="--", linewidth=1, color=_COLOURS["eager"],
                      label="floor" if number == 0 else None)  # fmt: skip
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
    both[0].legend(fontsize=8)
    _title(figure, both[1], documents[:1], "Time of a step over its size")
    return figure


def memory(documents: Sequence[Document]) -> Figure | None:
    """Bars: peak memory beyond inputs and gradients, of eager code and of ours."""
    (document, *_) = documents
    mode = report.mode_of(document)
    rows = []
    for record in document["cases"]:
        us = report.ours(record, mode)
        peaks = [record["providers"].get(name, {}).get("peak_bytes") for name in ("eager", us)]
        if record["title"] != "scaling" and all(peaks):
            rows.append((record["name"], us, *peaks))
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8.4, 1.3 + 0.32 * len(rows)))
    for column, offset, name in ((2, -0.2, "eager"), (3, 0.2, None)):
        values = [row[column] for row in rows]
        places = [k + offset for k in range(len(rows))]
        colour = _COLOURS[name or str(rows[0][1])]
        axes.barh(places, values, 0.38, color=colour, label=name or f"vicreg_fast, {rows[0][1]}")
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                report.size(value), (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
    axes.set_yticks(range(len(rows)), [str(row[0]) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: report.size(value)))
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("peak memory of a step beyond inputs and gradients")
    axes.legend(fontsize=8, loc="lower right")
    _title(figure, axes, documents[:1], "Peak memory")
    return figure


def roofline(documents: Sequence[Document]) -> Figure | None:
    """Achieved operations per second over operations per byte, under the ceilings that the run measured."""
    (document, *_) = documents
    mode = report.mode_of(document)
    ceilings = document["sessions"][-1]["ceilings"]
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
    colours = dict(zip(_MARKS, ("#12a37f", "#3b86cc", "#d9822b", "#c9648f"), strict=True))
    for kind in kinds:
        ridge = rates[kind] / copy
        axes.plot([ridge, high], [rates[kind] / 1e12] * 2, color=colours[kind], linewidth=1)
        axes.annotate(f"products, {kind}: {rates[kind] / 1e12:.3g} TFLOP/s", (high, rates[kind] / 1e12), (0, 3),
                      textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    steepest = max(rates[kind] for kind in kinds) / copy if kinds else high
    axes.plot(
        [low, steepest], [low * copy / 1e12, steepest * copy / 1e12], color=_COLOURS["eager"], linewidth=1
    )
    axes.annotate(
        f"copy: {copy / 1e9:.3g} GB/s",
        (low, low * copy / 1e12),
        (4, 12),
        textcoords="offset points",
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
    axes.legend(fontsize=8, title="products", loc="lower right")
    _title(figure, axes, documents[:1], "Roofline of our backend, all shapes")
    return figure


FIGURES: dict[str, Callable[[Sequence[Document]], Figure | None]] = {
    "speedups": speedups,
    "scaling": scaling,
    "memory": memory,
    "roofline": roofline,
}


def save(draw: Callable[[], Figure | None], folder: Path, name: str) -> list[Path]:
    """A figure on both grounds, ``<name>-light.png`` and ``<name>-dark.png``; nothing where there is nothing to draw."""
    paths = []
    for theme in _THEMES:
        with _theme(theme):
            figure = draw()
            if figure is None:
                return []
            path = folder / f"{name}-{theme}.png"
            # No date and no version in the file: the same result gives the same bytes on one machine.
            figure.savefig(path, dpi=_DPI, metadata={"Software": None})
            plt.close(figure)
            paths.append(path)
    return paths


def picture(folder: str, name: str, words: str) -> str:
    """HTML that shows the one that suits the reader's ground."""
    return (
        f'<picture>\n<source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.png">\n'
        f'<img alt="{words}" src="{folder}/{name}-light.png">\n</picture>'
    )
