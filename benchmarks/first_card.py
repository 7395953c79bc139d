"""What the first minutes on a card should settle, unattended: ``python benchmarks/first_card.py --part PART --out DIR``.

Three parts of eight minutes each, in this order:

    correctness   the machine, the parity check, the tests that need a GPU, the time of every kernel beside its estimate
    tuning        a search for block sizes, the kernels and the benchmark with what it found, a profile of the worst kernels
    proof         on a clean commit: parity and graphs once more, the benchmark at the shapes with targets and fifteen more

A part needs neither an installed package nor a network.  It writes as it goes and ends with ``DIR/page.md``.  Every step is a
child process with a limit (steps.py); Ctrl-C ends it and still writes the page.  ``--rehearse`` runs a part on a CPU: small
shapes, Triton's interpreter, and kernels' times that are made up and marked so.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: its folder has modules called as others', such as results
    sys.path[0] = str(ROOT)

from benchmarks import card_page, checkout  # noqa: E402
from benchmarks.shapes import KERNEL_SHAPES, PROOF_SHAPES  # noqa: E402
from benchmarks.steps import Runner, Step  # noqa: E402
from benchmarks.text import minutes  # noqa: E402

MINUTES = 8.0
# Seconds of the total that are not the steps': this process's start, and the last page.
_MARGIN = 4.0
REHEARSED_SHAPE, REHEARSED_CPU_SHAPE = "64x64-high", "8x16-highest"
# pytest -k: what is repeated on the commit with new rows.
PARITY_AND_GRAPHS = "as_good_as_eager or few_samples or nearest_candidate or cuda_graph or agree_bit_for_bit"
SANITIZED = "memcheck and bfloat16"


class Part:
    """The steps of a part on this machine."""

    def __init__(self, out: Path, rehearse: bool) -> None:
        self._out, self._rehearse = out, rehearse
        self._device = ["--device", "cpu" if rehearse else "cuda"]  # never a CPU in the place of a card
        # Compilation takes most of the tests' time.  Each process has a context of the card, half a GB.
        self._workers = 2 if rehearse else min(14, max(2, (os.cpu_count() or 2) - 2))

    def _python(self, *words: object) -> list[str]:
        return [sys.executable, *map(str, words)]

    def _benchmarks(self, command: str, *words: object) -> list[str]:
        return self._python("-m", "benchmarks", command, *words)

    def _file(self, name: str) -> Path:
        return self._out / name

    def _tests(
        self, name: str, marker: str, limit: float, least: float, *, only: str = "", workers: int = 1,
        skip: str | None = None,
    ) -> Step:  # fmt: skip
        """Tests that need a GPU, of those ``only`` pytest's -k; in a rehearsal a few others, in the same way."""
        # By name: the other test files need packages that a card's machine may lack.
        files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_gpu_*.py"))
        if self._rehearse:
            files, marker, only = ["tests/test_kernel_functions.py"], "not full", ""
        command = self._python("-m", "pytest", *files, "-m", marker, *(["-k", only] if only else []))
        command += ["-v", "--tb=short", "--durations=10", "-p", "no:cacheprovider", "--test-seconds=90"]
        command += [f"--junitxml={self._file(f'{name}.xml')}"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(workers), "--dist=worksteal", "--max-worker-restart=40"]
        # Every worker's Inductor would start as many compilers as there are cores.
        return Step(name, command, limit, least, {"TORCHINDUCTOR_COMPILE_THREADS": "1"}, skip)

    def _kernels(self, limit: float, least: float, **environment: str) -> list[list[Step]]:
        """The kernels' times, then the estimates beside them."""
        times, estimates = self._file("kernels.json"), self._file("estimate.json")
        made_up = ["--made-up", "--shape", REHEARSED_SHAPE] if self._rehearse else ["--shape", *KERNEL_SHAPES]
        measure = self._benchmarks("kernels", *self._device, "--json", times, *made_up)
        beside = self._benchmarks("estimate", "--against", times, "--json", estimates)
        # No context of the card in the processes that only compile.
        hidden = {**environment, "CUDA_VISIBLE_DEVICES": ""}
        return [
            [Step("kernels", measure, limit, least, environment)],
            [Step("estimate", beside, 60, 25, hidden)],
        ]

    def _benchmark(
        self, shapes: Sequence[str], *words: str, limit: float, least: float, **environment: str
    ) -> Step:
        if self._rehearse:
            shapes, words = (REHEARSED_CPU_SHAPE,), ("--quick",)
        command = self._benchmarks("run", *self._device, "--fresh", "--out", self._file("results"), *words)
        command += ["--minutes", "{minutes}", "--shape", *shapes]
        return Step("benchmark", command, limit, least, environment)

    @property
    def rows(self) -> Path:
        """Where the search writes what it found."""
        return self._file("tune") / "configs.jsonl"

    def correctness(self) -> list[list[Step]]:
        """Is it right, and how long does each kernel take?"""
        missing = None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on the PATH"
        check = self._python("-m", "vicreg_fast", "--quick", *self._device)
        return [
            [self._machine()],
            # Side by side: nothing is timed.
            [
                self._tests("tests", "gpu and not alone and not sanitizer", 330, 90, workers=self._workers),
                Step("parity", check, 120, 30),
            ],
            [self._tests("tests-alone", "gpu and alone", 80, 30)],
            *self._kernels(110, 60),
            [
                self._tests(
                    "tests-sanitizer", "gpu and sanitizer", 100, 25, only=SANITIZED, workers=2, skip=missing
                )
            ],
        ]

    def _machine(self) -> Step:
        return Step(
            "machine", self._benchmarks("machine", *self._device, "--json", self._file("machine.json")), 60, 10
        )

    def tuning(self) -> list[list[Step]]:
        """Which block sizes are fastest, and what holds the worst kernels back?"""
        shapes = [REHEARSED_SHAPE] if self._rehearse else KERNEL_SHAPES
        search = self._benchmarks(
            "tune", "--out", self.rows.parent, "--minutes", "{minutes}", "--shape", *shapes
        )
        tuned = {"VICREG_FAST_AUTOTUNE_FILE": str(self.rows)}  # from here on the kernels have its rows
        only = ("--provider", "eager", "aten", "triton")
        words = ["--times", self._file("kernels.json"), "--estimates", self._file("estimate.json")]
        profile = self._benchmarks("profile", *self._device, *words, "--out", self._file("profile.txt"))
        return [
            [self._machine()],
            [Step("tune", search, 240, 60)],
            *self._kernels(110, 60, **tuned),
            [self._benchmark(KERNEL_SHAPES, *only, limit=120, least=40, **tuned)],
            [Step("profile", profile, 60, 20, skip="times are made up" if self._rehearse else None)],
        ]

    def proof(self) -> list[list[Step]]:
        """Do the new rows hold, and which targets are met?"""
        repeated = "gpu and not alone and not sanitizer"
        return [
            [self._machine()],
            [self._tests("tests", repeated, 150, 60, only=PARITY_AND_GRAPHS, workers=self._workers)],
            [self._benchmark(PROOF_SHAPES, limit=330, least=120)],
        ]


