"""How the benchmarks time: order and quantiles, and the graphs and events of a GPU that is played."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import memory, providers, records, report, run, timing
from benchmarks.cases import CASES

from .played_result import CEILINGS

TINY = "64x64-highest"
NAMED = {case.name: case for case in CASES}
EFFORT = timing.Effort(2, 3, 0.0)


def test_rounds_are_interleaved_and_a_run_that_fails_is_left_out() -> None:
    order: list[str] = []

    def turn(name: str, last: int = 99) -> Callable[[int], dict[str, timing.Times]]:
        def run(number: int) -> dict[str, timing.Times]:
            order.append(f"{name}{number}")
            if number == last:
                raise RuntimeError
            return {"both": timing.Times([float(number)], [0.0])}

        return run

    def attempt(name: str, call: timing.Call) -> bool:
        try:
            call()
        except RuntimeError:
            return False
        return True

    runs = {"a": turn("a"), "b": turn("b", last=1), "c": turn("c")}
    found = timing.interleaved(runs, timing.Effort(3, 3, 0.0), attempt)
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1", "a2", "c2", "c3", "a3"]
    assert list(found) == ["a", "c"]
    assert [parts["both"].device for parts in found.values()] == 2 * [[1.0, 2.0, 3.0]]


def test_quantiles_are_those_of_the_sample() -> None:
    assert timing.quantiles([6, 2, 4, 3, 5, 1]) == {"q20": 2, "median": 3.5, "q80": 5}
    assert timing.quantiles([7]) == {"q20": 7, "median": 7, "q80": 7}


class PlayedGraph:
    """A CUDA graph on the CPU: remembers the operators of a capture, and repeats them into the same memory."""

    forgets = 0  # operators left out of a replay

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for operator, args, kwargs, out in self.calls[: len(self.calls) - self.forgets]:
            again = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


@contextmanager
def played_capture(graph: PlayedGraph, **_: Any) -> Iterator[None]:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, operator: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            out = operator(*args, **(kwargs or {}))
            graph.calls.append((operator, args, kwargs or {}, out))
            return out

    with Recorder():
        yield


class PlayedEvent:
    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: "PlayedEvent") -> float:
        return (later.at - self.at) * 1e3


@pytest.fixture
def played_gpu(monkeypatch: pytest.MonkeyPatch) -> timing.Bench:
    """A bench that takes the CPU for a GPU."""

    @contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    class Properties:
        L2_cache_size = 1 << 16

    played: dict[str, Any] = {
        "CUDAGraph": PlayedGraph,
        "graph": played_capture,
        "graph_pool_handle": lambda: None,
        "stream": stream,
        "current_stream": Stream,
        "Stream": lambda device: Stream(),
        "Event": lambda enable_timing: PlayedEvent(),
        "synchronize": lambda *args: None,
        "set_stream": lambda stream: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: Properties,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 100 + 3 * 64 * 64 * 4,
    }
    for name, value in played.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "is_gpu", lambda device: True)
    return timing.Bench(torch.device("cpu"))


@pytest.mark.parametrize("name", [TINY, "vicregl-2x4x8-m2-highest", "matching-64x49x512-m20-highest"])
@pytest.mark.parametrize("forgets", [0, 1], ids=["whole", "one operator left out"])
def test_graphs_are_judged_and_timed(
    forgets: int, name: str, played_gpu: timing.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlayedGraph, "forgets", forgets)
    case = NAMED[name]
    record = records.new_record(case, CEILINGS, 0)
    # A GPU's products are not what a CPU plays: only those who compute as a CPU does are asked.
    run.measure(case, record, played_gpu, EFFORT, ["eager", "aten"])
    for provider in ("eager", "aten"):
        entry = record["providers"][provider]
        if name == TINY:
            # Three times a view; of the backward pass less two gradients.
            expected = {"forward": 3 * 64 * 64 * 4, "backward": 64 * 64 * 4, "both": 3 * 64 * 64 * 4}
            assert entry["peak_bytes"] == expected
        launch, graph = entry["modes"]["launch"], entry["modes"]["graph"]
        assert launch["status"] == "timed"
        whole = report.part_of(record)
        assert launch[whole]["median"] >= launch["host"][whole]["median"] > 0
        if forgets:
            assert graph["status"] == "wrong"
            assert graph[whole] is None
        else:
            assert graph["status"] == "timed", graph["reason"]
            assert {len(graph[part]) for part in case.parts} == {3}


def test_graphs_of_every_set_are_judged(played_gpu: timing.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class LaterForgets(PlayedGraph):
        """Of the second set: three graphs a set and provider."""

        made = 0

        def __init__(self) -> None:
            super().__init__()
            LaterForgets.made += 1
            self.forgets = int(LaterForgets.made > 3)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", LaterForgets)
    monkeypatch.setattr(timing.Bench, "sets", lambda bench, size: 2)
    record = records.new_record(NAMED[TINY], CEILINGS, 0)
    run.measure(NAMED[TINY], record, played_gpu, EFFORT, ["aten"])
    assert record["providers"]["aten"]["modes"]["graph"]["status"] == "wrong"


def test_what_waits_for_the_host_is_not_captured(
    played_gpu: timing.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture that is broken off would end the run: torch 2.11 is of no use after it."""
    modes: list[Any] = [0]

    def waiting(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return providers.eager(x, y)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(providers, "eager_of", lambda *args: waiting)
    monkeypatch.setattr(torch.cuda, "graph", pytest.fail)
    record = records.new_record(NAMED[TINY], CEILINGS, 0)
    run.measure(NAMED[TINY], record, played_gpu, EFFORT, ["eager"])
    graph = record["providers"]["eager"]["modes"]["graph"]
    assert graph["status"] == "not captured"
    assert "synchronizing" in graph["reason"]
    assert modes[-1] == 0


@pytest.mark.parametrize("mode", ["launch", "graph"])
def test_who_fails_keeps_no_memory(
    mode: str, played_gpu: timing.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[timing.Step] = []
    backward = timing.Step.backward

    def failing(step: timing.Step) -> None:
        if step in kept:
            raise torch.OutOfMemoryError("CUDA out of memory")
        backward(step)

    def timed(bench: timing.Bench, steps: list[timing.Step]) -> Any:
        kept.extend(steps)
        return launched(bench, steps)

    launched = timing.launched
    if mode == "launch":
        monkeypatch.setattr(timing, "launched", timed)
    else:
        monkeypatch.setattr(timing, "_warm_up", lambda step, stream: kept.append(step))
    monkeypatch.setattr(timing.Step, "backward", failing)
    record = records.new_record(NAMED[TINY], CEILINGS, 0)
    run.measure(NAMED[TINY], record, played_gpu, EFFORT, ["aten"])
    modes = record["providers"]["aten"]["modes"]
    assert modes[mode]["status"] == modes["graph"]["status"] == "out of memory"
    assert all(step.results == {} for step in kept)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when calling",
    ],
)
def test_no_memory_has_many_words(words: str) -> None:
    entry: dict[str, Any] = {}
    with records.recorded(entry):
        raise RuntimeError(words)
    assert entry["status"] == "out of memory"


