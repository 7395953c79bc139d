"""``python -m benchmarks run`` on a CPU: what it writes, continues, records and refuses."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException

from benchmarks import distributed, libraries, machine, measure, providers, results, run, targets, timing
from benchmarks.__main__ import main
from benchmarks.cases import CASES, PARTS, SUITES, Case

from .fake_result import CEILINGS

Capture = pytest.CaptureFixture[str]
TINY = "64x64-highest"
NAMED = {case.name: case for case in CASES}
ON_CPU = ("run", "--device", "cpu", "--quick")
CPU = torch.device("cpu")


real_ceilings = timing.ceilings


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds; ceilings, which take half a second, only where a test is about them."""
    monkeypatch.setattr(timing, "QUICK", timing.Effort(2, 3, 0.0))
    monkeypatch.setattr(timing, "ceilings", lambda bench: CEILINGS)


def run_shapes(folder: Path, *names: str) -> int:
    return main([*ON_CPU, "--out", str(folder), "--shape", *names])


def written(folder: Path) -> dict[str, Any]:
    (path,) = folder.iterdir()
    return results.load(path)  # which checks it against the schema


# -- what is written ----------------------------------------------------------------------------------------------


def test_result_has_the_machine_the_errors_and_the_times(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "ceilings", real_ceilings)
    assert run_shapes(tmp_path, TINY) == 0
    document = written(tmp_path)
    (session,) = document["sessions"]
    assert (
        session["command"] == f"python -m benchmarks run --device cpu --quick --out {tmp_path} --shape {TINY}"
    )
    assert session["clocks"]["after"]["reason"]
    # No CPU is slower than 10 MB/s or faster than 100 TB/s: a wrong unit would be.
    ceilings = session["ceilings"]
    for rate in (ceilings["copy_bytes_per_s"], *ceilings["operations_per_s"].values()):
        assert 1e7 < rate < 1e14
    assert document["complete"]
    assert document["machine"]["torch"] == torch.__version__
    assert document["asked"] == {"shapes": [TINY], "providers": None, "quick": True}
    (case,) = document["cases"]
    assert (case["shape"], case["dtype"], case["samples"]) == ({"N": 64, "D": 64}, "float32", 64)
    assert case["floor"]["both"]["operations"] == 6 * 64**3
    assert case["floor"]["both"]["bytes"] == 6 * 64 * 64 * 4
    for name in ("eager", "aten"):
        entry = case["providers"][name]
        assert entry["status"] == "right"
        assert 0 < max(entry["errors"].values()) < case["bound"]
        assert all(size > 0 for size in entry["peak_bytes"].values())
        (mode,) = entry["modes"].values()
        assert (mode["status"], mode["rounds"], mode["host"]) == ("timed", 2, None)
        for part in PARTS:
            assert 0 < mode[part]["q20"] <= mode[part]["median"] <= mode[part]["q80"]
    assert "needs a CUDA or ROCm device" in case["providers"]["triton"]["reason"]
    eager, aten = (case["providers"][name]["modes"]["launch"]["both"]["median"] for name in ("eager", "aten"))
    verdict = case["targets"]["launch"]["eager"]
    assert verdict == {"asked": 1.0, "found": eager / aten, "met": eager >= aten}
    out = capsys.readouterr().out
    assert f"| {TINY} | " in out
    assert "| lightly " in out  # among what is not timed


RANKS = "ranks-1024x256-highest"


@pytest.mark.parametrize("name", ["vicregl-2x4x8-m2-highest", "matching-64x49x512-m20-highest", RANKS])
def test_shapes_of_other_suites_are_measured(name: str, tmp_path: Path) -> None:
    assert run_shapes(tmp_path, name) == 0
    (case,) = written(tmp_path)["cases"]
    for provider in {"eager", "cdist", "bmm", "aten"} & case["providers"].keys():
        entry = case["providers"][provider]
        mode = entry["modes"]["launch"]
        assert mode["status"] == "timed", provider
        assert tuple(part for part in PARTS if mode[part]) == NAMED[name].parts
        if name == RANKS:
            assert entry["errors"]["gradient of loss"] < case["bound"]
            # Eager code gathers both views of both ranks, and makes a matrix of each.
            assert min(entry["peak_bytes"].values()) > 2 * 2 * 1024 * 256 * 4
            assert (case["shape"], case["samples"]) == ({"N": 1024, "D": 256, "ranks": 2}, 2048)
    assert case["providers"]["triton"]["status"] == "unavailable"
    assert case["targets"]["launch"]["eager"]["found"] > 0


def test_one_gpu_is_left_out_of_the_distributed_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    record: dict[str, Any] = {"shape": {}}
    distributed.measure_ranks(NAMED[RANKS], record, CEILINGS, torch.device("cuda:0"), timing.QUICK, None)
    assert record["status"] == "left out"
    assert "one GPU" in record["reason"]


