"""The sweep for block sizes: what survives a crash, what is timed in which order, and what is written.  All times are made up."""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks import __main__ as command
from vicreg_fast.backends.triton import configs
from vicreg_fast.backends.triton.configs import Gradient, Key, Product
from vicreg_fast.backends.triton.launch_timing import Times

from . import fake_device
from .interpreted import import_interpreted

sift: Any = import_interpreted("benchmarks.sift")
tune: Any = import_interpreted("benchmarks.tune")
tune_process: Any = import_interpreted("benchmarks.tune_process")
tune_device: Any = import_interpreted("benchmarks.tune_device")

Trial = import_interpreted("vicreg_fast.backends.triton.search").Trial

GOAL = sift.Goal("cuda:90", configs.Device("sm90", 132))
SHAPE = "8x16-highest"
KEY = Key("sm90", 132, True, "gradient", "tf32", 2, 256, 8192)
GRAM = KEY._replace(kernel="gram", kind="half")
TABLE = configs.from_table(KEY)
A, B, C = Gradient(64, 64, 32), Gradient(64, 128, 32), Gradient(128, 64, 32)


# -- the process of the device --------------------------------------------------------------------------------------


def test_a_candidate_that_ends_the_process_is_recorded_and_the_others_are_timed() -> None:
    process = tune_process.DeviceProcess(fake_device.serve)
    try:
        goal = process.start()
        key = Key(*goal.device, True, "narrow_gradient", "fp32", 2, 8, 16)
        tried = [fake_device.FATAL, fake_device.FASTEST]
        trials, error = tune.time_candidates(process, SHAPE, key, tried, 0.01, time.monotonic() + 100)
        together = process.ask(
            tune_device.Together(SHAPE, {key: fake_device.FASTEST}, 0.01), time.monotonic() + 100
        )
        unknown = process.ask(tune_device.Search("4x4", key, (), 0.01), time.monotonic() + 100)
    finally:
        process.stop()
    assert error is None
    assert goal.target == "interpreter"
    table, fastest, fatal = trials
    assert table.config == configs.from_table(key)
    assert (fastest.config, fastest.time.median) == (fake_device.FASTEST, 1e-6)
    assert [name for name, _ in fastest.kernels] == ["narrow_gradient"]
    assert (fatal.config, fatal.time) == (fake_device.FATAL, None)
    assert fatal.reason == "crashed: the process was ended by SIGKILL"
    # The whole step: three kernels of 3 us, of which the rows make one faster.
    assert [trial.time.median for trial in together] == pytest.approx([9e-6, 7e-6])
    assert unknown == tune_device.Failed("StopIteration: ", device=False)


class FakeProcess:
    """A process that never ended by itself."""

    exitcode = -9

    def __init__(self) -> None:
        self.killed = False

    def kill(self) -> None:
        self.killed = True

    def join(self, timeout: float) -> None: ...


@pytest.fixture
def silent() -> Iterator[tuple[tune_process.DeviceProcess, Any, FakeProcess]]:
    """A process that was started, the other end of its connection, and its stand-in."""
    ours, theirs = multiprocessing.Pipe()
    process: Any = tune_process.DeviceProcess()
    process._connection, process._process = ours, FakeProcess()
    yield process, theirs, process._process
    theirs.close()


