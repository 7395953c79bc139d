"""The whole batch from every rank's part of it.

DistributedDataParallel and FSDP2 average parameter gradients over R ranks.  Every rank returns R times the
gradient of the global loss with respect to its own rows, so that the average is the gradient of one process that
holds the whole batch.  Upstream gradients are taken to be equal on all ranks, as they are when every rank sums
the same losses; then no communication is needed in the backward.

Ranks may hold different numbers of samples.  Their counts travel first, as numbers: on a GPU this waits for the
device once a step.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_MAX_DIMS = 4
_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def world_size(group: Any) -> int:
    """Number of ranks; 1 where no process group exists."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def check_group(group: Any) -> None:
    """A process group, or None for all ranks."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"process_group needs a torch.distributed process group or None, got {group!r}")


def _device(tensors: Mapping[str, Any], group: Any) -> torch.device:
    """Where this group's collectives run."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    for tensor in tensors.values():
        if isinstance(tensor, Tensor):
            return tensor.device
    return torch.device("cpu")


def exchange_counts(tensors: Mapping[str, Any], error: Exception | None, group: Any) -> list[int]:
    """Every rank's first dimension of the named tensors, once all ranks have said that theirs are in order.

    ``error`` is what this rank's own checks found.  A rank with bad input says so here instead of leaving the
    others to wait: it raises its error, they raise one that names it.  All other dimensions must agree.
    """
    mine = [0 if error is None else 1]
    for tensor in tensors.values():
        described = isinstance(tensor, Tensor) and error is None
        shape = list(tensor.shape) if described else []
        mine += [len(shape), _DTYPES.index(tensor.dtype) if described else 0]
        mine += shape + [0] * (_MAX_DIMS - len(shape))
    sent = torch.tensor(mine, dtype=torch.int64, device=_device(tensors, group))
    received = [torch.empty_like(sent) for _ in range(world_size(group))]
    dist.all_gather(received, sent, group=group)
    ranks = [r.tolist() for r in received]
    if error is not None:
        raise error
    bad = [rank for rank, said in enumerate(ranks) if said[0]]
    if bad:
        raise RuntimeError(f"rank {bad[0]} was given bad input: its own error names the argument")
    width = 2 + _MAX_DIMS
    for number, name in enumerate(tensors):
        at = 1 + number * width
        for rank, said in enumerate(ranks):
            for first, here in (
                (ranks[0][at : at + 2], said[at : at + 2]),
                (ranks[0][at + 3 : at + width], said[at + 3 : at + width]),
            ):
                if first != here:
                    raise ValueError(
                        f"{name} needs the same type and the same dimensions after the first on every rank, "
                        f"got {_describe(ranks[0], at)} on rank 0 and {_describe(said, at)} on rank {rank}"
                    )
    return [said[3] for said in ranks]


def _describe(said: list[int], at: int) -> str:
    shape = tuple(said[at + 2 : at + 2 + said[at]])
    return f"{shape} {str(_DTYPES[said[at + 1]])[6:]}"


class _Once(torch.autograd.Function):
    """The identity, in a backward pass: what other ranks would add to a second derivative is not here."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "gather_distributed=True has no second derivative: it would need the other ranks' part"
        )


def _once(grad: Tensor) -> Tensor:
    return _Once.apply(grad) if torch.is_grad_enabled() else grad  # type: ignore[no-untyped-call]


class _GatherRows(torch.autograd.Function):
    """forward: every rank's rows, in the order of ranks.  backward: R times this rank's part of the gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Any) -> Tensor:
        rank = dist.get_rank(group)
        ctx.start, ctx.count, ctx.ranks = sum(counts[:rank]), counts[rank], len(counts)
        # Collectives need one shape: shorter parts are padded.  Bytes, because not every backend knows bfloat16.
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: counts[rank]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather([p.view(torch.uint8) for p in parts], padded.view(torch.uint8), group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _once(grad[ctx.start : ctx.start + ctx.count] * ctx.ranks), None, None


def gather_rows(rows: Tensor, counts: list[int], group: Any) -> Tensor:
    """Rows (n_r, ...) of every rank: (sum n_r, ...), with gradient (once: it has no second derivative)."""
    return _GatherRows.apply(rows, counts, group)  # type: ignore[no-any-return, no-untyped-call]


class _AverageOverSamples(torch.autograd.Function):
    """forward: sum_r n_r / N * value_r.  backward: R * n_r / N times the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: list[int], group: Any) -> Tensor:
        share = counts[dist.get_rank(group)] / sum(counts)
        ctx.factor = share * len(counts)
        total = values * share
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _once(grad * ctx.factor), None, None


def average_over_samples(values: Tensor, counts: list[int], group: Any) -> Tensor:
    """Global means from every rank's own means over n_r samples."""
    return _AverageOverSamples.apply(values, counts, group)  # type: ignore[no-any-return, no-untyped-call]
