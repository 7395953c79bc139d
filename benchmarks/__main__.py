"""``python -m benchmarks``: measures, reports, and compiles the kernels for GPUs that need not be there."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any


def _folder(name: str) -> str:
    if not name:
        raise argparse.ArgumentTypeError("needs the name of a folder, got ''")
    return name


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise argparse.ArgumentTypeError(f"needs a positive number of minutes, got {text!r}")
    return minutes


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed and memory of VICReg losses: docs/benchmarks.md."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="time every provider at every shape and write a JSON file",
        description="Time forward and backward of every loss and of patch matching, on the same inputs in one run. An "
        "incorrect provider is marked 'wrong' and not timed. The same command continues a run that was stopped.",
        epilog="exit status: 0 where every provider that ran was correct, whatever its speed; 1 where one was wrong or "
        "raised; 2 for a bad argument; 130 after Ctrl-C, which keeps the finished shapes",
    )
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "NAME"}
    run.add_argument("--device", metavar="NAME", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    run.add_argument("--suite", action="append", metavar="NAMES", help="as vicreg,vicregl,matching,distributed")
    run.add_argument("--shape", **several, help="(default: those of the device)")
    run.add_argument("--provider", **several, help="as eager or vicreg_fast-as-lightly (default: all)")
    run.add_argument("--quick", action="store_true", help="few repetitions; by default one shape of each kind")
    run.add_argument("--fresh", action="store_true", help="do not continue a run that was stopped")
    run.add_argument("--out", type=_folder, metavar="DIR", help="(default: benchmarks/results)")
    words = "a Markdown page and figures, light and dark"
    report = commands.add_parser("report", help=words, epilog="exit status: 0; 2 for an unusable file")
    report.add_argument("files", nargs="*", metavar="FILE", help="(default: the latest in benchmarks/results)")
    report.add_argument("--compare", action="store_true", help="compare the files shape by shape")
    report.add_argument("--out", type=_folder, metavar="DIR", help="(default: benchmark-report)")
    report.add_argument("--readme", action="store_true", help="write the tables of README.md and docs instead")
    resources = commands.add_parser(
        "resources",
        help="compile every kernel for a GPU that need not be there",
        epilog="exit status: 0 where all is well, 1 where a variant has a defect, 2 for a bad argument",
    )
    targets = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")
    resources.add_argument("--target", choices=targets, default="cuda:90", help="(default: %(default)s)")
    resources.add_argument("--every", type=int, default=1, metavar="N", help="compile one variant of N only")
    estimate = commands.add_parser(
        "estimate",
        help="what a shape would cost on a GPU that need not be there, by a model",
        description="Compile every kernel of a shape as the library would launch it, count its instructions, and estimate its "
        "time. Nothing is measured.",
        epilog="exit status: 0; 1 where a kernel cannot be compiled; 2 for a bad argument",
    )
    estimate.add_argument("--target", choices=targets, default="cuda:90", help="(default: %(default)s)")
    estimate.add_argument("--shape", **several, help="(default: the shapes with a target on a GPU)")
    estimate.add_argument("--json", metavar="FILE", help="write the estimates there")
    estimate.add_argument("--against", metavar="FILE", help="a result of run: its times beside the estimates")
    tune = commands.add_parser(
        "tune",
        help="search for the fastest block sizes of the kernels",
        description="Compile candidates for every kernel of a shape, keep the best by the estimate, check and time each alone on "
        "the GPU, and write rows for vicreg_fast/backends/triton/configs.py. Without a GPU it only compiles and estimates.",
        epilog="exit status: 0, also where the time was over; 1 where a kernel could not be searched; 2 for a bad argument; "
        "130 after Ctrl-C, which keeps what was found",
    )
    tune.add_argument("--shape", **several, help="(default: the shapes with a target on a GPU)")
    tune.add_argument(
        "--minutes", type=_minutes, default=8.0, metavar="M", help="at most (default: %(default)g)"
    )
    tune.add_argument("--out", type=_folder, metavar="DIR", help="(default: tuning)")
    tune.add_argument("--target", choices=targets, help="without a GPU (default: cuda:90)")
    return parser, commands.choices


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.  Returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # some encodings lack µ and –
    try:
        status = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has closed, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush fails too
        return 141
    except OSError as error:  # such as a full disk
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 1


def _main(argv: Sequence[str]) -> int:
    parser, commands = _parser()
    arguments = parser.parse_args(argv)
    command = commands[arguments.command]
    if arguments.command == "resources":
        if arguments.every < 1:
            command.error(f"--every needs at least 1, got {arguments.every}")
        try:
            from . import resources
        except ImportError as error:
            command.error(f"Triton is needed: {error}")
        return 1 if resources.report(arguments.target, arguments.every) else 0
    if arguments.command == "estimate":
        try:
            from . import estimate
        except ImportError as error:
            command.error(f"{error}; Triton is needed, and pip install -e '.[benchmarks]'")
        try:
            return estimate.estimate(arguments.target, arguments.shape, arguments.json, arguments.against)
        except ValueError as error:
            command.error(str(error))
    if arguments.command == "tune":
        try:
            from . import tune
        except ImportError as error:
            command.error(f"{error}; Triton is needed, and pip install -e '.[benchmarks]'")
        try:
            return tune.tune(arguments.shape, arguments.minutes, arguments.out, arguments.target)
        except ValueError as error:
            command.error(str(error))
    try:
        from . import report, run
        from .results import UsageError
    except ImportError as error:
        command.error(f"{error}; pip install -e '.[benchmarks]'")
    try:
        if arguments.command == "report":
            return report.write(arguments.files, arguments.compare, arguments.out, arguments.readme)
        return run.run(arguments, f"python -m benchmarks {shlex.join(argv)}")
    except UsageError as error:
        command.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