def test_a_process_that_is_silent_is_ended_and_its_last_configuration_blamed(
    silent: tuple[tune_process.DeviceProcess, Any, FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, theirs, fake = silent
    monkeypatch.setattr(tune_process, "_SILENCE", 0.05)
    theirs.send(tune_device.Next(A))
    answer = process.ask(tune_device.Search(SHAPE, KEY, (A,), 1.0), time.monotonic() + 10)
    assert answer == tune_process.Lost(A, "no answer in 0 s", in_time=True)
    assert fake.killed


def test_nobody_is_blamed_where_the_time_is_over(
    silent: tuple[tune_process.DeviceProcess, Any, FakeProcess],
) -> None:
    process, theirs, fake = silent
    theirs.send(tune_device.Next(A))
    answer = process.ask(tune_device.Search(SHAPE, KEY, (A,), 1.0), time.monotonic() + 0.05)
    assert answer == tune_process.Lost(A, "no time left", in_time=False)
    assert fake.killed


def test_a_failed_device_ends_its_process(silent: tuple[tune_process.DeviceProcess, Any, FakeProcess]) -> None:
    process, theirs, fake = silent
    theirs.send(tune_device.Next(B))
    theirs.send(tune_device.Failed("an illegal memory access", device=True))
    assert process.ask(tune_device.Search(SHAPE, KEY, (B,), 1.0), time.monotonic() + 10) == tune_process.Lost(
        B, "an illegal memory access"
    )
    assert fake.killed


class Device:
    """In place of a process: answers in turn, and notes what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked, self.stopped = list(answers), [], False

    def start(self) -> sift.Goal:
        return GOAL

    def ask(self, job: Any, end: float) -> Any:
        self.asked.append(job)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def stop(self) -> None:
        self.stopped = True


def trial(config: Any, seconds: float) -> Trial:
    return Trial(config, Times(seconds, seconds, seconds), (("gradient", Times(seconds, seconds, seconds)),))


def test_time_that_is_over_is_not_a_crash() -> None:
    device: Any = Device(tune_process.Lost(A, "no time left", in_time=False))
    assert tune.time_candidates(device, SHAPE, KEY, [A], 1.0, 0.0) == ([], "no time left")


def test_candidates_that_keep_crashing_are_an_error() -> None:
    tried = [A, B, C, A._replace(stages=2), B._replace(stages=2)]
    device: Any = Device(*(tune_process.Lost(config, "an illegal memory access") for config in tried))
    trials, error = tune.time_candidates(device, SHAPE, KEY, tried, 1.0, 0.0)
    assert trials == []
    assert error is not None
    assert error.startswith(f"4 candidates ended the process: {A!r}, {B!r}")
    assert [len(job.candidates) for job in device.asked] == [5, 4, 3, 2]


def test_a_table_that_crashes_is_an_error() -> None:
    device: Any = Device(tune_process.Lost(TABLE, "an illegal memory access"))
    assert tune.time_candidates(device, SHAPE, KEY, [A], 1.0, 0.0) == ([], "an illegal memory access")


# -- the command ----------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """In place of an answer of a process: computed when it is asked for, from its time on."""

    compute: Callable[[], Any]
    begin: float

    def ready(self) -> bool:
        return time.monotonic() >= self.begin

    def get(self, timeout: float) -> Any:
        if time.monotonic() + timeout < self.begin:
            raise multiprocessing.TimeoutError
        return self.compute()


class Pool:
    """In place of processes: works in this one, at once but for the outlooks, which wait for their turn."""

    outlook_seconds = 0.0

    def __init__(self, processes: int, initializer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.turns = 0

    def apply_async(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        self.turns += function is sift.outlook
        begin = time.monotonic() + self.turns * self.outlook_seconds
        return Answer(partial(function, *arguments), begin if function is sift.outlook else 0.0)

    def terminate(self) -> None: ...


SLOW, FAST = "256x8192-high", "2048x8192-bf16"


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Made-up estimates of two shapes: gradient and gram of SLOW, and a gradient of FAST.  Returns the compiled keys."""
    compiled: list[Any] = []
    fast_key = KEY._replace(first=2048, kind="half")

    def outlook(shape: str, goal: sift.Goal) -> sift.Outlook:
        if shape == SLOW:
            return sift.Outlook(shape, 0.1, (sift.Table(KEY, 50.0, ()), sift.Table(GRAM, 20.0, ())))
        return sift.Outlook(shape, 0.4, (sift.Table(fast_key, 300.0, ()),))

    def sift_in_time(position: int, shape: str, goal: sift.Goal, table: Any, group: Any) -> list[sift.Verdict]:
        compiled.append((position, shape, table.key.kernel))
        return [sift.Verdict(config, 10.0 + sum(config)) for config in group]

    monkeypatch.setattr(sift, "outlook", outlook)
    monkeypatch.setattr(sift, "sift_in_time", sift_in_time)
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(type(context), "Pool", lambda self, *arguments: Pool(*arguments))
    return compiled


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU were there; the results name this machine's CPU."""
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.machine, "device", lambda name: tune.torch.device("cpu"))


def sweep(out: Path, *answers: Any, minutes: float = 1.0) -> tuple[int, dict[str, Any], Device]:
    device = Device(*answers)
    start: Any = lambda: device  # noqa: E731
    status = tune.tune([FAST, SLOW], minutes, str(out), start_device=start)
    return status, json.loads((out / "tune.json").read_text()), device


def test_a_sweep_times_the_best_candidates_and_writes_rows(
    swept: list[Any], with_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = configs.from_table(GRAM)
    status, document, device = sweep(
        tmp_path / "out",
        [trial(TABLE, 5e-5), trial(A, 4e-5), Trial(B, reason="wrong: by far")],
        [trial(table, 2e-5), trial(Product(32, 16), 3e-5)],
        [trial(None, 9e-5), trial(None, 8e-5)],
        tune_device.Failed("ValueError: no", device=False),
    )
    # The least share of the bound first; within a shape the longest kernel first.
    asked = [(job.shape, getattr(job, "key", None) and job.key.kernel) for job in device.asked]
    assert asked == [(SLOW, "gradient"), (SLOW, "gram"), (SLOW, None), (FAST, "gradient")]
    assert [key for key, _ in device.asked[2].rows.items()] == [KEY]
    assert all(len(job.candidates) == tune.BEST for job in (*device.asked[:2], device.asked[3]))
    assert {len(set(job.candidates)) for job in device.asked[:2]} == {tune.BEST}
    assert device.stopped
    assert status == 1  # the last key has an error
    assert not document["complete"]
    assert [kernel["status"] for kernel in document["kernels"]] == ["timed", "timed", "error"]
    assert document["kernels"][0]["trials"][1]["microseconds"]["median"] == pytest.approx(40)
    assert document["steps"][0]["rows"]["median"] == pytest.approx(80)
    rows = (tmp_path / "out" / "rows.txt").read_text()
    row = f"Row(256, 8192, {A!r}),  # {SLOW}: 40 µs, was 50 µs"
    assert row in rows
    assert eval(row.partition("#")[0].rstrip(", "), vars(configs)) == configs.Row(256, 8192, A)
    assert f"# {SLOW}: the table's {table!r} stays, 20 µs" in rows
    assert f"# {FAST}: ValueError: no" in rows
    # The library reads what was found.
    lines = [json.loads(line) for line in (tmp_path / "out" / "configs.jsonl").read_text().splitlines()]
    assert [(line["key"][3], line["ms"]) for line in lines] == [("gradient", 0.04), ("gram", 0.02)]
    assert "1 wrong" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_found(swept: list[Any], with_gpu: None, tmp_path: Path) -> None:
    status, document, device = sweep(tmp_path, [trial(TABLE, 5e-5), trial(A, 4e-5)], KeyboardInterrupt())
    assert status == 130
    assert device.stopped
    assert [kernel["key"]["kernel"] for kernel in document["kernels"]] == ["gradient"]
    assert not document["complete"]
    assert f"{A!r}" in (tmp_path / "rows.txt").read_text()


def test_no_kernel_is_begun_when_the_time_is_over(
    swept: list[Any], with_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, document, device = sweep(tmp_path, minutes=1e-9)
    assert status == 0
    assert device.asked == []
    assert (document["kernels"], document["complete"]) == ([], False)
    assert f"no time left for {SLOW} gradient, {SLOW} gram, {FAST} gradient" in capsys.readouterr().out


def test_the_order_is_decided_by_the_estimates_that_came_in_time_or_by_the_first(
    swept: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pool, "outlook_seconds", 0.1)
    monkeypatch.setattr(tune, "_PLANNING", 0.0)
    assert tune.tune([SLOW, FAST], 1.0, str(tmp_path)) == 0
    assert f"{FAST}: the tables' own configurations were not compiled in time" in capsys.readouterr().out
    document = json.loads((tmp_path / "tune.json").read_text())
    assert [kernel["shape"] for kernel in document["kernels"]] == [SLOW, SLOW]
    assert not document["complete"]


def test_a_kernel_that_the_end_cuts_off_is_no_error(swept: list[Any], with_gpu: None, tmp_path: Path) -> None:
    cut_off = tune_process.Lost(A, tune_process.NO_TIME, in_time=False)
    both = [[trial(TABLE, 5e-5)], [trial(TABLE, 3e-4)]]
    status, document, _ = sweep(tmp_path, both[0], cut_off, both[1])
    assert status == 0
    assert [kernel["reason"] for kernel in document["kernels"]] == [None, "no time left", None]
    assert not document["complete"]


def test_a_device_that_does_not_start_is_named(
    swept: list[Any], with_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Device):
        def start(self) -> Any:
            raise RuntimeError(
                "the process that runs candidates did not start: the process ended with status 1"
            )

    broken: Any = Broken
    assert tune.tune([SLOW], 1.0, str(tmp_path), start_device=broken) == 1
    assert "did not start: the process ended with status 1" in capsys.readouterr().err


def test_without_a_gpu_the_estimate_ranks_and_the_output_says_so(
    swept: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.tune([SLOW], 1.0, str(tmp_path)) == 0
    out, document = capsys.readouterr().out, json.loads((tmp_path / "tune.json").read_text())
    assert "no GPU: candidates are compiled for cuda:90 and ranked by the estimate; nothing is timed" in out
    assert not document["timed"]
    assert {kernel["status"] for kernel in document["kernels"]} == {"estimated"}
    assert all(kernel["trials"][0]["microseconds"] is None for kernel in document["kernels"])
    rows = (tmp_path / "rows.txt").read_text()
    assert "nothing was timed" in rows
    assert "Row(" not in rows
    assert (tmp_path / "configs.jsonl").read_text() == ""


def test_an_earlier_sweep_is_not_overwritten(swept: list[Any], tmp_path: Path) -> None:
    (tmp_path / "tune.json").write_text("precious")
    with pytest.raises(ValueError, match=r"--out needs a folder without a tune\.json"):
        tune.tune([SLOW], 1.0, str(tmp_path))
    assert (tmp_path / "tune.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "8x16-highest"], "no shape '8x16-highest' on a GPU"),
        (["--minutes", "0"], "needs a positive number of minutes, got '0'"),
        (["--minutes", "soon"], "needs a positive number of minutes, got 'soon'"),
        (["--target", "cuda:70"], "cuda:70"),
    ],
    ids=["shape", "minutes", "word", "target"],
)
def test_unusable_arguments_are_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["tune", *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
