"""Every provider at every shape under pytest-benchmark: ``pytest benchmarks/test_speed.py -k 256x2048``.

One test is one part (forward, backward or both) of one provider at one shape.  A group is compared.  A call ends when the
device is done; on a GPU ``extra_info`` has the device's own time, by events.  An incorrect provider fails and is not
timed.  Providers are timed one after the other here; ``python -m benchmarks run`` interleaves their rounds.
"""

import functools
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import measure, providers, timing
from .cases import CASES, Case
from .conftest import DEVICE
from .timing import Bench, Step


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The shapes that --device measures by default.  Only ``python -m benchmarks run`` measures several ranks."""
    device = metafunc.config.stash[DEVICE]
    chosen = [
        pytest.param(case, name, part, id=f"{case.name}-{part}-{name}")
        for case in CASES
        if device.type in case.devices and case.suite != "distributed"
        for name in providers.names_of(case)
        if name != "compile" or case.compiled
        for part in case.parts
    ]
    metafunc.parametrize(("case", "name", "part"), chosen)


pytestmark = pytest.mark.filterwarnings("ignore")  # Inductor warns about the machine and about torch


_bench = functools.cache(Bench)  # one for each device


@functools.lru_cache(maxsize=1)  # the tests of a provider's parts follow each other
def _prepared(case: Case, name: str, device: torch.device) -> tuple[Step | None, measure.Record]:
    """A judged and warmed-up step, and the provider's entry; no step where it cannot be timed."""
    _prepared.cache_clear()  # or the previous step would keep its memory until this one is made
    bench = _bench(device)
    provider = dict(providers.providers(case, device, [name]))[name]
    entry = measure.provider_record(provider)
    steps = measure.prepare(case, provider, bench, [case.inputs(0, device)], {}, entry)
    return (steps[0] if steps else None), entry


@pytest.fixture
def precision(case: Case, request: pytest.FixtureRequest) -> Iterator[None]:
    """torch's own matmuls at the shape's precision."""
    with providers.matmul_precision(case.precision, request.config.stash[DEVICE]):
        yield


@pytest.mark.usefixtures("precision")
def test_speed(
    case: Case, name: str, part: str, benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> None:
    bench = _bench(request.config.stash[DEVICE])
    step, entry = _prepared(case, name, bench.device)
    if step is None:
        stop = pytest.skip if entry["status"] in ("unavailable", "out of memory") else pytest.fail
        stop(f"{entry['status']}: {entry['reason']}")

    def finish(call: Callable[[], object]) -> None:
        call()
        bench.synchronize()

    before = functools.partial(finish, step.forward if part == "backward" else step.clear)
    call = functools.partial(finish, getattr(step, part))
    before()
    start = time.perf_counter()
    call()
    rounds = max(5, min(100, int(1 / (time.perf_counter() - start))))
    benchmark.group = f"{case.name}, {part}"
    benchmark.extra_info.update(
        suite=case.suite, shape=case.shape, provider=name, dtype=str(case.dtype), precision=case.precision
    )
    benchmark.pedantic(call, setup=before, rounds=rounds, warmup_rounds=1)  # type: ignore[no-untyped-call]
    step.clear()
    if bench.on_gpu and not benchmark.disabled:
        run = timing.launched(bench, [step])
        benchmark.extra_info["device"] = measure.quantiles([run(0)[part].device for _ in range(rounds)])
