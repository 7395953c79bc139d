"""Peak memory of a training step's loss, beyond the inputs and their gradients."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import CASES, Case
from .memory import peak_bytes, tensor_bytes


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.target > 1], ids=lambda case: case.name.replace(" ", "-")
)
def test_step(
    case: Case, benchmark: BenchmarkFixture, memory_table: list[tuple[str, float, float, float]]
) -> None:
    inputs = case.inputs()
    sizes = {}
    for backend in ("reference", "auto"):
        step = case.step(backend, inputs)
        step()
        gradients = tensor_bytes(*inputs[:2])
        for tensor in inputs:
            tensor.grad = None
        sizes[backend] = peak_bytes(step) - gradients
    benchmark.extra_info.update(eager_bytes=sizes["reference"], bytes=sizes["auto"])
    benchmark.pedantic(lambda: None, rounds=1)  # type: ignore[no-untyped-call]  # the figures are in extra_info; there is no time to report
    memory_table.append((case.name, sizes["reference"], sizes["auto"], tensor_bytes(*inputs[:2])))
