"""What a sweep found: a JSON document, rows that can be pasted into tables.py, and rows that the library reads.

    schema, version, date, machine, commit   as in a result of ``run``
    target, triton                           what was compiled for, and by which version
    timed            False: no GPU was there, and ``microseconds`` are absent
    asked, complete  the names of the requested shapes, and whether every kernel of theirs is in the file
    kernels          of each: shape, key, status, reason, table and best (positions in trials), row, trials
    steps            of each shape: status, reason, microseconds with the tables' configurations and with the rows

A status is "timed"; "estimated", where only the model ranked; or "error".  A trial has its configuration, the microseconds
by the model (``estimated``) and as measured, for the pass and for each of its kernels, and the reason why it was not timed.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vicreg_fast.backends.triton import autotune, search
from vicreg_fast.backends.triton.configs import Key
from vicreg_fast.backends.triton.launch_timing import Times
from vicreg_fast.backends.triton.search import Trial

from . import results
from .results import UsageError
from .text import duration

SCHEMA, VERSION = "vicreg_fast.tune", 1
_HINT = (
    "# A row is for all sizes up to its own: it belongs behind those of smaller sizes and before those of larger ones.",
)
DOCUMENT, ROWS, TUNED = "tune.json", "rows.txt", "configs.jsonl"


class Found(NamedTuple):
    """A key of a shape: the trials, the table's first, and the estimates of their configurations."""

    shape: str
    key: Key
    trials: Sequence[Trial]
    estimates: dict[Any, float]
    error: str | None = None  # why nothing was timed

    @property
    def status(self) -> str:
        """See above."""
        if self.error is not None:
            return "error"
        return "timed" if self.trials[0].time is not None else "estimated"

    @property
    def best(self) -> Trial:
        """The fastest trial; by the estimate where nothing was timed."""
        if self.status == "timed":
            return search.fastest(self.trials)
        table = self.trials[0]
        ranked = [trial for trial in self.trials if trial.config in self.estimates]
        best = min(ranked, key=lambda trial: self.estimates[trial.config], default=table)
        return best if self.estimates[best.config] < self.estimates.get(table.config, 0.0) else table

    @property
    def table_name(self) -> str:
        """The rows of tables.py that the key belongs to."""
        kind = f'["{self.key.kind}"]' if self.key.kind else ""
        layout = "aligned" if self.key.aligned else "unaligned"
        return f"{self.key.kernel}{kind} of {self.key.arch}, {layout}, {self.key.num_sms} SMs"

    def microseconds(self, trial: Trial) -> float | None:
        """A trial's time in microseconds, or its estimate where nothing was timed."""
        if self.status == "timed":
            return None if trial.time is None else 1e6 * trial.time.median
        return self.estimates.get(trial.config)

    def row(self) -> str:
        """A line of Python for tables.py: a row and its time, or a comment where none is new."""
        if self.status != "timed" or self.best is self.trials[0]:
            return f"# {self.shape}: {self._words()}"
        before, after = (_duration(self.microseconds(trial)) for trial in (self.trials[0], self.best))
        return f"Row({self.key.first}, {self.key.second}, {self.best.config!r}),  # {self.shape}: {after}, was {before}"

    def _words(self) -> str:
        """What was found, in words."""
        if self.error is not None:
            return self.error
        table, best = self.trials[0], self.best
        before, after = (_duration(self.microseconds(trial)) for trial in (table, best))
        estimated = "by the estimate " if self.status == "estimated" else ""
        if best is table:
            return f"{estimated}the table's {table.config!r} stays, {before}"
        return f"{estimated}{best.config!r} {after}, the table's {before}"

    def summary(self) -> str:
        """A line for the screen."""
        timed = sum(trial.time is not None for trial in self.trials)
        reasons = Counter(trial.reason.partition(":")[0] for trial in self.trials if trial.reason is not None)
        left_out = "".join(f", {count} {reason}" for reason, count in reasons.most_common())
        counts = f" ({timed} of {len(self.trials)} timed{left_out})" if self.trials else ""
        return f"{self.shape} {self.key.kernel}: {self._words()}{counts}"

    def record(self) -> dict[str, Any]:
        """The key as the document has it."""
        best = None if self.error is not None else list(self.trials).index(self.best)
        return {
            "shape": self.shape, "key": self.key._asdict(), "status": self.status, "reason": self.error,
            "table": 0 if self.trials else None, "best": best, "row": self.row(),
            "trials": [self._trial_record(trial) for trial in self.trials],
        }  # fmt: skip

    def _trial_record(self, trial: Trial) -> dict[str, Any]:
        return {
            "config": None if trial.config is None else trial.config._asdict(),
            "estimated": self.estimates.get(trial.config),
            "microseconds": _microseconds(trial.time),
            "kernels": [{"kernel": name, "microseconds": _microseconds(time)} for name, time in trial.kernels],
            "reason": trial.reason,
        }


def _microseconds(time: Times | None) -> dict[str, float] | None:
    return None if time is None else {name: 1e6 * value for name, value in time._asdict().items()}


def _duration(microseconds: float | None) -> str:
    return "–" if microseconds is None else duration(1e-6 * microseconds)


def step_record(shape: str, trials: Sequence[Trial], error: str | None = None) -> dict[str, Any]:
    """A shape's whole step: with the tables' configurations, and with the rows."""
    reason = error or next((trial.reason for trial in trials if trial.reason is not None), None)
    before, after = (_microseconds(trial.time) for trial in trials) if trials else (None, None)
    status = "error" if reason is not None else "timed"
    return {"shape": shape, "status": status, "reason": reason, "table": before, "rows": after}


class Writer:
    """Writes everything that was found so far into a folder, after every kernel."""

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        self.document = document | {
            "schema": SCHEMA,
            "version": VERSION,
            "complete": False,
            "kernels": [],
            "steps": [],
        }
        self._folder, self._found = folder, list[Found]()

    def start(self) -> None:
        """Write a document without kernels, which shows whether the folder can be written to."""
        if (self._folder / DOCUMENT).exists():
            raise UsageError(f"--out needs a folder without a {DOCUMENT}, got {self._folder}")
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / TUNED).touch()
        self.save()

    def add(self, found: Found) -> None:
        """Write one more key."""
        self._found.append(found)
        self.document["kernels"].append(found.record())
        if found.status == "timed":
            autotune.append(self._folder / TUNED, found.key, found.best, found.trials[0])
        self.save()

    def add_step(self, record: dict[str, Any]) -> None:
        """Write the times of one more step."""
        self.document["steps"].append(record)
        self.save()

    def save(self) -> None:
        """Write the document and the rows."""
        results.save(self.document, self._folder / DOCUMENT)
        (self._folder / ROWS).write_text(self.rows())

    def rows(self) -> str:
        """The rows by table, those of more samples last: a table's first row that is large enough counts."""
        about = self.document["machine"]
        words = f"# {about['device']}, torch {about['torch']}, Triton {self.document['triton']}, {self.document['date']}"
        lines = [
            words,
            *([] if self.document["timed"] else ["# nothing was timed: ranked by the estimate alone"]),
        ]
        ordered = sorted(self._found, key=lambda found: (found.table_name, found.key.first, found.key.second))
        for position, found in enumerate(ordered):
            if position == 0 or ordered[position - 1].table_name != found.table_name:
                lines.append(f"# {found.table_name}")
            lines.append(found.row())
        return "\n".join(lines) + "\n"
