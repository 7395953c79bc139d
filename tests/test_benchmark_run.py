"""``python -m benchmarks run``, on a CPU and on a GPU that is played: what it writes, refuses and leaves out."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException

from benchmarks import (
    distributed,
    libraries,
    machine,
    providers,
    report,
    results,
    run,
    test_speed,
    timing,
)
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Case, VICReg
from benchmarks.conftest import DEVICE

from .played_result import CEILINGS

Capture = pytest.CaptureFixture[str]
TINY = "64x64-highest"
NAMED = {case.name: case for case in CASES}
ARGUMENTS = ("run", "--device", "cpu", "--quick", "--shape", TINY, "--out")
CPU = torch.device("cpu")


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
    assert (document["schema"], document["version"], document["complete"]) == ("vicreg_fast.benchmark", 3, True)
    (session,) = document["sessions"]
    assert session["command"] == " ".join(("python -m benchmarks", *ARGUMENTS, str(tmp_path)))
    assert session["date"].endswith("+00:00")
    assert session["clocks"]["before"]["power_limit_w"] is None
    assert session["clocks"]["after"]["reason"]
    # No CPU is slower than 10 MB/s, none faster than 100 TB/s: a lost factor of a million would be.
    ceilings = session["ceilings"]
    for rate in (ceilings["copy_bytes_per_s"], *ceilings["operations_per_s"].values()):
        assert 1e7 < rate < 1e14
    assert document["machine"]["torch"] == torch.__version__
    assert document["asked"] == {"shapes": [TINY], "providers": None, "quick": True}
    (case,) = document["cases"]
    assert (case["name"], case["shape"], case["dtype"]) == (TINY, {"N": 64, "D": 64}, "float32")
    assert (case["precision"], case["status"], case["samples"]) == ("highest", "measured", 64)
    assert case["floor"]["both"]["operations"] == 6 * 64**3
    assert case["floor"]["both"]["bytes"] == 6 * 64 * 64 * 4
    for name in ("eager", "aten"):
        entry = case["providers"][name]
        assert entry["status"] == "right"
        assert 0 < max(entry["errors"].values()) < case["bound"]
        assert all(size > 0 for size in entry["peak_bytes"].values())
        (mode,) = entry["modes"].values()
        assert (mode["status"], mode["rounds"], mode["host"]) == ("timed", 2, None)
        for part in ("forward", "backward", "both"):
            assert 0 < mode[part]["q20"] <= mode[part]["median"] <= mode[part]["q80"]
        assert mode["both"]["q80"] > mode["backward"]["q20"]
    for name in ("compile", "triton"):
        assert case["providers"][name]["status"] == "unavailable"
        assert case["providers"][name]["modes"] == {}
    assert "needs a CUDA or ROCm device" in case["providers"]["triton"]["reason"]
    eager, aten = (case["providers"][name]["modes"]["launch"]["both"]["median"] for name in ("eager", "aten"))
    judged = case["targets"]["launch"]["eager"]
    assert judged == {"asked": 1.0, "found": eager / aten, "met": eager >= aten}
    out = capsys.readouterr().out
    assert report.table(document) in out
    assert f"| {TINY} | " in out


@pytest.mark.parametrize("name", ["vicregl-2x4x8-m2-highest", "matching-64x49x512-m20-highest"])
def test_maps_are_measured(name: str, tmp_path: Path) -> None:
    assert main(["run", "--device", "cpu", "--quick", "--shape", name, "--out", str(tmp_path)]) == 0
    (case,) = written(tmp_path)["cases"]
    parts = NAMED[name].parts
    for provider in ("eager", "cdist", "aten", *(["bmm"] if "bmm" in case["providers"] else [])):
        mode = case["providers"][provider]["modes"]["launch"]
        assert mode["status"] == "timed", provider
        assert [part for part in ("forward", "backward", "both") if mode[part]] == list(parts)
    assert case["floor"].keys() == set(parts)
    assert case["targets"]["launch"]["eager"]["found"] > 0


def test_ranks_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ranks-1024x256-highest"
    assert main(["run", "--device", "cpu", "--quick", "--shape", name, "--out", str(tmp_path)]) == 0
    (case,) = written(tmp_path)["cases"]
    assert case["shape"] == {"N": 1024, "D": 256, "ranks": 2}
    assert case["samples"] == 2048
    for provider in ("eager", "aten"):
        entry = case["providers"][provider]
        assert entry["status"] == "right", entry["reason"]
        assert entry["modes"]["launch"]["both"]["median"] > 0
        # Eager code gathers both views of both ranks, and makes a matrix of each.
        assert min(entry["peak_bytes"].values()) > 2 * 2 * 1024 * 256 * 4
    assert case["providers"]["triton"]["status"] == "unavailable"


def test_a_provider_that_raises_on_all_ranks_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(distributed, "_eager", no_memory)
    case = NAMED["ranks-1024x256-highest"]
    dist = torch.distributed
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        found = distributed._measured(case, CPU, 0, 1, timing.QUICK, ["eager", "aten"])
    finally:
        dist.destroy_process_group()
    assert (found["eager"]["status"], found["eager"]["reason"]) == ("out of memory", "CUDA out of memory")
    assert found["eager"]["modes"] == {}
    assert found["aten"]["modes"]["launch"]["both"]["median"] > 0


def test_one_gpu_has_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    record: dict[str, Any] = {"shape": {}, "status": "measured"}
    case = NAMED["ranks-256x8192-high"]
    assert isinstance(case, distributed.Distributed)
    distributed.measure(case, record, CEILINGS, torch.device("cuda:0"), timing.QUICK, None)
    assert record["status"] == "left out"
    assert "one GPU" in record["reason"]


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
    assert " wrong | " in capsys.readouterr().out


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

    monkeypatch.setattr(timing.Bench, "sets", chained)
    assert main([*ARGUMENTS, str(tmp_path)]) == 0
    document = written(tmp_path)
    assert document["complete"]
    assert document["cases"][0]["status"] == "out of memory"
    assert document["cases"][0]["providers"] == {}


def test_no_memory_for_the_truth_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(providers, "truth", no_memory)
    assert main([*ARGUMENTS, str(tmp_path)]) == 0
    found = written(tmp_path)["cases"][0]["providers"]
    assert [found[name]["status"] for name in ("eager", "aten")] == 2 * ["out of memory"]


def test_no_memory_for_the_truth_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames of what was raised hold the tensors that were there already."""
    case = VICReg("highest", N=4, D=8)
    calls: list[int] = []

    def no_memory(*args: Any) -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(providers, "truth", no_memory)
    truths: dict[Any, Any] = {}
    provider = providers.Provider(providers.eager, None, providers.DROP_IN)
    inputs = case.inputs(0, CPU)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="float64 reference: CUDA out of memory"):
            run._truth(truths, case, provider, inputs)
    (kept,) = truths.values()
    tb, names = kept.__traceback__, []
    while tb is not None:
        names.append(tb.tb_frame.f_code.co_name)
        tb = tb.tb_next
    assert "no_memory" not in names
    assert len(calls) == 1


