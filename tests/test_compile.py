"""torch.compile: one graph, and the values and gradients of the reference in eager mode."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

from vicreg_fast import VICRegLLoss, VICRegLoss, operators
from vicreg_fast.plan import LOCAL_VIEWS, ONE_VIEW, TWO_VIEWS, Plan
from vicreg_fast.sides import keeps_moments, uses_dual

from .data import U, assert_exact, both_sides

B, P1, P2, C, D, M = 4, 9, 8, 6, 5, 3
# Five roundings of a sum of few samples; on the dual side the covariance is the difference of two sums and, in these
# shapes, a third at least of the larger.  Measured: 3 U.
FLOAT32 = 16 * U
KINDS = ("vicreg", "image", "slot")  # VICRegLoss, and VICRegLLoss by its statistics
# Dynamo itself makes the instance that torch.autograd.Function warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
every_kind = pytest.mark.parametrize("kind", KINDS)
TRITON = importlib.util.find_spec("triton") is not None
dual_and_primal = both_sides(dual=[(6, 80)], primal=[(16, 6)])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    z = 0.7 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z.to(dtype)


def make_loss(kind: str, **options: Any) -> nn.Module:
    if kind == "vicreg":
        return VICRegLoss(**options)
    return VICRegLLoss(M, statistics=kind, **options)


def arguments(
    kind: str, images: int = B, features: int = D, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """The loss's arguments, the locations last."""
    globals_ = [randn(images, features, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2)]
    if kind == "vicreg":
        return globals_
    maps = [randn(images, P, C, seed=P, dtype=dtype).requires_grad_() for P in (P1, P2)]
    return [*maps, *globals_, *(randn(images, P, 2, seed=P + 20) for P in (P1, P2))]


