"""The registered operators: torch.library.opcheck of each of them, and that none writes to its inputs.

test_autograd_registration is left out: the operators have no autograd formulas of their own, vicreg_fast.autograd
differentiates around them.
"""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from vicreg_fast import operators  # noqa: F401  registers the operators
from vicreg_fast.plan import ONE_VIEW, TWO_VIEWS, Plan, local_views
from vicreg_fast.sides import uses_dual

from .conftest import Launches
from .data import seeded_randn
from .parity import assert_same_bits

B, P1, P2 = 4, 9, 8
CHECKS = ("test_schema", "test_faketensor")
# Tracing is slower: only a case of each side and of each kind of statistics is traced.
TRACED = (*CHECKS, "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
# Dynamo itself creates the instance that torch.autograd.Function warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def views(*shape: int) -> list[Tensor]:
    return [seeded_randn(*shape, seed=seed) for seed in (1, 2)]


def local(
    counts: tuple[int, int], per_slot: bool, channels: int = 6
) -> tuple[Plan, list[Tensor], list[Tensor]]:
    maps, locations = ([seeded_randn(B, P, d, seed=P + d) for P in (P1, P2)] for d in (channels, 2))
    return local_views(counts)._replace(per_slot=per_slot), maps, locations


def transposed(*shape: int) -> list[Tensor]:
    return [z.mT.contiguous().mT for z in views(*shape)]


def in_dtypes(sources: list[Tensor], *dtypes: torch.dtype) -> list[Tensor]:
    return [z.to(dtype) for z, dtype in zip(sources, dtypes, strict=True)]


# Plan, sources, locations.
CASES: dict[str, tuple[Plan, list[Tensor], list[Tensor]]] = {
    "primal": (TWO_VIEWS, views(16, 6), []),
    "dual": (TWO_VIEWS, views(6, 80), []),
    "dual-without-moments": (TWO_VIEWS, views(2, 9000), []),
    "primal-problems": (TWO_VIEWS._replace(gamma=0.5, eps=1e-4), views(2, 3, 7, 5), []),
    "dual-problems": (TWO_VIEWS, views(2, 3, 4, 5), []),
    "primal-transposed": (TWO_VIEWS, transposed(16, 6), []),
    "dual-transposed": (TWO_VIEWS, transposed(6, 80), []),
    "primal-mixed-dtypes": (TWO_VIEWS, in_dtypes(views(16, 6), torch.float32, torch.bfloat16), []),
    "dual-mixed-dtypes": (TWO_VIEWS, in_dtypes(views(6, 80), torch.float32, torch.bfloat16), []),
    "one-view": (ONE_VIEW, views(16, 6)[:1], []),
    "variance": (ONE_VIEW._replace(covariance=False), views(16, 6)[:1], []),
    "inference": (TWO_VIEWS._replace(save_for_backward=False), views(16, 6), []),
    "image": local((3, 3), per_slot=False),
    "image-unequal": local((8, 3), per_slot=False),
    "image-primal": local((5, 5), per_slot=False, channels=3),
    "slot": local((3, 3), per_slot=True),
    "slot-unequal": local((3, 7), per_slot=True),
    "slot-patch-order": (
        local((3, 3), per_slot=True)[0]._replace(match_order="patch"),
        *local((3, 3), True)[1:],
    ),
}
TRACED_CASES = ("primal", "dual", "dual-without-moments", "image", "image-unequal", "slot-unequal")
CHECKED = [(name, check) for name in CASES for check in (TRACED if name in TRACED_CASES else CHECKS)]
every_check = pytest.mark.parametrize(("name", "check"), CHECKED)
DIFFERENTIABLE = [name for name in CASES if name != "inference"]


def constants(plan: Plan) -> list[Any]:
    """The plan as the operators' schemas take it."""
    return [list(value) if isinstance(value, tuple) else value for value in plan]


def terms_arguments(name: str) -> list[Any]:
    plan, sources, locations = CASES[name]
    return [sources, locations, *constants(plan)]


def gradient_arguments(name: str, needs: list[bool] | None = None) -> list[Any]:
    """Arguments of ``gradient`` after the case's ``terms``, with an upstream gradient of each term but the first."""
    plan, sources, _ = CASES[name]
    results = torch.ops.vicreg_fast.terms(*terms_arguments(name))
    saved = results[plan.outputs :]
    match_index = saved.pop(0) if plan.match_counts else None
    upstream: list[Tensor | None] = [torch.tensor(1.0 + k) for k in range(3 * len(plan.group_sizes))]
    upstream[0] = None
    return [sources, match_index, saved, upstream, needs or [True] * len(sources), *constants(plan)]


def match_arguments(channels: int, m: int) -> list[Any]:
    return [*(seeded_randn(B, P, channels, seed=P) for P in (P1, P2)), m, "aten"]


def distance_arguments() -> list[Any]:
    queries, candidates, m, backend = match_arguments(6, 3)
    return [queries, candidates, torch.ops.vicreg_fast.match(queries, candidates, m, backend), backend]


def test_cases_are_of_both_sides() -> None:
    sides = {uses_dual(*rows.shape) for name in ("primal", "dual") for _, rows in groups_of(name)}
    assert sides == {False, True}
    assert not any(uses_dual(*rows.shape) for _, rows in groups_of("image-primal"))
    assert all(uses_dual(*rows.shape) for _, rows in groups_of("image"))


def groups_of(name: str) -> list[Any]:
    plan, sources, _ = CASES[name]
    index = torch.ops.vicreg_fast.terms(*terms_arguments(name))[plan.outputs] if plan.match_counts else None
    return [view for group in plan.groups(sources, index) for view in group]


@every_check
def test_opcheck_terms(name: str, check: str) -> None:
    torch.library.opcheck(torch.ops.vicreg_fast.terms, terms_arguments(name), test_utils=check)


@pytest.mark.parametrize(("name", "check"), [case for case in CHECKED if case[0] in DIFFERENTIABLE])
def test_opcheck_gradient(name: str, check: str) -> None:
    torch.library.opcheck(torch.ops.vicreg_fast.gradient, gradient_arguments(name), test_utils=check)


@pytest.mark.parametrize("check", TRACED)
@pytest.mark.parametrize("channels", [2, 6])
@pytest.mark.parametrize("m", [1, P1])
def test_opcheck_match(m: int, channels: int, check: str) -> None:
    torch.library.opcheck(torch.ops.vicreg_fast.match, match_arguments(channels, m), test_utils=check)


@pytest.mark.parametrize("check", TRACED)
def test_opcheck_match_distances(check: str) -> None:
    torch.library.opcheck(torch.ops.vicreg_fast.match_distances, distance_arguments(), test_utils=check)


# -- on Triton kernels, in the interpreter ----------------------------------------------------------------------

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
# Some of each kernel: float32, and few launches, which take 0.2 s each.
ON_KERNELS = ("primal", "dual", "inference", "image", "image-unequal", "image-primal", "slot-unequal")


def kernel_arguments(operator: str, name: str) -> list[Any]:
    """A case's arguments as float32, for the Triton backend."""
    plan, sources, locations = CASES[name]
    plan = plan._replace(backend="triton")
    sources = [z.float() for z in sources]
    arguments: list[Any] = [sources, locations, *constants(plan)]
    if operator == "terms":
        return arguments
    results = torch.ops.vicreg_fast.terms(*arguments)
    saved = results[plan.outputs :]
    match_index = saved.pop(0) if plan.match_counts else None
    upstream = [torch.tensor(1.0 + k) for k in range(3 * len(plan.group_sizes))]
    return [sources, match_index, saved, upstream, [True] * len(sources), *constants(plan)]


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("operator", "name"),
    [*(("terms", name) for name in ON_KERNELS), *(("gradient", n) for n in ON_KERNELS if n in DIFFERENTIABLE)],
)
def test_opcheck_on_kernels(operator: str, name: str) -> None:
    arguments = kernel_arguments(operator, name)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.vicreg_fast, operator), arguments, test_utils=checks)


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("channels", [2, 6])
def test_opcheck_matching_on_kernels(channels: int) -> None:
    checks = ("test_schema", "test_faketensor")
    *maps, m, _ = match_arguments(channels, 5)
    queries, candidates = (z.float() for z in maps)
    torch.library.opcheck(torch.ops.vicreg_fast.match, [queries, candidates, m, "triton"], test_utils=checks)
    matches = torch.ops.vicreg_fast.match(queries, candidates, m, "triton")
    distances = [queries, candidates, matches, "triton"]
    torch.library.opcheck(torch.ops.vicreg_fast.match_distances, distances, test_utils=checks)