def test_interruption_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    measure = run.measure

    def interrupted(case: Case, *args: Any, **kwargs: Any) -> None:
        if case.name == TINY:
            raise KeyboardInterrupt
        measure(case, *args, **kwargs)

    monkeypatch.setattr(run, "measure", interrupted)
    arguments = ["run", "--device", "cpu", "--quick", "--out", str(tmp_path), "--shape", TINY, "8x16-highest"]
    assert main(arguments) == 130
    document = written(tmp_path)
    assert [case["name"] for case in document["cases"]] == ["8x16-highest"]
    assert not document["complete"]
    assert document["sessions"][0]["clocks"]["after"] is not None
    captured = capsys.readouterr()
    assert "interrupted; the same command continues" in captured.err
    assert "| 8x16-highest |" in captured.out

    monkeypatch.setattr(run, "measure", measure)
    assert main([*arguments[:-2], "8x16-highest", "33x31-highest"]) == 0  # another question: a file of its own
    assert len(list(tmp_path.iterdir())) == 2
    assert main(arguments) == 0
    assert "1 of 2 shapes are there" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2
    continued = next(found for found in results.kept(tmp_path).values() if TINY in found["asked"]["shapes"])
    assert continued["complete"]
    assert [case["name"] for case in continued["cases"]] == ["8x16-highest", TINY]
    assert [case["session"] for case in continued["cases"]] == [0, 1]
    assert continued["cases"][0] == document["cases"][0]


