"""gather_distributed: several processes give what one process with the whole batch gives.

All collectives run in two spawns, of two and of three ranks: starting processes takes seconds, a scenario
milliseconds.  Every scenario has a process group of its own, so that one that fails cannot disturb the next, and
leaves its results in files, which the tests of this file read.  The truth is one process with the whole batch and
the formulas of ``vicreg_fast.reference``.
"""

import datetime
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vicreg_fast import VICRegLLoss, VICRegLoss, reference

WORLDS = (2, 3)
KINDS = ("vicreg", "image", "slot")  # VICRegLoss, and VICRegLLoss by its statistics
EMBEDDINGS = ("vicreg", "wide")  # VICRegLoss, of few features and of so many that the covariance is N x N
COLLECTIVE_SECONDS = 10  # a collective takes milliseconds: a longer wait is a rank that never came
SPAWN_SECONDS = 90
# Closed forms against formulas, blocks summed in another order: hundreds of units of 2^-53.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
INPUTS, D, WIDE, P1, P2, M = 6, 5, 70, 7, 8, 3
COEFFICIENTS, GAMMA, EPS, ALPHA = (7.0, 5.0, 3.0), 0.8, 1e-4, 0.6
KEYS = ("inv-loss", "var-loss", "cov-loss", "loss")


class Case(NamedTuple):
    kind: str
    counts: tuple[int, ...]  # samples of every rank

    @property
    def world(self) -> int:
        return len(self.counts)

    def __str__(self) -> str:
        return f"{self.kind}-{'+'.join(map(str, self.counts))}"


CASES = [Case(k, c) for k in KINDS for c in ((4, 4), (5, 2), (1, 6), (1, 1), (3, 3, 3), (4, 1, 2))]
CASES += [Case("wide", c) for c in ((4, 4), (5, 2), (3, 3, 3), (4, 1, 2))]
# An empty part: embeddings only, maps need one image.
CASES += [Case("vicreg", c) for c in ((0, 5), (3, 0, 2))]


# -- shared by the ranks and the truth --------------------------------------------------------------------------


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole_batch(B: int) -> list[torch.Tensor]:
    """Two views' patches before the network, and their locations."""
    return [randn(B, P1, INPUTS, seed=1), randn(B, P2, INPUTS, seed=2), *locations(B)]


def locations(B: int) -> list[torch.Tensor]:
    return [randn(B, P1, 2, seed=3), randn(B, P2, 2, seed=4)]


def part(tensors: list[torch.Tensor], counts: tuple[int, ...], rank: int) -> list[torch.Tensor]:
    start = sum(counts[:rank])
    return [t[start : start + counts[rank]] for t in tensors]


