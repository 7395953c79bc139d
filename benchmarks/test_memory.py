"""The bound of a training step's peak memory, beyond the inputs and their gradients."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vicreg_fast import functional
from vicreg_fast.sides import uses_dual

from . import providers
from .cases import CASES, Case, local, vicreg
from .text import size
from .timing import Bench, Step


def problems(matmul: str, P: int, N: int, D: int) -> Case:
    """P independent problems of N samples each, averaged."""
    case = vicreg(matmul, P * N, D)
    return replace(case, name=f"{P}-problems-{N}x{D}-{matmul}", shape=case.shape | {"problems": P})


# The shapes that come closest to the bound: so few samples that one statistic per feature is as large as the inputs, inputs
# that must be converted to float32, all patches matched.
HARD = (
    *(vicreg("highest", N, D) for N, D in ((2, 4096), (3, 8192), (100, 125), (512, 512))),
    *(vicreg("bf16", N, D) for N, D in ((256, 2048), (300, 300), (1000, 1200), (9, 20000))),
    problems("highest", 500, 4, 64),
    problems("bf16", 64, 2, 500),
    problems("highest", 64, 100, 125),
    local("highest", 256, 9, 512, 4),
    local("highest", 256, 49, 64, 10),
    local("highest", 64, 49, 128, None),
    local("highest", 64, 49, 128, None, statistics="slot"),
    local("highest", 64, 6, 256, None),
    local("highest", 2, 1024, 64, 20),
    local("bf16", 32, 49, 512, 10),
)
# The shapes with a speed-up target on a CPU.
WITH_TARGET = tuple(case for case in CASES if case.targets.get("cpu", {}).get("eager", 0) > 1)
SMALL = 1 << 18  # 256 KiB for buffers so small that saving them would gain nothing


def allowed_bytes(case: Case) -> int:
    """Twice the inputs and, for each problem and view, one matrix of the smaller side: all in float32."""
    shape, views = case.shape, 2
    P, D, elements = shape.get("problems", 1), shape.get("D", 0), case.elements
    N = shape.get("N", 0) // P
    if case.suite == "vicregl":
        m, D, views, elements = max(shape["m"]), shape["C"], 8, 2 * shape["B"] * max(shape["P"]) * shape["C"]
        P, N = (shape["B"], m) if shape["statistics"] == "image" else (m, shape["B"])
    side = N if uses_dual(P, N, D) else D
    return int(4 * (2 * elements + P * views * side**2))


def losses_of(case: Case) -> Callable[..., dict[str, Tensor]]:
    """The losses of a shape."""
    if "problems" in case.shape:
        sizes = (case.shape["problems"], -1, case.shape["D"])
        return lambda x, y: {"loss": torch.stack(functional.vicreg_terms(x.view(sizes), y.view(sizes))).sum()}
    return providers.ours_of(case, "auto", providers.definition_of(case))


@pytest.mark.parametrize("case", [*WITH_TARGET, *HARD], ids=lambda case: case.name)
def test_memory(case: Case) -> None:
    bench = Bench(torch.device("cpu"))
    step = Step(losses_of(case), case.inputs(0, bench.device))
    peak, allowed = step.peak_bytes(bench)["both"], allowed_bytes(case)
    assert peak <= allowed + SMALL, f"{size(peak)}, {size(allowed)} allowed"
