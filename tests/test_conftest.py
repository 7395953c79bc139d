"""Marker expressions that select tests for a GPU, and the error on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .conftest import selects_gpu


@pytest.mark.parametrize("expression", ["gpu", "gpu and not compile_all", "compile_all or gpu", "(gpu)"])
def test_selects_the_gpu(expression: str) -> None:
    assert selects_gpu(expression)


@pytest.mark.parametrize(
    "expression", ["", "not gpu", "not compile_all and not gpu", "not (compile_all or gpu)", "compile_all"]
)
def test_does_not_select_the_gpu(expression: str) -> None:
    assert not selects_gpu(expression)


def test_selecting_the_gpu_without_one_is_an_error() -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", str(Path(__file__).parent)],
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"-m gpu needs a CUDA or ROCm device; torch {torch.__version__} sees none" in done.stderr