class Network(nn.Module):
    """Patches of two views -> two maps and their means, by one small network of fixed weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        features = WIDE if kind == "wide" else D
        self.layers = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, features)).double()
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(0.5 * randn(*parameter.shape, seed=10 + seed))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        B = a.shape[0]
        z = self.layers(torch.cat([a.flatten(0, 1), b.flatten(0, 1)]))
        maps = z[: B * P1].view(B, P1, z.shape[1]), z[B * P1 :].view(B, P2, z.shape[1])
        return *maps, maps[0].mean(1), maps[1].mean(1)


def make_loss(kind: str, coefficients: tuple[Any, Any, Any] = COEFFICIENTS, **options: Any) -> nn.Module:
    if kind in EMBEDDINGS:
        return VICRegLoss(*coefficients, GAMMA, eps=EPS, **options)
    options = {"alpha": ALPHA, **options}
    return VICRegLLoss(M, options.pop("alpha"), *coefficients, GAMMA, eps=EPS, statistics=kind, **options)


def call(loss: nn.Module, kind: str, outputs: Any, places: Any) -> dict[str, torch.Tensor]:
    return loss(*outputs[2:]) if kind in EMBEDDINGS else loss(*outputs, *places)


def true_terms(kind: str, outputs: Any, places: Any) -> dict[str, reference.VICRegTerms]:
    """The unweighted terms of every part, on the whole batch."""
    terms = {"global": reference.vicreg_terms(*outputs[2:], GAMMA, EPS)}
    if kind not in EMBEDDINGS:
        local = reference.local_terms(*outputs[:2], *places, M, GAMMA, EPS, statistics=kind)
        terms |= {"location": local.location, "feature": local.feature}
    return terms


def true_losses(kind: str, outputs: Any, places: Any) -> dict[str, torch.Tensor]:
    losses = {}
    for name, terms in true_terms(kind, outputs, places).items():
        weighted = [w * t for w, t in zip(COEFFICIENTS, terms, strict=True)]
        losses |= {f"{name}/{k}": v for k, v in zip(KEYS, (*weighted, sum(weighted)), strict=True)}
    if kind in EMBEDDINGS:
        return {k.removeprefix("global/"): v for k, v in losses.items()}
    local = (losses["location/loss"] + losses["feature/loss"]) / 2
    return {"loss": ALPHA * losses["global/loss"] + (1 - ALPHA) * local, **losses}


# -- scenarios: what every rank does ----------------------------------------------------------------------------

Result = dict[str, Any]
Scenario = Callable[[int], Result]


def caught(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def train_step(case: Case, rank: int) -> Result:
    """Losses and the parameter gradients that DDP averages."""
    network = DistributedDataParallel(Network(case.kind))
    a, b, *places = part(whole_batch(sum(case.counts)), case.counts, rank)
    loss = make_loss(case.kind, gather_distributed=True)
    losses = call(loss, case.kind, network(a, b), places)
    losses["loss"].backward()
    return {
        "losses": {k: v.detach() for k, v in losses.items()},
        "gradients": [p.grad for p in network.parameters()],
    }


def trainable_coefficients(case: Case, rank: int) -> Result:
    coefficients = tuple(nn.Parameter(torch.tensor(c, dtype=torch.float64)) for c in COEFFICIENTS)
    a, b, *places = part(whole_batch(sum(case.counts)), case.counts, rank)
    loss = make_loss(case.kind, coefficients, gather_distributed=True)
    call(loss, case.kind, Network(case.kind)(a, b), places)["loss"].backward()
    return {"gradients": [c.grad for c in coefficients]}


def half_precision(counts: tuple[int, ...], dtype: torch.dtype, rank: int) -> Result:
    x, y = (z.requires_grad_() for z in part(half_views(sum(counts), dtype), counts, rank))
    losses = VICRegLoss(gather_distributed=True)(x, y)
    losses["loss"].backward()
    return {"losses": {k: v.detach() for k, v in losses.items()}, "gradients": [x.grad, y.grad]}


def half_views(N: int, dtype: torch.dtype) -> list[torch.Tensor]:
    # Seven features: 14 bytes a row, no multiple of a word.
    return [(0.7 * randn(N, 7, seed=seed)).to(dtype) for seed in (5, 6)]


def strided(counts: tuple[int, ...], rank: int) -> Result:
    """Transposed views of a larger storage."""
    x, y = part([randn(sum(counts), D, seed=seed) for seed in (5, 6)], counts, rank)
    x, y = (z.t().contiguous().t().requires_grad_() for z in (x, y))
    losses = VICRegLoss(gather_distributed=True)(x, y)
    losses["loss"].backward()
    return {"losses": {k: v.detach() for k, v in losses.items()}, "gradients": [x.grad, y.grad]}


def good_arguments(kind: str) -> dict[str, Any]:
    """Three samples for every rank, the same ones."""
    if kind == "vicreg":
        return {"x": randn(3, D, seed=5), "y": randn(3, D, seed=6)}
    maps, globals_ = ((randn(3, P, D, seed=P) for P in (P1, P2)), (randn(3, D, seed=s) for s in (5, 6)))
    places = locations(3)
    names = ("x1_maps", "x2_maps", "x1_glob", "x2_glob", "x1_locations", "x2_locations")
    return dict(zip(names, (*maps, *globals_, *places), strict=True))


class Fault(NamedTuple):
    """What the last rank is given instead, and what it is told."""

    kind: str
    argument: str
    spoil: Callable[[torch.Tensor], Any]
    error: str


BAD_HERE = {
    "x-integer": Fault("vicreg", "x", torch.Tensor.long, "TypeError: x needs dtype"),
    "y-integer": Fault("vicreg", "y", torch.Tensor.long, "TypeError: y needs dtype"),
    "x-missing": Fault("vicreg", "x", lambda t: None, "TypeError: x needs a tensor"),
    "y-another-N": Fault("vicreg", "y", lambda t: t[:2], "ValueError: y needs the shape of x"),
    "x-3d": Fault("vicreg", "x", lambda t: t[None], "ValueError: x needs shape"),
    "x-5d": Fault("vicreg", "x", lambda t: t[None, None, None], "ValueError: x needs shape"),
    "image-maps-integer": Fault("image", "x2_maps", torch.Tensor.long, "TypeError: x2_maps needs dtype"),
    "slot-maps-integer": Fault("slot", "x2_maps", torch.Tensor.long, "TypeError: x2_maps needs dtype"),
    "slot-maps-missing": Fault("slot", "x1_maps", lambda t: None, "TypeError: x1_maps needs a tensor"),
    "slot-maps-another-B": Fault("slot", "x2_maps", lambda t: t[:2], "ValueError: x2_maps needs the images"),
    "image-locations-another-B": Fault("image", "x1_locations", lambda t: t[:2], "ValueError: x1_locations"),
    "slot-locations-1d": Fault("slot", "x2_locations", lambda t: t[..., :1], "ValueError: x2_locations"),
    "slot-globals-another-B": Fault(
        "slot", "x2_glob", lambda t: t[:2], "ValueError: x2_glob needs the shape of x1"
    ),
}
# Each rank's own arguments agree with one another, but those of the last rank not with the others'.
DIFFERS = {
    "features": Fault("vicreg", "", lambda t: t[:, :4], "ValueError: x needs the same"),
    "dtype": Fault("vicreg", "", torch.Tensor.float, "ValueError: x needs the same"),
    "image-patches": Fault("image", "2", lambda t: t[:, :5], "ValueError: x2_maps needs the same"),
    "slot-patches": Fault("slot", "2", lambda t: t[:, :5], "ValueError: x2_maps needs the same"),
    "slot-dtype": Fault("slot", "maps", torch.Tensor.float, "ValueError: x1_maps needs the same"),
    "slot-coordinates": Fault("slot", "locations", lambda t: torch.cat([t, t[..., :1]], -1), "ValueError: x1_"),
    "slot-locations-dtype": Fault("slot", "locations", torch.Tensor.float, "ValueError: x1_locations"),
}


def spoilt(fault: Fault) -> dict[str, Any]:
    """The good arguments but for one; for those in DIFFERS, every one that must go along."""
    good = good_arguments(fault.kind)
    if fault.argument in good:
        return {**good, fault.argument: fault.spoil(good[fault.argument])}
    chosen = [n for n in good if fault.argument in n and not (fault.argument == "2" and n == "x2_glob")]
    return {n: fault.spoil(t) if n in chosen else t for n, t in good.items()}


def bad_input(fault: Fault, world: int, rank: int) -> Result:
    loss = make_loss(fault.kind, gather_distributed=True)
    good = good_arguments(fault.kind)
    given = spoilt(fault) if rank == world - 1 else good
    started = time.perf_counter()
    error = caught(lambda: loss(**given))
    waited = time.perf_counter() - started
    return {"error": error, "waited": waited, "next": loss(**good)["loss"]}


def too_few(world: int, rank: int) -> Result:
    x, y = part([randn(1, D, seed=seed) for seed in (5, 6)], (0,) * (world - 1) + (1,), rank)
    return {"error": caught(lambda: VICRegLoss(gather_distributed=True)(x, y))}


def second_derivative(kind: str, alpha: float, rank: int) -> Result:
    """The sum of the squared gradient, differentiated in three ways."""

    def prepare() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = {n: t.requires_grad_("locations" not in n) for n, t in good_arguments(kind).items()}
        options = {} if kind == "vicreg" else {"alpha": alpha}
        loss = make_loss(kind, gather_distributed=True, **options)(**inputs)["loss"]
        leaf = inputs["x" if kind == "vicreg" else "x1_maps" if alpha < 1 else "x1_glob"]
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return loss, first.square().sum(), leaf

    def backward() -> torch.Tensor:
        _, penalty, leaf = prepare()
        penalty.backward()
        return leaf.grad

    def grad() -> torch.Tensor:
        _, penalty, leaf = prepare()
        return torch.autograd.grad(penalty, leaf)[0]

    def grad_of_both() -> torch.Tensor:
        # The loss reaches the leaf by itself here: a penalty without a path to it would be left out in silence.
        loss, penalty, leaf = prepare()
        first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
        return torch.autograd.grad(loss + penalty, leaf)[0] - first

    found: Result = {}
    for function in (backward, grad, grad_of_both):
        try:
            found[function.__name__] = function()
        except RuntimeError as error:
            found[function.__name__] = str(error)
    return found


def subgroup(rank: int) -> Result:
    """Ranks 0 and 2 gather from each other; rank 1 is on its own."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return {}
    counts = (2, 0, 3)
    x, y = (z.requires_grad_() for z in part([randn(5, D, seed=5), randn(5, D, seed=6)], counts, rank))
    loss = VICRegLoss(gather_distributed=True, process_group=group)(x, y)["loss"]
    loss.backward()
    return {"loss": loss.detach(), "gradients": [x.grad, y.grad]}


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
UNEQUAL = {2: (3, 6), 3: (3, 1, 5)}
SECOND = {"vicreg": ("vicreg", 0.0), "slot": ("slot", 0.0), "global": ("image", 1.0), "image": ("image", 0.0)}


