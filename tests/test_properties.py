"""Properties that hold for all data: the fast path of a transformed input equals the transformed result of the reference.

Drawn shapes cover each way to compute the covariance: D x D of few features, D x D of many features and about as many
samples, and N x N.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vicreg_fast import VICRegLLoss, VICRegLoss, checks, functional, reference
from vicreg_fast.sides import uses_dual

from .data import EXACT, assert_exact

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def few_features(draw: st.DrawFn) -> tuple[int, int]:
    return draw(st.integers(2, 40)), draw(st.integers(1, 64))


@st.composite
def many_features_and_samples(draw: st.DrawFn) -> tuple[int, int]:
    D = draw(st.integers(65, 110))
    return draw(st.integers(4 * D // 5 + 1, 130)), D


@st.composite
def few_samples(draw: st.DrawFn) -> tuple[int, int]:
    D = draw(st.integers(65, 200))
    return draw(st.integers(2, 4 * D // 5)), D


SIDES = {
    "primal-few-features": few_features(),
    "primal-many-features": many_features_and_samples(),
    "dual": few_samples(),
}
every_side = pytest.mark.parametrize("side", SIDES)


@st.composite
def views(draw: st.DrawFn, side: str) -> tuple[Tensor, Tensor]:
    """x and y (N, D): multiples of 2^-20, so that adding another multiple below 2^20 is exact."""
    N, D = draw(SIDES[side])
    assert uses_dual(1, N, D) == (side == "dual")
    generator = torch.Generator().manual_seed(draw(seeds))
    scale = draw(st.floats(0.3, 3.0))
    x = scale * torch.randn(N, D, generator=generator, dtype=torch.float64)
    y = x + 0.3 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return on_grid(x), on_grid(y)


def on_grid(z: Tensor) -> Tensor:
    return (z * 2**20).round() / 2**20


def evaluate(
    terms: Callable[..., tuple[Tensor, ...]], x: Tensor, y: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Values of the three terms, and the gradients of x and y from each."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    values = terms(x, y)
    gradients = [torch.autograd.grad(value, (x, y), retain_graph=True) for value in values]
    return list(values), list(itertools.chain(*gradients))


@every_side
@quick
@given(data=st.data(), seed=seeds)
def test_order_of_the_samples_does_not_matter(side: str, data: st.DataObject, seed: int) -> None:
    x, y = data.draw(views(side))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    values, gradients = evaluate(functional.vicreg_terms, x[order], y[order])
    true_values, true_gradients = evaluate(reference.vicreg_terms, x, y)
    assert_exact(values, true_values)
    assert_exact(gradients, [t[order] for t in true_gradients])


@every_side
@quick
@given(data=st.data(), seed=seeds)
def test_a_vector_added_to_both_views_does_not_matter(side: str, data: st.DataObject, seed: int) -> None:
    x, y = data.draw(views(side))
    # Up to a million standard deviations, of either sign.
    generator = torch.Generator().manual_seed(seed)
    far = on_grid(2.0**19 * (2 * torch.rand(x.shape[1], generator=generator, dtype=torch.float64) - 1))
    assert torch.equal((x + far) - far, x)
    values, gradients = evaluate(functional.vicreg_terms, x + far, y + far)
    true_values, true_gradients = evaluate(reference.vicreg_terms, x, y)
    assert_exact(values, true_values)
    assert_exact(gradients, true_gradients)


@every_side
@quick
@given(data=st.data(), far=st.integers(-(2**19), 2**19))
def test_a_vector_added_to_one_view_changes_invariance_only(side: str, data: st.DataObject, far: int) -> None:
    x, y = data.draw(views(side))
    values, gradients = evaluate(functional.vicreg_terms, x + far, y)
    true_values, true_gradients = evaluate(reference.vicreg_terms, x, y)
    assert_exact(values[1:], true_values[1:])
    assert_exact(gradients[2:], true_gradients[2:])


@every_side
@quick
@given(data=st.data())
def test_views_may_be_swapped(side: str, data: st.DataObject) -> None:
    x, y = data.draw(views(side))
    values, gradients = evaluate(functional.vicreg_terms, y, x)
    true_values, true_gradients = evaluate(reference.vicreg_terms, x, y)
    assert_exact(values, true_values)
    of_y, of_x = gradients[::2], gradients[1::2]
    assert_exact([*of_x, *of_y], [*true_gradients[::2], *true_gradients[1::2]])


@every_side
@pytest.mark.parametrize("term", ["variance", "covariance"])
@quick
@given(data=st.data())
def test_gradients_of_statistics_sum_to_zero_over_the_samples(
    term: str, side: str, data: st.DataObject
) -> None:
    z = data.draw(views(side))[0].requires_grad_()
    value = functional.variance_covariance(z)[term == "covariance"]
    (gradient,) = torch.autograd.grad(value, z)
    assert gradient.sum(0).norm() <= EXACT * gradient.norm()


@every_side
@quick
@given(data=st.data())
def test_twice_the_features_are_sixteen_times_the_covariance(side: str, data: st.DataObject) -> None:
    x, _ = data.draw(views(side))
    cov = functional.variance_covariance(2 * x)[1]
    assert_exact([cov], [16 * reference.covariance(x)])


# -- matching ---------------------------------------------------------------------------------------------------


@st.composite
def maps(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two maps of locations or features, multiples of 2^-20; equal distances do not occur."""
    images, queries, candidates = draw(st.integers(1, 4)), draw(st.integers(1, 30)), draw(st.integers(1, 30))
    channels = draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(seeds))
    a, b = (
        on_grid(torch.randn(images, patches, channels, generator=generator, dtype=torch.float64))
        for patches in (queries, candidates)
    )
    return a, b


