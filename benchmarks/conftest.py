"""``pytest benchmarks``: the option --device."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --device."""
    parser.addoption("--device", help="device of test_speed.py (default: cuda where there is one)")
