"""Collects the benchmark's rows and prints them as the table that the README shows."""

import platform

import pytest
import torch

SpeedRows = list[tuple[str, float, float, float | None]]  # name, eager and our seconds, speed-up asked for
MemoryRows = list[tuple[str, int | None, int, int]]  # name, eager's and our bytes, bytes allowed
_SPEED = pytest.StashKey[SpeedRows]()
_MEMORY = pytest.StashKey[MemoryRows]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SPEED] = []
    config.stash[_MEMORY] = []


@pytest.fixture
def speed_table(request: pytest.FixtureRequest) -> SpeedRows:
    return request.config.stash[_SPEED]


@pytest.fixture
def memory_table(request: pytest.FixtureRequest) -> MemoryRows:
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
            asked = "" if target is None else f"{target:g}x" + (" **missed**" if theirs / ours < target else "")
            write(f"| {name} | {_duration(theirs)} | {_duration(ours)} | {theirs / ours:.2f}x | {asked} |")
    if memory:
        write("")
        write("| peak memory beyond inputs and gradients | vicreg_fast | allowed | eager | less |")
        write("|---|---|---|---|---|")
        for name, eager_bytes, ours, allowed in memory:
            eager = "| |" if eager_bytes is None else f"{_size(eager_bytes)} | {eager_bytes / ours:.1f}x |"
            write(f"| {name} | {_size(ours)} | {_size(allowed)} | {eager}")


def _size(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:.1f} KiB"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
