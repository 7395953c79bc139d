"""``pytest benchmarks``: the device of test_speed.py."""

import pytest

from . import machine
from .results import UsageError


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --device."""
    parser.addoption("--device", help="device of test_speed.py (default: cuda where there is one)")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device that is not here."""
    try:
        machine.device(config.getoption("--device"))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
