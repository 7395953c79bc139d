"""Marker expressions that select tests for a GPU, the error on a machine without one, warnings on a GPU, --test-seconds."""

import faulthandler
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from vicreg_fast.backends import kernel_failures

from . import conftest
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


class FakeItem:
    """A test that is run with --test-seconds."""

    def __init__(self, seconds: float) -> None:
        self.config = self
        self.stash = {conftest.STDERR: 7}
        self.seconds = seconds

    def getoption(self, name: str, default: float) -> float:
        return {"test_seconds": self.seconds}.get(name, default)


@pytest.mark.parametrize("seconds", [0.0, 30.0])
def test_a_test_with_a_limit_is_watched_until_it_ends(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda *args, **options: calls.append((args, options))
    )
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: calls.append("cancelled"))
    running = conftest.pytest_runtest_protocol(FakeItem(seconds))  # type: ignore[arg-type]
    next(running)
    assert calls == ([((seconds,), {"exit": True, "file": 7})] if seconds else [])
    with pytest.raises(StopIteration):
        next(running)
    assert calls[1:] == (["cancelled"] if seconds else [])


class FakeConfig:
    """A run of pytest -m gpu."""

    def __init__(self) -> None:
        self.option = Namespace(markexpr="gpu and not alone")
        self.stash = pytest.Stash()
        self.filters: list[str] = []

    def addinivalue_line(self, name: str, line: str) -> None:
        assert name == "filterwarnings"
        self.filters.append(line)


def test_on_a_gpu_only_the_warning_that_kernels_were_replaced_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = FakeConfig()
    monkeypatch.setattr(os, "dup", lambda descriptor: descriptor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError):  # no GPU is here
        conftest.pytest_configure(config)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True):
        for line in ("error", *config.filters):
            action, _, message = line.partition(":")
            warnings.filterwarnings(action, message)  # type: ignore[arg-type]
        warnings.warn("torch has a remark on this card", UserWarning, stacklevel=1)
        with pytest.raises(UserWarning, match="cannot run"):
            kernel_failures.warn(" on cuda:0", "a test's own reason")
