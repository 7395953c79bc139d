"""``backend="auto"`` where a kernel fails: ATen computes the whole call and all later ones, forward and backward.

CPU tensors pass for those of a GPU, and kernels run in the interpreter until one is made to fail.
"""

import importlib
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vicreg_fast import VICRegLLoss, VICRegLoss, backends, functional
from vicreg_fast.backends import aten_backend, kernel_failures
from vicreg_fast.plan import TWO_VIEWS, Plan, local_views

from .data import seeded_randn
from .parity import assert_same_bits

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

# Dynamo itself makes the instance that torch.autograd.Function warns of.
pytestmark = [
    pytest.mark.usefixtures("interpreted", "auto_runs_kernels"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
M = 3
WARNING = "the Triton kernels cannot run on cpu: OutOfResources"


@pytest.fixture
def auto_runs_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On CPU tensors too; and nothing has failed yet."""
    monkeypatch.setattr(backends, "_ALWAYS_ATEN", ())
    monkeypatch.setattr(kernel_failures, "reasons", {})
    monkeypatch.setattr(kernel_failures, "_warned", set())
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Kernels:
    """The names of the kernels that were launched, and of those that fail from now on."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.failing: set[str] = set()
        # Made anew each time: an error keeps the tensors of its traceback's frames.
        self.error: Callable[[], BaseException] = lambda: OutOfResources(300000, 232448, "shared memory")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    state = Kernels()
    kind = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    run = kind.run

    def run_or_fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.fn.__name__.strip("_").removesuffix("_kernel")
        state.launched.append(name)
        if name in state.failing:
            raise state.error()
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", run_or_fail)
    return state


def loss_of(kind: str, backend: str = "auto") -> nn.Module:
    if kind in ("dual", "primal"):
        return VICRegLoss(backend=backend)
    return VICRegLLoss(M, 0.0, statistics=kind, backend=backend)


def inputs_of(kind: str) -> list[Tensor | None]:
    """The loss's arguments.  The first two require gradients."""
    if kind in ("dual", "primal"):
        shape = (6, 80) if kind == "dual" else (16, 6)
        return [seeded_randn(*shape, seed=seed).requires_grad_() for seed in (1, 2)]
    maps = [seeded_randn(4, P, 6, seed=P).requires_grad_() for P in (9, 8)]
    return [*maps, None, None, *(seeded_randn(4, P, 2, seed=P + 20) for P in (9, 8))]


def losses_of(kind: str, backend: str = "auto") -> list[Tensor]:
    with torch.no_grad():
        return list(loss_of(kind, backend)(*inputs_of(kind)).values())


def step(loss: Any, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """All losses, and the gradients of their total."""
    inputs = inputs_of(kind)
    losses = loss(*inputs)
    gradients = torch.autograd.grad(losses["loss"], [z for z in inputs[:2] if z is not None])
    return [value.detach() for value in losses.values()], list(gradients)


def assert_step(actual: tuple[list[Tensor], list[Tensor]], kind: str, forward: str = "aten") -> None:
    """The losses of a backend and the gradients of ATen, bit for bit."""
    assert_same_bits(actual[0], losses_of(kind, forward))
    assert_same_bits(actual[1], step(loss_of(kind, "aten"), kind)[1])


def assert_one_warning(caught: pytest.WarningsRecorder) -> None:
    """One of the library; NumPy has its own of Triton 3.6's interpreter."""
    assert sum("the Triton kernels cannot run" in str(warning.message) for warning in caught) == 1


# Kernels of each loss's forward pass, in order, and of its backward pass.
FORWARD = {
    "dual": ["moments_forward", "gram_forward"],
    "primal": ["narrow_second_moment_forward", "splitk_reduction"],
    "image": ["match_forward", "vicregl_forward"],
    "slot": ["match_forward", "moments_forward", "gram_forward"],
}
BACKWARD = {
    "dual": "gradient",
    "primal": "narrow_gradient",
    "image": "vicregl_gradient",
    "slot": "scatter_backward",
}
KINDS = list(FORWARD)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in FORWARD[kind]])
def test_a_forward_kernel_fails(kind: str, name: str, kernels: Kernels) -> None:
    kernels.failing = {name}
    with pytest.warns(UserWarning, match=WARNING) as caught:
        assert_step(step(loss_of(kind), kind), kind)
    assert_one_warning(caught)
    assert kernels.launched[-1] == name
    kernels.launched.clear()
    assert_step(step(loss_of(kind), kind), kind)  # a second warning would be an error
    assert kernels.launched == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_kernel_fails(kind: str, kernels: Kernels) -> None:
    kernels.failing = {BACKWARD[kind]}
    with pytest.warns(UserWarning, match=WARNING) as caught:
        actual = step(loss_of(kind), kind)
    assert_one_warning(caught)
    assert kernels.launched[-1] == BACKWARD[kind]
    assert_step(actual, kind, forward="triton")
    kernels.launched.clear()
    assert_step(step(loss_of(kind), kind), kind)
    assert kernels.launched == []


def test_a_backward_pass_after_another_calls_failure_is_atens(kernels: Kernels) -> None:
    x, y = inputs_of("dual")
    total = VICRegLoss()(x, y)["loss"]
    kernels.failing = {"narrow_second_moment_forward"}
    with pytest.warns(UserWarning, match=WARNING):
        step(loss_of("primal"), "primal")
    kernels.launched.clear()
    actual = torch.autograd.grad(total, (x, y))
    assert kernels.launched == []
    assert_same_bits(actual, step(loss_of("dual", "aten"), "dual")[1])


def test_one_gradient_alone(kernels: Kernels) -> None:
    x, y = inputs_of("image")[0], inputs_of("image")[1]
    rest = inputs_of("image")[2:]
    kernels.failing = {"vicregl_gradient"}
    total = loss_of("image")(x, y.detach(), *rest)["loss"]
    with pytest.warns(UserWarning, match=WARNING):
        (actual,) = torch.autograd.grad(total, x)
    assert_same_bits([actual], step(loss_of("image", "aten"), "image")[1][:1])


def test_without_a_failure_the_kernels_compute_everything(kernels: Kernels) -> None:
    actual = step(loss_of("dual"), "dual")
    launched, kernels.launched = kernels.launched, []
    expected = step(loss_of("dual", "triton"), "dual")
    assert_same_bits(actual[0] + actual[1], expected[0] + expected[1])
    assert launched == kernels.launched == [*FORWARD["dual"], "gradient"]


def test_the_triton_backend_raises_and_remembers_nothing(kernels: Kernels) -> None:
    kernels.failing = {"gram_forward"}
    for _ in range(2):
        with pytest.raises(OutOfResources):
            step(loss_of("dual", "triton"), "dual")
    assert kernel_failures.reasons == {}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["gram_forward", "gradient"])