def test_peak_memory_is_that_of_each_part() -> None:
    """Forward three views, of which it keeps one; backward two more, the gradients, and one beside them."""
    bytes_of_a_view = 4 << 16
    n = bytes_of_a_view // 4

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            first, second, third = x + 1, y + 1, x + y
            ctx.save_for_backward(first)
            return (first + second + third).sum()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            (first,) = ctx.saved_tensors
            a, b = torch.empty(n), torch.empty(n)
            beside = first + 1
            return a.fill_(1), b.copy_(beside)

    inputs = (torch.randn(n, requires_grad=True), torch.randn(n, requires_grad=True))
    step = timing.Step(lambda x, y: {"loss": Kept.apply(x, y)}, inputs)
    found = step.peak_bytes(memory.peak_bytes)
    views = {part: round(size / bytes_of_a_view, 1) for part, size in found.items()}
    # first, second, third, first + second, and that plus third; of the backward pass first and what is beside it.
    assert views == {"forward": 5.0, "backward": 2.0, "both": 5.0}
    assert step.results == {}


def test_what_waits_for_the_host_has_no_graph(
    played_gpu: timing.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def no_capture(*_: Any, **__: Any) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", no_capture)
    record = records.new_record(NAMED[TINY], CEILINGS, 0)
    run.measure(NAMED[TINY], record, played_gpu, EFFORT, ["eager", "aten"])
    found = {name: entry["modes"]["graph"]["status"] for name, entry in record["providers"].items()}
    assert found == {"eager": "not captured", "aten": "error"}  # ours can be captured: it is a defect
    assert all(entry["modes"]["launch"]["status"] == "timed" for entry in record["providers"].values())
    assert providers.is_ours("ours as lightly")
    assert not providers.is_ours("lightly")


def test_sets_exceed_the_cache_where_four_suffice() -> None:
    bench = timing.Bench(torch.device("cpu"))
    bench.cache_bytes = 50 << 20
    assert [bench.sets(size << 20) for size in (1, 16, 64, 600)] == [4, 4, 2, 2]