def scenarios(world: int) -> dict[str, Scenario]:
    found: dict[str, Scenario] = {}

    def add(name: str, function: Callable[..., Result], *arguments: Any) -> None:
        found[name] = lambda rank: function(*arguments, rank)

    for case in CASES:
        if case.world == world:
            add(f"step {case}", train_step, case)
    for kind in KINDS:
        add(f"coefficients {kind}", trainable_coefficients, Case(kind, UNEQUAL[world]))
    for name, dtype in HALVES.items():
        add(name, half_precision, UNEQUAL[world], dtype)
    add("strided", strided, UNEQUAL[world])
    if world == 3:
        add("subgroup", subgroup)
    for name, (kind, alpha) in SECOND.items():
        add(f"second {name}", second_derivative, kind, alpha)
    add("too few", too_few, world)
    for name, fault in (BAD_HERE | DIFFERS).items():
        add(name, bad_input, fault, world)
    return found


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    for number, (name, scenario) in enumerate(scenarios(world).items()):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store-{number}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
        )
        try:
            result = scenario(rank)
        except Exception:
            result = {"crash": traceback.format_exc()}
        dist.destroy_process_group()
        torch.save(result, f"{folder}/{name}.{rank}")


# -- the parent -------------------------------------------------------------------------------------------------


