"""``pytest benchmarks``: which device, and the table of memory at the end."""

import pytest
import torch

from . import machine, report
from .results import RefusedError

MemoryRows = list[tuple[str, int | None, int, int]]  # name, eager's and our bytes, bytes allowed
_MEMORY = pytest.StashKey[MemoryRows]()
DEVICE = pytest.StashKey[torch.device]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="device of test_speed.py (default: cuda where there is one)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MEMORY] = []
    try:
        config.stash[DEVICE] = machine.device(config.getoption("--device"))
    except RefusedError as error:
        raise pytest.UsageError(str(error)) from error


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
