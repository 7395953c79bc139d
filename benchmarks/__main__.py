"""``python -m benchmarks``: measures, reports, and compiles the kernels for GPUs that need not be there."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .text import minutes


def _folder(name: str) -> str:
    if not name:
        raise argparse.ArgumentTypeError("needs the name of a folder, got ''")
    return name


_SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "NAME"}
_TARGETS = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed and memory of VICReg losses: docs/benchmarks.md."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run_and_report(commands)
    _add_resources_and_estimate(commands)
    _add_kernels(commands)
    return parser, commands.choices


def _add_run_and_report(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="time every provider at every shape and write a JSON file",
        description="Time forward and backward of every loss and of patch matching, on the same inputs in one run. An "
        "incorrect provider is marked 'wrong' and not timed. The same command continues a run that was stopped.",
        epilog="exit status: 0 where every provider that ran was correct, whatever its speed; 1 where one was wrong or "
        "raised; 2 for a bad argument; 130 after Ctrl-C, which keeps the finished shapes",
    )
    run.add_argument("--device", metavar="NAME", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    run.add_argument("--suite", action="append", metavar="NAMES", help="as vicreg,vicregl,matching,distributed")
    run.add_argument("--shape", **_SEVERAL, help="(default: those of the device)")
    run.add_argument("--provider", **_SEVERAL, help="as eager or vicreg_fast-as-lightly (default: all)")
    run.add_argument("--quick", action="store_true", help="few repetitions; by default one shape of each kind")
    run.add_argument("--minutes", type=minutes, metavar="M", help="divide this time among the shapes (default: 7.3 on a "
                     "GPU, 13.3 on a CPU)")  # fmt: skip
    run.add_argument("--fresh", action="store_true", help="do not continue a run that was stopped")
    run.add_argument("--out", type=_folder, metavar="DIR", help="(default: benchmarks/results)")
    words = "a Markdown page and figures, light and dark"
    report = commands.add_parser("report", help=words, epilog="exit status: 0; 2 for an unusable file")
    report.add_argument("files", nargs="*", metavar="FILE", help="(default: the latest in benchmarks/results)")
    report.add_argument("--compare", action="store_true", help="compare the files shape by shape")
    report.add_argument("--out", type=_folder, metavar="DIR", help="(default: benchmark-report)")
    report.add_argument("--readme", action="store_true", help="write the tables of README.md and docs instead")


def _add_resources_and_estimate(commands: Any) -> None:
    resources = commands.add_parser(
        "resources",
        help="compile every kernel for a GPU that need not be there",
        epilog="exit status: 0 where all is well, 1 where a variant has a defect, 2 for a bad argument",
    )
    resources.add_argument("--target", choices=_TARGETS, default="cuda:90", help="(default: %(default)s)")
    resources.add_argument("--every", type=int, default=1, metavar="N", help="compile one variant of N only")
    estimate = commands.add_parser(
        "estimate",
        help="what a shape would cost on a GPU that need not be there, by a model",
        description="Compile every kernel of a shape as the library would launch it, count its instructions, and estimate its "
        "time. Nothing is measured.",
        epilog="exit status: 0; 1 where a kernel cannot be compiled; 2 for a bad argument",
    )
    estimate.add_argument("--target", choices=_TARGETS, help="(default: that of --against, or cuda:90)")
    estimate.add_argument("--shape", **_SEVERAL, help="(default: the shapes with a target on a GPU)")
    estimate.add_argument("--json", metavar="FILE", help="write the estimates there")
    estimate.add_argument("--against", metavar="FILE", help="a file of kernels or a result of run: its times "
                          "beside the estimates")  # fmt: skip


def _add_kernels(commands: Any) -> None:
    kernels = commands.add_parser(
        "kernels",
        help="time every kernel of a step, each alone, and write a JSON file",
        description="Time each launch of a step by graph replay with a cold L2 cache. estimate --against reads the file.",
        epilog="exit status: 0 where every shape was timed; 1 where one raised; 2 for a bad argument; 130 after Ctrl-C, "
        "which keeps the finished shapes",
    )
    kernels.add_argument("--device", metavar="NAME", help="cuda or cuda:1 (default: cuda)")
    kernels.add_argument("--shape", **_SEVERAL, help="(default: those of estimate)")
    kernels.add_argument("--json", required=True, metavar="FILE", help="the file")
    kernels.add_argument(
        "--made-up", action="store_true", help="rehearse on a CPU, with times that are made up"
    )
    words = "print the device, versions, clocks, commit and ceilings as JSON"
    about = commands.add_parser("machine", help=words, description=f"P{words[1:]}.")
    about.add_argument(
        "--device", metavar="NAME", help="cuda, cuda:1 or cpu (default: cuda where there is one)"
    )
    about.add_argument("--json", metavar="FILE", help="write it there too")
    words = "profile the kernels that miss their estimates by the most"
    profile = commands.add_parser("profile", help=words, description=f"With --times, --estimates and --out: {words}. "
                                  "Needs a GPU.", epilog="exit status: 0; 2 for a bad argument")  # fmt: skip
    profile.add_argument("--device", metavar="NAME", help="cuda or cuda:1 (default: cuda)")
    profile.add_argument("--times", metavar="FILE", help="of kernels")
    profile.add_argument("--estimates", metavar="FILE", help="of estimate --json")
    profile.add_argument("--out", metavar="FILE", help="where the report goes")
    profile.add_argument("--worst", type=int, default=3, metavar="N", help="how many (default: %(default)s)")
    profile.add_argument(
        "--step", metavar="SHAPE", help="only run this shape's step twice, for a profiler around it"
    )
    tune = commands.add_parser(
        "tune",
        help="search for the fastest block sizes of the kernels",
        description="Compile candidates for every kernel of a shape, keep the best by the estimate, check and time each alone on "
        "the GPU, and write rows for vicreg_fast/backends/triton/tables.py. Without a GPU it only compiles and estimates.",
        epilog="exit status: 0, also where the time was over; 1 where a kernel could not be searched; 2 for a bad argument; "
        "130 after Ctrl-C, which keeps what was found",
    )
    tune.add_argument("--shape", **_SEVERAL, help="(default: the shapes with a target on a GPU)")
    tune.add_argument(
        "--minutes", type=minutes, default=8.0, metavar="M", help="at most (default: %(default)g)"
    )
    tune.add_argument("--out", type=_folder, metavar="DIR", help="(default: tuning)")
    tune.add_argument("--target", choices=_TARGETS, help="without a GPU (default: cuda:90)")


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
    needs = "Triton is needed, and " if arguments.command in ("estimate", "kernels", "tune") else ""
    try:
        run = _imported(arguments, f"python -m benchmarks {shlex.join(argv)}")
    except ImportError as error:
        command.error(f"{error}; {needs}pip install -e '.[benchmarks]'")
    from .results import UsageError

    try:
        return run()
    except UsageError as error:
        command.error(str(error))


def _imported(arguments: argparse.Namespace, command: str) -> Callable[[], int]:
    """What runs a command that measures, estimates or reports.  Raises ImportError where a package is missing."""
    if arguments.command == "estimate":
        from .estimate import estimate

        return partial(estimate, arguments.target, arguments.shape, arguments.json, arguments.against)
    if arguments.command == "tune":
        from . import tune

        return partial(tune.tune, arguments.shape, arguments.minutes, arguments.out, arguments.target)
    if arguments.command == "report":
        from . import report

        return partial(report.write, arguments.files, arguments.compare, arguments.out, arguments.readme)
    if arguments.command == "kernels":
        from . import kernel_run

        return partial(kernel_run.run, arguments, command)
    if arguments.command == "profile":
        from . import profiles

        return partial(profiles.run, arguments)
    if arguments.command == "machine":
        from . import machine

        return partial(machine.describe, arguments.device, arguments.json)
    from . import run

    return partial(run.run, arguments, command)


if __name__ == "__main__":
    sys.exit(main())
