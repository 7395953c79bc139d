"""VICRegL's local loss on Triton kernels, in the interpreter: against the reference in float64.

The reference is evaluated at the kernels' own matches, which the matching tests check: where two candidates are equally near
up to rounding, either is right.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vicreg_fast import VICRegLLoss
from vicreg_fast.sides import uses_dual

from .conftest import Launches
from .data import TERMS, U
from .parity import HALF, KINDS, SINGLE, assert_same_bits, covering_pairs
from .vicregl_parity import PARTS, assert_parity, maps_of

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")

# -- parity -----------------------------------------------------------------------------------------------------

AXES: dict[str, Sequence[Any]] = {
    "patches": [(2, 2), (9, 9), (9, 49), (49, 50), (50, 9), (64, 49), (196, 64), (300, 196)],
    "C": [1, 3, 32, 130, 512],
    "matches": [2, 10, 20, (20, 4), None],
    "kind": ["highest", "high", "medium", "float16", "float16-highest"],
    "layout": ["contiguous", "transposed", "sliced", "problems last"],
    "statistics": ["image", "slot"],
}


def assert_case(
    patches: tuple[int, int], C: int, matches: Any, kind: str, layout: str, statistics: str
) -> None:
    dtype, requested, unit = KINDS[kind]
    given = matches if isinstance(matches, tuple) else (matches, matches)
    m1, m2 = (P if m is None else min(m, P) for m, P in zip(given, patches, strict=True))
    maps = maps_of(3, patches, C, layout, dtype)
    locations = [torch.rand(3, P, 2) for P in patches]
    scale = 2.0 ** ((3 * m1 * C).bit_length() - 4)  # gradients go with 1 / (B m C), and may be no float16
    assert_parity(maps, locations, (m1, m2), statistics == "slot", requested, unit, scale)


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "") for value in case.values())


def cost(patches: tuple[int, int], C: int, matches: Any, statistics: str, **_: Any) -> float:
    """About how long a case takes: the launches, tiles of distances, and programs of the terms."""
    m = max(patches) if matches is None else 20
    many = statistics == "slot" or m > 64
    return 1 + C * patches[0] * patches[1] / 2e6 + (m * (1 + C / 64) / 10 if many else 0)


@pytest.mark.parametrize("case", covering_pairs(AXES, cost), ids=name_of)
def test_as_good_as_eager(case: dict[str, Any]) -> None:
    assert_case(**case)


@pytest.mark.full
@pytest.mark.parametrize("values", list(itertools.product(*AXES.values())), ids=str)
def test_every_combination_is_as_good_as_eager(values: tuple[Any, ...]) -> None:
    assert_case(*values)


@pytest.mark.parametrize("C", [20, 70])  # of 64 matches, columns in one block and in two
def test_primal_of_many_matches(C: int) -> None:
    assert not uses_dual(2, 64, C)
    maps = maps_of(2, (64, 70), C)
    assert_parity(maps, [torch.rand(2, P, 2) for P in (64, 70)], (64, 64), False, "highest", 0.0)


def test_float32_in_two_parts_as_on_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """G and the gradients' sums from operands split into TF32 and a rest; here other matmuls are as exact, so this is asked for."""
    from vicreg_fast.backends.triton import arguments

    policy = arguments.matmul_policy

    def on_tensor_cores(*args: Any) -> arguments.MatmulPolicy:
        return policy(*args)._replace(dot_precision="tf32x3", exact_precision="tf32x3")

    monkeypatch.setattr(arguments, "matmul_policy", on_tensor_cores)
    maps = maps_of(3, (49, 50), 130)
    assert uses_dual(3, 20, 130)
    assert_parity(maps, [torch.rand(3, P, 2) for P in (49, 50)], (20, 20), False, "highest", 0.0)


def test_gradients_of_float32_maps_are_not_added_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """precision="medium" rounds a matmul's operands.  A GPU's policy is asked for: the interpreter's holds them as float32."""
    from vicreg_fast.backends.triton import arguments

    maps = [z.requires_grad_() for z in maps_of(2, (9, 12), 96)]
    locations = [torch.rand(2, P, 2) for P in (9, 12)]

    def invariance(maps: Sequence[Tensor], backend: str) -> Tensor:
        loss = VICRegLLoss(9, 0.0, backend=backend, precision="highest")
        return loss.local_loss(*maps, *locations)["location/inv-loss"]

    wide = [z.detach().double().requires_grad_() for z in maps]
    truth = torch.autograd.grad(invariance(wide, "reference"), wide)
    fast = invariance(maps, "triton")
    policy = arguments.MatmulPolicy("bf16", "tf32", torch.bfloat16, "half", "ieee")
    monkeypatch.setattr(arguments, "matmul_policy", lambda *_: policy)
    for g, t in zip(torch.autograd.grad(fast, maps), truth, strict=True):
        assert (g - t).norm() <= 8 * U * t.norm()


