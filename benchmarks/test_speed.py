"""Speed of a training step's loss against the eager reference, interleaved: ``pytest benchmarks --benchmark-enable``.

Every round times eager code, then ours: pytest-benchmark's figures are ours, eager's medians and the ratio stand
in ``extra_info`` and in the table at the end.  A case whose loss disagrees with the reference gets no time.

Before a side is timed it runs once untimed.  The first call after the other side's pays for what that one left:
returning the eager matrices' memory to the system took 3 to 7 ms of our 8 at 256x2048, in a third of the rounds.
"""

import statistics
import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import CASES, Case
from .conftest import SpeedRows


def _rounds(seconds: float) -> int:
    """As many as fit in ten seconds, at least 5 and at most 200."""
    return max(5, min(200, int(10 / seconds)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_step(case: Case, benchmark: BenchmarkFixture, speed_table: SpeedRows) -> None:
    inputs = case.inputs()
    eager, fast = case.step("reference", inputs), case.step("auto", inputs)
    eager()
    fast()
    # Tests judge both by float64; this only refuses to time a wrong answer.
    expected, found = case.loss("reference", inputs), case.loss("auto", inputs)
    assert found == pytest.approx(expected, rel=1e-3)

    times: list[float] = []

    def time_eager(warm_up: bool = True) -> None:
        if warm_up:
            eager()
        start = time.perf_counter()
        eager()
        times.append(time.perf_counter() - start)
        fast()

    time_eager()
    first = times.pop()
    # Where eager code takes seconds, what a call leaves is nothing beside them.
    warm_up = first < 1
    rounds = _rounds(first * (1 + warm_up))
    benchmark.pedantic(fast, setup=lambda: time_eager(warm_up), rounds=rounds, warmup_rounds=1)  # type: ignore[no-untyped-call]
    if benchmark.disabled:
        return
    assert benchmark.stats is not None
    ours = benchmark.stats.stats.median
    theirs = statistics.median(times)
    benchmark.extra_info.update(
        eager_median_s=theirs, speedup=theirs / ours, target=case.target, threads=torch.get_num_threads()
    )
    speed_table.append((case.name, theirs, ours, case.target))
