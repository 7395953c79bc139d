"""Figures of results, each for a light and a dark page."""

import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt

from . import frames, targets
from .providers import PROVIDERS
from .text import duration

Document = Mapping[str, Any]
MODES = {"graph": "CUDA graphs", "launch": "called from Python"}
_STYLES = {"light": "default", "dark": "dark_background"}
_SETTINGS = {"font.size": 9, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}
# Legible on both grounds and distinct without red and green.  Grey is eager code's.
_COLOURS = ["#8c8c8c", "#12a37f", "#3b86cc", "#d9822b", "#c9648f", "#9a7bd1", "#b5a642"]


def label(document: Document) -> str:
    """A result in one line: device, versions, commit, time and mode."""
    about, date = document["machine"], document["sessions"][-1]["date"][:16].replace("T", " ")
    words = [about["device"], f"torch {about['torch']}", f"Triton {about['triton']}"]
    words += [str(document["commit"]["commit"])[:7], date, MODES[targets.mode_of(document)]]
    words += ["quick"] * document["asked"]["quick"] + ["stopped"] * (not document["complete"])
    return ("NOT MEASURED: " if "fixture" in document else "") + ", ".join(words)


def labels(documents: Sequence[Document]) -> list[str]:
    """The label of each result after a letter: two results may have the same label."""
    return [f"{string.ascii_uppercase[k]}: {label(document)}" for k, document in enumerate(documents)]


def plot(table: pd.DataFrame, path: Path, title: str, unit: Callable[[float], str], lines: bool = False) -> str:
    """Draw each column of ``table``, as bars from 1 or as lines over its index; returns HTML that shows the figure.

    Writes ``<path>-light.png`` and ``<path>-dark.png``, whose metadata have the title.
    """
    colours = _COLOURS if "eager" in table else _COLOURS[1:]
    for theme, style in _STYLES.items():
        with plt.style.context([style, _SETTINGS]):
            height = 4.2 if lines else 1.2 + 0.22 * len(table) * max(1.4, table.shape[1])
            figure, axes = plt.subplots(figsize=(8.4, height), layout="constrained")
            if lines:
                table.plot(ax=axes, color=colours, marker="o", markersize=3.5, loglog=True, legend=False)
                axes.set_xticks(table.index, map(str, table.index))
            else:
                table.plot.barh(ax=axes, color=colours, width=0.8, logx=True, legend=False, ylabel="")
                axes.invert_yaxis()
                axes.set_xlim(min(1, 0.9 * table.min().min()), 1.6 * table.max().max())
                for bars in axes.containers:
                    axes.bar_label(bars, fmt=unit, padding=3, fontsize=8)  # type: ignore[arg-type]
            (axes.yaxis if lines else axes.xaxis).set_major_formatter(lambda value, _: unit(value))
            axes.xaxis.set_minor_formatter("")
            axes.yaxis.set_minor_formatter("")
            axes.grid(alpha=0.3, axis="y" if lines else "x")
            figure.suptitle(title, x=0.01, ha="left", fontsize=10)
            if table.shape[1] > 1:
                columns = 1 if len(table.columns[0]) > 30 else 4
                figure.legend(loc="outside lower left", frameon=False, ncols=columns)
            # No date and no version: the same result gives the same bytes on one machine.
            metadata = {"Software": None, "Title": title}
            figure.savefig(f"{path}-{theme}.png", dpi=120, metadata=metadata)
            plt.close(figure)
    return picture(path.name, title.splitlines()[0])


def picture(path: str, words: str) -> str:
    """HTML that shows the figure that suits the reader's page."""
    return (
        f'<picture>\n<source media="(prefers-color-scheme: dark)" srcset="{path}-dark.png">\n'
        f'<img alt="{words}" src="{path}-light.png">\n</picture>'
    )


def _compared(document: Document) -> pd.DataFrame:
    frame = frames.frame(document)
    return frame[frame["mode"] == targets.mode_of(document)]


def speed_ups(documents: Sequence[Document], path: Path) -> list[str]:
    """Bars: the speed-up over eager code at the shapes with a target, a series for each result."""
    series = {}
    for name, frame in zip(labels(documents), map(_compared, documents), strict=True):
        frame = frame[frame["has target"]] if frame["has target"].any() else frame
        eager = frame[frame["provider"] == "eager"].set_index("shape")["median"]
        series[name] = eager / frame[frame["ours"]].set_index("shape")["median"]
    table = pd.concat(series, axis=1).dropna(how="all")
    title = "Speed-up over eager code" + (f"\n{label(documents[0])}" if len(documents) == 1 else "")
    return [plot(table, path, title, "{:.3g}×".format)] if len(table) else []


def line_of(document: Document, along: str) -> tuple[str, dict[str, int]]:
    """The longest line of VICReg shapes that differ in N (or D) alone: what is fixed, and the sizes by shape."""
    other = "D" if along == "N" else "N"
    lines: dict[str, dict[str, int]] = {}
    for record in document["cases"]:
        if record["suite"] == "vicreg":
            fixed = f"{other} = {record['shape'][other]}, {record['name'].rsplit('-', 1)[1]}"
            lines.setdefault(fixed, {})[record["name"]] = record["shape"][along]
    return max(lines.items(), key=lambda item: len(item[1]), default=("", {}))


def draw(documents: Sequence[Document], folder: Path, prefix: str = "") -> list[str]:
    """All figures: speed-ups, and time over N and over D; of several results the time of vicreg_fast."""
    drawn = speed_ups(documents, folder / f"{prefix}speedups")
    compared = [frame.set_index("shape", drop=False) for frame in map(_compared, documents)]
    for along in ("N", "D"):
        fixed, sizes = line_of(documents[0], along)
        title = f"Time of forward and backward over {along}, at {fixed}"
        if len(documents) == 1:
            title += f"\n{label(documents[0])}"
            table = frames.pivot(compared[0], "median").filter(PROVIDERS)
            table["roofline bound"] = compared[0].groupby(level=0)["seconds"].first()
        else:
            medians = [frame.loc[frame["ours"], "median"] for frame in compared]
            table = pd.concat(medians, axis=1, keys=labels(documents))
        table = (
            table[table.index.isin(sizes)]
            .dropna(axis=1, how="all")
            .rename(index=sizes)
            .rename_axis(along)
            .sort_index()
        )
        if len(table) > 2:
            drawn.append(plot(table, folder / f"{prefix}scaling-{along}", title, duration, lines=True))
    return drawn