PARTS = ("correctness", "tuning", "proof")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a part.  Returns the exit status."""
    arguments = _parser().parse_args(argv)
    begin = time.monotonic()
    out = arguments.out.resolve()
    if out.is_relative_to(ROOT):
        _parser().error(
            f"--out needs a folder outside of the checkout, where it is no change, got {arguments.out}"
        )
    if (out / "steps.jsonl").exists():
        _parser().error(f"--out needs a folder without the steps of another part, got {arguments.out}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        _parser().error(f"cannot write to {arguments.out}: {error.strerror}")
    part: list[list[Step]] = getattr(Part(out, arguments.rehearse), arguments.part)()
    signal.signal(signal.SIGTERM, _interrupt)
    status = 0
    with checkout.importable() as view:
        path = os.pathsep.join(filter(None, [str(view), os.environ.get("PYTHONPATH")]))
        added = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        part = [[step._replace(environment={**added, **step.environment}) for step in group] for group in part]

        def write(verdicts: Sequence[dict[str, Any]]) -> None:
            try:
                card_page.write(out, arguments.part, verdicts, time.monotonic() - begin, arguments.rehearse)
            except Exception:  # what the steps have written is worth more than their page
                (out / "page.md").write_text(f"This page could not be made:\n\n{traceback.format_exc()}")

        runner = Runner(out, view, 60 * arguments.minutes - _MARGIN - (time.monotonic() - begin), write)
        try:
            runner.run(part)
        except KeyboardInterrupt:
            status = 130
    print("\n" + (out / "page.md").read_text(), flush=True)
    bad = any(verdict["status"] in ("failed", "timed out") for verdict in runner.verdicts)
    return status or int(bad)


def _interrupt(signum: int, frame: object) -> None:
    """A request to end is Ctrl-C."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/first_card.py",
        description="Check, tune or prove the kernels on a card, unattended, within minutes: docs/benchmarks.md.",
        epilog="exit status: 0 where every step passed or was skipped; 1 where one failed or was stopped by its limit; 2 for a "
        "bad argument; 130 after Ctrl-C",
    )
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a folder for the page, results and logs"
    )
    parser.add_argument(
        "--minutes", type=minutes, default=MINUTES, metavar="M", help="in all (default: %(default)s)"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU, with kernels' times that are made up"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
