"""Steps of benchmarks/steps.py: what a verdict says, who is ended with a step, and how time is divided."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import steps
from benchmarks.steps import Runner, Step

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "GRACE", 0.2)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs groups of steps within some seconds and returns the verdicts."""

    def in_folder(groups: list[list[Step]], seconds: float = 20.0) -> list[dict[str, Any]]:
        runner = Runner(tmp_path, tmp_path, seconds, lambda verdicts: None)
        runner.run(groups)
        assert written(tmp_path) == runner.verdicts
        return runner.verdicts

    return in_folder


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def shell(name: str, command: str, limit: float = 10.0, least: float = 0.1, **options: Any) -> Step:
    return Step(name, ("sh", "-c", command), limit, least, **options)


def statuses(verdicts: list[dict[str, Any]]) -> dict[str, str]:
    return {verdict["step"]: verdict["status"] for verdict in verdicts}


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_status_output_and_environment(run: Run, tmp_path: Path) -> None:
    passed, failed = run(
        [[shell("good", "echo out; echo $WORD >&2", environment={"WORD": "err"})], [shell("bad", "exit 3")]]
    )
    assert (passed["status"], passed["reason"]) == ("passed", None)
    assert (failed["status"], failed["reason"]) == ("failed", "exit status 3")
    assert (tmp_path / passed["log"]).read_text() == "out\nerr\n"


def test_a_verdict_is_written_before_the_next_step_begins(run: Run) -> None:
    assert statuses(
        run([[shell("first", "true")], [shell("second", 'grep -q "first.*passed" steps.jsonl')]])
    ) == {
        "first": "passed",
        "second": "passed",
    }


def test_a_step_that_hangs_is_ended_with_its_descendants(run: Run, tmp_path: Path) -> None:
    """None of them heeds an interruption."""
    command = "trap '' INT; sh -c 'echo $$ > pid; sleep 60; true' & sleep 60; true"
    begin = time.monotonic()
    (verdict,) = run([[shell("hangs", command, limit=0.5)]])
    assert time.monotonic() - begin < 5
    assert (verdict["status"], verdict["reason"]) == ("timed out", "ended after 0 s")
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_what_a_finished_step_leaves_running_is_ended(run: Run, tmp_path: Path) -> None:
    (verdict,) = run([[shell("leaves", "sleep 60 & echo $! > pid")]])
    assert verdict["status"] == "passed"
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_step_may_write_what_it_has_when_its_time_is_over(run: Run, tmp_path: Path) -> None:
    (verdict,) = run([[shell("writes", "trap 'echo late > report; exit 0' INT; sleep 60", limit=0.3)]])
    assert verdict["status"] == "timed out"
    assert (tmp_path / "report").read_text() == "late\n"


def test_later_steps_keep_their_least_time(run: Run) -> None:
    later = [[shell("short", "true", least=1.0)], [shell("missing", "true", least=9.0, skip="no such tool")]]
    verdicts = run([[shell("long", "sleep 60", limit=50.0)], *later], seconds=2.0)
    assert statuses(verdicts) == {"long": "timed out", "short": "passed", "missing": "skipped"}
    assert verdicts[2]["reason"] == "no such tool"
    # 2 s, less one of the later step and the grace of both.
    assert verdicts[0]["allowed"] == pytest.approx(0.6, abs=0.15)


def test_a_step_without_time_is_skipped_by_name_and_the_next_one_runs(run: Run) -> None:
    verdicts = run(
        [[shell("first", "true")], [shell("large", "true", least=30.0)], [shell("last", "true")]], 5.0
    )
    assert statuses(verdicts) == {"first": "passed", "large": "skipped", "last": "passed"}
    assert verdicts[1]["reason"] in (
        "no time left: 5 s, and it needs 30 s",
        "no time left: 4 s, and it needs 30 s",
    )


def test_too_little_time_for_all_goes_to_the_first(run: Run) -> None:
    verdicts = run([[shell("first", "sleep 60", least=0.5)], [shell("second", "true", least=1.0)]], seconds=1.2)
    assert statuses(verdicts) == {"first": "timed out", "second": "skipped"}


def test_a_step_is_told_its_minutes(run: Run, tmp_path: Path) -> None:
    (verdict,) = run([[Step("told", ("echo", "--minutes", "{minutes}"), 75.0, 1.0)]], seconds=100.0)
    # 75 s, less 15 for the start.
    assert (tmp_path / "logs" / "told.log").read_text() == "--minutes 1.00\n"
    assert verdict["command"][-1] == "1.00"


def test_the_steps_of_a_group_run_side_by_side(run: Run) -> None:
    """Each waits for the other's file."""
    meet = "touch {}; until [ -e {} ]; do sleep 0.02; done"
    both = [shell("a", meet.format("a", "b"), limit=5.0), shell("b", meet.format("b", "a"), limit=5.0)]
    assert statuses(run([both])) == {"a": "passed", "b": "passed"}


def test_a_long_log_keeps_its_beginning_and_its_end(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_HEAD", 10)
    monkeypatch.setattr(steps, "_TAIL", 20)
    run([[shell("long", "seq -w 1 100")]])
    text = (tmp_path / "logs" / "long.log").read_text()
    assert text.startswith("001\n002\n0")
    assert text.endswith("\n097\n098\n099\n100\n")
    assert "[... 370 bytes left out ...]" in text


SCRIPT = """
import sys
from pathlib import Path
from benchmarks import first_card, steps
steps.GRACE = 0.2
slow = "import time; print('started', flush=True); time.sleep(60)"
groups = [[steps.Step("quick", ("true",), 9, 0)], [steps.Step("slow", (sys.executable, "-c", slow), 50, 0)],
          [steps.Step("never", ("true",), 9, 0)]]
first_card.Part.correctness = lambda self: groups
sys.exit(first_card.main(["--part", "correctness", "--out", sys.argv[1]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminated"])
def test_an_interruption_ends_the_step_and_leaves_a_page(number: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "logs" / "slow.log"
    end = time.monotonic() + 20
    while not (log.exists() and log.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert statuses(written(tmp_path)) == {"quick": "passed", "slow": "interrupted", "never": "skipped"}
    page = (tmp_path / "page.md").read_text()
    assert page in output
    assert "**interrupted**" in page
    assert "interrupted before it began" in page
