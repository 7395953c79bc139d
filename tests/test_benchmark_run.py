"""``python -m benchmarks run``, on a CPU and on a GPU that is played: what it writes, refuses and leaves out."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import machine, providers, report, run, timing
from benchmarks.__main__ import main
from vicreg_fast.precision import round_operand

Capture = pytest.CaptureFixture[str]
TINY = "64x64-high"
SHAPES = {shape.name: shape for shape in providers.SHAPES}
ARGUMENTS = ("run", "--device", "cpu", "--quick", "--shape", TINY, "--out")


# What others have measured on an H200.
CEILINGS = {
    "copy_bytes_per_s": 4.3e12,
    "operations_per_s": {"bf16": 790e12, "high": 395e12, "highest": 132e12},
}


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds; and half a second for the ceilings only where a test is about them."""
    monkeypatch.setattr(timing, "QUICK", timing.Effort(2, 3, 0.0))
    if "real_ceilings" not in request.fixturenames:
        monkeypatch.setattr(timing, "ceilings", lambda bench: CEILINGS)


@pytest.fixture
def real_ceilings() -> None:
    pass


def written(folder: Path) -> dict[str, Any]:
    (path,) = folder.iterdir()
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.mark.usefixtures("real_ceilings")
def test_result_holds_the_machine_and_the_times(tmp_path: Path, capsys: Capture) -> None:
    assert main([*ARGUMENTS, str(tmp_path)]) == 0
    document = written(tmp_path)
    assert (document["schema"], document["version"], document["complete"]) == ("vicreg_fast.benchmark", 1, True)
    assert document["command"] == " ".join(("python -m benchmarks", *ARGUMENTS, str(tmp_path)))
    assert document["date"].endswith("+00:00")
    assert document["machine"]["torch"] == torch.__version__
    assert set(document["commit"]) == {"commit", "dirty", "reason"}
    assert document["clocks"]["before"]["power_limit_w"] is None
    assert document["clocks"]["after"]["reason"]
    assert set(document["ceilings"]["operations_per_s"]) == {"bf16", "high", "highest"}
    # No CPU is slower than 10 MB/s, none faster than 100 TB/s: a lost factor of a million would be.
    for rate in (document["ceilings"]["copy_bytes_per_s"], *document["ceilings"]["operations_per_s"].values()):
        assert 1e7 < rate < 1e14
    (case,) = document["cases"]
    assert (case["name"], case["N"], case["D"], case["dtype"]) == (TINY, 64, 64, "float32")
    assert (case["precision"], case["status"]) == ("high", "measured")
    assert case["floor"]["operations"] == 6 * 64**3
    assert case["floor"]["bytes"] == 6 * 64 * 64 * 4
    for name in ("eager", "aten"):
        entry = case["providers"][name]
        assert entry["status"] == "right"
        assert 0 < max(entry["errors"].values()) < case["bound"]
        assert entry["peak_bytes"] > 0
        (mode,) = entry["modes"].values()
        assert (mode["status"], mode["rounds"], mode["host"]) == ("timed", 2, None)
        for part in ("forward", "backward", "both"):
            assert 0 < mode[part]["q20"] <= mode[part]["median"] <= mode[part]["q80"]
        assert mode["both"]["q80"] > mode["backward"]["q20"]
    for name in ("compile", "triton"):
        assert case["providers"][name]["status"] == "unavailable"
        assert case["providers"][name]["modes"] == {}
    assert "needs a CUDA or ROCm device" in case["providers"]["triton"]["reason"]
    assert case["targets"]["launch"]["aten"] == {"asked": 1.0, "found": None, "met": None}
    out = capsys.readouterr().out
    assert out.rstrip().endswith(report.table(document["cases"]))
    assert f"| {TINY}, launch | " in out


