"""Scenarios with several ranks: what each rank does, how the ranks are started, and how tests read the results.

All collectives run in two spawns, of two and of three ranks: starting processes takes seconds, a scenario
milliseconds.  Each scenario has its own process group, so that a failure does not disturb the next scenario.  Each rank
saves its results in files.
"""

import datetime
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

from vicreg_fast import VICRegLoss

from .distributed_batch import (
    CASES,
    COEFFICIENTS,
    KINDS,
    UNEQUAL,
    Case,
    D,
    Network,
    arguments_of_one_rank,
    call,
    half_views,
    make_loss,
    part,
    randn,
    views,
    whole_batch,
)

WORLDS = (2, 3)
COLLECTIVE_SECONDS = 10  # a collective takes milliseconds: a longer wait means that a rank is missing
SPAWN_SECONDS = 90

Result = dict[str, Any]
Scenario = Callable[[int], Result]

both_worlds = pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"{world}ranks")


def error_of(function: Callable[[], Any]) -> str:
    """Type and message of the error that a call raises."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


# -- right input ------------------------------------------------------------------------------------------------


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


def losses_and_gradients(x: torch.Tensor, y: torch.Tensor, **options: Any) -> Result:
    """Of VICRegLoss with its own coefficients."""
    x, y = x.requires_grad_(), y.requires_grad_()
    losses = VICRegLoss(gather_distributed=True, **options)(x, y)
    losses["loss"].backward()
    return {"losses": {k: v.detach() for k, v in losses.items()}, "gradients": [x.grad, y.grad]}


def half_precision(counts: tuple[int, ...], dtype: torch.dtype, rank: int) -> Result:
    return losses_and_gradients(*part(half_views(sum(counts), dtype), counts, rank))


def strided(counts: tuple[int, ...], rank: int) -> Result:
    """Embeddings whose rows are not contiguous."""
    return losses_and_gradients(*(z.t().contiguous().t() for z in part(views(sum(counts)), counts, rank)))


def subgroup(rank: int) -> Result:
    """Ranks 0 and 2 gather from each other; rank 1 does not take part."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return {}
    return losses_and_gradients(*part(views(5), (2, 0, 3), rank), process_group=group)


# -- wrong input ------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What is wrong with an argument of the last rank, and the error that is expected."""

    kind: str
    argument: str
    corrupt: Callable[[torch.Tensor], Any]
    error: str


BAD_ON_ONE_RANK = {
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
# The arguments of each rank agree with one another, but the last rank's differ from the other ranks'.
DIFFERENT_BETWEEN_RANKS = {
    "features": Fault("vicreg", "", lambda t: t[:, :4], "ValueError: x needs the same"),
    "dtype": Fault("vicreg", "", torch.Tensor.float, "ValueError: x needs the same"),
    "image-patches": Fault("image", "2", lambda t: t[:, :5], "ValueError: x2_maps needs the same"),
    "slot-patches": Fault("slot", "2", lambda t: t[:, :5], "ValueError: x2_maps needs the same"),
    "slot-dtype": Fault("slot", "maps", torch.Tensor.float, "ValueError: x1_maps needs the same"),
    "slot-coordinates": Fault("slot", "locations", lambda t: torch.cat([t, t[..., :1]], -1), "ValueError: x1_"),
    "slot-locations-dtype": Fault("slot", "locations", torch.Tensor.float, "ValueError: x1_locations"),
}
FAULTS = BAD_ON_ONE_RANK | DIFFERENT_BETWEEN_RANKS


def with_fault(fault: Fault) -> dict[str, Any]:
    """Arguments with the fault: in the argument of its name, else in all arguments whose names contain it."""
    good = arguments_of_one_rank(fault.kind)
    if fault.argument in good:
        return {**good, fault.argument: fault.corrupt(good[fault.argument])}
    chosen = [n for n in good if fault.argument in n and not (fault.argument == "2" and n == "x2_glob")]
    return {n: fault.corrupt(t) if n in chosen else t for n, t in good.items()}


def bad_input(fault: Fault, world: int, rank: int) -> Result:
    loss = make_loss(fault.kind, gather_distributed=True)
    good = arguments_of_one_rank(fault.kind)
    arguments = with_fault(fault) if rank == world - 1 else good
    started = time.perf_counter()
    error = error_of(lambda: loss(**arguments))
    waited = time.perf_counter() - started
    return {"error": error, "waited": waited, "next": loss(**good)["loss"]}


def too_few(world: int, rank: int) -> Result:
    x, y = part([randn(1, D, seed=seed) for seed in (5, 6)], (0,) * (world - 1) + (1,), rank)
    return {"error": error_of(lambda: VICRegLoss(gather_distributed=True)(x, y))}


def second_derivative(kind: str, alpha: float, rank: int) -> Result:
    """The sum of the squared gradient, differentiated in three ways: the gradient, or the error message."""

    def prepare() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = {n: t.requires_grad_("locations" not in n) for n, t in arguments_of_one_rank(kind).items()}
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
        # The loss itself depends on the leaf, so autograd would silently drop a penalty without a path to the leaf.
        loss, penalty, leaf = prepare()
        first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
        return torch.autograd.grad(loss + penalty, leaf)[0] - first

    outcomes: Result = {}
    for function in (backward, grad, grad_of_both):
        try:
            outcomes[function.__name__] = function()
        except RuntimeError as error:
            outcomes[function.__name__] = str(error)
    return outcomes


# -- all scenarios ----------------------------------------------------------------------------------------------

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SECOND = {"vicreg": ("vicreg", 0.0), "slot": ("slot", 0.0), "global": ("image", 1.0), "image": ("image", 0.0)}


def scenarios(world: int) -> dict[str, Scenario]:
    """Every scenario of so many ranks, by name."""
    by_name: dict[str, Scenario] = {}

    def add(name: str, function: Callable[..., Result], *arguments: Any) -> None:
        by_name[name] = lambda rank: function(*arguments, rank)

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
    for name, fault in FAULTS.items():
        add(name, bad_input, fault, world)
    return by_name


def run_rank(rank: int, world: int, folder: str) -> None:
    """Run every scenario as one rank, and save the results."""
    torch.set_num_threads(1)
    for k, (name, scenario) in enumerate(scenarios(world).items()):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store-{k}",
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


def run_ranks(world: int, folder: Path) -> Callable[[str], list[Result]]:
    """Run every scenario on ``world`` ranks; returns a function that reads a scenario's results, one a rank."""
    context = mp.spawn(run_rank, (world, str(folder)), nprocs=world, join=False)
    deadline = time.monotonic() + SPAWN_SECONDS
    failure = ""
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                failure = f"the ranks did not end within {SPAWN_SECONDS} s"
                break
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        failure = str(error)
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def read(name: str) -> list[Result]:
        paths = [folder / f"{name}.{rank}" for rank in range(world)]
        missing = [path.name for path in paths if not path.exists()]
        assert not missing, f"no results {missing}: {failure}"
        results = [torch.load(path) for path in paths]
        for result in results:
            assert "crash" not in result, result["crash"]
        return results

    return read