def test_an_error_that_is_not_the_kernels_is_raised(name: str, error: BaseException, kernels: Kernels) -> None:
    kernels.failing, kernels.error = {name}, lambda: error
    with pytest.raises(type(error)) as caught:
        step(loss_of("dual"), "dual")
    assert caught.value is error
    assert kernel_failures.reasons == {}
    kernels.failing.clear()
    step(loss_of("dual"), "dual")
    assert "gradient" in kernels.launched


@pytest.mark.parametrize("name", ["match_forward", "distance_forward"])
def test_match_patches(name: str, kernels: Kernels) -> None:
    maps = [z.detach() for z in inputs_of("image")[:2] if z is not None]
    expected = functional.match_patches(*maps, M, backend="aten")
    kernels.failing = {name}
    with pytest.warns(UserWarning, match=WARNING) as caught:
        actual = functional.match_patches(*maps, M)
    assert_one_warning(caught)
    assert_same_bits(list(actual), list(expected))


def test_matches_of_either_backend_serve_aten() -> None:
    plan, maps = local_views((M, M)), [z.detach() for z in inputs_of("image")[:2] if z is not None]
    locations = [z for z in inputs_of("image")[4:] if z is not None]
    made = [
        backends.module(name).match(maps, locations, plan.match_counts, plan.match_order, False)
        for name in ("triton", "aten")
    ]
    assert [matches.arrival_counter is None for matches in made] == [False, True]
    assert_same_bits(*(aten_backend.terms(plan, maps, matches) for matches in made))


# -- compiled -------------------------------------------------------------------------------------------------------


