"""Gathers the batches of all ranks into one.

DistributedDataParallel and FSDP2 average parameter gradients over R ranks.  Every rank returns R times the gradient of
the global loss with respect to its own rows.  The average is then the gradient of one process that holds the whole batch.
Upstream gradients are assumed to be equal on all ranks, as they are if every rank adds up the same losses.  The backward
pass then needs no communication.

Ranks may hold different numbers of samples, so the counts are exchanged first.  On a GPU this is one host
synchronisation a step.
"""

from collections.abc import Callable, Mapping
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
    """The device on which this group's collectives run."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    for tensor in tensors.values():
        if isinstance(tensor, Tensor):
            return tensor.device
    return torch.device("cpu")


def exchange_counts(check: Callable[[], object], tensors: Mapping[str, Any], group: Any) -> list[int]:
    """Size of the first dimension of the named tensors on every rank, after every rank has checked its input.

    ``check`` raises TypeError or ValueError for bad input of this rank.  The rank tells the other ranks of its error,
    so that they do not wait for it.  It then raises its error, and the other ranks raise one that names the rank.  All
    dimensions but the first must agree.
    """
    error: Exception | None = None
    try:
        check()
    except (TypeError, ValueError) as raised:
        error = raised
    message = [0 if error is None else 1]
    for tensor in tensors.values():
        described = isinstance(tensor, Tensor) and error is None
        shape = list(tensor.shape) if described else []
        message += [len(shape), _DTYPES.index(tensor.dtype) if described else 0]
        message += shape + [0] * (_MAX_DIMS - len(shape))
    sent = torch.tensor(message, dtype=torch.int64, device=_device(tensors, group))
    received = [torch.empty_like(sent) for _ in range(world_size(group))]
    dist.all_gather(received, sent, group=group)
    messages = [tensor.tolist() for tensor in received]
    if error is not None:
        raise error
    failed = [rank for rank, message in enumerate(messages) if message[0]]
    if failed:
        raise RuntimeError(f"rank {failed[0]} was given bad input: its own error names the argument")
    _check_alike(list(tensors), messages)
    return [message[3] for message in messages]


def _check_alike(names: list[str], messages: list[list[int]]) -> None:
    """Raises if a tensor differs between ranks in its type or in a dimension after the first."""
    # Of each tensor: number of dimensions, index of its type, dimensions.
    width = 2 + _MAX_DIMS
    for k, name in enumerate(names):
        at = 1 + k * width
        for rank, message in enumerate(messages):
            for expected, actual in (
                (messages[0][at : at + 2], message[at : at + 2]),
                (messages[0][at + 3 : at + width], message[at + 3 : at + width]),
            ):
                if expected != actual:
                    raise ValueError(
                        f"{name} needs the same type and the same dimensions after the first on every rank, "
                        f"got {_describe(messages[0], at)} on rank 0 and {_describe(message, at)} on rank {rank}"
                    )


def _describe(message: list[int], at: int) -> str:
    shape = tuple(message[at + 2 : at + 2 + message[at]])
    return f"{shape} {str(_DTYPES[message[at + 1]])[6:]}"


class _NoSecondDerivative(torch.autograd.Function):
    """The identity in a backward pass.  Its own backward raises: other ranks would add to a second derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "gather_distributed=True has no second derivative: it would need the other ranks' part"
        )


def _without_second_derivative(grad: Tensor) -> Tensor:
    return _NoSecondDerivative.apply(grad) if torch.is_grad_enabled() else grad  # type: ignore[no-untyped-call]


class _GatherRows(torch.autograd.Function):
    """forward: the rows of all ranks, in the order of ranks.  backward: R times the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Any) -> Tensor:
        rank = dist.get_rank(group)
        ctx.start, ctx.count, ctx.ranks = sum(counts[:rank]), counts[rank], len(counts)
        # Collectives need one shape, so shorter parts are padded.  Not every backend has bfloat16, so bytes are sent.
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: counts[rank]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather([part.view(torch.uint8) for part in parts], padded.view(torch.uint8), group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _without_second_derivative(grad[ctx.start : ctx.start + ctx.count] * ctx.ranks), None, None


def gather_rows(rows: Tensor, counts: list[int], group: Any) -> Tensor:
    """Rows (n_r, ...) of every rank: (sum n_r, ...), with a gradient but no second derivative."""
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
        return _without_second_derivative(grad * ctx.factor), None, None


def average_over_samples(values: Tensor, counts: list[int], group: Any) -> Tensor:
    """Global means, from the means of every rank over its n_r samples."""
    return _AverageOverSamples.apply(values, counts, group)  # type: ignore[no-any-return, no-untyped-call]