def test_one_image() -> None:
    maps = maps_of(1, (12, 9), 48)
    assert_parity(maps, [torch.rand(1, P, 3) for P in (12, 9)], (9, 9), False, "highest", 0.0)


def test_one_candidate_is_nearest_to_every_query() -> None:
    maps = maps_of(2, (40, 30), 96)
    locations = [
        torch.rand(2, P, 2) + 100 * (torch.arange(P)[:, None] > 0) * (1, -1)[k] for k, P in enumerate((40, 30))
    ]
    assert_parity(maps, locations, (20, 20), False, "highest", 0.0)


@pytest.mark.parametrize("statistics", ["image", "slot"])
def test_a_mean_of_a_thousand_standard_deviations(statistics: str) -> None:
    """Rounding the mean once would show in what is centred by it."""
    maps = [z + 700 for z in maps_of(7, (20, 20), 96)]
    locations = [torch.rand(7, 20, 2)] * 2
    assert_parity(maps, locations, (7, 7), statistics == "slot", "highest", 0.0)


def test_the_first_row_is_far_from_the_others() -> None:
    """It is what is subtracted before the mean is known."""
    maps = maps_of(3, (9, 9), 96)
    for z in maps:
        z[:, 0] += 1e4
    locations = [torch.arange(9.0)[:, None].expand(3, 9, 2)] * 2  # each patch matches itself, in order
    assert_parity(maps, locations, (9, 9), False, "highest", 0.0)


@pytest.mark.parametrize("kind", ["float16", "medium"])
def test_dual_side_of_gathered_rows_in_16_bits(kind: str) -> None:
    dtype, precision, unit = KINDS[kind]
    assert uses_dual(5, 9, 96)
    maps = maps_of(9, (20, 20), 96, dtype=dtype)
    assert_parity(maps, [torch.rand(9, 20, 2)] * 2, (5, 4), True, precision, unit, scale=2.0**10)


def test_gradients_of_both_kinds_of_matches_add_up_per_slot() -> None:
    loss, inputs = loss_and_inputs(num_matches=5, statistics="slot")
    grads = torch.autograd.grad(loss(*inputs)["loss"], inputs[:2])
    parts = [loss.local_loss(*inputs[:2], *inputs[4:])[f"{part}/loss"] for part in PARTS]
    alone = [torch.autograd.grad(part / 2, inputs[:2], retain_graph=True) for part in parts]
    for g, a, b in zip(grads, *alone, strict=True):
        assert (g - a - b).norm() <= 4 * U * g.norm()


