"""VICRegL's local loss and patch matching on a GPU: pytest -m gpu."""

from functools import partial

import pytest
import torch
from torch import Tensor

from vicreg_fast import VICRegLLoss, functional

from .data import U
from .parity import BFLOAT, KINDS, SINGLE, assert_same_bits
from .test_gpu_launches import device_operations
from .vicregl_parity import assert_parity, maps_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("statistics", ["image", "slot"])
@pytest.mark.parametrize(
    ("patches", "C", "counts", "layout"),
    [
        ((49, 49), 512, (20, 20), "contiguous"),
        ((49, 50), 130, (20, 4), "transposed"),
        ((196, 64), 384, (64, 40), "sliced"),
        ((300, 196), 96, (300, 196), "contiguous"),
        ((64, 49), 20, (49, 49), "problems last"),
        ((9, 9), 3, (9, 9), "contiguous"),
    ],
)
def test_as_good_as_eager(
    patches: tuple[int, int], C: int, counts: tuple[int, int], layout: str, statistics: str, kind: str
) -> None:
    dtype, precision, unit = KINDS[kind]
    maps = [z.to(DEVICE) for z in maps_of(16, patches, C, layout, dtype)]
    locations = [torch.rand(16, P, 2, device=DEVICE) for P in patches]
    assert_parity(maps, locations, counts, statistics == "slot", precision, unit, scale=2.0**12)


@pytest.mark.parametrize("dtype", [SINGLE, torch.float16, BFLOAT], ids=str)
@pytest.mark.parametrize("patches", [(49, 49), (196, 300), (1024, 1000)], ids=str)
def test_the_nearest_candidate(patches: tuple[int, int], dtype: torch.dtype) -> None:
    """At most 2 E farther than the nearest, E as in test_matching.py, with any s among the candidates."""
    P1, P2 = patches
    queries, candidates = (torch.randn(4, P, 768, device=DEVICE).to(dtype) for P in (P1, P2))
    query, candidate, distance = functional.match_patches(queries, candidates, backend="triton")
    true = torch.cdist(
        queries.double(), candidates.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    norms = [z.double().norm(dim=2).amax(1) for z in (queries, candidates)]
    E = 1.01 * (768 + 8) * U * (norms[0] + 3 * norms[1]).square()[:, None]
    actual = true.gather(1, query[..., None].expand(-1, -1, P2)).gather(2, candidate[..., None])[..., 0]
    best = true.amin(2)
    assert (actual <= best.gather(1, query) + 2 * E).all()
    assert (best.gather(1, query) - best.sort(1).values).abs().le(2 * E).all()
    assert torch.allclose(distance.double().square(), actual, rtol=1e-5)


def run(loss: VICRegLLoss, inputs: list[Tensor]) -> list[Tensor]:
    """Losses, then both maps' gradients."""
    losses = forward_of(loss, inputs)
    return [*losses.values(), *torch.autograd.grad(losses["loss"], inputs[:2])]


def forward_of(loss: VICRegLLoss, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The local part alone (alpha = 0): maps and locations of both views."""
    x1_maps, x2_maps, *locations = inputs
    return loss(x1_maps, x2_maps, None, None, *locations)


def inputs_of(dtype: torch.dtype = SINGLE, patches: tuple[int, int] = (49, 49)) -> list[Tensor]:
    maps = [z.to(DEVICE).requires_grad_() for z in maps_of(64, patches, 512, dtype=dtype)]
    return [*maps, *(torch.rand(64, P, 2, device=DEVICE) for P in patches)]


@pytest.mark.parametrize("statistics", ["image", "slot"])
def test_two_runs_agree_bit_for_bit(statistics: str) -> None:
    loss, inputs = VICRegLLoss(20, 0.0, statistics=statistics, backend="triton"), inputs_of()
    first = run(loss, inputs)
    for _ in range(10):
        assert_same_bits(run(loss, inputs), first)


@pytest.mark.parametrize("patches", [(49, 49), (196, 100)], ids=str)
def test_in_a_cuda_graph(patches: tuple[int, int], clean_memory: None) -> None:
    loss, inputs = VICRegLLoss(20, 0.0, backend="triton"), inputs_of(patches=patches)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(loss, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = run(loss, inputs)
    for _ in range(2):  # the second replay finds the arrival counter as the first left it
        new = inputs_of(patches=patches)
        with torch.no_grad():
            for old, fresh in zip(inputs, new, strict=True):
                old.copy_(fresh)
        graph.replay()
        assert_same_bits(static, run(loss, new))


@pytest.mark.filterwarnings("ignore")  # the profiler's own
@pytest.mark.parametrize("dtype", [SINGLE, BFLOAT], ids=str)
@pytest.mark.parametrize("patches", [(49, 49), (196, 100)], ids=str)
def test_few_kernels(patches: tuple[int, int], dtype: torch.dtype, clean_memory: None) -> None:
    loss, inputs = VICRegLLoss(20, 0.0, backend="triton"), inputs_of(dtype, patches)
    run(loss, inputs)
    device_operations(lambda: run(loss, inputs))  # the first profile may miss something
    local_loss = partial(loss.local_loss, *inputs)
    forward = device_operations(local_loss)
    losses, upstream = local_loss(), torch.ones((), device=DEVICE)
    both = [losses["location/loss"], losses["feature/loss"]]
    backward = device_operations(lambda: torch.autograd.grad(both, inputs[:2], [upstream] * 2))
    assert 1 <= len(forward) <= 3, forward
    assert 1 <= len(backward) <= 2, backward


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_the_host_does_not_wait() -> None:
    loss, inputs = VICRegLLoss(20, 0.0, backend="triton"), inputs_of()
    run(loss, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(loss, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
