"""The distributed suite: one process a rank, statistics over the rows of all ranks.

Each rank measures as one process does, and the bench makes all ranks agree.
"""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import providers, targets
from .cases import Case, vicreg
from .measure import Record, measure
from .timing import Bench, Effort

_CPU_RANKS = 2
_TIMEOUT = timedelta(seconds=120)  # the longest that a rank waits for one that has failed


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
        arguments = (ranks, Path(folder), case, device.type, effort, only)
        mp.spawn(_rank, arguments, nprocs=ranks)  # type: ignore[attr-defined, no-untyped-call]
        record["providers"] = torch.load(Path(folder, "providers"), weights_only=True)


def _rank(
    rank: int, ranks: int, folder: Path, case: Case, kind: str, effort: Effort, only: Sequence[str] | None
) -> None:
    """The work of one process.  The first rank writes the entries of the providers."""
    # all_gather is deprecated, but it is the one gather with gradient in every torch from 2.10 on.
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional", FutureWarning)
    if kind == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    device = torch.device(f"cuda:{rank}" if kind == "cuda" else "cpu")
    backend, store = "nccl" if kind == "cuda" else "gloo", f"file://{folder / 'store'}"
    dist.init_process_group(backend, store, rank=rank, world_size=ranks, timeout=_TIMEOUT)
    try:
        record: Record = {"providers": {}}
        with providers.matmul_precision(case.precision, device):
            measure(case, record, Bench(device), effort, only, skip_compile=False)
        if rank == 0:
            torch.save(record["providers"], folder / "providers")
        dist.barrier()
    finally:
        dist.destroy_process_group()