def wrong_value(losses: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    return losses | {"loss": losses["loss"] * 1.01}


def wrong_gradient(losses: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    return losses | {"loss": losses["loss"] + 0.1 * (x - x.detach()).sum() / x.numel()}


def unwritten_gradient(losses: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    return losses | {"cov-loss": losses["cov-loss"] + float("nan") * (x - x.detach()).sum().detach()}


@pytest.mark.parametrize("fault", [wrong_value, wrong_gradient, unwritten_gradient])
def test_wrong_provider_gets_a_mark_and_no_time(
    fault: Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    right = providers.VICRegLoss

    def faulty(*args: Any, **kwargs: Any) -> providers.Losses:
        losses = right(*args, **kwargs)
        return lambda x, y: fault(dict(losses(x, y)), x)

    monkeypatch.setattr(providers, "VICRegLoss", faulty)
    assert main([*ARGUMENTS, str(tmp_path)]) == 1
    (case,) = written(tmp_path)["cases"]
    entry = case["providers"]["aten"]
    assert entry["status"] == "wrong"
    assert "allowed" in entry["reason"]
    assert entry["modes"] == {}
    assert case["providers"]["eager"]["modes"]["launch"]["status"] == "timed"
    assert " wrong | unavailable |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "out of memory", 0), (ZeroDivisionError("no"), "error", 1)],
)
@pytest.mark.parametrize("calls_that_pass", [0, 4], ids=["at the gate", "while timed"])
def test_provider_that_raises_is_written_down_and_the_rest_goes_on(
    calls_that_pass: int,
    error: Exception,
    status: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, calls = providers.VICRegLoss, iter(range(calls_that_pass))
    monkeypatch.setattr(timing.Bench, "sets", lambda bench, size: 2)

    def raising(*args: Any, **kwargs: Any) -> providers.Losses:
        losses = right(*args, **kwargs)

        def call(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            if next(calls, None) is None:
                raise error
            return dict(losses(x, y))

        return call

    monkeypatch.setattr(providers, "VICRegLoss", raising)
    assert main([*ARGUMENTS, str(tmp_path)]) == code
    found = written(tmp_path)["cases"][0]["providers"]
    entry = found["aten"]["modes"]["launch"] if calls_that_pass else found["aten"]
    assert entry["status"] == status
    assert str(error) in entry["reason"]
    assert entry.get("both") is None
    assert found["eager"]["modes"]["launch"]["both"]["median"] > 0


def test_case_that_fails_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any) -> None:
        raise RuntimeError("where it ends") from torch.OutOfMemoryError("CUDA out of memory")

    def chained(*args: Any) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            no_memory()

    monkeypatch.setattr(providers, "truth", chained)
    assert main([*ARGUMENTS, str(tmp_path)]) == 0
    document = written(tmp_path)
    assert document["complete"]
    assert document["cases"][0]["status"] == "out of memory"
    assert document["cases"][0]["providers"] == {}


def test_interruption_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    measure = run.measure

    def interrupted(shape: providers.Shape, *args: Any) -> None:
        if shape.name != TINY:
            raise KeyboardInterrupt
        measure(shape, *args)

    monkeypatch.setattr(run, "measure", interrupted)
    arguments = ["run", "--device", "cpu", "--quick", "--out", str(tmp_path), "--shape", TINY, "64x2048-high"]
    assert main(arguments) == 130
    document = written(tmp_path)
    assert [case["name"] for case in document["cases"]] == [TINY]
    assert not document["complete"]
    assert document["clocks"]["after"] is not None
    captured = capsys.readouterr()
    assert captured.err.split() == ["interrupted"]
    assert f"| {TINY}, launch |" in captured.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cpu", "--shape", "1x1"], ["'1x1'", *SHAPES]),
        (["--device", "cuda:99"], ["'cuda:99'", "only cpu"]),
        (["--device", "nonsense"], ["'nonsense'", "only cpu"]),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--out", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


def test_result_that_is_there_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(run, "measure", lambda *args: None)
    assert main([*ARGUMENTS, str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    path.write_text("precious")
    with pytest.raises(SystemExit) as stopped:
        main([*ARGUMENTS, str(tmp_path)])
    assert stopped.value.code == 2
    assert "is there already" in capsys.readouterr().err
    assert path.read_text() == "precious"


def test_default_shapes_of_a_cpu_are_small() -> None:
    chosen = run._chosen(None, torch.device("cpu"))
    assert TINY in [shape.name for shape in chosen]
    assert all(shape.N * shape.D < 1 << 21 for shape in chosen)
    assert run._chosen(None, torch.device("cuda:0")) == list(providers.SHAPES)


def test_help_states_the_exit_status(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "exit status: 0" in capsys.readouterr().out


# The gate


@pytest.mark.parametrize(("products", "refused"), [("highest", True), ("high", False)])
def test_gate_tells_tf32_from_float32(products: str, refused: bool) -> None:
    shape = providers.Shape(256, 512, products)
    inputs = shape.inputs(0, torch.device("cpu"))

    def rounded(z: Tensor) -> Tensor:
        c = z - z.mean(0)
        return c + (round_operand(c.detach(), "tf32") - c.detach())

    found = providers.evaluate(lambda x, y: providers.eager(rounded(x), rounded(y)), inputs)
    # The invariance is taken from the centred views here, which changes its value a little: not what is judged.
    values = {"cov-loss": found.values["cov-loss"]}
    judged = providers.Evaluation(values, {"cov-loss": found.gradients["cov-loss"]})
    reason = providers.wrong(providers.errors(judged, providers.truth(inputs)), shape.bound)
    assert (reason is not None) == refused, reason


@pytest.mark.parametrize("N", [64, 513])
@pytest.mark.parametrize("products", ["highest", "high", "bf16"])
def test_gate_lets_eager_code_pass(products: str, N: int) -> None:
    shape = providers.Shape(N, 256, products)
    inputs = shape.inputs(3, torch.device("cpu"))
    true = providers.truth(inputs)
    assert (
        providers.wrong(providers.errors(providers.evaluate(providers.eager, inputs), true), shape.bound)
        is None
    )


def test_torch_multiplies_in_the_shape_s_precision_and_is_left_as_it_was() -> None:
    matmul, device = torch.backends.cuda.matmul, torch.device("cuda")
    before = matmul.fp32_precision
    for precision, setting in (("high", "tf32"), ("highest", "ieee"), (None, "ieee")):
        with providers.products_of(precision, device):
            assert matmul.fp32_precision == setting
            # What Inductor reads: it raises where only the newer of torch's two interfaces was used.
            assert torch.get_float32_matmul_precision() == ("high" if setting == "tf32" else "highest")
        assert matmul.fp32_precision == before


# Timing


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


@pytest.mark.parametrize("forgets", [0, 1], ids=["whole", "one operator left out"])
def test_graphs_are_judged_and_timed(
    forgets: int, played_gpu: timing.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlayedGraph, "forgets", forgets)
    shape = SHAPES[TINY]
    case: dict[str, Any] = {"providers": {}}
    run.measure(shape, case, played_gpu, timing.QUICK)
    for name in ("eager", "aten"):
        entry = case["providers"][name]
        assert entry["peak_bytes"] == 64 * 64 * 4  # three times a view, less two gradients
        launch, graph = entry["modes"]["launch"], entry["modes"]["graph"]
        assert launch["status"] == "timed"
        assert launch["both"]["median"] >= launch["host"]["both"]["median"] > 0
        if forgets:
            assert graph["status"] == "wrong"
            assert graph["both"] is None
        else:
            assert graph["status"] == "timed", graph["reason"]
            assert {len(graph[part]) for part in ("forward", "backward", "both")} == {3}


def test_sets_exceed_the_cache_where_four_suffice() -> None:
    bench = timing.Bench(torch.device("cpu"))
    bench.cache_bytes = 50 << 20
    assert [bench.sets(size << 20) for size in (1, 16, 64, 600)] == [4, 4, 2, 2]


# Report


def test_floor_is_the_slower_of_operations_and_bytes() -> None:
    expected = {
        "256x8192-highest": (24e-6, "operations"),
        "256x8192-high": (12e-6, "bytes"),
        "2048x8192-bf16": (0.26e-3, "operations"),
        "2600000x64-bf16": (0.46e-3, "bytes"),
    }
    for name, (seconds, bound_by) in expected.items():
        found = report.floor(SHAPES[name], CEILINGS)
        assert found["seconds"] == pytest.approx(seconds, rel=0.05)
        assert found["bound_by"] == bound_by


def test_targets_are_met_or_missed() -> None:
    shape = SHAPES["256x8192-highest"]
    times = {"eager": 6.0, "compile": 2.4, "triton": 0.1}
    entries: dict[str, Any] = {
        name: {"status": "right", "modes": {"graph": {"status": "timed", "both": {"median": seconds}}}}
        for name, seconds in times.items()
    }
    entries["aten"] = {"status": "wrong", "modes": {}}
    case: dict[str, Any] = {"name": shape.name, "floor": {"seconds": 0.05}, "providers": entries}
    judged = report.judge(shape, case, "graph", held=True)
    assert {name: (j["asked"], j["met"]) for name, j in judged.items()} == {
        "eager": (60, True),
        "compile": (25, False),
        "aten": (1.5, None),
        "floor": (0.4, True),
    }
    assert report.judge(shape, case, "graph", held=False)["floor"]["met"] is None
    case["targets"] = {"graph": judged}
    row = report.table([case]).splitlines()[2]
    assert row == (
        "| 256x8192-highest, graph | 6e+03 ms | 2.4e+03 ms | wrong | 100 ms | "
        "60x (60), **24x (25)**, – (1.5) | 0.5 (0.4) |"
    )


# Machine


def test_missing_tools_are_null_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    clocks = machine.clocks(torch.device("cuda:0"))
    assert "nvidia-smi" in clocks.pop("reason")
    assert set(clocks.values()) == {None}
    commit = machine.commit()
    assert commit["commit"] is None
    assert "git" in commit["reason"]


def test_a_line_of_nvidia_smi() -> None:
    assert machine._parsed("580.159.04, 1980, 2619, 121.5, 700.00, [N/A]") == {
        "driver": "580.159.04",
        "sm_clock_mhz": 1980.0,
        "memory_clock_mhz": 2619.0,
        "power_w": 121.5,
        "power_limit_w": 700.0,
        "temperature_c": None,
    }