def compiled(kind: str, backend: str = "auto") -> Any:
    return torch.compile(loss_of(kind, backend), fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(("kind", "backward"), [("image", False), ("dual", True)])
def test_a_kernel_of_a_compiled_loss_fails(kind: str, backward: bool, kernels: Kernels) -> None:
    truth, loss = step(compiled(kind, "aten"), kind), compiled(kind)
    kernels.failing = {BACKWARD[kind] if backward else FORWARD[kind][-1]}
    with pytest.warns(UserWarning, match=WARNING) as caught:
        losses, gradients = step(loss, kind)
    assert_one_warning(caught)
    assert_same_bits(gradients, truth[1])
    if not backward:
        assert_same_bits(losses, truth[0])
    kernels.launched.clear()
    losses, gradients = step(loss, kind)
    assert kernels.launched == []
    assert_same_bits(losses + gradients, truth[0] + truth[1])


LOCAL = ([seeded_randn(4, P, 6, seed=P) for P in (9, 8)], [seeded_randn(4, P, 2, seed=P) for P in (9, 8)])
PLANS: dict[str, tuple[Plan, list[Tensor], list[Tensor]]] = {
    "dual": (TWO_VIEWS, [seeded_randn(6, 80, seed=seed) for seed in (1, 2)], []),
    "image": (local_views((M, M)), *LOCAL),
    "slot": (local_views((M, 2))._replace(per_slot=True), *LOCAL),
}


@pytest.mark.parametrize("kind", PLANS)
def test_an_operator_keeps_the_promise_of_its_shapes_after_a_failure(kind: str, kernels: Kernels) -> None:
    plan, sources, locations = PLANS[kind]
    plan = plan._replace(backend="auto")
    arguments = [sources, locations, *(list(v) if isinstance(v, tuple) else v for v in plan)]
    kernel_failures.reasons[torch.device("cpu")] = "any"
    torch.library.opcheck(torch.ops.vicreg_fast.terms, arguments, test_utils=("test_schema", "test_faketensor"))
    assert kernels.launched == []


def test_a_compiled_loss_where_triton_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = step(compiled("dual", "aten"), "dual")
    monkeypatch.setattr(backends, "_import_failure", lambda: "ImportError: broken")
    with pytest.warns(UserWarning, match="the Triton kernels cannot run: ImportError: broken") as caught:
        losses, gradients = step(compiled("dual"), "dual")
    assert_one_warning(caught)
    assert_same_bits(losses + gradients, truth[0] + truth[1])


def test_a_compiled_loss_is_traced_for_aten_after_a_failure(kernels: Kernels) -> None:
    """So that its backward pass computes nothing twice."""
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    loss = torch.compile(loss_of("dual"), fullgraph=True, backend=record)
    kernels.failing = {"moments_forward"}
    with pytest.warns(UserWarning, match=WARNING):
        step(loss, "dual")
    step(loss, "dual")
    first, second = graphs
    for graph, backend in ((first, "auto"), (second, "aten")):
        calls = re.findall(r"ops\.vicreg_fast\.\w+\(.*'(auto|aten)'", graph)
        assert calls == [backend] * 2  # terms and gradient


# -- nothing half done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gram_forward", "gradient"])
def test_a_warning_that_is_an_error(name: str, kernels: Kernels) -> None:
    kernels.failing = {name}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        x, y = inputs_of("dual")
        assert x is not None
        with pytest.raises(UserWarning, match=WARNING):
            VICRegLoss()(x, y)["loss"].backward()
        assert x.grad is None
        assert_step(step(loss_of("dual"), "dual"), "dual")


def test_a_backward_pass_can_be_repeated_after_its_warning_was_an_error(kernels: Kernels) -> None:
    x, y = inputs_of("dual")
    total = VICRegLoss()(x, y)["loss"]
    kernels.failing = {"gradient"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match=WARNING):
            torch.autograd.grad(total, (x, y), retain_graph=True)
        assert_same_bits(torch.autograd.grad(total, (x, y)), step(loss_of("dual", "aten"), "dual")[1])


def test_threads_that_fail_together_warn_once(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(kernel_failures.warnings, "warn", lambda text, **kwargs: warned.append(text))
    kernels.failing = {"moments_forward"}
    barrier = threading.Barrier(4)
    results: list[Any] = []
    failed = importlib.import_module("triton.runtime.interpreter").InterpretedFunction.run

    def together(*args: Any, **kwargs: Any) -> Any:
        barrier.wait(60)  # no thread fails before all of them have found that nothing has failed
        return failed(*args, **kwargs)

    monkeypatch.setattr(
        importlib.import_module("triton.runtime.interpreter").InterpretedFunction, "run", together
    )
    workers = torch.get_num_threads()

    def run() -> None:
        torch.set_num_threads(workers)  # a new thread has the default, and the order of sums depends on it
        results.append(step(loss_of("dual"), "dual"))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(warned) == 1
    assert len(results) == 4
    for result in results:
        assert_step(result, "dual")


def test_the_failed_calls_memory_is_free_when_aten_computes(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[weakref.ref[Tensor]] = []
    empty: Callable[..., Tensor] = torch.empty

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        z = empty(*args, **kwargs)
        allocated.append(weakref.ref(z))
        return z

    alive: list[Any] = []
    terms = aten_backend.terms

    def counted(*args: Any) -> list[Tensor]:
        alive.append([z() for z in allocated if z() is not None])
        return terms(*args)

    monkeypatch.setattr(aten_backend, "terms", counted)
    kernels.failing = {"gram_forward"}
    monkeypatch.setattr(torch, "empty", recorded)
    with pytest.warns(UserWarning, match=WARNING):
        losses_of("dual")
    assert len(allocated) > 4
    assert alive == [[]]
