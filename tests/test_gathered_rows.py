"""VICReg's Triton kernels on gathered rows, in Triton's interpreter: against the reference in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from vicreg_fast import reference
from vicreg_fast.plan import LOCAL_VIEWS, Matches

from .data import U
from .parity import assert_same_bits

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")
# A few roundings of the result, as in data.py: the largest error below is less than 6 units.
ROUNDINGS = 8 * U


def terms_of_matches(sources: Sequence[Tensor], index: Tensor, per_slot: bool) -> Tensor:
    """The terms of two pairs whose views are matches of two maps, by gathering them: (3,)."""
    views = [
        reference.gather_rows(sources[v], i.t() if per_slot else i)
        for v, i in zip((0, 1, 1, 0), index, strict=True)
    ]
    views = [view.transpose(0, 1) for view in views] if per_slot else views
    x_to_y, y_to_x = (torch.stack(reference.vicreg_terms(*views[k : k + 2])) for k in (0, 2))
    return (x_to_y + y_to_x) / 2


Evaluation = tuple[Tensor, list[list[Tensor]]]  # three terms; for each the gradients of both sources


def evaluate_by_autograd(
    function: Callable[[list[Tensor]], Tensor], maps: Sequence[Tensor], dtype: torch.dtype
) -> Evaluation:
    sources = [z.to(dtype).requires_grad_() for z in maps]
    terms = function(sources)
    grads = [torch.autograd.grad(term, sources, retain_graph=True) for term in terms]
    return terms.detach().double(), [[g.double() for g in both] for both in grads]


def evaluate_kernels(maps: Sequence[Tensor], index: Tensor, per_slot: bool) -> Evaluation:
    """The same by the Triton backend, for one loss whose matches are given."""
    from vicreg_fast.backends import triton_backend

    m = index.shape[1] if per_slot else index.shape[2]
    plan = LOCAL_VIEWS._replace(
        view_source=LOCAL_VIEWS.view_source[:4], group_sizes=(4,), per_slot=per_slot, match_counts=(m, m),
        backend="triton", precision="highest",
    )  # fmt: skip
    flat = index.flatten()
    outputs = triton_backend.terms(plan, maps, Matches(flat))
    saved, one = outputs[plan.outputs :], torch.ones(())
    grads = [
        triton_backend.gradient(
            plan, maps, flat, saved, [one if j == k else None for j in range(3)], [True, True]
        )
        for k in range(3)
    ]
    return torch.stack(outputs[:3]).double(), [[g.double() for g in both] for both in grads]


@pytest.mark.parametrize("layout", ["channels last", "channels first", "sliced"])
# Images, patches of each map, matches and channels: dual and primal, full tiles and split ones.
@pytest.mark.parametrize(
    ("per_slot", "size"),
    [
        (False, (6, 9, 7, 5, 40)),
        (False, (6, 9, 7, 5, 3)),
        (False, (2, 40, 36, 33, 130)),
        (False, (2, 64, 62, 60, 70)),
        (True, (9, 7, 6, 3, 40)),
        (True, (9, 7, 6, 3, 5)),
        (True, (33, 5, 6, 2, 130)),
    ],
    ids=str,
)
def test_gathered_rows(per_slot: bool, size: tuple[int, ...], layout: str) -> None:
    B, L1, L2, m, C = size
    maps = [0.7 * torch.randn(B, L, C) + 0.3 for L in (L1, L2)]
    if layout == "channels first":
        maps = [z.mT.contiguous().mT for z in maps]
    elif layout == "sliced":
        maps = [torch.randn(B, 2 * L, C + 5)[:, ::2, 2 : C + 2] for L in (L1, L2)]
    # A query is matched once, a candidate any number of times.
    queries = [torch.stack([torch.randperm(L)[:m] for _ in range(B)]) for L in (L1, L2)]
    candidates = [torch.randint(L, (B, m)) for L in (L2, L1)]
    views = [queries[0], candidates[0], queries[1], candidates[1]]
    index = torch.stack([view.t() for view in views] if per_slot else views)

    def by_definition(sources: list[Tensor]) -> Tensor:
        return terms_of_matches(sources, index, per_slot)

    truth, truth_grads = evaluate_by_autograd(by_definition, maps, torch.float64)
    eager, eager_grads = evaluate_by_autograd(by_definition, maps, torch.float32)
    fast, fast_grads = evaluate_kernels(maps, index, per_slot)
    assert ((fast - truth).abs() <= 2 * (eager - truth).abs() + ROUNDINGS * truth + 8 * U).all()
    for fast_pair, eager_pair, truth_pair in zip(fast_grads, eager_grads, truth_grads, strict=True):
        for f, e, t in zip(fast_pair, eager_pair, truth_pair, strict=True):
            assert (f - t).norm() <= 2 * (e - t).norm() + ROUNDINGS * t.norm()


def test_a_candidate_chosen_often_gets_the_same_gradient_each_time() -> None:
    maps = [torch.randn(3, 12, 40) for _ in range(2)]
    index = torch.zeros(4, 3, 8, dtype=torch.int64)
    runs = [evaluate_kernels(maps, index, False)[1] for _ in range(2)]
    assert_same_bits(*([g for both in grads for g in both] for grads in runs))
