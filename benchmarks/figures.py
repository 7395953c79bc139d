"""Figures of results, each for a light and a dark page."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt

from . import targets
from .providers import PROVIDERS
from .targets import duration

Document = Mapping[str, Any]
MODES = {"graph": "CUDA graphs", "launch": "called from Python"}
# matplotlib's style, the ground of GitHub's page, and the text.
_THEMES = {"light": ("default", "#ffffff", "#1f2328"), "dark": ("dark_background", "#0d1117", "#e6edf3")}
# Legible on both grounds and distinct without red and green.  Grey is eager code's.
_COLOURS = ("#8c8c8c", "#12a37f", "#3b86cc", "#d9822b", "#c9648f", "#9a7bd1", "#b5a642")


def label(document: Document) -> str:
    """A result in one line: device, versions, commit, time and mode."""
    about, date = document["machine"], document["sessions"][-1]["date"]
    words = [about["device"], f"torch {about['torch']}"]
    words += [f"Triton {about['triton']}"] * (about["kind"] == "cuda")
    words += [
        str(document["commit"]["commit"])[:7],
        date[:16].replace("T", " "),
        MODES[targets.mode_of(document)],
    ]
    words += ["quick"] * document["asked"]["quick"] + ["stopped"] * (not document["complete"])
    return ("NOT MEASURED: " if "fixture" in document else "") + ", ".join(words)


def labels(documents: Sequence[Document]) -> list[str]:
    """The label of each result after a letter: two results may have the same label."""
    return [f"{chr(ord('A') + k)}: {label(document)}" for k, document in enumerate(documents)]


def plot(
    frame: pd.DataFrame,
    path: Path,
    title: str,
    unit: Callable[[float], str],
    lines: bool = False,
    source: str = "",
) -> str:
    """Draw a series for each column of ``frame``, as bars from 1 or as lines over its index; returns HTML that shows it.

    Writes ``<path>-light.png`` and ``<path>-dark.png``, with ``source`` as PNG's text of that name.
    """
    colours = list(_COLOURS if "eager" in frame else _COLOURS[1:])
    for theme, (style, ground, text) in _THEMES.items():
        settings: dict[str, Any] = {f"{what}.facecolor": ground for what in ("figure", "axes", "savefig")}
        settings |= dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), text)
        settings |= dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
        settings |= {"font.size": 9, "axes.axisbelow": True}
        with plt.style.context([style, settings]):
            height = 4.2 if lines else 1.2 + 0.22 * len(frame) * max(1.4, frame.shape[1])
            figure, axes = plt.subplots(figsize=(8.4, height), layout="constrained")
            if lines:
                frame.plot(ax=axes, color=colours, marker="o", markersize=3.5, loglog=True, legend=False)
                axes.set_xticks(frame.index, map(str, frame.index))
            else:
                frame.plot.barh(ax=axes, color=colours, width=0.8, logx=True, legend=False, ylabel="")
                axes.invert_yaxis()
                axes.set_xlim(min(1, 0.9 * frame.min().min()), 1.6 * frame.max().max())
                for bars, column in zip(axes.containers, frame, strict=True):
                    words = frame[column].map(unit, na_action="ignore").fillna("")
                    axes.bar_label(bars, list(words), padding=3, fontsize=8)  # type: ignore[arg-type]
            (axes.yaxis if lines else axes.xaxis).set_major_formatter(lambda value, _: unit(value))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_formatter("")
            axes.grid(alpha=0.3, axis="y" if lines else "x")
            figure.suptitle(title, x=0.01, ha="left", fontsize=10)
            if frame.shape[1] > 1:
                columns = 1 if len(frame.columns[0]) > 30 else 4
                figure.legend(loc="outside lower left", frameon=False, ncols=columns)
            # No date and no version: the same result gives the same bytes on one machine.
            figure.savefig(f"{path}-{theme}.png", dpi=120, metadata={"Software": None, "Source": source})
            plt.close(figure)
    return picture(path.name, title)


def picture(path: str, words: str) -> str:
    """HTML that shows the figure that suits the reader's page."""
    return (
        f'<picture>\n<source media="(prefers-color-scheme: dark)" srcset="{path}-dark.png">\n'
        f'<img alt="{words.partition(chr(10))[0]}" src="{path}-light.png">\n</picture>'
    )


def _compared(document: Document) -> pd.DataFrame:
    """The rows of the mode of comparison."""
    frame = targets.frame(document)
    return frame[frame["mode"] == targets.mode_of(document)]


def speed_ups(documents: Sequence[Document], path: Path, source: str = "") -> list[str]:
    """Bars: the speed-up over eager code at the shapes with a target, a series for each result."""
    series = {}
    for document, name in zip(documents, labels(documents), strict=True):
        frame = _compared(document)
        frame = frame[frame["has target"]] if frame["has target"].any() else frame
        ours, eager = (
            frame[rows].set_index("shape")["median"] for rows in (frame["ours"], frame["provider"] == "eager")
        )
        series[name] = eager.reindex(ours.index) / ours
    table = pd.DataFrame(series).dropna(how="all")
    title = "Speed-up over eager code" + (f"\n{label(documents[0])}" if len(documents) == 1 else "")
    return [plot(table, path, title, "{:.3g}×".format, source=source)] if len(table) else []


def line_of(document: Document, along: str) -> tuple[str, dict[str, int]]:
    """The longest line of VICReg shapes that differ in N (or D) alone: what is fixed, and the sizes by shape."""
    other = "D" if along == "N" else "N"
    lines: dict[str, dict[str, int]] = {}
    for record in document["cases"]:
        if record["suite"] == "vicreg":
            fixed = f"{other} = {record['shape'][other]}, {record['name'].rsplit('-', 1)[1]}"
            lines.setdefault(fixed, {})[record["name"]] = record["shape"][along]
    fixed, sizes = max(lines.items(), key=lambda item: len(item[1]), default=("", {}))
    return fixed, dict(sorted(sizes.items(), key=lambda item: item[1]))


def draw(documents: Sequence[Document], folder: Path, prefix: str = "") -> list[str]:
    """All figures: speed-ups, and time over N and over D; of several results the time of vicreg_fast."""
    drawn = speed_ups(documents, folder / f"{prefix}speedups")
    for along in ("N", "D"):
        fixed, sizes = line_of(documents[0], along)
        frames = [frame[frame["shape"].isin(sizes)] for frame in map(_compared, documents)]
        title, frame = f"Time of forward and backward over {along}, at {fixed}", frames[0]
        if len(documents) == 1:
            title += f"\n{label(documents[0])}"
            table = targets.pivot(frame, frame["median"])
            table = table[[name for name in table if name in PROVIDERS]].dropna(axis=1, how="all")
            table["roofline bound"] = frame.groupby("shape")["seconds"].first()
        else:
            medians = [frame[frame["ours"]].set_index("shape")["median"] for frame in frames]
            table = pd.DataFrame(dict(zip(labels(documents), medians, strict=True)))
        table = table.reindex([shape for shape in sizes if shape in table.index])
        table = table.rename(index=sizes).rename_axis(along)
        if len(table) > 2:
            drawn.append(plot(table, folder / f"{prefix}scaling-{along}", title, duration, lines=True))
    return drawn
