"""``python -m benchmarks``: the kernels measured on a GPU, and what can be known of them without one."""

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed and memory: pytest benchmarks."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    resources = commands.add_parser(
        "resources",
        help="compile every kernel for a GPU that need not be there",
        epilog="exit status: 0 where all is well, 1 where a variant has a defect, 2 for a bad argument",
    )
    targets = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")
    resources.add_argument("--target", choices=targets, default="cuda:90", help="(default: %(default)s)")
    resources.add_argument("--every", type=int, default=1, metavar="N", help="compile one variant of N only")
    measure = commands.add_parser(
        "run",
        help="time forward and backward of every provider and write a JSON file",
        description="Time VICReg's forward and backward by eager code, torch.compile, ATen and Triton, called from "
        "Python and replayed as CUDA graphs, on the same inputs in one run. Providers that are wrong get no time. "
        "Writes a JSON file (benchmarks/results/README.md) and prints a table.",
        epilog="exit status: 0 where every provider that ran was right, whatever its speed; 1 where one was wrong or "
        "raised; 2 for a bad argument or where the file is there already; 130 after Ctrl-C, which keeps the "
        "shapes that are done",
    )
    measure.add_argument("--device", default="cuda", metavar="NAME", help="cuda, cuda:1 or, to try the benchmark "
                         "itself, cpu: eager code and ATen on small shapes (default: %(default)s)")  # fmt: skip
    measure.add_argument("--shape", nargs="+", metavar="NAME", help="shapes to measure (default: all)")
    measure.add_argument("--quick", action="store_true", help="fewer repetitions")
    measure.add_argument("--out", metavar="DIR", help="folder of the file (default: benchmarks/results)")
    arguments = parser.parse_args(argv)
    if arguments.command == "run":
        from . import run

        words = sys.argv[1:] if argv is None else argv
        chosen = (arguments.device, arguments.shape, arguments.quick, arguments.out)
        try:
            return run.run(*chosen, command=" ".join(("python -m benchmarks", *words)))
        except run.RefusedError as error:
            measure.error(str(error))
    if arguments.every < 1:
        parser.error(f"--every needs at least 1, got {arguments.every}")
    try:
        from .resources import report
    except ImportError as error:
        parser.error(f"Triton is needed: {error}")
    return 1 if report(arguments.target, arguments.every) else 0


if __name__ == "__main__":
    sys.exit(main())
