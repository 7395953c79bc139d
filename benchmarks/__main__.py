"""``python -m benchmarks``: measure, report, and what can be known of the kernels without a GPU."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed and memory of VICReg losses: docs/benchmarks.md."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="time every provider of every shape and write a JSON file",
        description="Time forward and backward of every loss and of patch matching, on the same inputs in one run: by "
        "eager code, torch.compile, ATen, Triton (called from Python, and replayed as CUDA graphs) and the libraries "
        "that are installed. Whoever is wrong gets no time. A run that was stopped is continued by the same command.",
        epilog="exit status: 0 where every provider that ran was right, whatever its speed; 1 where one was wrong or "
        "raised; 2 for a bad argument; 130 after Ctrl-C, which keeps the shapes that are done",
    )
    run.add_argument("--device", metavar="NAME", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    run.add_argument(
        "--suite",
        action="append",
        metavar="NAMES",
        help="vicreg, vicregl, matching, distributed; some, with commas between",
    )
    run.add_argument(
        "--shape",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="these shapes (default: those of the device)",
    )
    run.add_argument(
        "--provider",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="these providers, as 'eager' or 'ours as lightly'",
    )
    run.add_argument(
        "--quick",
        action="store_true",
        help="few repetitions; a shape of each kind, in about a minute, where none is named",
    )
    run.add_argument("--fresh", action="store_true", help="begin anew where a run was stopped")
    run.add_argument(
        "--out", type=_folder, metavar="DIR", help="folder of the file (default: benchmarks/results)"
    )
    report = commands.add_parser(
        "report",
        help="a Markdown page and figures from result files",
        description="Write a page and its figures, light and dark. Several files come one after the other, and beside each "
        "other in the figures.",
        epilog="exit status: 0; 2 for a file that cannot be used",
    )
    report.add_argument("files", nargs="*", metavar="FILE", help="(default: the latest in benchmarks/results)")
    report.add_argument(
        "--compare", action="store_true", help="hold the files against each other, shape by shape"
    )
    report.add_argument(
        "--out", type=_folder, metavar="DIR", help="folder of the page (default: benchmark-report)"
    )
    report.add_argument("--readme", action="store_true", help="write README.md's tables and figure instead")
    resources = commands.add_parser(
        "resources",
        help="compile every kernel for a GPU that need not be there",
        epilog="exit status: 0 where all is well, 1 where a variant has a defect, 2 for a bad argument",
    )
    targets = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")
    resources.add_argument("--target", choices=targets, default="cuda:90", help="(default: %(default)s)")
    resources.add_argument("--every", type=int, default=1, metavar="N", help="compile one variant of N only")
    return parser, {"run": run, "report": report, "resources": resources}


def _folder(name: str) -> str:
    if not name:
        raise argparse.ArgumentTypeError("needs the name of a folder, got ''")
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # µ and – have no place in every encoding
    try:
        status = _main(argv)
        sys.stdout.flush()
        return status
    # As vicreg_fast/__main__.py has it, which is not asked: to import it is to import torch, and that may be what was interrupted.
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush fails too
        return 141
    except OSError as error:  # as of a full disk
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 1


def _main(argv: Sequence[str] | None) -> int:
    parser, commands = _parser()
    arguments = parser.parse_args(argv)
    command = commands[arguments.command]
    if arguments.command == "resources":
        return _resources(arguments, command)
    try:
        from . import page, run
        from .results import RefusedError
    except ImportError as error:
        command.error(f"{error}; pip install -e '.[benchmarks]'")
    words = sys.argv[1:] if argv is None else argv
    try:
        if arguments.command == "report":
            return page.write(arguments.files, arguments.compare, arguments.out, arguments.readme)
        suites = None
        if arguments.suite is not None:
            suites = [name.strip() for names in arguments.suite for name in names.split(",")]
        options = run.Options(
            arguments.device, suites, arguments.shape, arguments.provider, arguments.quick, arguments.fresh,
            arguments.out, f"python -m benchmarks {shlex.join(words)}",
        )  # fmt: skip
        return run.run(options)
    except RefusedError as error:
        command.error(str(error))


def _resources(arguments: argparse.Namespace, command: argparse.ArgumentParser) -> int:
    if arguments.every < 1:
        command.error(f"--every needs at least 1, got {arguments.every}")
    try:
        from .resources import report
    except ImportError as error:
        command.error(f"Triton is needed: {error}")
    return 1 if report(arguments.target, arguments.every) else 0


if __name__ == "__main__":
    sys.exit(main())
