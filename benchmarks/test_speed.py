"""Every provider at every shape under pytest-benchmark: ``pytest benchmarks/test_speed.py -k 256x2048``.

A group has one part (forward, backward or both) of one shape.  A call ends when the device is done; on a GPU
``extra_info`` has the device's own time.  Providers are timed one after the other.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import machine, measure, providers
from .cases import CASES, Case
from .timing import Bench, Step

pytestmark = pytest.mark.filterwarnings("ignore")  # Inductor warns about the machine and about torch
_bench = functools.cache(Bench)  # one for each device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The shapes that --device measures by default.  Only ``python -m benchmarks run`` measures several ranks."""
    device = machine.device(metafunc.config.getoption("--device"))
    chosen = [
        pytest.param(device, case, name, part, id=f"{case.name}-{part}-{name}")
        for case in CASES
        if device.type in case.devices and case.suite != "distributed"
        for name in providers.names_of(case)
        if name != "compile" or case.compiled
        for part in case.parts
    ]
    metafunc.parametrize(("device", "case", "name", "part"), chosen)


@functools.lru_cache(maxsize=1)  # the tests of a provider's parts follow each other
def _prepared(case: Case, name: str, device: torch.device) -> tuple[list[Step], measure.Record]:
    """A judged and warmed-up step, and the provider's entry; no step where it cannot be timed."""
    _prepared.cache_clear()  # or the previous step would keep its memory until this one is made
    provider = dict(providers.providers(case, device, [name]))[name]
    entry = measure.provider_record(provider)
    return measure.prepare(case, provider, _bench(device), [case.inputs(0, device)], {}, entry), entry


def test_speed(device: torch.device, case: Case, name: str, part: str, benchmark: BenchmarkFixture) -> None:
    bench = _bench(device)

    def finish(call: Callable[[], object]) -> None:
        call()
        bench.synchronize()

    with providers.matmul_precision(case.precision, device):
        steps, entry = _prepared(case, name, device)
        if not steps:
            stop = pytest.skip if entry["status"] in ("unavailable", "out of memory") else pytest.fail
            stop(f"{entry['status']}: {entry['reason']}")
        (step,) = steps
        before = functools.partial(finish, step.forward if part == "backward" else step.clear)
        call = functools.partial(finish, getattr(step, part))
        rounds = max(5, min(100, int(1 / max(step.time(bench)[part]))))
        benchmark.group = f"{case.name}, {part}"
        benchmark.extra_info.update(
            suite=case.suite, shape=case.shape, provider=name, dtype=str(case.dtype), precision=case.precision
        )
        benchmark.pedantic(call, setup=before, rounds=rounds, warmup_rounds=1)  # type: ignore[no-untyped-call]
        step.clear()
        if bench.on_gpu and not benchmark.disabled:
            seconds = [step.time(bench)[part].device for _ in range(rounds)]
            benchmark.extra_info["device"] = measure.quantiles(seconds)
