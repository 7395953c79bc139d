"""The kernels compile for GPUs that are not here: no spill, within shared memory, on tensor cores, 64-bit offsets."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
TARGETS = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")


def resources(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: in this one Triton is an interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "resources", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_one_variant_in_nine_compiles_without_a_defect(target: str) -> None:
    done = resources("--target", target, "--every", "9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"0 defects on {target}\n")
    assert len(done.stdout.splitlines()) >= 6


@pytest.mark.compile_all
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles_without_a_defect(target: str) -> None:
    done = resources("--target", target)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_target_lists_the_known_ones() -> None:
    done = resources("--target", "cuda:70")
    assert done.returncode == 2
    for target in TARGETS:
        assert target in done.stderr