def run_ranks(world: int, folder: Path) -> Callable[[str], list[Result]]:
    """Run every scenario on ``world`` ranks; the answer reads a scenario's results."""
    context = mp.spawn(worker, (world, str(folder)), nprocs=world, join=False)
    deadline = time.monotonic() + SPAWN_SECONDS
    ended = ""
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                ended = f"the ranks did not end within {SPAWN_SECONDS} s"
                break
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        ended = str(error)
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def read(name: str) -> list[Result]:
        paths = [folder / f"{name}.{rank}" for rank in range(world)]
        missing = [path.name for path in paths if not path.exists()]
        assert not missing, f"no results {missing}: {ended}"
        results = [torch.load(path) for path in paths]
        for result in results:
            assert "crash" not in result, result["crash"]
        return results

    return read


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Callable[[str], list[Result]]]:
    return {world: run_ranks(world, tmp_path_factory.mktemp(f"ranks{world}")) for world in WORLDS}


both_worlds = pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"{world}ranks")
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_ddp_averages_to_the_gradient_of_one_process_with_the_whole_batch(results, case):
    network = Network(case.kind)
    a, b, *places = whole_batch(sum(case.counts))
    loss = true_losses(case.kind, network(a, b), places)["loss"]
    truth = torch.autograd.grad(loss, list(network.parameters()))
    assert all(gradient.abs().max() > 1e-3 for gradient in truth[:2])
    for rank in results[case.world](f"step {case}"):
        for gradient, true in zip(rank["gradients"], truth, strict=True):
            # The last bias shifts all embeddings, which no variance sees: its true gradient is a rounding.
            torch.testing.assert_close(gradient, true, **EXACT)


