"""How the benchmarks time: the order of rounds, quantiles, graphs that are judged, and peak memory."""

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import graphs, measure, providers, targets, timing
from benchmarks.cases import CASES
from benchmarks.timing import Times

from .fake_result import CEILINGS

TINY = next(case for case in CASES if case.name == "64x64-highest")
CPU = torch.device("cpu")
EFFORT = timing.Effort(2, 3, 0.0)


def test_rounds_are_interleaved_and_a_failed_run_is_dropped() -> None:
    order: list[str] = []

    def run_of(name: str, last: int = 99) -> timing.Run:
        def run(index: int) -> dict[str, Times]:
            order.append(f"{name}{index}")
            if index == last:
                raise RuntimeError
            return {"both": Times(float(index), 0.0)}

        return run

    runs = {"a": run_of("a"), "b": run_of("b", last=1), "c": run_of("c")}
    times = timing.interleaved(runs, timing.Effort(3, 3, 0.0), lambda name: suppress(RuntimeError))
    # Each round starts at another run.
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1", "a2", "c2", "c3", "a3"]
    # The first round, index 0, is not counted.
    counted = {name: [t["both"].device for t in rounds] for name, rounds in times.items()}
    assert counted == {"a": [1.0, 2.0, 3.0], "c": [1.0, 2.0, 3.0]}


@pytest.mark.parametrize(("effort", "rounds"), [((7, 200, 0.0), 7), ((3, 5, 60.0), 5)], ids=["least", "most"])
def test_rounds_are_at_least_and_at_most(effort: tuple[int, int, float], rounds: int) -> None:
    times = timing.interleaved({"a": lambda index: {"both": Times(1.0, 1.0)}}, timing.Effort(*effort))
    assert len(times["a"]) == rounds


def test_quantiles_are_those_of_the_sample() -> None:
    assert measure.quantiles([6, 2, 4, 3, 5, 1]) == {"q20": 2, "median": 3.5, "q80": 5}
    assert measure.quantiles([7]) == {"q20": 7, "median": 7, "q80": 7}


def test_both_is_the_sum_of_the_parts() -> None:
    step = timing.Step(lambda x, y: providers.eager(providers.DROP_IN, x, y), TINY.inputs(0, CPU))
    times = timing.launched(timing.Bench(CPU), [step])(0)
    assert times["both"].device == times["forward"].device + times["backward"].device > 0
    assert step.results == {}


# -- graphs -------------------------------------------------------------------------------------------------------


class FakeGraphs:
    """In place of a step's CUDA graphs: what a replay leaves is ``damage`` of what the step computes."""

    damage = staticmethod(lambda index, z: z)
    made = 0

    def __init__(self, step: timing.Step, pool: Any, stream: Any) -> None:
        step.both()
        self.results, self.gradients, self.index = dict(step.results), step.gradients, FakeGraphs.made
        FakeGraphs.made += 1
        self.step = step
        step.clear()

    def replayed(self) -> list[graphs.Outputs]:
        loss = self.damage(self.index, self.results["loss"].detach())
        return [graphs.Outputs({"loss": loss}, self.gradients)] * 2

    def forget(self) -> None:
        pass

    @property
    def replays(self) -> list[list[timing.Call]]:
        return [self.step.parts, [self.step.both]]


class GraphBench(timing.Bench):
    """A CPU that is measured in both modes."""

    has_graphs, stream = True, None


@pytest.fixture
def graph_bench(monkeypatch: pytest.MonkeyPatch) -> GraphBench:
    monkeypatch.setattr(graphs, "Graphs", FakeGraphs)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(FakeGraphs, "made", 0)
    return GraphBench(CPU)


def measured(bench: timing.Bench, name: str) -> dict[str, Any]:
    """The modes of a provider."""
    record = targets.shape_record(TINY, CEILINGS, 0)
    measure.measure(TINY, record, bench, EFFORT, [name])
    modes: dict[str, Any] = record["providers"][name]["modes"]
    return modes


def test_graphs_are_timed_beside_launches(graph_bench: GraphBench) -> None:
    modes = measured(graph_bench, "aten")
    for mode in ("launch", "graph"):
        assert modes[mode]["status"] == "timed", modes[mode]["reason"]
        assert all(modes[mode][part]["median"] > 0 for part in TINY.parts)


@pytest.mark.parametrize("wrong_set", [0, 1])
def test_graphs_of_every_set_are_judged(
    wrong_set: int, graph_bench: GraphBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(index: int, z: Tensor) -> Tensor:
        return z * 1.01 if index == wrong_set else z

    monkeypatch.setattr(FakeGraphs, "damage", staticmethod(damage))
    graph = measured(graph_bench, "aten")["graph"]
    assert graph["status"] == "wrong"
    assert graph["both"] is None


@pytest.mark.parametrize(("name", "status"), [("eager", "not captured"), ("aten", "error")])
def test_code_that_waits_for_the_host_is_not_captured(
    name: str, status: str, graph_bench: GraphBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In vicreg_fast that is a defect."""

    def waiting(step: timing.Step, pool: Any, stream: Any) -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(graphs, "Graphs", waiting)
    modes = measured(graph_bench, name)
    assert modes["graph"]["status"] == status
    assert "synchronizing" in modes["graph"]["reason"]
    assert modes["launch"]["status"] == "timed"


# -- memory -------------------------------------------------------------------------------------------------------


OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
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
    step = timing.Step(lambda x, y: {"loss": Kept.apply(x, y)}, inputs)
    peaks = step.peak_bytes(timing.peak_bytes_on_cpu)
    tensors = {part: round(peak / (4 * n), 1) for part, peak in peaks.items()}
    assert tensors == {"forward": 5.0, "backward": 2.0, "both": 5.0}


def test_sets_exceed_the_cache_where_four_suffice() -> None:
    bench = timing.Bench(CPU)
    bench.cache_bytes = 50 << 20
    assert [bench.sets(size << 20) for size in (1, 16, 64, 600)] == [4, 4, 2, 2]
