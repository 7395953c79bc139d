"""All times of a result as one pandas table."""

import itertools
from collections.abc import Mapping
from typing import Any

import pandas as pd

from .cases import PARTS
from .providers import names
from .targets import modes_of, ours, part_of
from .text import duration

_COLUMNS = dict.fromkeys(("suite", "shape", "provider", "mode", "status", "reason", *PARTS), object)
_COLUMNS |= dict.fromkeys(("has target", "ours"), bool)
_COLUMNS |= dict.fromkeys(("samples", "bytes", "operations", "seconds", "peak"), float)
_COLUMNS |= dict.fromkeys(("q20", "median", "q80", "host", "rounds"), float)


def frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """A row for every provider of every shape in every mode; mode "" where nothing was timed at the shape.

    "samples", and the roofline bound's "seconds", "bytes" and "operations", are the shape's.  "time" is the median in words,
    or why there is none.
    """
    rows = []
    for record in document["cases"]:
        part = part_of(record)
        shape = {"suite": record["suite"], "shape": record["name"], "samples": record["samples"]}
        eager = [verdicts.get("eager", {}).get("asked") or 0 for verdicts in record["targets"].values()]
        shape["has target"] = max(eager, default=0) > 1  # more than eager code's speed
        for mode, (name, provider) in itertools.product(modes_of(record) or [""], record["providers"].items()):
            entry = {"host": None} | provider["modes"].get(mode, provider)
            row = shape | record["floor"][part] | entry | (entry.get(part) or {})
            row["host"] = ((entry["host"] or {}).get(part) or {}).get("median")
            row |= {"provider": name, "mode": mode, "ours": name == ours(record, mode)}
            rows.append(row | {"peak": provider["peak_bytes"][part]})
    table = pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS)
    words = table["median"].map(duration, na_action="ignore").astype(object)
    return table.assign(time=words.fillna(table["status"].replace("unavailable", "–")))


def pivot(frame: pd.DataFrame, values: str) -> pd.DataFrame:
    """A row for each shape and a column for each provider, both in order."""
    wide = frame.pivot(index="shape", columns="provider", values=values)
    return wide.reindex(index=frame["shape"].unique(), columns=[name for name in names() if name in wide])
