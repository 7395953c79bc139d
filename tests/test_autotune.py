"""A search on request: when it runs, what it uses from then on, and the file of its rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vicreg_fast import functional
from vicreg_fast.backends.triton import configs
from vicreg_fast.backends.triton.configs import Gradient, Moments, Product

from .data import U

autotune: Any = pytest.importorskip("vicreg_fast.backends.triton.autotune")
search: Any = pytest.importorskip("vicreg_fast.backends.triton.search")
candidates: Any = pytest.importorskip("vicreg_fast.backends.triton.candidates")

WANTED = {
    "moments": Moments(32, 32, 4),
    "gram": Product(32, 16, 4, 2, 2),
    "gradient": Gradient(32, 64, 16, 4, 2),
}


class FakeTimer:
    """Fake seconds, least for WANTED.  ``timed`` has the kernels."""

    def __init__(self) -> None:
        self.timed: list[str] = []

    def capture(self, launch: Any) -> Callable[[], float]:
        self.timed.append(launch.name)
        current = [
            launch.arguments[name]
            for name in ("BLOCK_N", "BLOCK_D", "BLOCK_M", "BLOCK_K")
            if name in launch.arguments
        ]
        wanted = WANTED[launch.name.removesuffix("_forward")]
        return lambda: 1.0 if current == list(wanted[: len(current)]) else 2.0


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interpreted: None) -> Path:
    """A search among few candidates is asked for; its file."""
    path = tmp_path / "cache" / "configs.jsonl"
    monkeypatch.setenv("VICREG_FAST_AUTOTUNE", "1")
    monkeypatch.setenv("VICREG_FAST_AUTOTUNE_FILE", str(path))
    monkeypatch.setattr(configs, "tuned_configs", {})
    monkeypatch.setattr(autotune, "_files_read", set())
    monkeypatch.setattr(candidates, "candidates", lambda key: [WANTED[key.kernel]])
    return path


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> FakeTimer:
    timer = FakeTimer()
    monkeypatch.setattr(autotune, "_timer", lambda: timer)
    return timer


def gradient_of(x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    terms = functional.vicreg_terms(x, x.detach() + 0.1, backend="triton")
    return torch.autograd.grad(sum(terms), x)[0]


def used() -> dict[str, Any]:
    return {key.kernel: config for key, config in configs.tuned_configs.items()}


def test_a_search_finds_the_fastest_and_writes_it_down(requested: Path, timer: FakeTimer) -> None:
    x = torch.randn(20, 96)
    gradient_of(x)
    assert used() == WANTED
    lines = [json.loads(line) for line in requested.read_text().splitlines()]
    assert [line["key"][3] for line in lines] == ["moments", "gram", "gradient"]
    assert all(line["ms"] < line["table_ms"] for line in lines)
    # The next call, and the next process, search no more.
    count = len(timer.timed)
    gradient_of(x)
    configs.tuned_configs.clear()
    autotune._files_read.clear()
    gradient_of(x)
    assert len(timer.timed) == count
    assert used() == WANTED


def test_a_file_alone_is_read_and_nothing_is_searched(
    requested: Path, timer: FakeTimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient_of(torch.randn(20, 96))
    configs.tuned_configs.clear()
    autotune._files_read.clear()
    timer.timed.clear()
    monkeypatch.delenv("VICREG_FAST_AUTOTUNE")
    gradient_of(torch.randn(20, 96))
    assert used() == WANTED
    gradient_of(torch.randn(24, 96))  # a shape without rows
    assert timer.timed == []
    assert len(requested.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("kind", "words"),
    [("missing", "No such file"), ("folder", "Is a directory"), ("binary", "can't decode")],
    ids=["missing", "folder", "binary"],
)
def test_a_file_alone_that_cannot_be_read_is_named(
    kind: str, words: str, requested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VICREG_FAST_AUTOTUNE")
    if kind == "folder":
        requested.mkdir(parents=True)
    elif kind == "binary":
        requested.parent.mkdir()
        requested.write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match=rf"no row of .*configs\.jsonl is used, because .*{words}"):
        gradient_of(torch.randn(20, 96))
    gradient_of(torch.randn(20, 96))  # warns once


def test_a_file_that_cannot_be_written_to_costs_no_step(
    requested: Path, timer: FakeTimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(autotune, "append", full)
    with pytest.warns(
        UserWarning, match=r"alone, because .*configs\.jsonl cannot be written to: no space left"
    ):
        gradient_of(torch.randn(20, 96))
    assert used() == WANTED


def test_a_search_changes_no_result(requested: Path, timer: FakeTimer, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(20, 96)
    grad = gradient_of(x)
    monkeypatch.delenv("VICREG_FAST_AUTOTUNE")
    monkeypatch.delenv("VICREG_FAST_AUTOTUNE_FILE")
    configs.tuned_configs.clear()
    # Other tiles add in another order: a few roundings, as in data.py.
    assert (grad - gradient_of(x)).norm() <= 8 * U * grad.norm()


def test_wrong_configurations_are_warned_of(
    requested: Path, timer: FakeTimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "TOLERANCE", -1.0)
    with pytest.warns(UserWarning, match=r"1 of 2 configurations of \w+ are left out, such as .*: wrong"):
        gradient_of(torch.randn(20, 96))
    assert set(used()) == set(WANTED)
    assert not set(used().values()) & set(WANTED.values())


@pytest.mark.parametrize("captures", [False, True], ids=["without a GPU", "while a graph is captured"])
def test_no_search_where_nothing_can_be_timed(
    captures: bool, requested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if captures:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gradient_of(torch.randn(20, 96))
    assert used() == {}
    assert not requested.exists()


@pytest.mark.parametrize(
    "line", ['{"key": [1, 2]}', '{"key": ["sm90", 1', "", "[]"], ids=["short", "cut", "empty", "list"]
)
def test_a_broken_line_is_named_and_left_out(line: str, requested: Path, timer: FakeTimer) -> None:
    requested.parent.mkdir()
    requested.write_text(line + "\n")
    with pytest.warns(UserWarning, match=r"configs\.jsonl, line 1, is no row of a search and is left out"):
        gradient_of(torch.randn(20, 96))
    assert used() == WANTED


def test_no_search_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", ""):
        monkeypatch.setenv("VICREG_FAST_AUTOTUNE", value)
        assert not autotune.enabled()
    monkeypatch.delenv("VICREG_FAST_AUTOTUNE")
    assert not autotune.enabled()
