"""How the benchmarks time: the order of rounds, quantiles, graphs that are judged, and peak memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import graphs, measure, providers, targets, timing
from benchmarks.cases import CASES
from benchmarks.timing import Effort, Times

from .fake_result import CEILINGS

TINY = next(case for case in CASES if case.name == "64x64-highest")
CPU = torch.device("cpu")
BENCH = timing.Bench(CPU)


class FakeStep:
    """A step that writes its name and its call into ``order``, takes as many seconds as calls, and fails at ``last``."""

    def __init__(self, name: str, order: list[str], last: int = 99) -> None:
        self.name, self.order, self.last, self.calls = name, order, last, -1

    def time(self, bench: timing.Bench) -> dict[str, Times]:
        self.calls += 1
        self.order.append(f"{self.name}{self.calls}")
        if self.calls == self.last:
            raise RuntimeError("no")
        return {"both": Times(float(self.calls), 0.0)}


def timed(effort: Effort, *steps: FakeStep) -> dict[str, Any]:
    """The entries of mode launch."""
    entries = {step.name: measure.provider_record(providers.Provider(lambda: {})) for step in steps}
    runs: dict[str, Any] = {step.name: [step] for step in steps}
    measure.interleaved("launch", runs, entries, BENCH, effort)
    return {name: entry["modes"]["launch"] for name, entry in entries.items()}


def test_rounds_are_interleaved_and_a_failed_provider_is_dropped() -> None:
    order: list[str] = []
    steps = FakeStep("a", order), FakeStep("b", order, last=1), FakeStep("c", order)
    times = timed(Effort(3, 3, 0.0), *steps)
    # Each round starts at another provider.
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1", "a2", "c2", "c3", "a3"]
    assert (times["b"]["status"], times["b"]["reason"], times["b"]["both"]) == (
        "error",
        "RuntimeError: no",
        None,
    )
    for name in "ac":  # the first round, of 0 seconds, is not counted
        assert times[name]["rounds"] == 3
        assert times[name]["both"] == measure.quantiles([1, 2, 3])


@pytest.mark.parametrize(("effort", "rounds"), [((7, 200, 0.0), 7), ((3, 5, 60.0), 5)], ids=["least", "most"])
def test_rounds_are_at_least_and_at_most(effort: tuple[int, int, float], rounds: int) -> None:
    assert timed(Effort(*effort), FakeStep("a", []))["a"]["rounds"] == rounds


def test_quantiles_are_those_of_the_sample() -> None:
    assert measure.quantiles([6, 2, 4, 3, 5, 1]) == {"q20": 2, "median": 3.5, "q80": 5}
    assert measure.quantiles([7]) == {"q20": 7, "median": 7, "q80": 7}


def test_both_is_the_sum_of_the_parts() -> None:
    step = timing.Step(lambda x, y: providers.eager(providers.DROP_IN, x, y), TINY.inputs(0, CPU))
    times = step.time(BENCH)
    assert times["both"].device == times["forward"].device + times["backward"].device > 0
    assert step.results == {}


# -- graphs -------------------------------------------------------------------------------------------------------


class FakeGraphs:
    """In place of a step's CUDA graphs: what a replay leaves is ``damage`` of what the step computes."""

    damage = staticmethod(lambda index, z: z)
    made = 0

    def __init__(self, step: timing.Step, pool: Any, stream: Any) -> None:
        step.both()
        self.loss, self.gradients = self.damage(FakeGraphs.made, step.results["loss"].detach()), step.gradients
        self.time = step.time
        FakeGraphs.made += 1
        step.clear()

    def first_replay(self) -> list[graphs.Outputs]:
        return [({"loss": self.loss}, self.gradients)] * 2


@pytest.fixture(autouse=True)
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "Graphs", FakeGraphs)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(FakeGraphs, "made", 0)


def measured(name: str) -> dict[str, Any]:
    """The modes of a provider on a CPU that is measured in both."""
    bench: Any = timing.Bench(CPU)
    bench.has_graphs, bench.stream = True, None
    record = targets.shape_record(TINY, CEILINGS, 0)
    measure.measure(TINY, record, bench, Effort(2, 3, 0.0), [name], skip_compile=False)
    modes: dict[str, Any] = record["providers"][name]["modes"]
    return modes


def test_graphs_are_timed_beside_launches() -> None:
    modes = measured("aten")
    for mode in ("launch", "graph"):
        assert modes[mode]["status"] == "timed", modes[mode]["reason"]
        assert all(modes[mode][part]["median"] > 0 for part in TINY.parts)


@pytest.mark.parametrize("wrong_set", [0, 1])
def test_graphs_of_every_set_are_judged(wrong_set: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(index: int, z: Tensor) -> Tensor:
        return z * 1.01 if index == wrong_set else z

    monkeypatch.setattr(FakeGraphs, "damage", staticmethod(damage))
    graph = measured("aten")["graph"]
    assert (graph["status"], graph["both"]) == ("wrong", None)


@pytest.mark.parametrize(("name", "status"), [("eager", "not captured"), ("aten", "error")])
def test_code_that_waits_for_the_host_is_not_captured(
    name: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In vicreg_fast that is a defect."""

    def waiting(step: timing.Step, pool: Any, stream: Any) -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(graphs, "Graphs", waiting)
    modes = measured(name)
    assert modes["graph"]["status"] == status
    assert "synchronizing" in modes["graph"]["reason"]
    assert modes["launch"]["status"] == "timed"


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_out_of_memory_is_recognised(message: str) -> None:
    entry: dict[str, Any] = {}
    with measure.recorded(entry):
        try:
            raise RuntimeError(message)
        finally:
            raise RuntimeError("where the capture ends")
    assert entry["status"] == "out of memory"


def test_peak_memory_is_that_of_each_part() -> None:
    """Forward allocates five tensors and keeps one.  Backward allocates the gradients and one more."""
    n = 1 << 16

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            first, second, third = x + 1, y + 1, x + y
            ctx.save_for_backward(first)
            return (first + second + third).sum()  # two more, for the partial sums

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            (first,) = ctx.saved_tensors
            a, b = torch.empty(n), torch.empty(n)
            beside = first + 1
            return a.fill_(1), b.copy_(beside)

    inputs = (torch.randn(n, requires_grad=True), torch.randn(n, requires_grad=True))
    peaks = timing.Step(lambda x, y: {"loss": Kept.apply(x, y)}, inputs).peak_bytes(BENCH)
    tensors = {part: round(peak / (4 * n), 1) for part, peak in peaks.items()}
    assert tensors == {"forward": 5.0, "backward": 2.0, "both": 5.0}


def test_sets_exceed_the_cache_where_four_suffice() -> None:
    bench = timing.Bench(CPU)
    bench.cache_bytes = 50 << 20
    assert [bench.sets(size << 20) for size in (1, 16, 64, 600)] == [4, 4, 2, 2]
