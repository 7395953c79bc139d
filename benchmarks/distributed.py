"""The distributed suite: a process a rank, statistics over the rows of all ranks.

Eager code gathers every rank's rows, with gradient, and computes the loss of all of them on every rank.  A step begins at a
barrier, is timed on every rank as in mode launch of one device, and its time and peak memory are the largest of any rank.
"""

import math
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from vicreg_fast import VICRegLoss

from . import providers, records, report
from .cases import CASES, PARTS, Case, Distributed
from .libraries import Losses
from .memory import tensor_bytes
from .providers import DROP_IN, Provider
from .timing import Bench, Effort, Step, Times

_CPU_RANKS = 2
_TIMEOUT = timedelta(seconds=120)  # no rank waits longer for one that has failed


def measure(
    case: Distributed,
    record: dict[str, Any],
    ceilings: dict[str, Any],
    device: torch.device,
    effort: Effort,
    wanted: Sequence[str] | None,
) -> None:
    """Gate and time every provider of a case on all ranks; fills ``record``."""
    ranks = torch.cuda.device_count() if device.type == "cuda" else _CPU_RANKS
    record["shape"]["ranks"] = ranks
    if ranks < 2:
        record.update(status="left out", reason="one GPU is one rank: there is nothing to gather")
        return
    record["samples"] *= ranks
    # Of a CPU's ceilings all ranks have a share.
    devices = ranks if device.type == "cuda" else 1
    record["floor"] = report.floor(replace(case, N=case.N * ranks), ceilings, devices)
    with tempfile.TemporaryDirectory() as folder:
        answer = os.path.join(folder, "answer")
        arguments = (ranks, os.path.join(folder, "store"), answer, case.name, device.type, effort, wanted)
        mp.spawn(_rank, arguments, nprocs=ranks)  # type: ignore[attr-defined, no-untyped-call]
        record["providers"] = torch.load(answer, weights_only=True)


def _rank(
    rank: int, ranks: int, store: str, answer: str, name: str, kind: str, effort: Effort, wanted: Any
) -> None:
    """What one process does; the first writes the answer."""
    # Of the one way to gather with gradient that every torch from 2.10 on has.
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional", FutureWarning)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    (case,) = [case for case in CASES if case.name == name]
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=ranks, timeout=_TIMEOUT)
    try:
        with providers.products_of(case.precision, device):
            found = _measured(case, device, rank, ranks, effort, wanted)
        if rank == 0:
            torch.save(found, answer)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _eager(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    x, y = (torch.cat(all_gather(z)) for z in (x, y))  # type: ignore[no-untyped-call]
    return providers.eager(x, y)


def _providers(case: Case, device: torch.device, wanted: Sequence[str] | None) -> dict[str, Provider]:
    found = {"eager": Provider(_eager)}
    for backend in ("aten", "triton"):
        found[backend] = providers.ours(case, backend, device, DROP_IN)
        if found[backend].losses is not None:
            loss = VICRegLoss(backend=backend, precision=case.precision, gather_distributed=True)
            found[backend] = Provider(lambda x, y, loss=loss: dict(loss(x, y)))
    return {name: provider for name, provider in found.items() if wanted is None or name in wanted}


def _errors(case: Case, losses: Losses, rank: int, ranks: int, device: torch.device) -> dict[str, float]:
    """Of the loss and of every rank's part of its gradient, against one process that holds all rows."""
    parts = [case.inputs(seed, device) for seed in range(ranks)]
    whole = tuple(torch.cat([part[k].detach() for part in parts]).requires_grad_() for k in range(2))
    true = providers.truth(case, DROP_IN, whole)
    found = providers.evaluate(case, losses, parts[rank])
    gathered = []
    for gradient in found.gradients["loss"]:
        every = [torch.empty_like(gradient) for _ in range(ranks)]
        dist.all_gather(every, gradient.contiguous())
        gathered.append(torch.cat(every) / ranks)  # as DistributedDataParallel averages
    values = {"loss": found.values["loss"]}
    relative = providers.errors(providers.Evaluation(values, {"loss": tuple(gathered)}), true)
    # All ranks must say the same of a provider, or some would wait for others: the worst, and no number is the worst.
    worst = torch.tensor(list(relative.values()), dtype=torch.float64, device=device).nan_to_num(nan=math.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(relative, worst.tolist(), strict=True))


def _measured(
    case: Case, device: torch.device, rank: int, ranks: int, effort: Effort, wanted: Sequence[str] | None
) -> dict[str, Any]:
    bench = Bench(device)
    entries: dict[str, Any] = {}
    steps: dict[str, list[Step]] = {}
    inputs = [case.inputs(rank, device)]
    sets = bench.sets(tensor_bytes(*inputs[0]))
    inputs += [case.inputs(rank + number * ranks, device) for number in range(1, sets)]
    for name, provider in _providers(case, device, wanted).items():
        entry = entries[name] = records.provider_entry(provider)
        if provider.losses is None:
            continue
        with records.recorded(entry):
            found = _errors(case, provider.losses, rank, ranks, device)
        # What a rank raised the others must know, or they would wait for it; of one they say its words.
        if reasons := [reason for reason in _gathered(entry["reason"], ranks) if reason is not None]:
            entry["status"] = max(
                _gathered(entry["status"], ranks), key=("right", "out of memory", "error").index
            )
            entry["reason"] = reasons[0]
        elif records.judged(entry, found, providers.BOUNDS[case.products]):
            steps[name] = [Step(provider.losses, tensors) for tensors in inputs]
            peaks = _gathered(steps[name][0].peak_bytes(bench.peak_bytes), ranks)
            entry["peak_bytes"].update({part: max(peak[part] for peak in peaks) for part in peaks[0]})
    samples: dict[str, list[list[float]]] = {name: [] for name in steps}
    begin, rounds, go_on = time.perf_counter(), -1, bool(steps)
    while go_on:
        rounds += 1
        order = list(steps)
        first = rounds % len(order)
        for name in order[first:] + order[:first]:
            step = steps[name][rounds % sets]
            if not bench.on_gpu:  # as in timing.launched; every time, because ranks must do the same
                step.both()
                step.clear()
            dist.barrier()
            seconds = bench.time(step.parts, idle=True).device
            step.clear()
            slowest = torch.tensor([*seconds, sum(seconds)], dtype=torch.float64, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            samples[name].append(slowest.tolist())
        # The first rank's clock decides for all.
        over = rounds >= effort.least and (
            rounds >= effort.most or time.perf_counter() - begin >= effort.seconds
        )
        vote = torch.tensor(int(over), device=device)
        dist.broadcast(vote, 0)
        go_on = not vote.item()
    for name, rows in samples.items():
        times = {
            part: Times(list(column), [])
            for part, column in zip(PARTS, zip(*rows[1:], strict=True), strict=True)
        }
        records.write_times(records.mode_entry("launch", entries[name]), times, with_host=False)
    return entries


def _gathered(mine: Any, ranks: int) -> list[Any]:
    """What every rank has."""
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, mine)
    return every
