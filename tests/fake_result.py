"""A result file of a GPU that does not exist: nothing in it was measured.  For tests of what reads result files."""

from typing import Any

from benchmarks import libraries, measure, providers, results, targets
from benchmarks.cases import CASES, PARTS, Case
from benchmarks.timing import Times

# Published rates of an H200.
CEILINGS = {
    "copy_bytes": 1 << 30,
    "copy_bytes_per_s": 4.3e12,
    "product_side": 8192,
    "operations_per_s": {"bf16": 790e12, "high": 395e12, "highest": 132e12},
}
MARK = "made by hand for tests: no GPU has run this"
# By provider: multiples of the roofline bound, and the least seconds of a call.
SPEED = {"eager": (30.0, 3e-4), "compile": (12.0, 2e-4), "cdist": (9.0, 2e-4), "bmm": (5.0, 1e-4)}
SPEED |= {"aten": (4.0, 2e-4), "triton": (1.8, 6e-5)}
CLOCKS: dict[str, Any] = {"driver": "580.1", "sm_clock_mhz": 1980.0, "memory_clock_mhz": 3201.0, "reason": None}
CLOCKS |= {"power_w": 120.0, "power_limit_w": 700.0, "temperature_c": 35.0}


def fake_record(case: Case, faster: float = 1.0) -> measure.Record:
    """A shape's record: every provider correct, compile only where it is measured by default."""
    record = targets.shape_record(case, CEILINGS, 0) | {"seconds": 3.0}
    for name in providers.names_of(case):
        if name not in SPEED:
            continue
        definition = providers.definition_of(case)
        if name == "compile" and not case.compiled:
            entry = measure.provider_record(providers.Provider(None, "compiled at other shapes", definition))
        else:
            entry = measure.provider_record(providers.Provider(lambda *_: {}, None, definition))
            entry["peak_bytes"] |= dict.fromkeys(case.parts, 10 * case.elements * (9 if name == "eager" else 1))
            factor, least = SPEED[name]
            for mode, extra in (("launch", least), ("graph", 5e-6)):
                seconds = {p: factor * record["floor"][p]["seconds"] / faster + extra for p in case.parts}
                rounds = [{p: Times(k * s, least) for p, s in seconds.items()} for k in (0.97, 1, 1.05)]
                measure.write_times(measure.mode_record(mode, entry), rounds, with_host=True)
        record["providers"][name] = entry
    record["targets"] = targets.judge(case, record, "cuda")
    return record


def fake_result(faster: float = 1.0, device: str = "NVIDIA Fake") -> results.Document:
    """Every shape of a GPU; the first provider of the first shape is wrong, the last shape has too little memory."""
    cases = [case for case in CASES if "cuda" in case.devices]
    clocks = {"before": CLOCKS, "after": CLOCKS}
    session = {"date": "2026-01-01T00:00:00+00:00", "command": "none", "load": 0.1, "clocks": clocks}
    document: results.Document = {
        "schema": results.SCHEMA,
        "version": results.VERSION,
        "fixture": MARK,
        "complete": True,
        "commit": {"commit": "0123456789ab", "dirty": False, "changes": None, "reason": None},
        "machine": {
            "device": device, "kind": "cuda", "index": 0, "uuid": "GPU-0", "capability": "9.0", "multiprocessors": 132,
            "l2_bytes": 50 << 20, "memory_bytes": 141 << 30, "cuda": "13.0", "hip": None, "torch": "2.13.0",
            "triton": "3.9.0", "python": "3.11.7", "platform": "Linux", "processor": "fake", "threads": 16,
            "environment": {},
        },
        "libraries": {name: libraries.version(name) for name in providers.LIBRARIES},
        "asked": {"shapes": [case.name for case in cases], "providers": None, "quick": False},
        "providers": providers.PROVIDERS,
        "sessions": [{**session, "ceilings": CEILINGS}],
        "cases": [fake_record(case, faster) for case in cases],
    }  # fmt: skip
    first, last = document["cases"][0], document["cases"][-1]
    first["providers"]["eager"].update(status="wrong", reason="loss: error 1.0e-01 of its size", modes={})
    first["targets"] = targets.judge(cases[0], first, "cuda")
    last.update(status="out of memory", reason="CUDA out of memory", providers={}, targets={})
    assert set(PARTS) == set(first["floor"])
    return document
