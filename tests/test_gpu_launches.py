"""How the Triton kernels run on a GPU (pytest -m gpu): streams, graphs, numbers of launches, memory, composition.

Values and gradients are tested in test_gpu_vicreg.py and test_gpu_vicregl.py.
"""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vicreg_fast import VICRegLoss
from vicreg_fast.backends.triton.splitk import WORKSPACE

from .data import U, assert_exact, both_sides
from .parity import BFLOAT, HALF, SINGLE, assert_same_bits
from .test_gpu_vicreg import DEVICE, pair

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

dual_and_primal = both_sides(dual=[(200, 1000)], primal=[(1000, 200)])


def run(x: Tensor, y: Tensor, loss: Callable[..., dict[str, Tensor]] | None = None) -> list[Tensor]:
    """The module's four losses, then both gradients of their total."""
    losses = (VICRegLoss(backend="triton") if loss is None else loss)(x, y)
    return [*(value.detach() for value in losses.values()), *torch.autograd.grad(losses["loss"], (x, y))]


# -- streams, graphs, order -------------------------------------------------------------------------------------------


@dual_and_primal
def test_on_the_current_stream(shape: tuple[int, int]) -> None:
    x, y = pair(*shape)
    expected = run(x, y)
    late = [torch.full_like(z, math.nan).requires_grad_() for z in (x, y)]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # 50 ms: the host has launched everything before the inputs are written
        with torch.no_grad():
            for z, value in zip(late, (x, y), strict=True):
                z.copy_(value)
        actual = run(*late)
        torch.cuda.current_stream().synchronize()
    assert_same_bits(actual, expected)


@dual_and_primal
def test_in_a_cuda_graph(shape: tuple[int, int], clean_memory: None) -> None:
    x, y = pair(*shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = run(x, y)
    for _ in range(2):  # the second replay finds the arrival counter as the first left it
        new = pair(*shape)
        with torch.no_grad():
            x.copy_(new[0])
            y.copy_(new[1])
        graph.replay()
        assert_same_bits(static, run(*new))


@pytest.mark.parametrize("deterministic", [True, False])
@both_sides(dual=[(500, 8192)], primal=[(100_000, 128)])
def test_two_runs_agree_bit_for_bit(shape: tuple[int, int], deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    x, y = pair(*shape)
    first = run(x, y)
    for _ in range(10):
        assert_same_bits(run(x, y), first)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@dual_and_primal
def test_the_host_does_not_wait(shape: tuple[int, int]) -> None:
    x, y = pair(*shape)
    run(x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- launches and memory ----------------------------------------------------------------------------------------------


def device_operations(function: Callable[[], object]) -> list[str]:
    """Names of the kernels, memsets and copies of a call."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        function()
        torch.cuda.synchronize()
    events = profiled.events() or []
    return [e.name for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]


@pytest.mark.filterwarnings("ignore")  # the profiler's own
@pytest.mark.parametrize("dtype", [SINGLE, BFLOAT], ids=str)
@both_sides(dual=[(256, 2048)], primal=[(4096, 256)])
def test_few_kernels(shape: tuple[int, int], dtype: torch.dtype, clean_memory: None) -> None:
    x, y = pair(*shape, dtype=dtype)
    loss = VICRegLoss(backend="triton")
    run(x, y, loss)
    device_operations(lambda: run(x, y, loss))  # the first profile may miss something
    forward = device_operations(lambda: loss(x, y))
    total, upstream = loss(x, y)["loss"], torch.ones((), device=DEVICE)
    backward = device_operations(lambda: torch.autograd.grad(total, (x, y), upstream))
    assert 1 <= len(forward) <= 3, forward
    assert 1 <= len(backward) <= 2, backward


@pytest.mark.parametrize("dtype", [SINGLE, BFLOAT], ids=str)
def test_peak_memory(dtype: torch.dtype, clean_memory: None) -> None:
    N, D = 2048, 8192
    # For each view one N x N matrix and one copy, both in the operand's type, and a few numbers a row and a column.  Then
    # what does not grow: the split tiles.
    allowed = 2 * dtype.itemsize * (N * N + N * D) + 128 * (N + D) + WORKSPACE
    x, y = pair(N, D, dtype=dtype)
    loss = VICRegLoss(backend="triton")
    run(x, y, loss)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    total = loss(x, y)["loss"]
    forward = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(total, (x, y))
    backward = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients)
    assert max(forward, backward) <= allowed, (forward, backward, allowed)


# -- composition -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Inductor has remarks on the machine and on Triton
@dual_and_primal
def test_compiled_by_inductor(shape: tuple[int, int]) -> None:
    x, y = pair(*shape)
    loss = VICRegLoss(backend="triton")
    torch.compiler.reset()
    actual = run(x, y, torch.compile(loss, fullgraph=True))
    # The same kernels, but the terms are weighted after them.
    for f, e in zip(actual, run(x, y, loss), strict=True):
        assert (f - e).norm() <= 8 * U * e.norm()


@dual_and_primal
def test_float64_runs_on_aten(shape: tuple[int, int]) -> None:
    x, y = pair(*shape, dtype=torch.float64)
    assert_exact(run(x, y, VICRegLoss()), run(x, y, VICRegLoss(backend="reference")))


@pytest.mark.parametrize("cast", [HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("cast_inputs", [False, True], ids=["float32 inputs", "cast inputs"])
@dual_and_primal
def test_autocast_changes_nothing(shape: tuple[int, int], cast_inputs: bool, cast: torch.dtype) -> None:
    x, y = pair(*shape, dtype=cast if cast_inputs else SINGLE)
    expected = run(x, y)
    with torch.autocast("cuda", dtype=cast):
        actual = run(x, y)
    assert [f.dtype for f in actual] == [SINGLE] * 4 + [x.dtype] * 2
    assert_same_bits(actual, expected)


SANITIZED = """
import torch
from vicreg_fast import VICRegLoss
x, y = (torch.randn({}, {}, device="cuda", dtype=torch.{}, requires_grad=True) for _ in "xy")
VICRegLoss(backend="triton")(x, y)["loss"].backward()
torch.cuda.synchronize()
"""


@pytest.mark.sanitizer
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@both_sides(dual=[(65, 131)], primal=[(131, 65)])
def test_compute_sanitizer(shape: tuple[int, int], dtype: str, tool: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SANITIZED.format(*shape, dtype))
    # Each tensor has an allocation of its own: else an access out of bounds would hit another tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
