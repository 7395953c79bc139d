"""``backend="auto"`` on a GPU where a kernel fails (pytest -m gpu): real errors of Triton, and CUDA graphs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vicreg_fast import VICRegLoss
from vicreg_fast.backends import kernel_failures

from .data import both_sides
from .parity import assert_same_bits
from .test_gpu_launches import run
from .test_gpu_vicreg import pair

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

dual_and_primal = both_sides(dual=[(200, 1000)], primal=[(1000, 200)])
WARNING = "the Triton kernels cannot run on cuda:0: OutOfResources: out of resource: shared memory"


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_failures, "reasons", {})
    monkeypatch.setattr(kernel_failures, "_warned", set())


def let_fail(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a kernel of the table more stages than any GPU has shared memory for: 320 KB."""
    from vicreg_fast.backends.triton import launch_vicreg

    choose = launch_vicreg.choose

    def too_large(key: Any) -> Any:
        config = choose(key)
        return config._replace(stages=40) if key.kernel == kernel else config

    monkeypatch.setattr(launch_vicreg, "choose", too_large)


def of_aten(x: Tensor, y: Tensor) -> list[Tensor]:
    return run(x, y, VICRegLoss(backend="aten"))


@dual_and_primal
def test_too_little_shared_memory_forward(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    let_fail("gram" if shape[0] < shape[1] else "second_moment", monkeypatch)
    x, y = pair(*shape)
    with pytest.warns(UserWarning, match=WARNING):
        actual = run(x, y, VICRegLoss())
    assert_same_bits(actual, of_aten(x, y))
    assert_same_bits(
        run(x, y, VICRegLoss()), of_aten(x, y)
    )  # without a second warning, which would be an error


@dual_and_primal
def test_too_little_shared_memory_backward(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair(*shape)
    losses = run(x, y)[:4]
    let_fail("gradient", monkeypatch)
    with pytest.warns(UserWarning, match=WARNING):
        actual = run(x, y, VICRegLoss())
    assert_same_bits(actual, losses + of_aten(x, y)[4:])


@dual_and_primal
def test_a_kernel_that_fails_during_the_capture_of_a_graph(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch, clean_memory: None
) -> None:
    x, y = pair(*shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # loads the kernels before the one that fails, and ATen's
        run(x, y)
        of_aten(x, y)
    torch.cuda.current_stream().wait_stream(side)
    let_fail("gram" if shape[0] < shape[1] else "second_moment", monkeypatch)
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(UserWarning, match=WARNING), torch.cuda.graph(graph):
        static = run(x, y, VICRegLoss())
    new = pair(*shape)
    with torch.no_grad():
        x.copy_(new[0])
        y.copy_(new[1])
    graph.replay()
    assert_same_bits(static, of_aten(*new))
