"""``pytest benchmarks``: the device, and the table of memory at the end."""

import pytest
import torch

from . import machine, report
from .results import UsageError

MemoryRows = list[dict[str, str]]
_MEMORY = pytest.StashKey[MemoryRows]()
DEVICE = pytest.StashKey[torch.device]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --device."""
    parser.addoption("--device", help="device of test_speed.py (default: cuda where there is one)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Find the device."""
    config.stash[_MEMORY] = []
    try:
        config.stash[DEVICE] = machine.device(config.getoption("--device"))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture
def memory_table(request: pytest.FixtureRequest) -> MemoryRows:
    """The rows of the table of memory."""
    return request.config.stash[_MEMORY]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of memory."""
    if rows := config.stash[_MEMORY]:
        terminalreporter.write_line(f"\nPeak memory beyond inputs and gradients\n\n{report.markdown(rows)}")
