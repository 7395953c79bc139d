"""torch.compile: one graph, and the values and gradients of the reference in eager mode."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

from vicreg_fast import VICRegLLoss, VICRegLoss, operators, reference
from vicreg_fast.autograd import weighted_terms
from vicreg_fast.plan import Plan
from vicreg_fast.sides import uses_dual

from .data import U, assert_exact, both_sides

B, P1, P2, C, D, M = 4, 9, 8, 6, 5, 3
# Five roundings of a sum of few samples; on the dual side the covariance is the difference of two sums and, in these
# shapes, a third at least of the larger.  Measured: 3 U.
FLOAT32 = 16 * U
KINDS = ("vicreg", "image", "slot")  # VICRegLoss, and VICRegLLoss by its statistics
# Dynamo itself makes the instance that torch.autograd.Function warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
every_kind = pytest.mark.parametrize("kind", KINDS)
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


def assert_same(actual: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    """The same names, and the same losses."""
    assert list(actual) == list(truth)
    assert_exact(list(actual.values()), list(truth.values()))


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
        actual = torch.autograd.grad(compiled[name], differentiable, **options)
        assert_exact(actual, torch.autograd.grad(truth[name], differentiable, **options))


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
    actual = torch._dynamo.explain(make_loss(kind))(*arguments(kind))
    assert (actual.graph_count, actual.graph_break_count) == (1, 0)


def test_bad_input_raises_its_own_error():
    """With ``fullgraph=True`` the compiler reports an exception of the traced code in words of its own."""
    compiled = torch.compile(VICRegLoss(), backend="aot_eager")
    x, y = (z.detach() for z in arguments("vicreg"))  # leaves: Dynamo looks at .grad, which warns of others
    with pytest.raises(ValueError, match="y needs the shape of x"):
        compiled(x, y[:2])


# -- the graph ---------------------------------------------------------------------------------------------------


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
    assert called.count("vicreg_fast.match.default") == 0  # terms() matches

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
    (actual,) = torch.autograd.grad(compiled(z), z)
    (true,) = torch.autograd.grad(VICRegLoss(backend="reference")(z, z)["loss"], z)
    assert_exact([actual], [true])


def test_the_same_tensor_apart_in_a_plan_of_three_views() -> None:
    plan = Plan((0, 1, 2), (3,), (0, 1, 0, 2, 1, 2))
    x, y = randn(12, 5, seed=1).requires_grad_(), randn(12, 5, seed=2)

    def total(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return weighted_terms(plan, (25.0, 15.0, 1.0), [x, y, x])[1]

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(x, y), x)
    inv = 2 * reference.invariance(x, y) / 3  # of three pairs, x with itself among them
    var, cov = ((2 * term(x) + term(y)) / 3 for term in (reference.variance, reference.covariance))
    (true,) = torch.autograd.grad(25 * inv + 15 * var + cov, x)
    assert_exact([actual], [true])


def test_a_subclass_that_overrides_a_local_method() -> None:
    class Mine(VICRegLLoss):
        def local_vicreg_loss(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return super().local_vicreg_loss(x, y)

    inputs = arguments("image")
    compiled = torch.compile(Mine(M), fullgraph=True, backend="aot_eager")
    assert_right(compiled, VICRegLLoss(M, backend="reference"), inputs)
