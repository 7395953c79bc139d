"""Peak memory of a training step's loss, beyond the inputs and their gradients."""

import math

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from vicreg_fast.rows import uses_dual

from .cases import CASES, Case
from .conftest import MemoryRows
from .memory import peak_bytes, tensor_bytes

# Besides the cases with a target of speed, what is hardest to do in the memory that the inputs grant: so few samples
# that a statistic of every feature is of the inputs' size, inputs that must be converted, all patches matched.
HARD = (
    Case("VICReg 2x4096", (2, 4096)),
    Case("VICReg 3x8192", (3, 8192)),
    Case("VICReg 100x125", (100, 125)),
    Case("VICReg 512x512", (512, 512)),
    Case("VICReg 256x2048 bfloat16", (256, 2048), dtype=torch.bfloat16),
    Case("VICReg 300x300 bfloat16", (300, 300), dtype=torch.bfloat16),
    Case("VICReg 1000x1200 bfloat16", (1000, 1200), dtype=torch.bfloat16),
    Case("VICReg 9x20000 bfloat16", (9, 20000), dtype=torch.bfloat16),
    Case("VICReg 500 problems 4x64", (500, 4, 64)),
    Case("VICReg 64 problems 2x500 bfloat16", (64, 2, 500), dtype=torch.bfloat16),
    Case("VICReg 64 problems 100x125", (64, 100, 125)),
    Case("VICRegL local B=256 P=9 C=512 m=4", (256, 9, 512, 4)),
    Case("VICRegL local B=256 P=49 C=64 m=10", (256, 49, 64, 10)),
    Case("VICRegL local B=64 P=49 C=128, all matches", (64, 49, 128, 49)),
    Case("VICRegL local B=64 P=49 C=128, all matches, per slot", (64, 49, 128, 49), statistics="slot"),
    Case("VICRegL local B=64 P=6 C=256, all matches", (64, 6, 256, 6)),
    Case("VICRegL local B=2 P=1024 C=64 m=20", (2, 1024, 64, 20)),
    Case("VICRegL local B=32 P=49 C=512 m=10 bfloat16", (32, 49, 512, 10), dtype=torch.bfloat16),
)
# Allowed beside what the inputs grant: buffers so small that cutting them would save nothing.
SMALL = 1 << 18


def allowed_bytes(case: Case) -> int:
    """Twice the inputs and, for each problem and view, one matrix of the smaller side: all in float32."""
    if case.local:
        B, patches, D, m = case.shape
        elements = 2 * B * patches * D
        (P, N), views = ((B, m) if case.statistics == "image" else (m, B)), 8
    else:
        N, D = case.shape[-2:]
        P, views = math.prod(case.shape[:-2]), 2
        elements = 2 * P * N * D
    side = N if uses_dual(P, N, D) else D
    return 4 * (2 * elements + P * views * side * side)


@pytest.mark.parametrize(
    "case",
    [*(c for c in CASES if c.target and c.target > 1), *HARD],
    ids=lambda case: case.name.replace(" ", "-"),
)
def test_step(case: Case, benchmark: BenchmarkFixture, memory_table: MemoryRows) -> None:
    inputs = case.inputs()
    allowed = allowed_bytes(case)
    sizes: dict[str, int] = {}
    # Eager code is measured where it is compared with: it takes its time at the others.
    for backend in ("reference", "auto") if case in CASES else ("auto",):
        step = case.step(backend, inputs)
        step()
        sizes[backend] = peak_bytes(step) - tensor_bytes(*inputs[:2])  # the gradients are of the inputs' size
    benchmark.extra_info.update(eager_bytes=sizes.get("reference"), bytes=sizes["auto"], allowed_bytes=allowed)
    benchmark.pedantic(lambda: None, rounds=1)  # type: ignore[no-untyped-call]  # the figures are in extra_info; there is no time to report
    memory_table.append((case.name, sizes.get("reference"), sizes["auto"], allowed))
    assert sizes["auto"] <= allowed + SMALL
