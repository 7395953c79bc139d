"""How kernels are timed alone: what is recorded, what a graph holds, what is done before each replay, and in which order."""

import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from vicreg_fast import VICRegLoss, functional

timing: Any = pytest.importorskip("vicreg_fast.backends.triton.launch_timing")
pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")

NAMES = ["moments_forward", "gram_forward", "gradient"]


def step(x: Tensor) -> None:
    """Forward and backward of the dual side: three kernels."""
    x = x.detach().requires_grad_()
    VICRegLoss(backend="triton")(x, x.detach() + 0.1)["loss"].backward()


def recorded_step(N: int = 20, D: int = 96) -> list[Any]:
    with timing.recorded() as launches:
        step(torch.randn(N, D))
    return list(launches)


class FakeTimer:
    """Seconds by kernel, in place of a device's; counts its calls."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds, self.calls = {name: iter(values) for name, values in seconds.items()}, []

    def capture(self, launch: Any) -> Callable[[], float]:
        def seconds() -> float:
            self.calls.append(launch.name)
            return next(self.seconds[launch.name])

        return seconds


# -- what is recorded -----------------------------------------------------------------------------------------------


def test_launches_are_made_and_recorded() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    before = InterpretedFunction.run
    x = torch.randn(20, 96)
    with timing.recorded() as launches:
        actual = functional.vicreg_terms(x, x + 0.1, backend="triton")
    expected = functional.vicreg_terms(x, x + 0.1, backend="triton")
    assert actual == expected
    assert [launch.name for launch in launches] == NAMES[:2]
    assert InterpretedFunction.run is before


def test_other_codes_kernels_are_launched_and_not_recorded() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def store(x_ptr, value):
        tl.store(x_ptr, value)

    x = torch.zeros(1)
    with timing.recorded(every_thread=True) as launches:
        store[(1,)](x, 2.0)
        store[lambda options: (1,)](x, value=3.0)
    assert (x.item(), launches) == (3.0, [])


@pytest.mark.parametrize(("every_thread", "expected"), [(False, []), (True, NAMES)])
def test_another_threads_launches_are_recorded_on_request(every_thread: bool, expected: list[str]) -> None:
    other = threading.Thread(target=step, args=(torch.randn(20, 96),))
    with timing.recorded(every_thread) as launches:
        other.start()
        other.join()
    assert [launch.name for launch in launches] == expected


def test_two_recordings_end_in_any_order() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    before = InterpretedFunction.run
    first, second = timing.recorded(), timing.recorded()
    with_first, with_second = first.__enter__(), second.__enter__()
    step(torch.randn(20, 96))
    first.__exit__(None, None, None)
    step(torch.randn(20, 96))
    second.__exit__(None, None, None)
    assert ([launch.name for launch in with_first], len(with_second)) == (NAMES, 6)
    assert InterpretedFunction.run is before


def test_equal_work_is_recognised() -> None:
    first, same, other = recorded_step(), recorded_step(), recorded_step(D=100)
    assert [launch.work for launch in first] == [launch.work for launch in same]
    assert all(a.work != b.work for a, b in zip(first, other, strict=True))


def test_a_launch_takes_the_tensors_of_earlier_ones_where_they_fit() -> None:
    tensors: dict[Any, Tensor] = {}
    first, second, third = ([launch.sharing(tensors) for launch in made] for made in (
        recorded_step(), with_other_norms(recorded_step()), with_other_norms(recorded_step())
    ))  # fmt: skip
    assert second[0].arguments["operand_ptr"] is first[0].arguments["operand_ptr"]
    assert second[0].arguments["partials"].column_ptr is first[0].arguments["partials"].column_ptr
    assert type(second[0].arguments["partials"]) is type(first[0].arguments["partials"])
    # The table's is of another shape; that of the launch before fits.
    assert second[0].arguments["row_sq_norms_ptr"].shape == (7,)
    assert third[0].arguments["row_sq_norms_ptr"] is second[0].arguments["row_sq_norms_ptr"]
    # What a kernel reads is what the kernel before it in the same pass wrote.
    assert first[1].arguments["operand_ptr"] is first[0].arguments["operand_ptr"]
    assert [launch.work for launch in second] == [launch.work for launch in third]


def with_other_norms(launches: list[Any]) -> list[Any]:
    launches[0].arguments["row_sq_norms_ptr"] = torch.zeros(7)
    return launches


# -- rounds ---------------------------------------------------------------------------------------------------------


def test_a_kernels_time_is_the_median_of_its_rounds_but_for_the_first() -> None:
    seconds = {name: [9.0, 5 * k, 1 * k, 3 * k] for k, name in enumerate(NAMES, 1)}
    timer = FakeTimer(seconds)
    x = torch.randn(20, 96)
    times = timing.kernel_times(lambda: step(x), timer, timing.Effort(3, 3, 0.0))
    assert [time.kernel for time in times] == NAMES
    assert [time.median for time in times] == [3.0, 6.0, 9.0]
    assert [time.rounds for time in times] == [3, 3, 3]
    assert times[0].q20 == pytest.approx(1.8)
    assert times[0].q80 == pytest.approx(4.2)
    # Each round makes every launch and starts at another one.
    assert timer.calls[:9] == [*NAMES, *NAMES[1:], NAMES[0], NAMES[2], *NAMES[:2]]


# -- graphs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device that runs nothing.  Returns what it was asked for, in order."""
    log: list[str] = []

    class Event:
        def __init__(self, **options: Any) -> None:
            log.append(f"event {options}")

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: Any) -> float:
            return 4.0

    class Graph:
        def capture_begin(self, **options: Any) -> None:
            log.append("begin" if not gc.isenabled() else "begin with garbage collection")

        def capture_end(self) -> None:
            log.append("end")

        def replay(self) -> None:
            log.append("replay")

    class Stream:
        def __init__(self, device: torch.device) -> None: ...

        def synchronize(self) -> None: ...

    properties = type("Properties", (), {"L2_cache_size": 1 << 27})
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    # 512 MiB, which nothing reads.
    monkeypatch.setattr(torch, "ones", lambda size, device: log.append(f"{4 * size >> 20} MiB"))
    monkeypatch.setattr(torch, "sum", lambda *_, **__: log.append("read"))
    monkeypatch.setattr(torch.version, "hip", None)
    return log


