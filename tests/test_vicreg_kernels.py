"""VICReg's Triton kernels in Triton's interpreter: values and gradients against the reference in float64.

bfloat16 inputs are not tested here, because the interpreter computes them wrong; rounding to bfloat16 is, held as float32
("medium").  What the interpreter cannot show (races, minimal sizes of matmuls, tensor cores) is checked by compilation, see
test_resources.py.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vicreg_fast import VICRegLoss, functional, precision, reference
from vicreg_fast.plan import LOCAL_VIEWS, Matches
from vicreg_fast.sides import uses_dual

from .conftest import Launches
from .data import HARD, U, both_sides, normal
from .parity import (
    HALF,
    KINDS,
    LAYOUTS,
    SINGLE,
    TF32,
    assert_nan_stays,
    assert_parity,
    assert_same_bits,
    covering_pairs,
    pair,
)

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.usefixtures("interpreted")
# A few roundings of the result, as in data.py: the largest error below is less than 6 units.
ROUNDINGS = 8 * U
dual_and_primal = both_sides(dual=[(20, 90)], primal=[(90, 20)])


def evaluate(x: Tensor, y: Tensor, backend: str, **options: Any) -> list[Tensor]:
    """The three values, then the gradients of their sum."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    values = functional.vicreg_terms(x, y, backend=backend, **options)
    return [*(value.detach() for value in values), *torch.autograd.grad(sum(values), (x, y))]


# -- parity -----------------------------------------------------------------------------------------------------

AXES: dict[str, Sequence[Any]] = {
    # Both sides, several tiles and several splits of their inner dimension; at 70 x 400 some tiles are split.
    "size": [(2, 65), (33, 140), (20, 300), (70, 400), (3, 31), (130, 33), (300, 20), (150, 70)],
    "kind": ["highest", "high", "medium", "float16", "float16-highest"],
    "layout": list(LAYOUTS),
    "problems": [(), (2,), (2, 2)],
    "eps": [0.0, 1e-4],
}


def assert_case(size: tuple[int, int], kind: str, layout: str, problems: tuple[int, ...], eps: float) -> None:
    dtype, requested, unit = KINDS[kind]
    x = 0.7 * LAYOUTS[layout](*problems, *size)
    y = x.detach() + 0.1 * torch.randn(*problems, *size)
    # Gradients go with 1 / (N D), and may be no float16.
    scale = 2.0 ** (math.prod(size).bit_length() - 4)
    assert_parity(x.to(dtype), y.to(dtype), requested, unit, eps, scale)


@pytest.mark.parametrize(
    "case", covering_pairs(AXES), ids=lambda case: "-".join(str(v).replace(" ", "") for v in case.values())
)
def test_as_good_as_eager(case: dict[str, Any]) -> None:
    assert_case(**case)


@pytest.mark.full
@pytest.mark.parametrize("values", list(itertools.product(*AXES.values())), ids=str)
def test_every_combination_is_as_good_as_eager(values: tuple[Any, ...]) -> None:
    assert_case(*values)


@both_sides(
    dual=[(2, 65), (63, 80), (3, 2, 5)], primal=[(2, 1), (2, 64), (31, 3), (300, 1), (65, 65), (3, 5, 2)]
)
def test_few_samples_or_features(shape: tuple[int, ...]) -> None:
    assert_parity(*pair(*shape), "highest", 0.0)


