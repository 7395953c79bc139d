"""How kernels are timed on a GPU, and what a search and a sweep do there (pytest -m gpu)."""

import importlib
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vicreg_fast import VICRegLoss
from vicreg_fast.backends.triton import configs
from vicreg_fast.plan import TWO_VIEWS

from . import fake_device
from .data import both_sides
from .parity import assert_same_bits
from .test_gpu_vicreg import DEVICE, pair

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu", "clean_memory")]


def module(name: str) -> Any:
    """A module of the backend or of the benchmarks, at the first use: importing it imports kernels."""
    return importlib.import_module(name)


def step(x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(VICRegLoss(backend="triton")(x, y)["loss"], (x, y)))


@both_sides(dual=[(256, 2048)], primal=[(4096, 256)])
def test_every_kernel_of_a_step_has_a_time(shape: tuple[int, int]) -> None:
    timing = module("vicreg_fast.backends.triton.launch_timing")
    N, D = shape
    small, large = pair(N, D), pair(8 * N, D) if N > D else pair(N, 8 * D)
    times = [timing.kernel_times(lambda inputs=inputs: step(*inputs)) for inputs in (small, large)]
    for kernels in times:
        assert kernels[-1].kernel == "gradient"
        assert 3 <= len(kernels) <= 4
        assert all(0 < kernel.q20 <= kernel.median <= kernel.q80 for kernel in kernels)
        # A millisecond is more than either step takes.  Other tests may use the device too:
        # they delay some rounds, not the fastest.
        assert sum(kernel.q20 for kernel in kernels) < 1e-3
    # Eight times the elements.
    assert times[1][-1].q20 > 2 * times[0][-1].q20


@both_sides(dual=[(256, 2048), (2048, 4096)], primal=[(4096, 256), (100_000, 64)])
def test_a_launch_replayed_alone_computes_the_same(shape: tuple[int, int]) -> None:
    timing, backend = (
        module("vicreg_fast.backends.triton.launch_timing"),
        module("vicreg_fast.backends.triton_backend"),
    )
    sources = [z.detach()[None] for z in pair(*shape)]
    with timing.recorded() as launches:
        results = backend.terms(TWO_VIEWS, sources, None)
    expected = [z.clone() for z in results]
    timer = timing.GraphTimer(DEVICE)
    calls = [timer.capture(launch) for launch in launches]
    for z in results[: TWO_VIEWS.outputs]:
        z.fill_(math.nan)
    for call in calls:  # the last program of the last kernel finds a counter of zero each time
        for _ in range(3):
            assert 0 < call() < 1
    assert_same_bits(results, expected)


def test_a_search_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = module("vicreg_fast.backends.triton.candidates")
    every = candidates.candidates
    monkeypatch.setattr(candidates, "candidates", lambda key: every(key)[:4])
    monkeypatch.setattr(configs, "tuned_configs", {})
    monkeypatch.setenv("VICREG_FAST_AUTOTUNE_FILE", str(tmp_path / "configs.jsonl"))
    x, y = pair(256, 2048)
    monkeypatch.setenv("VICREG_FAST_AUTOTUNE", "0")
    expected = step(x, y)
    monkeypatch.setenv("VICREG_FAST_AUTOTUNE", "1")
    actual = step(x, y)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 1e-4 * e.norm()
    lines = [json.loads(line) for line in (tmp_path / "configs.jsonl").read_text().splitlines()]
    assert [line["key"][3] for line in lines] == ["moments", "gram", "gradient"]
    assert all(0 < line["ms"] <= line["table_ms"] < 100 for line in lines)


def test_an_illegal_access_ends_one_process_of_a_sweep() -> None:
    tune, process = module("benchmarks.tune"), module("benchmarks.tune_process")
    device = process.DeviceProcess(fake_device.serve_gpu)
    try:
        goal = device.start()
        key = configs.Key(*goal.device, True, "narrow_gradient", "half", 2, 2_600_000, 64)
        tried = [fake_device.FATAL, fake_device.FASTEST]
        end = time.monotonic() + 120
        trials, error = tune.time_candidates(device, "2600000x64-bf16", key, tried, 0.5, end)
    finally:
        device.stop()
    assert error is None
    table, other, fatal = trials
    assert table.config == configs.from_table(key)
    assert (other.config, other.reason) == (fake_device.FASTEST, None)
    assert 0 < other.time.median < 1
    assert fatal.config == fake_device.FATAL
    assert fatal.reason.startswith("crashed: ")
