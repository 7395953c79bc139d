"""``python -m benchmarks profile``: which launches, and what is asked of the profilers.  No GPU: the reports are written by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import profiles
from benchmarks.__main__ import main
from benchmarks.kernel_results import Pair
from benchmarks.profiles import Worst

GPU = torch.device("cuda", 0)
LAUNCH = Worst("64x64-high", "gradient", 1, 2, Pair("gradient", 1.0, 3.0))


def shape(name: str, status: str = "timed", **kernels: float) -> dict[str, Any]:
    timed = [{"kernel": kernel, "microseconds": {"median": time}} for kernel, time in kernels.items()]
    return {"shape": name, "status": status, "microseconds": sum(kernels.values()), "kernels": timed}


def estimate(name: str, **kernels: float) -> dict[str, Any]:
    return {"shape": name, "kernels": [{"kernel": k, "microseconds": time} for k, time in kernels.items()]}


def test_the_worst_are_those_farthest_above_their_estimate_that_matter_to_their_shape() -> None:
    measured = {
        "shapes": [shape("a", gram=50.0, gradient=48.0, sum=9.0), shape("b", gram=30.0), shape("c", "error")]
    }
    estimates = [estimate("a", gram=25.0, gradient=16.0, sum=1.0), estimate("b", gram=29.0)]
    worst = profiles.worst(measured, estimates, 2)
    # The sum takes 9 times its estimate and 8 % of its shape.
    assert [(launch.shape, launch.kernel) for launch in worst] == [("a", "gradient"), ("a", "gram")]


def test_the_launch_of_every_step_is_found_in_a_trace() -> None:
    launches = [("_gradient_kernel", 1), ("_gradient_kernel", 2), ("_narrow_gradient_kernel", 3)] * 2
    events = [
        {"cat": "kernel", "name": name, "ts": k, "which": which} for k, (name, which) in enumerate(launches)
    ]
    events.append({"cat": "gpu_memcpy", "name": "_gradient_kernel", "ts": 9, "which": 0})
    found = profiles.kernel_events({"traceEvents": events}, "gradient", 1, 2)
    assert [event["which"] for event in found] == [2, 2]


def fake_ncu(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "ncu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_nsight_compute_is_asked_for_one_launch_and_its_lines_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report"
    report.write_text("    Duration      us        12.5\n    Branches   inst  7\n    L2 Hit Rate    %   80\n")
    fake_ncu(tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/arguments; cat {report}')
    assert profiles._ncu(LAUNCH, GPU) == ["Duration  us  12.5", "L2 Hit Rate  %  80"]
    words = (tmp_path / "arguments").read_text()
    assert "--clock-control none" in words  # the card's clocks stay as they are
    # Two launches of the first step, and the first of the second.
    assert "--kernel-name regex:^_gradient_kernel$ --launch-skip 3 --launch-count 1" in words
    assert words.strip().endswith("-m benchmarks profile --device cuda:0 --step 64x64-high")


def test_nsight_compute_without_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ncu(tmp_path, monkeypatch, "echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1")
    assert profiles._ncu(LAUNCH, GPU) == "==ERROR== ERR_NVGPUCTRPERM"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert profiles._ncu(LAUNCH, GPU) == "ncu is not on the PATH"


def test_a_cpu_has_no_profile(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["profile", "--device", "cpu"])
    assert stopped.value.code == 2
    assert "got device cpu" in capsys.readouterr().err