class FakeKernel:
    """Notes its launches, with the value of the arrival counter."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def run(self, *, partials: tuple[Any, ...], **_: Any) -> None:
        self.log.append(f"launch at {int(partials[2])}")
        partials[2].add_(1)


def fake_launch(log: list[str]) -> Any:
    from vicreg_fast.kernels.epilogue import Partials

    return timing.Launch(FakeKernel(log), (4,), {"partials": Partials(None, None, torch.zeros(1))})


def test_a_graph_holds_the_kernel_between_two_events(fake_cuda: list[str]) -> None:
    timer = timing.GraphTimer(torch.device("cpu"))
    launch = fake_launch(fake_cuda)
    seconds = timer.capture(launch)
    # Four times the L2 cache.  A launch before the capture loads the kernel.
    external = "event {'enable_timing': True, 'external': True}"
    captured = ["launch at 0", "begin", "record", "launch at 1", "record", "end"]
    assert fake_cuda == ["512 MiB", external, external, "synchronize", *captured]
    assert gc.isenabled()
    fake_cuda.clear()
    assert seconds() == 0.004
    assert fake_cuda == ["read", "replay", "synchronize"]
    assert int(launch.arguments["partials"].arrival_counter_ptr) == 0


def test_without_events_inside_graphs_they_stand_around_the_replay(
    fake_cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    seconds = timing.GraphTimer(torch.device("cpu")).capture(fake_launch(fake_cuda))
    assert "'external': True" not in "".join(fake_cuda)
    fake_cuda.clear()
    seconds()
    assert fake_cuda == ["read", "record", "replay", "record", "synchronize"]


def test_a_capture_that_fails_is_ended(fake_cuda: list[str]) -> None:
    class Broken(FakeKernel):
        def run(self, **arguments: Any) -> None:
            if "begin" in self.log:
                raise RuntimeError("no")

    launch = fake_launch(fake_cuda)._replace(kernel=Broken(fake_cuda))
    with pytest.raises(RuntimeError, match="no"):
        timing.GraphTimer(torch.device("cpu")).capture(launch)
    assert fake_cuda[-1] == "end"
    assert gc.isenabled()