# Gradients of more than one group of tiles; squared row norms of more column blocks than are read at a time.
@both_sides(dual=[(2, 40, 1200)], primal=[(600, 5)])
def test_more_than_one_round(shape: tuple[int, ...]) -> None:
    assert_parity(*pair(*shape), "highest", 0.0)


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_more_partial_sums_than_are_added_at_a_time(columns: int) -> None:
    from vicreg_fast.kernels.epilogue import _sum_partials as sum_partials

    @triton.jit
    def kernel(out_ptr, partials_ptr, count, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
        first, second, third = sum_partials(partials_ptr, count, COLUMNS, 1024)
        tl.store(out_ptr, first)
        tl.store(out_ptr + 1, second)
        tl.store(out_ptr + 2, third)

    kernel.fn.__globals__.update(sum_partials=sum_partials, tl=tl)
    partials, out = torch.randn(2500, columns, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    kernel[(1,)](out, partials, len(partials), columns)
    torch.testing.assert_close(out[:columns], partials.sum(0))
    assert torch.equal(out[columns:], torch.zeros(3 - columns, dtype=torch.float64))


@both_sides(dual=[(40, 90)], primal=[(150, 40), (150, 100)])
@pytest.mark.parametrize("data", HARD, ids=lambda data: data.__name__)
def test_hard_data(data: Callable[[int, int], Tensor], shape: tuple[int, int]) -> None:
    assert_parity(data(*shape).float(), data(*shape).float(), "highest", 0.0)


@dual_and_primal
def test_a_tf32_matmul_multiplies_rounded_operands(shape: tuple[int, int]) -> None:
    N, D = shape
    z = (normal(N, D) + 3).float().requires_grad_()
    cov = functional.variance_covariance(z, backend="triton", precision="high")[1]
    (grad,) = torch.autograd.grad(cov, z)
    c = z.detach().double() - z.detach().double().mean(0)
    o = precision.round_operand(c.float(), "tf32").double()
    # On the primal side the operand is shifted by a provisional centre before it is rounded: to TF32's unit.
    unit = U if uses_dual(1, N, D) else TF32
    C = o.T @ o / (N - 1)
    C0 = C - C.diagonal().diag()
    assert abs(float(cov.detach()) - float(C0.square().sum()) / D) <= 4 * unit * float(C.square().sum()) / D
    # The backward's other operand, M, is rounded too.
    scale = 4 / (D * (N - 1))
    assert float((grad - scale * o @ C0).norm()) <= TF32 * 2 * scale * float((o @ C).norm())


@pytest.mark.parametrize("requested", [None, "highest"])
@both_sides(dual=[(40, 300)], primal=[(300, 40), (300, 70)])
def test_float16_beyond_its_range(shape: tuple[int, int], requested: str | None) -> None:
    x, y = (200 * z.detach() for z in pair(*shape, dtype=HALF))  # N |cov| is 1e7, float16 ends at 65504
    assert_parity(x, y, requested, 0.0 if requested else TF32)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # of rows that are not stored
@both_sides(dual=[(40, 300)], primal=[(300, 40), (300, 70)])
def test_float16_centred_beyond_its_range(shape: tuple[int, int]) -> None:
    """An outlier's distance from the mean is no float16, but its half is."""
    x, y = (z.detach() for z in pair(*shape, dtype=HALF))
    x[:, 0] = -60000
    x[0, 0] = 60000
    assert (x[0, 0].double() - x[:, 0].double().mean()).abs() > torch.finfo(HALF).max
    assert_parity(x, y, None, TF32, scale=2.0**-8)  # nor are the gradients


def test_mixed_types() -> None:
    x, y = normal(20, 90).float().requires_grad_(), normal(20, 90).half().requires_grad_()
    losses = functional.vicreg_terms(x, y, backend="triton", precision="highest")
    truth = reference.vicreg_terms(x.detach().double(), y.detach().double())
    torch.testing.assert_close(torch.stack(losses).double(), torch.stack(truth), rtol=ROUNDINGS, atol=0)
    gradients = torch.autograd.grad(sum(losses), (x, y))
    assert [g.dtype for g in gradients] == [torch.float32, torch.float16]


@pytest.mark.parametrize("which", [0, 1], ids=["x", "y"])
@dual_and_primal
def test_one_input_without_gradient(shape: tuple[int, int], which: int) -> None:
    inputs = [normal(*shape).float(), normal(*shape).float()]
    leaf = inputs[which].requires_grad_()
    losses = VICRegLoss(backend="triton", precision="highest")(*inputs)
    (grad,) = torch.autograd.grad(losses["loss"], leaf)
    exact = [z.detach().double() for z in inputs]
    exact[which].requires_grad_()
    (truth,) = torch.autograd.grad(VICRegLoss(backend="reference")(*exact)["loss"], exact[which])
    assert (grad - truth).norm() <= ROUNDINGS * truth.norm()


@both_sides(dual=[(20, 90), (20, 320)], primal=[(90, 20), (90, 70)])
def test_one_view(shape: tuple[int, int]) -> None:
    z = normal(*shape).float().requires_grad_()
    exact = z.detach().double().requires_grad_()
    actual = functional.variance_covariance(z, backend="triton", precision="highest")
    expected = reference.variance(exact), reference.covariance(exact)
    for f, e in zip(actual, expected, strict=True):
        assert abs(f.double() - e) <= ROUNDINGS * e + 8 * U
        (g,), (t,) = (
            torch.autograd.grad(f, z, retain_graph=True),
            torch.autograd.grad(e, exact, retain_graph=True),
        )
        assert (g - t).norm() <= ROUNDINGS * t.norm()


@pytest.mark.parametrize("N", [3, 33, 200])
def test_constant_columns_have_no_gradient_from_the_variance(N: int) -> None:
    for D in (7, 300):
        z = (0.1 + torch.arange(D) / 3).expand(N, D).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(functional.variance_covariance(z, backend="triton")[0], z)
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@both_sides(dual=[(20, 90), (20, 320)], primal=[(90, 20), (90, 70)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_shows_what_is_not_finite(shape: tuple[int, int], value: float) -> None:
    x, y = normal(*shape).float(), normal(*shape).float()
    y[-1, -1] = value
    losses = functional.vicreg_terms(x, y, backend="triton")
    assert not any(loss.isfinite() for loss in losses)


@pytest.mark.parametrize("kind", ["highest", "high", "medium", "float16"])
@both_sides(dual=[(20, 90)], primal=[(90, 20), (90, 70)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_of_any_bits_stays_nan(shape: tuple[int, int], kind: str) -> None:
    assert_nan_stays(shape, kind)


@both_sides(dual=[(3, 90)], primal=[(3, 2), (7, 8)])
def test_few_samples_very_near_to_each_other(shape: tuple[int, int]) -> None:
    """Their distances have squares that are no float32; the gradient of the variance is of size 1 all the same."""
    z = (1e-21 * normal(*shape)).float().requires_grad_()
    exact = z.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(functional.variance_covariance(z, backend="triton")[0], z)
    (truth,) = torch.autograd.grad(reference.variance(exact), exact)
    assert (grad - truth).norm() <= ROUNDINGS * truth.norm()


# -- gathered rows ----------------------------------------------------------------------------------------------


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


def offset_of(p: int, n: int, strides: tuple[int, int, int]) -> int:
    """The offset that the kernels compute for a row."""

    @triton.jit(do_not_specialize=["p", "n", "source"])
    def kernel(out_ptr, source, p, n):  # type: ignore[no-untyped-def]
        rows = n + tl.arange(0, 1)
        tl.store(out_ptr + tl.arange(0, 1), row_offsets(source, None, p, p, rows, 1, 1))

    from vicreg_fast.kernels.views import Source, row_offsets

    kernel.fn.__globals__.update(row_offsets=row_offsets)
    out = torch.zeros(1, dtype=torch.int64)
    kernel[(1,)](out, Source(out, *strides, 1), p, n)
    return int(out)


@pytest.mark.parametrize(
    ("p", "n", "strides"),
    [(0, 2_599_999, (0, 1024, 0)), (2_599_999, 0, (1024, 0, 0)), (49, 65_535, (2**26, 2**16, 0))],
    ids=["rows", "problems", "both"],
)
def test_offsets_pass_32_bits(p: int, n: int, strides: tuple[int, int, int]) -> None:
    assert offset_of(p, n, strides) == p * strides[0] + n * strides[1] > 2**31


@pytest.mark.parametrize("row", [0, 1, 2, 4095, 4096, 5792, 11585, 30000])
def test_a_tile_finds_its_row_and_column(row: int) -> None:
    """float32 has no root exact enough beyond 4096 rows of tiles."""
    from vicreg_fast.kernels.numerics import tril_tile

    @triton.jit
    def kernel(out_ptr, t):  # type: ignore[no-untyped-def]
        i, j = tril_tile(t)
        tl.store(out_ptr, i)
        tl.store(out_ptr + 1, j)

    kernel.fn.__globals__.update(tril_tile=tril_tile)
    first = row * (row + 1) // 2
    for column in {0, row // 2, row}:
        out = torch.zeros(2, dtype=torch.int32)
        kernel[(1,)](out, first + column)
        assert out.tolist() == [row, column]


# -- launches, determinism, composition -----------------------------------------------------------------------------------------------


@both_sides(dual=[(20, 320)], primal=[(300, 20), (150, 100)])
def test_two_runs_agree_bit_for_bit(shape: tuple[int, int]) -> None:
    x, y = normal(*shape).float(), normal(*shape).float()
    assert_same_bits(evaluate(x, y, "triton"), evaluate(x, y, "triton"))


@both_sides(dual=[(2, 20, 30)], primal=[(2, 30, 20), (2, 90, 70)])
def test_a_problem_does_not_depend_on_the_others(shape: tuple[int, int, int]) -> None:
    x, y = torch.randn(shape), torch.randn(shape)
    other = torch.cat([x[:1], 1e3 * torch.randn(shape)[1:]])
    grads, changed = (evaluate(z, y, "triton")[3] for z in (x, other))
    assert torch.equal(grads[0], changed[0])
    assert not torch.equal(grads[1], changed[1])


FORWARD = {
    "dual, full tiles": ((20, 90), ["moments_forward", "gram_forward"]),
    "dual, split tiles": ((20, 320), ["moments_forward", "gram_forward", "splitk_reduction"]),
    "dual, some tiles split": ((70, 400), ["moments_forward", "gram_forward", "splitk_reduction"]),
    "primal, few features": ((90, 20), ["narrow_second_moment_forward", "splitk_reduction"]),
    "primal": ((150, 100), ["second_moment_forward", "splitk_reduction"]),
}


@pytest.mark.parametrize("case", FORWARD)
def test_launches(case: str, launches: Launches) -> None:
    shape, forward = FORWARD[case]
    x, y = normal(*shape).float().requires_grad_(), normal(*shape).float().requires_grad_()
    losses = VICRegLoss(backend="triton")(x, y)
    assert [launch.name for launch in launches] == forward
    assert len({value.data_ptr() for value in losses.values()}) == 4
    losses["loss"].backward()
    assert [launch.name for launch in launches[len(forward) :]] == ["gradient"]


def test_some_tiles_of_the_case_that_says_so_are_split(launches: Launches) -> None:
    functional.vicreg_terms(normal(70, 400).float(), normal(70, 400).float(), backend="triton")
    (gram,) = (launch.arguments for launch in launches if launch.name == "gram_forward")
    assert 0 < gram["full_tiles"] < 2 * gram["tiles"]
    assert gram["splits"] > 1


@both_sides(dual=[(20, 90), (20, 320)], primal=[(90, 20), (90, 70)])
def test_without_gradients_no_matrix_is_written(shape: tuple[int, int], launches: Launches) -> None:
    x, y = normal(*shape).float(), normal(*shape).float()
    kept = functional.vicreg_terms(x.clone().requires_grad_(), y, backend="triton")
    before = len(launches)
    terms = functional.vicreg_terms(x, y, backend="triton")
    assert_same_bits(list(terms), [value.detach() for value in kept])
    side = min(shape) if uses_dual(1, *shape) else shape[1]
    matrices = [[t for t in launch.tensors if t.shape == (2, side, side)] for launch in launches]
    assert any(matrices[:before])
    assert not any(matrices[before:])
    stores = [launch.arguments["M_ptr"] is not None for launch in launches if "M_ptr" in launch.arguments]
    assert stores == [True] * (len(stores) // 2) + [False] * (len(stores) // 2)
    assert before == len(launches) / 2


def test_fma_fusion_is_off(launches: Launches) -> None:
    for shape in ((20, 320), (90, 20), (90, 70)):
        x, y = normal(*shape).float().requires_grad_(), normal(*shape).float()
        VICRegLoss(backend="triton")(x, y)["loss"].backward()
    assert [launch.arguments["enable_fp_fusion"] for launch in launches] == [False] * len(launches)


def test_second_derivatives() -> None:
    x, y = normal(12, 80).float().requires_grad_(), normal(12, 80).float()

    def second(backend: str, x: Tensor) -> Tensor:
        loss = VICRegLoss(backend=backend)(x, y.to(x.dtype))["loss"]
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    truth = second("reference", x.detach().double().requires_grad_())
    assert (second("triton", x) - truth).norm() <= ROUNDINGS * truth.norm()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@dual_and_primal
def test_compiles_into_one_graph(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, y = pair(*shape, dtype=dtype)
    loss = VICRegLoss(backend="triton")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x, y)["loss"], x)
    (expected,) = torch.autograd.grad(loss(x, y)["loss"], x)
    # The same kernels; terms are weighted after them, not in them.
    assert (grad.double() - expected.double()).norm() <= (
        8 * U if dtype == SINGLE else TF32
    ) * expected.double().norm()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(VICRegLoss(backend="triton"), fullgraph=True, backend="aot_eager")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu: it needs a CUDA or ROCm device"):
        compiled(torch.randn(8, 4), torch.randn(8, 4))


def test_the_variance_alone_is_left_to_aten(launches: Launches) -> None:
    z = torch.randn(8, 4)
    variance, _ = functional.one_view_terms(z, functional.Options(backend="triton"), covariance=False)
    assert not launches
    assert abs(variance - reference.variance(z.double())) <= 8 * U


def test_refuses_float64() -> None:
    z = normal(8, 4)
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu: it has no float64"):
        VICRegLoss(backend="triton")(z, z)


def test_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    z = torch.randn(8, 4)
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu: it needs a CUDA or ROCm device"):
        VICRegLoss(backend="triton")(z, z)
