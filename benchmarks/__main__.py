"""``python -m benchmarks``: what can be known of the kernels without a GPU."""

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
    arguments = parser.parse_args(argv)
    if arguments.every < 1:
        parser.error(f"--every needs at least 1, got {arguments.every}")
    try:
        from .resources import report
    except ImportError as error:
        parser.error(f"Triton is needed: {error}")
    return 1 if report(arguments.target, arguments.every) else 0


if __name__ == "__main__":
    sys.exit(main())
