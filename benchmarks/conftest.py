"""Collects the benchmark's rows and prints them as the table that the README shows."""

import platform

import pytest
import torch

Rows = list[tuple[str, float, float, float]]
_SPEED = pytest.StashKey[Rows]()
_MEMORY = pytest.StashKey[Rows]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SPEED] = []
    config.stash[_MEMORY] = []


@pytest.fixture
def speed_table(request: pytest.FixtureRequest) -> Rows:
    return request.config.stash[_SPEED]


@pytest.fixture
def memory_table(request: pytest.FixtureRequest) -> Rows:
    return request.config.stash[_MEMORY]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    speed, memory = config.stash[_SPEED], config.stash[_MEMORY]
    write = terminalreporter.write_line
    if speed or memory:
        write("")
        write(f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, medians")
    if speed:
        write("")
        write("| loss, forward and backward | eager | vicreg_fast | faster | asked |")
        write("|---|---|---|---|---|")
        for name, theirs, ours, target in speed:
            mark = "" if theirs / ours >= target else " **missed**"
            write(
                f"| {name} | {_duration(theirs)} | {_duration(ours)} | {theirs / ours:.1f}x | {target:g}x{mark} |"
            )
    if memory:
        write("")
        write("| peak memory beyond inputs and gradients | eager | vicreg_fast | less | of the inputs |")
        write("|---|---|---|---|---|")
        for name, theirs, ours, inputs in memory:
            write(
                f"| {name} | {theirs / 2**20:.1f} MiB | {ours / 2**20:.1f} MiB | {theirs / ours:.0f}x "
                f"| {ours / inputs:.2f} |"
            )


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