@every_case
def test_every_rank_returns_the_losses_of_the_whole_batch(results, case):
    a, b, *places = whole_batch(sum(case.counts))
    truth = {k: v.detach() for k, v in true_losses(case.kind, Network(case.kind)(a, b), places).items()}
    for rank in results[case.world](f"step {case}"):
        torch.testing.assert_close(rank["losses"], truth, **EXACT)


@every_case
def test_all_ranks_return_the_same_bits(results, case):
    first, *others = results[case.world](f"step {case}")
    for other in others:
        torch.testing.assert_close(other["losses"], first["losses"], rtol=0, atol=0)


@both_worlds
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_coefficients_average_to_the_global_terms(results, world, kind):
    a, b, *places = whole_batch(sum(UNEQUAL[world]))
    with torch.no_grad():
        terms = true_terms(kind, Network(kind)(a, b), places)
    shares = {"global": 1.0} if kind == "vicreg" else {"global": ALPHA}
    shares |= dict.fromkeys(("location", "feature"), (1 - ALPHA) / 2)
    ranks = results[world](f"coefficients {kind}")
    for k in range(3):
        truth = sum(shares[name] * part_terms[k] for name, part_terms in terms.items())
        average = sum(rank["gradients"][k] for rank in ranks) / world
        torch.testing.assert_close(average, truth, **EXACT)