def permuted(patches: int, seed: int) -> tuple[Tensor, Tensor]:
    """A permutation of the patches, and its inverse."""
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    return order, order.argsort()


@quick
@given(maps(), seeds)
def test_permuted_candidates_have_permuted_indices(ab: tuple[Tensor, Tensor], seed: int) -> None:
    queries, candidates = ab
    order, inverse = permuted(candidates.shape[1], seed)
    matches = functional.match_patches(queries, candidates[:, order])
    query, candidate = reference.match(queries, candidates, queries.shape[1])
    assert torch.equal(matches.query_index, query)
    assert torch.equal(matches.candidate_index, inverse[candidate])


@quick
@given(maps(), seeds)
def test_permuted_queries_have_permuted_indices(ab: tuple[Tensor, Tensor], seed: int) -> None:
    queries, candidates = ab
    order, inverse = permuted(queries.shape[1], seed)
    matches = functional.match_patches(queries[:, order], candidates)
    query, candidate = reference.match(queries, candidates, queries.shape[1])
    assert torch.equal(matches.query_index, inverse[query])
    assert torch.equal(matches.candidate_index, candidate)


@quick
@given(maps(), st.integers(-(2**10), 2**10))
def test_a_vector_added_to_both_maps_does_not_change_matches(ab: tuple[Tensor, Tensor], far: int) -> None:
    queries, candidates = ab
    matches = functional.match_patches(queries + far, candidates + far)
    query, candidate = reference.match(queries, candidates, queries.shape[1])
    assert torch.equal(matches.query_index, query)
    assert torch.equal(matches.candidate_index, candidate)


# -- no value is read -------------------------------------------------------------------------------------------


def meta(*shape: int) -> Tensor:
    """A tensor without data: reading a value of it raises."""
    return torch.empty(shape, device="meta")


def test_a_tensor_without_data_cannot_be_read() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(meta(1))
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(meta(3).isfinite().all())


CHECKS: dict[str, Callable[[], object]] = {
    "views": lambda: checks.views({"x": meta(3, 8, 5), "y": meta(3, 8, 5)}),
    "patches": lambda: checks.patches(("queries", meta(2, 9, 4)), ("candidates", meta(2, 7, 4))),
    "local_inputs": lambda: checks.local_inputs(
        {"x1_maps": meta(2, 9, 4), "x2_maps": meta(2, 7, 4)},
        {"x1_locations": meta(2, 9, 2), "x2_locations": meta(2, 7, 2)},
        (5, 5),
        "image",
    ),
    "distance_matrix": lambda: checks.distance_matrix(meta(2, 9, 7), meta(2, 9, 4), meta(2, 7, 4)),
    "coefficient": lambda: checks.coefficient("inv_coeff", meta(1)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_checks_read_no_value(name: str) -> None:
    CHECKS[name]()


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]]] = {
    "vicreg": lambda x1, x2, l1, l2: VICRegLoss()(x1[:, 0], x2[:, 0]),
    "image": lambda x1, x2, l1, l2: VICRegLLoss(5, alpha=0.0)(x1, x2, None, None, l1, l2),
    "slot": lambda x1, x2, l1, l2: VICRegLLoss(5, alpha=0.0, statistics="slot")(x1, x2, None, None, l1, l2),
}


@pytest.mark.parametrize("channels", [4, 80])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_read_no_value(name: str, channels: int) -> None:
    """On a GPU the host would wait for the value."""
    x1, x2 = meta(6, 9, channels).requires_grad_(), meta(6, 7, channels).requires_grad_()
    loss = LOSSES[name](x1, x2, meta(6, 9, 2), meta(6, 7, 2))["loss"]
    torch.autograd.grad(loss, (x1, x2))