# -- what goes wrong ----------------------------------------------------------------------------------------------


FAULTS = {
    "memory": (torch.OutOfMemoryError("CUDA out of memory"), "out of memory", 0),
    "error": (ZeroDivisionError("no"), "error", 1),
    "wrong": (None, "wrong", 1),  # no exception: a result 1 % too large
}


@pytest.mark.parametrize(
    ("fault", "successes"), [("memory", 0), ("memory", 4), ("error", 0), ("error", 4), ("wrong", 0)]
)
def test_faulty_provider_is_recorded_and_the_others_are_timed(
    fault: str, successes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """At the gate, or after four calls, while it is timed."""
    correct, calls = providers.ours_of, iter(range(successes))
    error, status, code = FAULTS[fault]

    def faulty(*args: Any) -> providers.Losses:
        losses = correct(*args)

        def call(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            exhausted = next(calls, None) is None
            if exhausted and error:
                raise error
            return {name: value * (1.01 if exhausted else 1) for name, value in losses(x, y).items()}

        return call

    monkeypatch.setattr(timing.Bench, "sets", lambda bench, size: 2)
    monkeypatch.setattr(providers, "ours_of", faulty)
    assert run_shapes(tmp_path, TINY, "--provider", "eager", "aten") == code
    entries = written(tmp_path)["cases"][0]["providers"]
    entry = entries["aten"]["modes"]["launch"] if successes else entries["aten"]
    assert entry["status"] == status
    assert str(error or "allowed") in entry["reason"]
    assert entry.get("both") is None
    assert entries["eager"]["modes"]["launch"]["both"]["median"] > 0
    assert (f"{TINY}: aten" in capsys.readouterr().out) == (code == 1)


def test_failed_rank_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(*args: Any, **kwargs: Any) -> None:
        trace = "\n\n-- Process 0 terminated with the following error:\nTraceback:\n  x\n"
        raise ProcessRaisedException(f"{trace}torch.OutOfMemoryError: CUDA out of memory\n", 0, 1)

    monkeypatch.setattr(distributed.mp, "spawn", spawn)
    assert run_shapes(tmp_path, RANKS) == 0
    (case,) = written(tmp_path)["cases"]
    assert (case["status"], case["reason"]) == ("out of memory", "torch.OutOfMemoryError: CUDA out of memory")


def test_all_ranks_drop_a_provider_that_fails_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ("out of memory", "CUDA out of memory")
    monkeypatch.setattr(timing.Bench, "agree", lambda bench, value: [value, other])
    record: dict[str, Any] = {"providers": {}}
    measure.measure(NAMED[TINY], record, timing.Bench(CPU), timing.QUICK, ["eager"], skip_compile=True)
    entry = record["providers"]["eager"]
    assert ((entry["status"], entry["reason"]), entry["modes"]) == (other, {})


def test_lost_device_ends_the_run_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def lost(bench: timing.Bench) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(run, "measure", lambda *args: patched.setattr(timing.Bench, "free", lost))
        assert run_shapes(tmp_path, TINY, "8x16-highest") == 1
    assert "illegal memory access" in capsys.readouterr().out
    assert len(written(tmp_path)["cases"]) == 1
    assert run_shapes(tmp_path, TINY, "8x16-highest") == 0
    assert written(tmp_path)["complete"]


# -- resuming -----------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_finished_shapes_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = run.measure

    def interrupted_at_tiny(case: Case, *args: Any) -> None:
        if case.name == TINY:
            raise KeyboardInterrupt
        real(case, *args)

    with monkeypatch.context() as patched:
        patched.setattr(run, "measure", interrupted_at_tiny)
        assert run_shapes(tmp_path, TINY, "8x16-highest") == 130
    first = written(tmp_path)
    assert [case["name"] for case in first["cases"]] == ["8x16-highest"]
    assert not first["complete"]
    assert "interrupted; the same command continues" in capsys.readouterr().err

    assert run_shapes(tmp_path, TINY, "8x16-highest") == 0
    assert "1 of 2 shapes are measured" in capsys.readouterr().out
    second = written(tmp_path)
    assert second["complete"]
    assert [(case["name"], case["session"]) for case in second["cases"]] == [("8x16-highest", 0), (TINY, 1)]
    assert second["cases"][0] == first["cases"][0]


OTHERS = {"code": ("commit", {"changes": "other"}), "driver": ("clocks", {"driver": "1.2"})}
OTHERS |= {"card": ("machine", {"uuid": "GPU-1"})}
OPTIONS = {"shapes": "8x16-highest", "--fresh": "--fresh"}


@pytest.mark.parametrize("what", [*OPTIONS, *OTHERS, "configuration", "library"])
def test_another_run_is_not_continued(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", interrupted)
    assert run_shapes(tmp_path, TINY) == 130
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    if what in OTHERS:
        name, other = OTHERS[what]
        real = getattr(machine, name)
        monkeypatch.setattr(machine, name, lambda argument: real(argument) | other)
    elif what == "configuration":
        monkeypatch.setenv("VICREG_FAST_AUTOTUNE", "1")
    elif what == "library":
        monkeypatch.setattr(libraries, "version", lambda package: "9.9")
    assert run_shapes(tmp_path, TINY, *([OPTIONS[what]] if what in OPTIONS else [])) == 130
    assert len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == before


def test_existing_files_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure", lambda *args: None)
    assert run_shapes(tmp_path, TINY) == 0
    (path,) = tmp_path.iterdir()
    path.write_text("precious")
    assert run_shapes(tmp_path, TINY) == 0
    assert path.read_text() == "precious"
    assert (tmp_path / f"{path.stem}-2.json").exists()


def test_without_the_packages_of_reports_a_run_measures_and_has_no_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for package in ("tqdm", "tabulate"):
        monkeypatch.setitem(sys.modules, package, None)
    assert run_shapes(tmp_path, TINY, "--provider", "eager", "aten") == 0
    out = capsys.readouterr().out
    assert f"1 of 1: {TINY}\n" in out
    assert "No tables here: " in out
    assert written(tmp_path)["cases"][0]["providers"]["aten"]["modes"]["launch"]["both"]["median"] > 0


# -- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "1x1"], ["'1x1'", *NAMED]),
        (["--suite", "vicreg,bert"], ["'bert'", *SUITES]),
        (["--suite", ""], ["''", "vicreg"]),
        (["--out", ""], ["--out", "''"]),
        (["--minutes", "0"], ["--minutes", "positive", "'0'"]),
        (["--minutes", "nan"], ["--minutes", "positive", "'nan'"]),
        (["--out", __file__], [__file__]),
        (["--provider", "numpy"], ["'numpy'", *providers.names()]),
        (["--suite", "matching", "--shape", TINY], ["matching", "cpu"]),
        (["--provider", "bmm", "cdist", "--shape", TINY], ["bmm, cdist", "eager", "aten"]),
        (["--device", "cuda:99"], ["'cuda:99'", "only cpu"]),
    ],
    ids=lambda value: "-".join(value)[:30] if value[0].startswith("-") else "",
)
def test_bad_argument_is_refused_with_what_is_available(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*ON_CPU, "--out", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_default_shapes_of_a_device(device: str) -> None:
    def chosen(quick: bool = False, suite: list[str] | None = None) -> dict[str, str]:
        arguments = Namespace(suite=suite, shape=None, provider=None, quick=quick)
        return {case.name: case.suite for case in run.chosen(arguments, device)}

    everything, few = chosen(), chosen(quick=True)
    assert set(everything.values()) == set(few.values()) == set(SUITES)
    assert everything.keys() == {case.name for case in CASES if device in case.devices}
    assert few.keys() <= everything.keys()
    assert set(chosen(suite=["matching"]).values()) == {"matching"}


def test_names_of_shapes_are_unique() -> None:
    assert len(NAMED) == len(CASES)


def test_shape_without_a_requested_provider_is_named(tmp_path: Path, capsys: Capture) -> None:
    assert run_shapes(tmp_path, TINY, "ranks-256x2048-highest", "--provider", "lightly") == 0
    out = capsys.readouterr().out
    assert "none of the requested providers computes ranks-256x2048-highest" in out
    assert "Nothing was timed." in out


def test_compilation_is_skipped_where_too_little_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped: list[bool] = []
    monkeypatch.setattr(run, "measure", lambda *args: skipped.append(args[-1]))
    for seconds in (30.0, 40.0):  # torch.compile takes up to 30 s, and the shape 2 s
        monkeypatch.setattr(run, "_BUDGET", {"cpu": (0.0, seconds)})
        assert run_shapes(tmp_path, TINY) == 0
    for minutes in ("0.5", "0.7"):  # 30 s and 42
        assert run_shapes(tmp_path, TINY, "--minutes", minutes) == 0
    assert skipped == [True, False, True, False]
    case = next(case for case in CASES if case.compiled)
    assert "no time is left" in str(dict(providers.providers(case, CPU, skip_compile=True))["compile"].reason)


def test_failed_backend_is_not_replaced_by_the_other() -> None:
    timed = {"status": "right", "modes": {"graph": {"both": {"median": 1.0}}}}
    record: dict[str, Any] = {"suite": "vicreg", "providers": {"aten": timed}}
    for status, ours in (("unavailable", "aten"), ("wrong", None)):
        record["providers"]["triton"] = {"status": status, "modes": {}}
        assert targets.ours(record, "graph") == ours