def whole_gradients(x: torch.Tensor, y: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Losses with VICRegLoss's own coefficients, and their gradients, in float64."""
    x, y = x.double().requires_grad_(), y.double().requires_grad_()
    weighted = [w * t for w, t in zip((25.0, 15.0, 1.0), reference.vicreg_terms(x, y), strict=True)]
    losses = dict(zip(KEYS, (*weighted, sum(weighted)), strict=True))
    gradients = list(torch.autograd.grad(losses["loss"], (x, y)))
    return {k: v.detach() for k, v in losses.items()}, gradients


@both_worlds
@pytest.mark.parametrize("name", HALVES)
def test_half_precision_embeddings_are_gathered(results, world, name):
    counts, dtype = UNEQUAL[world], HALVES[name]
    losses, gradients = whole_gradients(*half_views(sum(counts), dtype))
    for number, rank in enumerate(results[world](name)):
        for key, loss in rank["losses"].items():
            assert loss.dtype == torch.float32
            # Computed in float32: some units of 2^-24.
            torch.testing.assert_close(loss.double(), losses[key], rtol=1e-6, atol=1e-7)
        for gradient, truth in zip(rank["gradients"], gradients, strict=True):
            assert gradient.dtype == dtype
            # Rounded to the input's type before and after the factor R.
            u = torch.finfo(dtype).eps
            (mine,) = part([world * truth], counts, number)
            torch.testing.assert_close(gradient.double(), mine, rtol=u, atol=u / 100)


@both_worlds
def test_strided_embeddings_are_gathered(results, world):
    counts = UNEQUAL[world]
    losses, gradients = whole_gradients(*(randn(sum(counts), D, seed=seed) for seed in (5, 6)))
    for number, rank in enumerate(results[world]("strided")):
        torch.testing.assert_close(rank["losses"], losses, **EXACT)
        mine = part([world * truth for truth in gradients], counts, number)
        torch.testing.assert_close(rank["gradients"], mine, **EXACT)


def test_a_process_group_gathers_from_its_ranks_only(results):
    losses, gradients = whole_gradients(randn(5, D, seed=5), randn(5, D, seed=6))
    ranks = results[3]("subgroup")
    for number in (0, 2):
        torch.testing.assert_close(ranks[number]["loss"], losses["loss"], **EXACT)
        mine = part([2 * truth for truth in gradients], (2, 0, 3), number)
        torch.testing.assert_close(ranks[number]["gradients"], mine, **EXACT)


@both_worlds
@pytest.mark.parametrize("name", BAD_HERE)
def test_bad_input_on_one_rank_raises_on_every_rank(results, world, name):
    *others, bad = results[world](name)
    assert bad["error"].startswith(BAD_HERE[name].error)
    for other in others:
        assert other["error"].startswith(f"RuntimeError: rank {world - 1} was given bad input")


@both_worlds
@pytest.mark.parametrize("name", DIFFERS)
def test_shapes_and_types_that_differ_between_ranks_raise_on_every_rank(results, world, name):
    errors = {rank["error"] for rank in results[world](name)}
    assert len(errors) == 1
    (error,) = errors
    assert error.startswith(DIFFERS[name].error)
    assert f"on rank {world - 1}" in error


@both_worlds
@pytest.mark.parametrize("name", BAD_HERE | DIFFERS)
def test_nobody_waits_for_a_rank_with_bad_input_and_the_next_step_works(results, world, name):
    ranks = results[world](name)
    assert max(rank["waited"] for rank in ranks) < COLLECTIVE_SECONDS / 2
    fault = (BAD_HERE | DIFFERS)[name]
    good = {n: torch.cat([t] * world) for n, t in good_arguments(fault.kind).items()}
    if fault.kind == "vicreg":
        truth = true_losses("vicreg", (None, None, *good.values()), ())["loss"]
    else:
        *outputs, first, second = good.values()
        truth = true_losses(fault.kind, outputs, (first, second))["loss"]
    for rank in ranks:
        torch.testing.assert_close(rank["next"], truth, **EXACT)


@both_worlds
def test_one_sample_in_the_global_batch_raises_on_every_rank(results, world):
    for rank in results[world]("too few"):
        assert rank["error"] == "ValueError: x needs at least 2 samples to have a variance, got 1"


every_way = pytest.mark.parametrize("way", ["backward", "grad", "grad_of_both"])


@both_worlds
@every_way
@pytest.mark.parametrize("name", ["vicreg", "slot", "global"])
def test_second_derivatives_through_the_gather_raise(results, world, name, way):
    for rank in results[world](f"second {name}"):
        assert isinstance(rank[way], str), f"a number instead of an error: {rank[way]}"
        assert re.search("twice|second derivative", rank[way]), rank[way]


@both_worlds
@every_way
def test_second_derivatives_of_per_image_statistics_raise_or_are_right(results, world, way):
    """Images' statistics are not gathered: the gradient is R n_r / N = 1 times that of this rank's own loss."""
    inputs = good_arguments("image")
    maps = inputs["x1_maps"].requires_grad_()
    places = inputs["x1_locations"], inputs["x2_locations"]
    local = reference.local_terms(maps, inputs["x2_maps"], *places, M, GAMMA, EPS)
    loss = sum(w * t for terms in local for w, t in zip(COEFFICIENTS, terms, strict=True)) / 2
    (first,) = torch.autograd.grad(loss, maps, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), maps)
    for rank in results[world]("second image"):
        if isinstance(rank[way], str):
            assert re.search("twice|second derivative", rank[way]), rank[way]
        else:
            torch.testing.assert_close(rank[way], second, **EXACT)


# -- one process ------------------------------------------------------------------------------------------------


def one_process(kind: str) -> None:
    network = Network(kind)
    a, b, *places = whole_batch(4)
    losses = call(make_loss(kind, gather_distributed=True), kind, network(a, b), places)
    gradients = torch.autograd.grad(losses["loss"], list(network.parameters()))
    truth = true_losses(kind, network(a, b), places)
    torch.testing.assert_close(losses, truth, **EXACT)
    true_gradients = torch.autograd.grad(truth["loss"], list(network.parameters()))
    torch.testing.assert_close(gradients, true_gradients, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_process_group_it_is_a_single_process(kind):
    assert not dist.is_initialized()
    one_process(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_one_rank_is_a_single_process(kind):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        one_process(kind)
    finally:
        dist.destroy_process_group()
