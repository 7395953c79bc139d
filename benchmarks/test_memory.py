"""Peak memory of a training step's loss, beyond the inputs and their gradients."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from vicreg_fast.rows import uses_dual

from .cases import CASES, Case
from .conftest import MemoryRows
from .memory import peak_bytes, tensor_bytes

# Besides the cases with a target of speed: so few samples that a statistic of every feature is of the inputs' size.
FEW_SAMPLES = (
    Case("VICReg 2x4096", (2, 4096)),
    Case("VICReg 3x8192", (3, 8192)),
    Case("VICRegL local B=256 P=9 C=512 m=4", (256, 9, 512, 4)),
)


def allowed_bytes(case: Case, input_bytes: int) -> int:
    """Twice the inputs and, for each problem and view, one matrix of the smaller side: all float32."""
    if case.local:
        images, _, channels, matches = case.shape
        problems, views, N, D = 2 * images, 4, matches, channels
    else:
        problems, views, (N, D) = 1, 2, case.shape
    side = N if uses_dual(N, D) else D
    return 2 * input_bytes + 4 * problems * views * side * side


@pytest.mark.parametrize(
    "case",
    [*(c for c in CASES if c.target and c.target > 1), *FEW_SAMPLES],
    ids=lambda case: case.name.replace(" ", "-"),
)
def test_step(case: Case, benchmark: BenchmarkFixture, memory_table: MemoryRows) -> None:
    inputs = case.inputs()
    allowed = allowed_bytes(case, tensor_bytes(*inputs[:2]))
    sizes = {}
    for backend in ("reference", "auto"):
        step = case.step(backend, inputs)
        step()
        sizes[backend] = peak_bytes(step) - tensor_bytes(*inputs[:2])  # the gradients are of the inputs' size
    benchmark.extra_info.update(eager_bytes=sizes["reference"], bytes=sizes["auto"], allowed_bytes=allowed)
    benchmark.pedantic(lambda: None, rounds=1)  # type: ignore[no-untyped-call]  # the figures are in extra_info; there is no time to report
    memory_table.append((case.name, sizes["reference"], sizes["auto"], allowed))
