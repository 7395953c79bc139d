"""Which candidates a sweep compiles, what it leaves out, and what it estimates."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vicreg_fast.backends.triton import configs
from vicreg_fast.backends.triton.configs import Gradient, Key, Product

from .interpreted import import_interpreted

sift: Any = import_interpreted("benchmarks.sift")

GOAL = sift.Goal("cuda:90", configs.Device("sm90", 132))
KEY = Key("sm90", 132, True, "gradient", "tf32", 2, 256, 8192)
GRAM = KEY._replace(kernel="gram")
TABLE = configs.from_table(KEY)
A, B, C = Gradient(64, 64, 32), Gradient(64, 128, 32), Gradient(128, 64, 32)


SIFTED = """
import json
import torch
from benchmarks import cases, estimate, sift
from vicreg_fast.backends.triton import configs

goal = sift.Goal("cuda:90", configs.Device("sm90", 66))
shape = "matching-64x196x384-m20-bf16"
outlook = sift.outlook(shape, goal)
print(json.dumps([outlook.shape, outlook.share, outlook.tables]))
(known,) = outlook.tables
table = configs.from_table(known.key)
found = sift.sift(shape, goal, known, [table, table._replace(block_k=48)])
print(json.dumps([[verdict.config, verdict.microseconds, verdict.reason] for verdict in found]))
print(len(configs.tuned_configs))

# What is compiled for tensors without data is what a launch on real ones takes from the cache.
launch = estimate.launches(cases.case_of(shape), goal.target, goal.device)[1]
def real(value):
    if isinstance(value, torch.Tensor):
        return torch.empty(16, dtype=value.dtype)
    return type(value)(*map(real, value)) if isinstance(value, tuple) else value
arguments = {name: real(value) for name, value in launch.arguments.items() if name != "grid"}
compiled = sift.compile_as_launched(launch, goal.target)
print(compiled.hash == launch.variant.kernel.run(grid=(1,), warmup=True, **arguments).hash)
"""


def test_candidates_are_compiled_as_launched_and_estimated(tmp_path: Path) -> None:
    # Rows of an earlier search do not count.  This one would not compile.
    rows = tmp_path / "configs.jsonl"
    config = {"largest_tile": 64, "block_k": 48, "warps": 4, "stages": 2}
    rows.write_text(json.dumps({"key": ["sm90", 66, True, "matching", "half", 64, 196, 384], "config": config}))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "VICREG_FAST_AUTOTUNE_FILE": str(rows)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SIFTED],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    outlook, verdicts, tuned, same = map(json.loads, done.stdout.replace("True", "true").splitlines())
    shape, share, keys = outlook
    ((key, time, defects),) = keys
    assert defects == []
    assert (shape, 0 < share < 1) == ("matching-64x196x384-m20-bf16", True)
    assert key[:4] == ["sm90", 66, True, "matching"]
    (_, in_table, no_reason), (_, invalid, error) = verdicts
    assert (in_table, no_reason) == (pytest.approx(time), None)
    assert (invalid, error.partition(": ")[0]) == (None, "does not compile")
    assert tuned == 0
    assert same is True


@pytest.mark.parametrize(
    ("config", "defects", "reason"),
    [
        (Product(64, 32, ctas_per_sm=2), ("the table's own",), None),
        (Product(64, 32, ctas_per_sm=3), (), "defect: gram_forward: 3 CTAs on an SM planned, 2 fit"),
        (Product(64, 32, ctas_per_sm=2), ("8 bytes spilled",), "defect: gram_forward: 8 bytes spilled"),
    ],
    ids=["fits", "crowded", "spills"],
)
def test_a_kernel_with_a_defect_is_left_out(
    config: Any, defects: tuple[str, ...], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three kernels, two depend on the configuration; what the compiler finds is made up."""
    names = ("moments_forward", "gram_forward", "splitk_reduction")
    made = [SimpleNamespace(variant=SimpleNamespace(name=name), _replace=lambda **_: None) for name in names]
    found = SimpleNamespace(defects=defects, ctas_per_sm=2)
    monkeypatch.setattr(sift, "_launches_with", lambda *_: made)
    monkeypatch.setattr(sift, "compile_as_launched", lambda *_: None)
    monkeypatch.setattr(sift.resources, "examine", lambda *_: found)
    monkeypatch.setattr(sift.estimate, "kernel_record", lambda *_: {"microseconds": 3.0})
    table = sift.Table(GRAM, 9.0, ("the table's own",))
    (verdict,) = sift.sift("256x8192-high", GOAL, table, [config])
    assert verdict == sift.Verdict(config, 6.0 if reason is None else None, reason)


def test_candidates_of_one_kernel_are_one_group() -> None:
    products = [Product(64, 32, 4, 3, 1), Product(64, 32, 4, 2, 1), Product(64, 32, 4, 3, 4)]
    assert sift.groups(products) == [[products[0], products[2]], [products[1]]]
    assert sift.groups([A, B]) == [[A], [B]]


def test_the_best_by_the_estimate_are_kept_in_their_order() -> None:
    verdicts = [
        sift.Verdict(A, 3.0),
        sift.Verdict(B, None, "defect: no"),
        sift.Verdict(C, 2.0),
        sift.Verdict(TABLE, 2.0),
    ]
    assert [verdict.config for verdict in sift.best(verdicts, 2)] == [C, TABLE]


def test_a_key_that_is_no_longer_waited_for_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sift, "_current", multiprocessing.get_context("spawn").Value("i", 3))
    monkeypatch.setattr(sift, "sift", lambda *_: [sift.Verdict(A, 1.0)])
    assert sift.sift_in_time(2, "256x8192-high", GOAL, KEY, [A]) == [
        sift.Verdict(A, None, "not compiled in time")
    ]
    assert sift.sift_in_time(3, "256x8192-high", GOAL, KEY, [A]) == [sift.Verdict(A, 1.0)]
