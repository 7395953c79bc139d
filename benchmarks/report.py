"""What a measured shape is held to: the floor of its device and the targets; and the table of a run."""

from collections.abc import Sequence
from typing import Any

from .providers import PROVIDERS, Shape


def floor(shape: Shape, ceilings: dict[str, Any]) -> dict[str, Any]:
    """The time in which the device could do what a shape needs at least, forward and backward."""
    arithmetic = shape.operations / ceilings["operations_per_s"][shape.products]
    traffic = shape.bytes / ceilings["copy_bytes_per_s"]
    return {
        "operations": shape.operations,
        "bytes": shape.bytes,
        "seconds": max(arithmetic, traffic),
        "bound_by": "operations" if arithmetic > traffic else "bytes",
    }


def _seconds(case: dict[str, Any], name: str, mode: str) -> float | None:
    """Median of forward and backward; None where there is no time."""
    both = case["providers"].get(name, {}).get("modes", {}).get(mode, {}).get("both")
    return None if both is None else float(both["median"])


def judge(shape: Shape, case: dict[str, Any], mode: str, held: bool) -> dict[str, Any]:
    """Triton's speed in a mode as a multiple of each provider's and as a share of the floor, and what was asked.

    ``held``: whether the share is asked for.  A call from Python is not held to the floor where there is a graph.
    """
    ours = _seconds(case, "triton", mode)
    judged = {}
    for name, asked in shape.targets._asdict().items():
        theirs = case["floor"]["seconds"] if name == "floor" else _seconds(case, name, mode)
        found = None if ours is None or theirs is None else theirs / ours
        if name == "floor" and not held:
            asked = None
        met = None if found is None or asked is None else found >= asked
        judged[name] = {"asked": asked, "found": found, "met": met}
    return judged


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Medians of forward and backward, and what was asked, as a Markdown table."""
    lines = [
        "| forward and backward | eager | compile | aten | triton | triton against eager, compile, aten (asked) | "
        "share of floor (asked) |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        for mode, judged in case["targets"].items():
            times = [_cell(case, name, mode) for name in PROVIDERS]
            ratios = ", ".join(_asked(judged[name], "x") for name in ("eager", "compile", "aten"))
            cells = [f"{case['name']}, {mode}", *times, ratios, _asked(judged["floor"], "")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Bold: less than was asked."])


def _cell(case: dict[str, Any], name: str, mode: str) -> str:
    """A time, or why there is none."""
    if (seconds := _seconds(case, name, mode)) is not None:
        return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
    provider = case["providers"].get(name, case)
    entry = provider.get("modes", {}).get(mode) or provider
    return str(entry["status"])


def _asked(judged: dict[str, Any], unit: str) -> str:
    found = "–" if judged["found"] is None else f"{judged['found']:.3g}{unit}"
    words = found if judged["asked"] is None else f"{found} ({judged['asked']:g})"
    return f"**{words}**" if judged["met"] is False else words
