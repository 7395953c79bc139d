"""A result file of a GPU, made by hand: nothing in it was measured.  For tests of what reads result files."""

from typing import Any

from benchmarks import libraries, providers, records, report, results, timing
from benchmarks.cases import CASES, PARTS, Case
from benchmarks.timing import Times

# What others have measured on an H200.
CEILINGS = {
    "copy_bytes": 1 << 30,
    "copy_bytes_per_s": 4.3e12,
    "product_side": 8192,
    "operations_per_s": {"bf16": 790e12, "high": 395e12, "highest": 132e12},
}
MARK = "made by hand for tests: no GPU has run this"
# Times of the floor, and seconds that a call takes at least.
SPEED = {"eager": (30.0, 3e-4), "compile": (12.0, 2e-4), "cdist": (9.0, 2e-4), "bmm": (5.0, 1e-4)}
SPEED |= {"aten": (4.0, 2e-4), "triton": (1.8, 6e-5)}
CLOCKS: dict[str, Any] = {
    "driver": "580.1",
    "sm_clock_mhz": 1980.0,
    "memory_clock_mhz": 3201.0,
    "power_w": 120.0,
    "power_limit_w": 700.0,
    "temperature_c": 35.0,
    "reason": None,
}


def quantiles(seconds: float) -> dict[str, float]:
    return timing.quantiles([0.97 * seconds, seconds, 1.05 * seconds])


def played_record(case: Case, faster: float = 1.0) -> dict[str, Any]:
    record = records.new_record(case, CEILINGS, 0)
    record["seconds"] = 3.0
    for name in providers.names_of(case):
        if name in providers.LIBRARIES or name.startswith("ours as"):
            continue
        entry = record["providers"][name] = records.provider_entry(
            providers.Provider(lambda *_: {}, None, providers.definition_of(case))
        )
        entry["peak_bytes"] |= dict.fromkeys(case.parts, 10 * case.elements * (9 if name == "eager" else 1))
        if name == "compile" and not case.compiled:
            entry.update(status="unavailable", reason="compiled at other shapes only")
            entry["peak_bytes"] = dict.fromkeys(PARTS)
            continue
        factor, least = SPEED[name]
        for mode, extra in (("launch", least), ("graph", 5e-6)):
            times = {
                part: Times([k * (factor * record["floor"][part]["seconds"] / faster + extra) for k in (0.97, 1, 1.05)], [least] * 3)
                for part in case.parts
            }  # fmt: skip
            records.write_times(records.mode_entry(mode, entry), times, with_host=True)
    record["targets"] = report.judge(case, record, "cuda")
    return record


def played_result(faster: float = 1.0, device: str = "NVIDIA Played") -> results.Document:
    """Every shape of a GPU; the first provider of the first shape is wrong, the last shape has no memory."""
    cases = [case for case in CASES if "cuda" in case.devices]
    document: results.Document = {
        "schema": results.SCHEMA,
        "version": results.VERSION,
        "fixture": MARK,
        "complete": True,
        "commit": {"commit": "0123456789ab", "dirty": False, "changes": None, "reason": None},
        "machine": {
            "device": device, "kind": "cuda", "index": 0, "uuid": "GPU-0", "capability": "9.0", "multiprocessors": 132, "l2_bytes": 50 << 20,
            "memory_bytes": 141 << 30, "cuda": "13.0", "hip": None, "torch": "2.13.0", "triton": "3.9.0",
            "python": "3.11.7", "platform": "Linux", "processor": "played", "threads": 16, "environment": {},
        },
        "libraries": {name: libraries.version(name) for name in providers.LIBRARIES},
        "asked": {"shapes": [case.name for case in cases], "providers": None, "quick": False},
        "providers": providers.PROVIDERS,
        "sessions": [
            {"date": "2026-01-01T00:00:00+00:00", "command": "none", "load": 0.1, "clocks": {"before": CLOCKS, "after": CLOCKS},
             "ceilings": CEILINGS}
        ],
        "cases": [played_record(case, faster) for case in cases],
    }  # fmt: skip
    first, last = document["cases"][0], document["cases"][-1]
    first["providers"]["eager"].update(status="wrong", reason="loss: error 1.0e-01 of its size", modes={})
    first["targets"] = report.judge(cases[0], first, "cuda")
    last.update(status="out of memory", reason="CUDA out of memory", providers={}, targets={})
    assert set(PARTS) == {"forward", "backward", "both"}
    document["sha256"] = results.digest(document)
    return document
