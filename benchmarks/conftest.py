"""``pytest benchmarks``: the device of test_speed.py."""

import pytest
import torch

from . import machine
from .results import UsageError

DEVICE = pytest.StashKey[torch.device]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --device."""
    parser.addoption("--device", help="device of test_speed.py (default: cuda where there is one)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Find the device."""
    try:
        config.stash[DEVICE] = machine.device(config.getoption("--device"))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