def counters_of(launches: Launches) -> list[Tensor]:
    """The arrival counters that kernels were launched with."""
    owners = [launch.arguments for launch in launches]
    owners += [launch.arguments["partials"]._asdict() for launch in launches if "partials" in launch.arguments]
    return [owner["arrival_counter_ptr"] for owner in owners if "arrival_counter_ptr" in owner]


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ON_KERNELS)
def test_no_operator_is_given_an_arrival_counter(name: str, launches: Launches) -> None:
    """A counter among the inputs would be counted up and set back: an input changed that the schema does not declare."""
    arguments = kernel_arguments("terms", name)
    torch.ops.vicreg_fast.terms(*arguments)
    counters = counters_of(launches)
    given = {z.untyped_storage().data_ptr() for z in tensors_of(arguments)}
    assert counters
    assert not {counter.untyped_storage().data_ptr() for counter in counters} & given


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("poison", [3, -1, 2**31 - 1])
@pytest.mark.parametrize("name", ["primal", "dual", "image", "slot-unequal"])
def test_a_poisoned_arrival_counter_changes_nothing(
    name: str, poison: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever uninitialised memory the counter gets, the last program is found, and the terms are right."""
    arguments = kernel_arguments("terms", name)
    expected = torch.ops.vicreg_fast.terms(*arguments)
    empty = torch.empty

    def poisoned_empty(*shape: Any, **options: Any) -> Tensor:
        z = empty(*shape, **options)
        return z.fill_(poison) if z.dtype == torch.int32 else z

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    assert_same_bits(torch.ops.vicreg_fast.terms(*arguments), expected)


# -- inputs are not written to ----------------------------------------------------------------------------------

CALLS = {
    **{f"terms-{name}": lambda name=name: ("terms", terms_arguments(name)) for name in CASES},
    **{f"gradient-{name}": lambda name=name: ("gradient", gradient_arguments(name)) for name in DIFFERENTIABLE},
    "gradient-of-one-view": lambda: ("gradient", gradient_arguments("dual", [True, False])),
    "match-locations": lambda: ("match", match_arguments(2, 5)),
    "match-features": lambda: ("match", match_arguments(6, 5)),
    "match_distances": lambda: ("match_distances", distance_arguments()),
}


def tensors_of(arguments: list[Any]) -> list[Tensor]:
    flat = [z for argument in arguments for z in (argument if isinstance(argument, list) else [argument])]
    return [z for z in flat if isinstance(z, Tensor)]


def storage_bytes(z: Tensor) -> Tensor:
    """Every byte of a tensor's storage, also those outside the view."""
    return torch.empty(0, dtype=torch.uint8).set_(z.untyped_storage()).clone()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_no_operator_writes_to_its_inputs(call: Any) -> None:
    name, arguments = call()
    tensors = tensors_of(arguments)
    before = [storage_bytes(z) for z in tensors]
    getattr(torch.ops.vicreg_fast, name)(*arguments)
    assert all(torch.equal(storage_bytes(z), b) for z, b in zip(tensors, before, strict=True))
