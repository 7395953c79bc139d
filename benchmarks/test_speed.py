"""Every provider of every shape under pytest-benchmark: ``pytest benchmarks/test_speed.py -k 256x2048``.

One test is one part (forward, backward or both) of one provider on one shape; a group is what is compared.  A call ends
when the device is done.  Of a GPU ``extra_info`` has the device's own time, by events.  Whoever is wrong fails and gets no
time.  Providers take turns test by test here; ``python -m benchmarks run`` interleaves their rounds.
"""

import functools
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import providers, timing
from .cases import CASES, Case, Distributed
from .conftest import DEVICE
from .timing import Bench


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The shapes of the device that --device names; several ranks are measured by ``python -m benchmarks run`` alone."""
    device = metafunc.config.stash[DEVICE]
    chosen = [
        pytest.param(case, name, part, id=f"{case.name}-{part}-{name.replace(' ', '-')}")
        for case in CASES
        if device.type in case.devices and not isinstance(case, Distributed)
        for name in providers.names_of(case)
        if name != "compile" or case.compiled
        for part in case.parts
    ]
    metafunc.parametrize(("case", "name", "part"), chosen)


pytestmark = pytest.mark.filterwarnings("ignore")  # Inductor has remarks on the machine and on torch


@functools.lru_cache(maxsize=1)
def _bench(device: torch.device) -> Bench:
    return Bench(device)


@functools.lru_cache(maxsize=1)  # of the parts of one provider, which follow each other
def _step(case: Case, name: str, device: torch.device) -> timing.Step | str:
    """A step that is right and warmed up, or why there is none."""
    bench = _bench(device)
    _step.cache_clear()  # the one before would be kept until this one is there
    bench.free()
    provider = dict(providers.providers(case, bench.device, [name])).get(name)
    if provider is None or provider.losses is None:
        return "unavailable: " + (provider.reason or "" if provider else "has no such loss")
    inputs = case.inputs(0, bench.device)
    found = providers.evaluate(case, provider.losses, inputs)
    assert provider.definition is not None
    true = providers.truth(case, provider.definition, inputs)
    if reason := providers.wrong(providers.errors(found, true), providers.BOUNDS[case.products]):
        return f"wrong: {reason}"
    return timing.Step(provider.losses, inputs)


@pytest.fixture
def precision(case: Case, request: pytest.FixtureRequest) -> Iterator[None]:
    """Torch's own products as the case has them."""
    with providers.products_of(case.precision, request.config.stash[DEVICE]):
        yield


@pytest.mark.usefixtures("precision")
def test_speed(
    case: Case, name: str, part: str, benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> None:
    device = request.config.stash[DEVICE]
    step = _step(case, name, device)
    if isinstance(step, str):
        (pytest.fail if step.startswith("wrong") else pytest.skip)(step)
    bench = _bench(device)
    benchmark.group = f"{case.name}, {part}"

    def finished(call: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            call()
            bench.synchronize()

        return timed

    before = finished(step.forward) if part == "backward" else finished(step.clear)
    call = finished(getattr(step, part))
    before()
    start = time.perf_counter()
    call()
    rounds = max(5, min(100, int(1 / (time.perf_counter() - start))))
    benchmark.extra_info.update(
        suite=case.suite, shape=case.shape, provider=name, dtype=str(case.dtype), precision=case.precision
    )
    benchmark.pedantic(call, setup=before, rounds=rounds, warmup_rounds=1)  # type: ignore[no-untyped-call]
    step.clear()
    if bench.on_gpu and not benchmark.disabled:
        run = timing.launched(bench, [step])
        times = [run(number)[part].device[0] for number in range(rounds)]
        benchmark.extra_info["device"] = timing.quantiles(times)