def evaluate(loss: Any, inputs: list[torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Values and the gradients of the total."""
    losses = loss(*inputs)
    gradients = torch.autograd.grad(losses["loss"], [z for z in inputs if z.requires_grad])
    return {name: value.detach() for name, value in losses.items()}, list(gradients)


def assert_same(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    """The same names, and the same losses."""
    assert list(found) == list(truth)
    assert_exact(list(found.values()), list(truth.values()))


def assert_right(compiled: Any, truth: nn.Module, inputs: list[torch.Tensor]) -> None:
    """Values and gradients equal those of ``truth``, a loss of the reference backend in eager mode."""
    assert truth.backend == "reference"
    (losses, gradients), (true_losses, true_gradients) = evaluate(compiled, inputs), evaluate(truth, inputs)
    assert_same(losses, true_losses)
    assert_exact(gradients, true_gradients)


def test_arguments_are_of_both_sides():
    assert not uses_dual(1, B, D)
    assert uses_dual(B, M, C)  # per image
    assert uses_dual(M, B, C)  # per slot
    assert not uses_dual(M, 7, C)  # of more images


@every_kind
def test_one_graph_with_the_references_values_and_gradients(kind):
    compiled = torch.compile(make_loss(kind), fullgraph=True, backend="aot_eager")
    assert_right(compiled, make_loss(kind, backend="reference"), arguments(kind))


@dual_and_primal
def test_one_graph_on_both_sides_of_the_covariance(shape):
    compiled = torch.compile(VICRegLoss(), fullgraph=True, backend="aot_eager")
    assert_right(compiled, VICRegLoss(backend="reference"), arguments("vicreg", *shape))


# Inductor itself calls what torch.jit warns of.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@dual_and_primal
def test_inductor(shape):
    compiled = torch.compile(VICRegLoss(gamma=0.8, eps=1e-4), fullgraph=True, backend="inductor")
    assert_right(compiled, VICRegLoss(gamma=0.8, eps=1e-4, backend="reference"), arguments("vicreg", *shape))


def test_compiled_reference_backend():
    compiled = torch.compile(VICRegLoss(backend="reference"), fullgraph=True, backend="aot_eager")
    assert_right(compiled, VICRegLoss(backend="reference"), arguments("vicreg"))


@every_kind
def test_every_term_is_differentiable_by_itself(kind):
    inputs = arguments(kind)
    compiled = torch.compile(make_loss(kind), fullgraph=True, backend="aot_eager")(*inputs)
    truth = make_loss(kind, backend="reference")(*inputs)
    differentiable = [z for z in inputs if z.requires_grad]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    for name in truth:
        found = torch.autograd.grad(compiled[name], differentiable, **options)
        assert_exact(found, torch.autograd.grad(truth[name], differentiable, **options))


@every_kind
def test_inference_without_gradients(kind):
    compiled = torch.compile(make_loss(kind), fullgraph=True, backend="aot_eager")
    inputs = arguments(kind)
    with torch.no_grad():
        losses = compiled(*inputs)
        truth = make_loss(kind, backend="reference")(*inputs)
    assert not any(loss.requires_grad for loss in losses.values())
    assert_same(losses, truth)


@every_kind
def test_a_second_shape_needs_no_second_graph(kind):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(make_loss(kind), fullgraph=True, dynamic=True, backend=counter)
    truth = make_loss(kind, backend="reference")
    assert_right(compiled, truth, arguments(kind, 7, 5))
    compilations = counter.frame_count
    # Seven images at least: which side a slot's covariance of 6 channels is on is part of a graph.
    for images, features in ((11, 6), (12, 10)):
        assert_right(compiled, truth, arguments(kind, images, features))
    assert counter.frame_count == compilations


def test_a_second_shape_on_the_other_side_of_the_covariance():
    compiled = torch.compile(VICRegLoss(), fullgraph=True, dynamic=True, backend="aot_eager")
    sides = []
    for images, features in ((7, 5), (5, 80), (20, 6), (9, 90)):
        assert_right(compiled, VICRegLoss(backend="reference"), arguments("vicreg", images, features))
        sides.append(uses_dual(1, images, features))
    assert sides == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "features"), [("vicreg", D), ("vicreg", 80), ("image", D), ("slot", D)], ids=lambda v: str(v)
)
def test_under_autocast_products_are_not_rounded(kind, features, dtype):
    inputs = arguments(kind, features=features, dtype=dtype)
    compiled = torch.compile(make_loss(kind), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, gradients = evaluate(compiled, inputs)
    exact = [z.detach().double().requires_grad_(z.requires_grad) for z in inputs]
    true_losses, true_gradients = evaluate(make_loss(kind, backend="reference"), exact)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        # Computed in float32; a bfloat16 product errs by 2^-8.
        assert abs(float(loss) - float(true_losses[name])) <= FLOAT32 * float(true_losses[name]), name
    for gradient, truth in zip(gradients, true_gradients, strict=True):
        assert gradient.dtype == dtype
        # A gradient is rounded to its input's type: by half a unit in the last place.
        rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
        assert (gradient.double() - truth).norm() <= (FLOAT32 + rounding) * truth.norm()


def test_a_network_and_its_loss_in_one_graph_under_autocast():
    network = nn.Linear(D, D)
    with torch.no_grad():
        network.weight.copy_(randn(D, D, seed=3))
        network.bias.zero_()

    def step(a, b):
        return VICRegLoss()(network(a), network(b))["loss"]

    a, b = (z.detach() for z in arguments("vicreg", 16, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = torch.compile(step, fullgraph=True, backend="aot_eager")(a, b)
        embeddings = network(a).detach().double(), network(b).detach().double()
    assert loss.dtype == torch.float32
    truth = VICRegLoss(backend="reference")(*embeddings)["loss"]
    assert abs(float(loss.detach()) - float(truth)) <= FLOAT32 * float(truth)


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("vicreg", name) for name in ("inv_coeff", "cov_coeff", "gamma", "eps")), ("slot", "var_coeff")],
)
def test_an_attribute_changed_between_calls_counts(kind, name):
    loss, truth, inputs = make_loss(kind), make_loss(kind, backend="reference"), arguments(kind)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_right(compiled, truth, inputs)
    for value in (0.5, 0.25):
        setattr(loss, name, value)
        setattr(truth, name, value)
        assert_right(compiled, truth, inputs)


def test_a_trainable_coefficient_is_differentiated():
    coefficient = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    x, y = arguments("vicreg")
    compiled = torch.compile(VICRegLoss(inv_coeff=coefficient), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x, y)["loss"], coefficient)
    assert_exact([gradient], [(x - y).square().mean().detach()])


def test_alpha_changed_between_calls_leaves_out_a_part():
    loss, truth, inputs = VICRegLLoss(M), VICRegLLoss(M, backend="reference"), arguments("image")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for alpha in (0.75, 0.5, 1.0, 0.0):
        loss.alpha = truth.alpha = alpha
        assert_same(compiled(*inputs), truth(*inputs))


@every_kind
def test_dynamo_finds_no_graph_break(kind):
    found = torch._dynamo.explain(make_loss(kind))(*arguments(kind))
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_bad_input_raises_its_own_error():
    """With ``fullgraph=True`` the compiler reports an exception of the traced code in words of its own."""
    compiled = torch.compile(VICRegLoss(), backend="aot_eager")
    x, y = (z.detach() for z in arguments("vicreg"))  # leaves: Dynamo looks at .grad, which warns of others
    with pytest.raises(ValueError, match="y needs the shape of x"):
        compiled(x, y[:2])


# -- the registered operators -----------------------------------------------------------------------------------

CHECKS = ("test_schema", "test_faketensor")


def local_indices(across: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Queries and candidates of maps 1, 2, 2, 1 in each of the two groups.
    found = [torch.randint(P, (B, M), generator=generator) for P in (P1, P2, P2, P1) * 2]
    groups = [torch.stack(found[:4]), torch.stack(found[4:])]
    return [group.mT for group in groups] if across else groups


def transposed(*shape: int, seed: int) -> torch.Tensor:
    return randn(*shape, seed=seed).mT.contiguous().mT


def operator_cases() -> dict[str, tuple[Plan, list[torch.Tensor], list[torch.Tensor]]]:
    maps = [randn(B, P, C, seed=P) for P in (P1, P2)]
    halves = [z.to(torch.bfloat16) for z in maps]
    few_channels = [z[..., :3] for z in maps]

    def views(*shape: int) -> list[torch.Tensor]:
        return [randn(*shape, seed=seed) for seed in (1, 2)]

    wide, tall = views(6, 80), views(16, 6)
    across = LOCAL_VIEWS._replace(across=True)
    return {
        "dual": (TWO_VIEWS, wide, []),
        "dual that keeps nothing": (TWO_VIEWS, views(2, 9000), []),
        "dual batches": (TWO_VIEWS, views(2, 3, 4, 5), []),
        "dual transposed": (TWO_VIEWS, [transposed(6, 80, seed=1), transposed(6, 80, seed=2)], []),
        "dual mixed types": (TWO_VIEWS, [wide[0].float(), wide[1].bfloat16()], []),
        "dual one view": (ONE_VIEW, wide[:1], []),
        "dual variance only": (ONE_VIEW._replace(covariance=False), wide[:1], []),
        "dual image": (LOCAL_VIEWS, maps, local_indices(False)),
        "dual slot": (across, maps, local_indices(True)),
        "dual slot bfloat16": (across, halves, local_indices(True)),
        "primal": (TWO_VIEWS._replace(gamma=0.5, eps=1e-4), tall, []),
        "primal of more features than samples": (TWO_VIEWS, views(6, 16), []),
        "primal batches": (TWO_VIEWS, views(2, 3, 7, 5), []),
        "primal transposed": (TWO_VIEWS, [transposed(16, 6, seed=1), transposed(16, 6, seed=2)], []),
        "primal float32": (TWO_VIEWS, [z.float() for z in tall], []),
        "primal mixed types": (TWO_VIEWS, [tall[0].float(), tall[1].bfloat16()], []),
        "primal one view": (ONE_VIEW, tall[:1], []),
        "primal variance only": (ONE_VIEW._replace(covariance=False), tall[:1], []),
        "primal image": (LOCAL_VIEWS, few_channels, local_indices(False)),
        "primal slot": (across, few_channels, local_indices(True)),
    }


every_operator_case = pytest.mark.parametrize("name", operator_cases())


def plain(plan: Plan) -> list[Any]:
    """The constants as the operators' schemas have them."""
    return [list(value) if isinstance(value, tuple) else value for value in plan]


@every_operator_case
def test_operator_cases_are_of_the_side_that_they_name(name):
    plan, sources, indices = operator_cases()[name]
    shapes = [rows.shape for group in plan.groups(sources, indices) for _, rows in group]
    assert {uses_dual(*shape) for shape in shapes} == {name.startswith("dual")}
    assert {keeps_moments(*shape) for shape in shapes} == {name != "dual that keeps nothing"}


@every_operator_case
def test_opcheck_terms(name):
    plan, sources, indices = operator_cases()[name]
    torch.library.opcheck(torch.ops.vicreg_fast.terms, (sources, indices, *plain(plan)), test_utils=CHECKS)


@every_operator_case
@pytest.mark.parametrize("partial", [False, True], ids=["all", "some"])
def test_opcheck_gradient(name, partial):
    plan, sources, indices = operator_cases()[name]
    outputs = torch.ops.vicreg_fast.terms(sources, indices, *plain(plan))
    saved = outputs[plan.outputs :]
    upstream: list[torch.Tensor | None] = [outputs[0].new_ones(()) for _ in range(3 * len(plan.group_sizes))]
    needs = [True] * len(sources)
    if partial:
        upstream[0] = None
        needs[0] = len(sources) == 1
    torch.library.opcheck(
        torch.ops.vicreg_fast.gradient,
        (sources, indices, saved, upstream, needs, *plain(plan)),
        test_utils=CHECKS,
    )


@pytest.fixture(params=["aten", *(["triton"] if TRITON else [])])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that runs here."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


@pytest.mark.parametrize("channels", [2, 3, 6], ids="{}channels".format)
@pytest.mark.parametrize("order", ["distance", "patch"])
@pytest.mark.parametrize("counts", [(1,), (3, 3), (8, 2)], ids=str)
@pytest.mark.parametrize("across", [False, True], ids=["image", "slot"])
def test_opcheck_match(channels, order, counts, across, backend):
    maps = [randn(B, P, channels, seed=P).float() for P in (P1, P2)]
    locations = [randn(B, P, 2, seed=P) for P in (P1, P2)]
    given = (maps, locations if len(counts) == 2 else [], counts, order, across, backend)
    torch.library.opcheck(torch.ops.vicreg_fast.match, given, test_utils=CHECKS)


def test_opcheck_match_distances(backend):
    queries, candidates = (randn(B, P, 6, seed=P).float() for P in (P1, P2))
    matches = torch.zeros(2, B, 3, dtype=torch.int64)
    given = (queries, candidates, matches, backend)
    torch.library.opcheck(torch.ops.vicreg_fast.match_distances, given, test_utils=CHECKS)


@every_kind
def test_a_graph_holds_the_operators_and_eager_code_does_not(kind, monkeypatch):
    """An operator costs more than the call it hides, and a traced loop over blocks thousands of nodes."""
    compiled = make_loss(kind)
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record)
    losses = torch.compile(compiled, fullgraph=True, backend=backend)(*arguments(kind))
    losses["loss"].backward()
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    parts = 1 if kind == "vicreg" else 2  # the global embeddings and the matched patches
    assert called.count("vicreg_fast.terms.default") == parts
    assert called.count("vicreg_fast.gradient.default") == parts
    assert called.count("vicreg_fast.match.default") == (0 if kind == "vicreg" else 1)

    def forbidden(*arguments: Any) -> None:
        raise AssertionError("eager code called a registered operator")

    names = ("terms", "gradient", "match", "match_distances")
    fake = type("Operators", (), dict.fromkeys(names, forbidden))
    monkeypatch.setattr(torch.ops, "vicreg_fast", fake)
    assert operators.torch.ops.vicreg_fast is fake
    make_loss(kind)(*arguments(kind))["loss"].backward()


def test_the_same_tensor_twice() -> None:
    z = randn(12, 5, seed=1).requires_grad_()
    compiled = torch.compile(lambda z: VICRegLoss()(z, z)["loss"], fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(z), z)
    (true,) = torch.autograd.grad(VICRegLoss(backend="reference")(z, z)["loss"], z)
    assert_exact([found], [true])


def test_a_subclass_that_overrides_a_local_method() -> None:
    class Mine(VICRegLLoss):
        def local_vicreg_loss(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return super().local_vicreg_loss(x, y)

    inputs = arguments("image")
    compiled = torch.compile(Mine(M), fullgraph=True, backend="aot_eager")
    assert_right(compiled, VICRegLLoss(M, backend="reference"), inputs)
