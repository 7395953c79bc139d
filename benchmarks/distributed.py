"""The distributed suite: one process a rank, statistics over the rows of all ranks.

Each rank measures as one process does, on a bench that makes all ranks agree: a call begins at a barrier, and its time, its
memory and its error are the largest of any rank.  There are no graphs.
"""

import math
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import gate, providers, targets
from .cases import Case, Inputs, vicreg
from .libraries import Definition
from .measure import Record, measure
from .timing import Bench, Call, Effort, Times

_CPU_RANKS = 2
_TIMEOUT = timedelta(seconds=120)  # the longest that a rank waits for one that has failed


class RankBench(Bench):
    """A device of one rank."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each value on any rank; NaN counts as infinite."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device).nan_to_num(nan=math.inf)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [float(value) for value in tensor.tolist()]

    def time(self, calls: Sequence[Call], idle: bool) -> list[Times]:
        """As on one device, from a barrier on."""
        dist.barrier()
        return super().time(calls, idle)

    def peak_bytes(self, *calls: Call) -> list[int]:
        """The largest peak of any rank."""
        return [int(peak) for peak in self.largest(super().peak_bytes(*calls))]

    def agree(self, value: Any) -> list[Any]:
        """The value of every rank."""
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def truth(self, case: Case, definition: Definition, inputs: Inputs) -> gate.Evaluation:
        """The float64 answer for all rows in one process, and this rank's rows of its gradients.

        Data parallelism averages the gradients of the ranks, so each is ``ranks`` times as large.
        """
        parts = [case.inputs(seed, self.device) for seed in range(self.ranks)]
        rows = tuple(torch.cat([part[k].detach() for part in parts]).requires_grad_() for k in range(2))
        values, gradients = gate.truth(case, definition, rows)

        def own(gradient: torch.Tensor) -> torch.Tensor:
            return self.ranks * gradient.chunk(self.ranks)[self.rank]

        return gate.Evaluation(values, {name: tuple(map(own, group)) for name, group in gradients.items()})


def measure_ranks(
    case: Case, record: Record, ceilings: Mapping[str, Any], device: torch.device, effort: Effort,
    only: Sequence[str] | None,
) -> None:  # fmt: skip
    """Judge and time every provider of a shape on all ranks.  Fills ``record``."""
    ranks = torch.cuda.device_count() if device.type == "cuda" else _CPU_RANKS
    record["shape"] = {**record["shape"], "ranks": ranks}
    if ranks < 2:
        record.update(status="left out", reason="one GPU is one rank: there is nothing to gather")
        return
    record["samples"] *= ranks
    devices = ranks if device.type == "cuda" else 1  # ranks on a CPU share its ceilings
    together = vicreg(case.matmul, case.shape["N"] * ranks, case.shape["D"])
    record["floor"] = targets.roofline(together, ceilings, devices)
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "output")
        arguments = (ranks, os.path.join(folder, "store"), output, case, device.type, effort, only)
        mp.spawn(_rank, arguments, nprocs=ranks)  # type: ignore[attr-defined, no-untyped-call]
        record["providers"] = torch.load(output, weights_only=True)


def _rank(
    rank: int, ranks: int, store: str, output: str, case: Case, kind: str, effort: Effort, only: Any
) -> None:
    """The work of one process.  The first rank writes the output."""
    # all_gather is deprecated, but it is the one gather with gradient in every torch from 2.10 on.
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional", FutureWarning)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=ranks, timeout=_TIMEOUT)
    try:
        record: Record = {"providers": {}}
        with providers.matmul_precision(case.precision, device):
            measure(case, record, RankBench(device), effort, only)
        if rank == 0:
            torch.save(record["providers"], output)
        dist.barrier()
    finally:
        dist.destroy_process_group()
