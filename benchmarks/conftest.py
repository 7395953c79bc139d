"""``pytest benchmarks``: which device, and the table of memory at the end."""

import pytest
import torch

from . import machine, report

MemoryRows = list[tuple[str, int | None, int, int]]  # name, eager's and our bytes, bytes allowed
_MEMORY = pytest.StashKey[MemoryRows]()


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", default=default, help="device of test_speed.py (default: %(default)s)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MEMORY] = []
    device = config.getoption("--device")
    there = machine.devices()
    if device not in there and f"{device}:0" not in there:
        raise pytest.UsageError(f"no device {device!r} here, only {', '.join(there)}")


@pytest.fixture
def memory_table(request: pytest.FixtureRequest) -> MemoryRows:
    return request.config.stash[_MEMORY]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = [
        [
            name,
            report.size(ours),
            report.size(allowed),
            *(("", "") if eager is None else (report.size(eager), f"{eager / ours:.1f}x")),
        ]
        for name, eager, ours, allowed in config.stash[_MEMORY]
    ]
    if rows:
        header = ["peak memory beyond inputs and gradients", "vicreg_fast", "allowed", "eager", "less"]
        terminalreporter.write_line("\n" + report.markdown(header, rows))