def test_equal_patches_and_constant_channels() -> None:
    x, y = maps_of(2, (20, 20), 40)
    x[:, ::2] = x[:, :1]
    x[..., 5] = y[..., 5] = 0.1
    assert_parity([x, y], [torch.rand(2, 20, 2)] * 2, (10, 10), False, "highest", 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_locations_of_other_types(dtype: torch.dtype) -> None:
    maps = [z.requires_grad_() for z in maps_of(3, (20, 70), 12)]
    locations = [(1000 * torch.rand(3, P, 2)).to(dtype) for P in (20, 70)]
    actual, truth = (
        VICRegLLoss(5, 0.0, backend=backend)(*maps, None, None, *locations)
        for backend in ("triton", "reference")
    )
    for name, value in truth.items():
        assert abs(actual[name] - value) <= 16 * U * value.abs(), name


def test_maps_of_different_types() -> None:
    x, y = maps_of(3, (20, 30), 40)
    actual, truth = (
        VICRegLLoss(5, 0.0, backend=backend)(
            x, y.half(), None, None, torch.rand(3, 20, 2), torch.rand(3, 30, 2)
        )
        for backend in ("triton", "reference")
    )
    assert actual.keys() == truth.keys()
    assert all(value.dtype == SINGLE for value in actual.values())


# -- NaN and infinity ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_rows(value: float) -> None:
    """Eager code's gradient is not finite in the rows that were chosen, and zero in those that were not."""
    x, y = maps_of(2, (9, 9), 40)
    x[0, 3, 7] = value
    locations = [torch.rand(2, 9, 2)] * 2  # every patch matches itself

    def gradients(backend: str) -> list[Tensor]:
        maps = [z.clone().requires_grad_() for z in (x, y)]
        losses = VICRegLLoss(9, 0.0, backend=backend).local_loss(*maps, *locations)
        assert not losses["location/loss"].isfinite()
        return list(torch.autograd.grad(losses["location/inv-loss"], maps))

    for actual, truth in zip(gradients("triton"), gradients("reference"), strict=True):
        assert torch.equal(actual.isfinite(), truth.isfinite())
        assert torch.allclose(actual, truth, rtol=16 * U, atol=0.0, equal_nan=True)
        assert not truth[0, 3].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_infinite_first_match_gives_an_infinite_invariance() -> None:
    """Rows of a block beyond the matches are copies of the first one: infinity times zero would be NaN."""
    x, y = (z.detach() for z in maps_of(2, (9, 9), 32))
    x[0, 0, 3] = float("inf")
    locations = [torch.arange(9.0)[:, None].expand(2, 9, 2)] * 2  # each patch matches itself, in order
    for backend in ("triton", "reference"):
        losses = VICRegLLoss(9, 0.0, backend=backend)(x, y, None, None, *locations)
        assert losses["location/inv-loss"] == float("inf"), backend


# -- determinism and launches -----------------------------------------------------------------------------------


def loss_and_inputs(
    P1: int = 12, P2: int = 9, C: int = 40, B: int = 3, dtype: torch.dtype = SINGLE, **options: Any
) -> tuple[VICRegLLoss, list[Any]]:
    maps = [z.requires_grad_() for z in maps_of(B, (P1, P2), C, dtype=dtype)]
    locations = [torch.rand(B, P, 2) for P in (P1, P2)]
    return VICRegLLoss(alpha=0.0, backend="triton", **options), [*maps, None, None, *locations]


def test_two_runs_agree_bit_for_bit() -> None:
    loss, inputs = loss_and_inputs(num_matches=5)
    runs = []
    for _ in range(2):
        losses = loss(*inputs)
        runs.append([*losses.values(), *torch.autograd.grad(losses["loss"], inputs[:2])])
    assert_same_bits(*runs)


LAUNCHES = {
    "small": ({"num_matches": 9}, ["match_forward", "vicregl_forward"]),
    "a pair of numbers": ({"num_matches": (9, 4)}, ["match_forward", "vicregl_forward"]),
    "large": ({"num_matches": 20, "P1": 70, "P2": 65}, ["match_forward", "select_forward", "vicregl_forward"]),
    "large, as patches lie": (
        {"num_matches": 20, "P1": 70, "P2": 65, "match_order": "patch"},
        ["match_forward", "select_forward", "vicregl_forward"],
    ),
    "few channels": ({"num_matches": 9, "C": 4}, ["match_forward", "vicregl_forward"]),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launches(case: str, launches: Launches) -> None:
    """All launches of a step, forward and backward."""
    options, forward = LAUNCHES[case]
    loss, inputs = loss_and_inputs(**options)
    losses = loss(*inputs)
    assert [launch.name for launch in launches] == forward
    assert len({value.data_ptr() for value in losses.values()}) == 9
    losses["loss"].backward()
    assert [launch.name for launch in launches[len(forward) :]] == ["vicregl_gradient"]
    assert [launch.arguments["enable_fp_fusion"] for launch in launches] == [False] * len(launches)


@pytest.mark.parametrize(
    ("statistics", "options"),
    [
        ("image", {"num_matches": 12, "P1": 20, "P2": 30, "C": 64}),
        ("image", {"num_matches": 70, "P1": 71, "P2": 72, "C": 90, "B": 2}),  # more than one program holds
        ("slot", {"num_matches": 12, "P1": 20, "P2": 30, "C": 64, "B": 9}),
        ("slot", {"num_matches": 6, "P1": 20, "P2": 30, "C": 4, "B": 40}),
    ],
)
def test_matched_rows_are_not_copied(statistics: str, options: dict[str, Any], launches: Launches) -> None:
    """Forward not at all; backward one source's gradients at a time, one buffer a direction, per slot."""
    loss, inputs = loss_and_inputs(statistics=statistics, **options)
    losses = loss(*inputs)
    B, m, C = inputs[0].shape[0], options["num_matches"], inputs[0].shape[2]
    P, N = (B, m) if statistics == "image" else (m, B)

    def of_rows(launched: Launches) -> list[tuple[int, ...]]:
        """Shapes of the floating tensors, inputs apart, that hold N rows of C features."""
        given = {z.data_ptr() for z in inputs if z is not None}
        every = [t for launch in launched for t in launch.tensors if t.data_ptr() not in given]
        return [tuple(t.shape) for t in every if t.is_floating_point() and t.shape[-2:] == (N, C)]

    assert not of_rows(launches)
    before = len(launches)
    losses["loss"].backward()
    needs_buffer = statistics == "slot" or m > 64
    assert set(of_rows(launches[before:])) == ({(2, P, N, C)} if needs_buffer else set())


def test_the_loss_is_the_mean_of_both_kinds() -> None:
    loss, inputs = loss_and_inputs(num_matches=5)
    losses = loss(*inputs)
    expected = (losses["location/loss"] + losses["feature/loss"]) / 2
    assert torch.equal(losses["loss"], expected)


def test_without_gradients_no_matrix_is_written(launches: Launches) -> None:
    loss, inputs = loss_and_inputs(num_matches=5)
    kept = loss(*inputs)
    with torch.no_grad():
        losses = loss(*inputs)
    assert_same_bits(list(losses.values()), [value.detach() for value in kept.values()])
    stores = [
        launch.arguments["gram_ptr"] is not None for launch in launches if launch.name == "vicregl_forward"
    ]
    assert stores == [True, False]


@pytest.mark.parametrize("which", [0, 1])
def test_one_map_without_gradient(which: int) -> None:
    loss, inputs = loss_and_inputs(num_matches=5)
    (both) = torch.autograd.grad(loss(*inputs)["loss"], inputs[:2])
    inputs[1 - which] = inputs[1 - which].detach()
    (alone,) = torch.autograd.grad(loss(*inputs)["loss"], inputs[which])
    assert torch.equal(alone, both[which])


@pytest.mark.parametrize("name", [f"{part}/{term}-loss" for part in PARTS for term in TERMS])
def test_each_term_is_differentiable_alone(name: str) -> None:
    loss, inputs = loss_and_inputs(num_matches=5)
    actual = torch.autograd.grad(loss(*inputs)[name], inputs[:2])
    truth_inputs = [z if z is None else z.detach().double() for z in inputs]
    maps = [z.requires_grad_() for z in truth_inputs[:2]]
    truth = torch.autograd.grad(VICRegLLoss(5, 0.0, backend="reference")(*truth_inputs)[name], maps)
    for f, t in zip(actual, truth, strict=True):
        assert (f - t).norm() <= 16 * U * t.norm()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_infinite_loss_leaves_the_others_gradients_finite() -> None:
    """Terms without an upstream gradient are not differentiated: infinity times zero would be NaN."""
    loss, inputs = loss_and_inputs(num_matches=5, P1=5, P2=5)
    with torch.no_grad():
        inputs[0][:, 0] *= 1e25  # their squares, and so their covariances, are no float32
    losses = loss(*inputs)
    assert not losses["location/cov-loss"].isfinite()
    grads = torch.autograd.grad(losses["location/var-loss"], inputs[:2])
    assert all(g.isfinite().all() for g in grads)


def test_second_derivatives() -> None:
    loss, inputs = loss_and_inputs(num_matches=5)

    def second(loss: VICRegLLoss, given: list[Any]) -> Tensor:
        (first,) = torch.autograd.grad(loss(*given)["loss"], given[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), given[0])[0]

    wide = [None if z is None else z.detach().double() for z in inputs]
    wide[0].requires_grad_()
    truth = second(VICRegLLoss(5, 0.0, backend="reference"), wide)
    assert (second(loss, inputs) - truth).norm() <= 16 * U * truth.norm()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("statistics", ["image", "slot"])
@pytest.mark.parametrize("matches", [5, (6, 4)], ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_compiles_into_one_graph(dtype: torch.dtype, matches: Any, statistics: str) -> None:
    loss, inputs = loss_and_inputs(num_matches=matches, statistics=statistics, dtype=dtype)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*inputs)["loss"], inputs[:2])
    expected = torch.autograd.grad(loss(*inputs)["loss"], inputs[:2])
    for f, e in zip(actual, expected, strict=True):
        # The same kernels; terms are weighted after them, not in them.
        unit = 8 * U if dtype == SINGLE else torch.finfo(HALF).eps
        assert (f.double() - e.double()).norm() <= unit * e.double().norm()
