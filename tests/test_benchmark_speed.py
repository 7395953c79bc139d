"""The benchmarks under pytest-benchmark: the tests that it collects, and what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import machine, providers, test_speed
from benchmarks.cases import CASES, PARTS


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_provider_of_every_shape_is_collected(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device", torch.device)
    collected: list[Any] = []
    config = SimpleNamespace(getoption=lambda option: device)
    metafunc: Any = SimpleNamespace(config=config, parametrize=lambda names, values: collected.extend(values))
    test_speed.pytest_generate_tests(metafunc)
    assert sorted(value.id for value in collected) == sorted(
        f"{case.name}-{part}-{name}"
        for case in CASES
        for name in providers.names_of(case)
        for part in case.parts
        if device in case.devices and case.suite != "distributed" and (name != "compile" or case.compiled)
    )


def test_a_group_for_each_part_is_timed(tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_speed.py"]
    command += ["--device", "cpu", "-k", "8x16-highest and (eager or aten)", f"--benchmark-json={output}"]
    # Without the variables of the run that this test is in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=machine.ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    timed = json.loads(output.read_text())["benchmarks"]
    assert {b["group"] for b in timed} == {f"8x16-highest, {part}" for part in PARTS}
    assert [b["extra_info"]["provider"] for b in timed] == ["eager"] * 3 + ["aten"] * 3
    assert all(b["stats"]["median"] > 0 for b in timed)
