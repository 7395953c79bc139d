"""Peak memory of a training step's loss, beyond the inputs and their gradients: it has a bound, on hard shapes too."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from vicreg_fast import functional
from vicreg_fast.sides import uses_dual

from . import providers
from .cases import CASES, DTYPES, Case, Inputs, Local, VICReg
from .conftest import MemoryRows
from .memory import peak_bytes
from .timing import Step


@dataclass(frozen=True, eq=False)
class Problems(VICReg):
    """P independent problems, averaged: views (P, N, D)."""

    P: int = field(kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.P} problems {super().name}"

    def inputs(self, seed: int, device: torch.device) -> Inputs:
        views = replace(self, N=self.P * self.N, P=1)
        both = super(Problems, views).inputs(seed, device)
        return tuple(z.detach().view(self.P, self.N, self.D).requires_grad_() for z in both)


def hard(products: str, *shapes: tuple[int, int]) -> list[Case]:
    return [VICReg(products, N=N, D=D) for N, D in shapes]


def local(B: int, P: int, C: int, matches: int | None, products: str = "highest", **options: Any) -> Case:
    pair = None if matches is None else (matches, matches)
    return Local(products, B=B, patches=(P, P), C=C, matches=pair, **options)


# Besides the shapes of which a speed is asked, what is hardest to do in the memory that the inputs grant: so few samples
# that a statistic of every feature is of the inputs' size, inputs that must be converted, all patches matched.
HARD = (
    *hard("highest", (2, 4096), (3, 8192), (100, 125), (512, 512)),
    *hard("bf16", (256, 2048), (300, 300), (1000, 1200), (9, 20000)),
    Problems("highest", P=500, N=4, D=64),
    Problems("bf16", P=64, N=2, D=500),
    Problems("highest", P=64, N=100, D=125),
    local(256, 9, 512, 4),
    local(256, 49, 64, 10),
    local(64, 49, 128, None),
    local(64, 49, 128, None, statistics="slot"),
    local(64, 6, 256, None),
    local(2, 1024, 64, 20),
    local(32, 49, 512, 10, "bf16"),
)
# Of which a speed-up is asked on a CPU.
ASKED = tuple(case for case in CASES if case.targets.get("cpu", {}).get("eager", 0) > 1)
# Allowed beside what the inputs grant: buffers so small that cutting them would save nothing.
SMALL = 1 << 18


def allowed_bytes(case: Case) -> int:
    """Twice the inputs and, for each problem and view, one matrix of the smaller side: all in float32."""
    if isinstance(case, Local):
        m, D, views = max(case.counts), case.C, 8
        elements = 2 * case.B * max(case.patches) * D
        P, N = (case.B, m) if case.statistics == "image" else (m, case.B)
    else:
        assert isinstance(case, VICReg)
        P, N, D, views = case.P if isinstance(case, Problems) else 1, case.N, case.D, 2
        elements = 2 * P * N * D
    side = N if uses_dual(P, N, D) else D
    return 4 * (2 * elements + P * views * math.prod((side, side)))


def losses_of(case: Case, backend: str) -> Callable[..., dict[str, Tensor]]:
    if isinstance(case, Problems):
        return lambda x, y: {"loss": torch.stack(functional.vicreg_terms(x, y, backend=backend)).sum()}
    return providers.ours_of(case, backend, providers.definition_of(case))


@pytest.mark.parametrize("case", [*ASKED, *HARD], ids=lambda case: case.name.replace(" ", "-"))
def test_memory(case: Case, benchmark: BenchmarkFixture, memory_table: MemoryRows) -> None:
    inputs = case.inputs(0, torch.device("cpu"))
    assert inputs[0].dtype == DTYPES[case.products]
    allowed = allowed_bytes(case)
    sizes: dict[str, int] = {}
    # Eager code is measured where it is compared with: it takes its time at the others.
    for backend in ("reference", "auto") if case in ASKED else ("auto",):
        step = Step(losses_of(case, backend), inputs)
        sizes[backend] = step.peak_bytes(peak_bytes)["both"]
    benchmark.extra_info.update(eager_bytes=sizes.get("reference"), bytes=sizes["auto"], allowed_bytes=allowed)
    benchmark.pedantic(lambda: None, rounds=1)  # type: ignore[no-untyped-call]  # the figures are in extra_info; there is no time to report
    memory_table.append((case.name, sizes.get("reference"), sizes["auto"], allowed))
    assert sizes["auto"] <= allowed + SMALL
