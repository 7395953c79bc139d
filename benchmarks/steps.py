"""Runs commands one after the other or side by side, each with a limit, all within a total time.

Every step is a child process in a session of its own, so that what it starts can be ended with it.  Its output goes to
``<folder>/logs/<name>.log``.  Its verdict is appended to ``<folder>/steps.jsonl`` as soon as it is known:

    step, status   "passed", "failed", "timed out", "skipped" or "interrupted"
    reason         the exit status, the limit, or why the step was skipped; null where it passed
    seconds, allowed, command, log

A step gets its limit, or less where less is left once every later step has its least time.  It is skipped where less than
its own least time is left.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

# Seconds between the request to end and the end.  pytest-xdist gives its workers ten, and writes the report then.
GRACE = 12.0
_POLL = 0.05
# Seconds of a step that are not its own to divide: imports, a CUDA context, and what it prints at its end.
_OVERHEAD = 15.0
# Bytes of a log that are kept: its beginning and its end.
_HEAD, _TAIL = 1 << 18, 3 << 18

Verdict = dict[str, Any]


class Step(NamedTuple):
    """A command, the seconds that it may take, and the seconds without which it is not started.

    "{minutes}" in the command stands for the minutes that the step may divide among its work.
    """

    name: str
    command: Sequence[str]
    limit: float
    least: float
    environment: Mapping[str, str] = {}  # added to this process's own
    skip: str | None = None  # why the step cannot run here

    @property
    def reserved(self) -> float:
        """The seconds that earlier steps leave for it."""
        return 0.0 if self.skip else self.least


class _Running:
    """A step's process."""

    def __init__(self, step: Step, allowed: float, log: Path, cwd: Path) -> None:
        self.step, self.allowed, self.log = step, allowed, log
        self._asked: float | None = None  # when it was asked to end
        self._begin = time.monotonic()
        minutes = f"{max(allowed - _OVERHEAD, 1.0) / 60:.2f}"
        self.command = [minutes if word == "{minutes}" else word for word in step.command]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                cwd=cwd,
                env={**os.environ, **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def ask(self) -> None:
        """Interrupt the process and its descendants, as Ctrl-C does: they may still write what they have."""
        if self._asked is None:
            self._asked = time.monotonic()
            os.killpg(self._process.pid, signal.SIGINT)  # not waited for yet, so the number is its own

    def has_ended(self) -> bool:
        """Whether the process has ended.  Asks it to where its time is over, and kills it where it does not."""
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        if self.seconds > self.allowed:
            self.ask()
        return self._asked is not None and time.monotonic() - self._asked > GRACE

    def end(self) -> int:
        """Kill what is left of the process and of its descendants.  Returns the exit status."""
        # Before the process is waited for: until then no other process can have its number.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        _shorten(self.log)
        return status

    def verdict(self, interrupted: bool) -> Verdict:
        """End the process and judge it."""
        seconds, asked = self.seconds, self._asked is not None
        status = self.end()
        if interrupted:
            word, reason = "interrupted", "Ctrl-C"
        elif asked:
            word, reason = "timed out", f"ended after {self.allowed:.0f} s"
        elif status:
            word, reason = "failed", f"exit status {status}"
        else:
            word, reason = "passed", None
        verdict = _verdict(self.step, word, reason)
        verdict |= {"seconds": round(seconds, 1), "allowed": round(self.allowed, 1)}
        return verdict | {"command": self.command, "log": f"logs/{self.log.name}"}


def _verdict(step: Step, status: str, reason: str | None) -> Verdict:
    """Of a step that was not run; a step that was run overwrites the rest."""
    verdict = {"step": step.name, "status": status, "reason": reason}
    return verdict | {"seconds": 0.0, "allowed": 0.0, "command": [*step.command], "log": None}


def _shorten(log: Path) -> None:
    """Leave the beginning and the end of a long log."""
    size = log.stat().st_size
    if size <= _HEAD + _TAIL:
        return
    with log.open("rb") as old:
        head = old.read(_HEAD)
        old.seek(size - _TAIL)
        tail = old.read()
    log.write_bytes(head + f"\n[... {size - _HEAD - _TAIL} bytes left out ...]\n".encode() + tail)


class Runner:
    """Runs steps into a folder within ``seconds`` from now.  ``after`` is called with the verdicts after every step."""

    def __init__(
        self, folder: Path, cwd: Path, seconds: float, after: Callable[[Sequence[Verdict]], object]
    ) -> None:
        self._folder, self._cwd, self._after = folder, cwd, after
        self._end = time.monotonic() + seconds
        self.verdicts: list[Verdict] = []
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, groups: Sequence[Sequence[Step]]) -> None:
        """Run the groups one after the other, the steps of a group side by side.

        Raises KeyboardInterrupt after it has ended and recorded the steps that ran; those that never ran are recorded too.
        """
        position = 0
        try:
            for position, group in enumerate(groups):
                later = sum(max(step.reserved for step in steps) for steps in groups[position + 1 :])
                # This group may need its grace, and then the last one.
                self._run_group(group, later + GRACE * (later > 0))
        except KeyboardInterrupt:
            for step in (step for group in groups[position + 1 :] for step in group):
                self._add(_verdict(step, "skipped", "interrupted before it began"))
            raise

    def _add(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        with (self._folder / "steps.jsonl").open("a") as lines:
            lines.write(json.dumps(verdict) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        words = [verdict["status"], f"{verdict['seconds']:.0f} s", *filter(None, [verdict["reason"]])]
        print(f"{verdict['step']}: {', '.join(words)}", flush=True)
        self._after(self.verdicts)

    def _run_group(self, group: Sequence[Step], later: float) -> None:
        running: list[_Running] = []
        waiting = [*group]
        interrupted = False
        try:
            while waiting:
                step = waiting.pop(0)
                left = self._end - time.monotonic() - GRACE
                if step.skip:
                    self._add(_verdict(step, "skipped", step.skip))
                elif left < step.least:
                    reason = f"no time left: {max(left, 0):.0f} s, and it needs {step.least:.0f} s"
                    self._add(_verdict(step, "skipped", reason))
                else:
                    allowed = min(step.limit, max(left - later, step.least))
                    print(f"{step.name}: at most {allowed:.0f} s", flush=True)
                    running.append(
                        _Running(step, allowed, self._folder / "logs" / f"{step.name}.log", self._cwd)
                    )
            while running:
                self._collect(running, interrupted=False)
                time.sleep(_POLL)
        except KeyboardInterrupt:
            interrupted = True
            for process in running:
                process.ask()
            while running:  # a second Ctrl-C leaves this loop
                self._collect(running, interrupted=True)
                time.sleep(_POLL)
            for step in waiting:
                self._add(_verdict(step, "skipped", "interrupted before it began"))
            raise
        finally:
            for process in running:
                self._add(process.verdict(interrupted))

    def _collect(self, running: list[_Running], interrupted: bool) -> None:
        """Record the processes that have ended, and take them off the list."""
        for process in [*running]:
            if process.has_ended():
                running.remove(process)
                self._add(process.verdict(interrupted))
