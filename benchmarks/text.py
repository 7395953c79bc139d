"""Numbers as words and words as numbers, and tables of plain Markdown, with nothing but Python's own library."""

import argparse
import math
from collections.abc import Sequence


def duration(seconds: float) -> str:
    """Seconds as s, ms or µs."""
    scale, unit = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    value = seconds * scale
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def size(count: float) -> str:
    """Bytes as B, KiB, MiB or GiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(count) >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count:.0f} B"


def minutes(text: str) -> float:
    """The value of an argument that is a time in minutes."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"needs a positive number of minutes, got {text!r}")
    return number


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, its columns aligned; None is an empty cell.  Of no rows an empty string."""
    if not rows:
        return ""
    cells = [
        ["" if value is None else str(value).replace("|", "\\|") for value in row] for row in (columns, *rows)
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