def test_what_was_stopped_is_left_alone_where_it_is_of_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    measure = run.measure
    monkeypatch.setattr(run, "measure", interrupted)
    assert main([*ARGUMENTS, str(tmp_path)]) == 130
    monkeypatch.setattr(run, "measure", measure)
    commit = machine.commit()
    monkeypatch.setattr(machine, "commit", lambda out: commit | {"changes": "another"})
    assert main([*ARGUMENTS, str(tmp_path)]) == 0
    monkeypatch.setattr(machine, "commit", lambda out: commit)
    assert main([*ARGUMENTS, str(tmp_path), "--fresh"]) == 0
    assert sorted(found["complete"] for found in results.kept(tmp_path).values()) == [False, True, True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cpu", "--shape", "1x1"], ["'1x1'", *NAMED]),
        (
            ["--device", "cpu", "--suite", "vicreg,bert"],
            ["'bert'", "vicreg", "vicregl", "matching", "distributed"],
        ),
        (["--device", "cpu", "--suite", ""], ["''", "vicreg"]),
        (["--device", "cpu", "--out", ""], ["--out", "''"]),
        (["--device", "cpu", "--provider", "numpy"], ["'numpy'", *providers.names()]),
        (["--device", "cpu", "--suite", "matching", "--shape", TINY], ["matching", "cpu"]),
        (["--device", "cpu", "--provider", "bmm", "--shape", TINY], ["bmm", "eager", "aten"]),
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


def test_result_that_is_there_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure", lambda *args, **kwargs: None)
    assert main([*ARGUMENTS, str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    path.write_text("precious")
    assert main([*ARGUMENTS, str(tmp_path)]) == 0
    assert path.read_text() == "precious"
    assert (tmp_path / f"{path.stem}-2.json").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main([*ARGUMENTS, str(tmp_path / "file")])
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_a_device_measures(device: str) -> None:
    everything = run.chosen(run.Options(), device)
    assert {case.suite for case in everything} == {"vicreg", "vicregl", "matching", "distributed"}
    assert all(device in case.devices for case in everything)
    quick = run.chosen(run.Options(quick=True), device)
    assert {case.suite for case in quick} == {"vicreg", "vicregl", "matching", "distributed"}
    assert {case.name for case in quick} <= {case.name for case in everything}
    matching = run.chosen(run.Options(suites=["matching"]), device)
    assert {case.suite for case in matching} == {"matching"}


def test_every_shape_of_real_use_is_there() -> None:
    on_gpu = {case.name for case in run.chosen(run.Options(), "cuda")}
    for N in (64, 128, 256, 512, 2048, 4096):
        for D in (2048, 8192, 16384):
            assert {f"{N}x{D}-{products}" for products in ("highest", "high", "bf16")} <= on_gpu
    assert {"6528x512-bf16", "2600000x64-bf16", "vicregl-64x49x512-m20+4-bf16"} <= on_gpu


def test_help_states_the_exit_status(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "exit status: 0" in capsys.readouterr().out


def test_a_device_that_is_lost_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    measure, free = run.measure, timing.Bench.free

    def breaking(case: Case, *args: Any, **kwargs: Any) -> None:
        measure(case, *args, **kwargs)

        def lost(bench: timing.Bench) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(timing.Bench, "free", lost)

    monkeypatch.setattr(run, "measure", breaking)
    arguments = ["run", "--device", "cpu", "--quick", "--out", str(tmp_path), "--shape", TINY, "8x16-highest"]
    assert main(arguments) == 1
    assert "illegal memory access" in capsys.readouterr().out
    document = written(tmp_path)
    assert not document["complete"]
    assert len(document["cases"]) == 1
    monkeypatch.setattr(timing.Bench, "free", free)
    monkeypatch.setattr(run, "measure", measure)
    assert main(arguments) == 0
    assert written(tmp_path)["complete"]


@pytest.mark.parametrize("what", ["driver", "card", "configuration"])
def test_another_driver_card_or_configuration_is_another_question(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", interrupted)
    assert main([*ARGUMENTS, str(tmp_path)]) == 130
    about, clocks = machine.machine(CPU), machine.clocks(CPU)
    if what == "driver":
        monkeypatch.setattr(machine, "clocks", lambda device: clocks | {"driver": "1.2"})
    elif what == "card":
        monkeypatch.setattr(machine, "machine", lambda device: about | {"uuid": "GPU-1"})
    else:
        monkeypatch.setenv("VICREG_FAST_AUTOTUNE", "1")
    assert main([*ARGUMENTS, str(tmp_path)]) == 130
    assert len(list(tmp_path.iterdir())) == 2
    assert main([*ARGUMENTS, str(tmp_path)]) == 130  # the second goes on
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_another_process_writes_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(*args: Any, **kwargs: Any) -> None:
        if len(list(tmp_path.glob("*.json"))) == 1:
            assert main([*ARGUMENTS, str(tmp_path)]) == 0

    monkeypatch.setattr(run, "measure", second)
    assert main([*ARGUMENTS, str(tmp_path)]) == 0
    assert [len(found["sessions"]) for found in results.kept(tmp_path).values()] == [1, 1]
    assert not list(tmp_path.glob("*.lock"))
    assert results.hold(tmp_path / "absent" / "a.json") is None  # nor is a file held that cannot be written


def test_shapes_and_providers_add_up_and_what_none_computes_is_told(tmp_path: Path, capsys: Capture) -> None:
    options = ["--shape", TINY, "--shape", "ranks-256x2048-highest", "--provider", "cdist", "--provider", "bmm"]
    with pytest.raises(SystemExit):
        main(["run", "--device", "cpu", "--quick", "--out", str(tmp_path), *options])
    assert "no provider cdist, bmm" in capsys.readouterr().err
    options = [
        "--shape",
        TINY,
        "--shape",
        "ranks-256x2048-highest",
        "--provider",
        "compile",
        "--provider",
        "triton",
    ]
    assert main(["run", "--device", "cpu", "--quick", "--out", str(tmp_path), *options[:-1], "lightly"]) == 0
    out = capsys.readouterr().out
    assert "ranks-256x2048-highest: of the providers asked for, none computes it" in out
    assert written(tmp_path)["asked"]["providers"] == ["compile", "lightly"]


def test_who_is_not_there_is_named(tmp_path: Path, capsys: Capture) -> None:
    assert main([*ARGUMENTS, str(tmp_path), "--provider", "triton"]) == 0
    out = capsys.readouterr().out
    assert "Nothing was timed." in out
    assert "not measured: triton: " in out


def test_ctrl_c_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    assert main(["run"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_folder_that_was_cleared_away_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure", lambda *args, **kwargs: shutil.rmtree(tmp_path / "out"))
    assert main([*ARGUMENTS, str(tmp_path / "out")]) == 0
    assert written(tmp_path / "out")["complete"]


def test_a_library_that_came_since_is_another_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "measure", interrupted)
        assert main([*ARGUMENTS, str(tmp_path)]) == 130
    monkeypatch.setattr(libraries, "version", lambda name: "9.9")
    monkeypatch.setattr(libraries, "find", lambda *args: "not really")
    assert main([*ARGUMENTS, str(tmp_path)]) == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_no_compilation_begins_that_may_not_end_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: dict[float, bool] = {}
    monkeypatch.setattr(run, "measure", lambda *args: late.update({run._BUDGET["cpu"][1]: args[-2]}))
    for seconds in (30.0, 40.0):  # and a shape may take two
        monkeypatch.setattr(run, "_BUDGET", {"cpu": (0.0, seconds)})
        assert main([*ARGUMENTS, str(tmp_path)]) == 0
    assert late == {30.0: True, 40.0: False}


def test_what_is_late_is_not_compiled() -> None:
    case = next(case for case in CASES if case.compiled)
    found = dict(providers.providers(case, CPU, late=True))
    assert "no time is left" in str(found["compile"].reason)
    assert found["eager"].losses is not None


def test_a_wrong_backend_is_not_replaced_by_the_other() -> None:
    modes = {"graph": {"both": {"median": 1.0}}}
    record: dict[str, Any] = {"suite": "vicreg", "providers": {"aten": {"status": "right", "modes": modes}}}
    assert report.ours(record, "graph") == "aten"
    record["providers"]["triton"] = {"status": "unavailable", "modes": {}}
    assert report.ours(record, "graph") == "aten"
    record["providers"]["triton"] = {"status": "wrong", "modes": {}}
    assert report.ours(record, "graph") is None


def test_a_failing_rank_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(*args: Any, **kwargs: Any) -> None:
        trace = "\n\n-- Process 0 terminated with the following error:\nTraceback:\n  x\n"
        raise ProcessRaisedException(f"{trace}torch.OutOfMemoryError: CUDA out of memory\n", 0, 1)

    monkeypatch.setattr(distributed.mp, "spawn", spawn)
    name = "ranks-1024x256-highest"
    assert main(["run", "--device", "cpu", "--quick", "--shape", name, "--out", str(tmp_path)]) == 0
    (case,) = written(tmp_path)["cases"]
    assert (case["status"], case["reason"]) == ("out of memory", "torch.OutOfMemoryError: CUDA out of memory")


# Under pytest-benchmark


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_pytest_collects_every_provider_of_every_shape(device: str) -> None:
    found: list[Any] = []
    config = SimpleNamespace(stash={DEVICE: torch.device(device)})
    metafunc = SimpleNamespace(config=config, parametrize=lambda names, values: found.extend(values))
    test_speed.pytest_generate_tests(metafunc)  # type: ignore[arg-type]
    assert len({value.id for value in found}) == len(found)
    there = {(value.values[0].name, value.values[1], value.values[2]) for value in found}
    for case in run.chosen(run.Options(), device):
        for name in () if isinstance(case, distributed.Distributed) else providers.names_of(case):
            for part in case.parts:
                assert ((case.name, name, part) in there) == (name != "compile" or case.compiled)


def test_pytest_writes_groups_and_what_they_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_speed.py"]
    options = [
        "--device",
        "cpu",
        "-k",
        "8x16-highest and (eager or aten)",
        f"--benchmark-json={tmp_path / 'a.json'}",
    ]
    # Not as a part of the run that this test is in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [*command, *options], cwd=machine.ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "a.json").read_text())["benchmarks"]
    assert {b["group"] for b in found} == {f"8x16-highest, {part}" for part in ("forward", "backward", "both")}
    assert [b["extra_info"]["provider"] for b in found] == ["eager"] * 3 + ["aten"] * 3
    assert all(b["stats"]["median"] > 0 and b["extra_info"]["shape"] == {"N": 8, "D": 16} for b in found)


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


def test_a_device_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device takes no other."""
    monkeypatch.setattr(machine, "devices", lambda: {"cpu": "a", "cuda:0": "b", "cuda:1": "c"})
    found = {name: machine.device(name) for name in (None, "cuda", "cuda:1", "cpu")}
    assert [str(device) for device in found.values()] == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    assert torch.cuda._utils._get_device_index(found["cuda"]) == 0  # type: ignore[attr-defined]


def test_files_that_git_does_not_know_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    seen = [machine.commit()]
    for text in ("a", "b"):
        (tmp_path / "new.py").write_text(text)
        seen.append(machine.commit())
    assert [found["dirty"] for found in seen] == [False, True, True]
    assert len({found["changes"] for found in seen}) == 3
    for folder in (tmp_path, tmp_path / "results"):  # where results are written they are no changes
        (tmp_path / "new.py").unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        (folder / "a.json").touch()
        assert machine.commit(folder)["dirty"] is False
        assert machine.commit()["dirty"] is True
        (folder / "a.json").unlink()


def test_a_line_of_nvidia_smi() -> None:
    assert machine._parsed("580.159.04, 1980, 2619, 121.5, 700.00, [N/A]") == {
        "driver": "580.159.04",
        "sm_clock_mhz": 1980.0,
        "memory_clock_mhz": 2619.0,
        "power_w": 121.5,
        "power_limit_w": 700.0,
        "temperature_c": None,
    }
