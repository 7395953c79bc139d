"""The backends' stages behind one call each: direct in eager mode, opaque operators while compiling.

A registered operator costs tens of microseconds more than the call, and a traced loop over blocks would put
thousands of nodes in a graph; so eager code calls the stage and traced code the operator.  The operators have no
autograd of their own: :mod:`vicreg_fast.autograd` differentiates both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, precision
from .multiview import Plan


def terms(plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """[weighted inv, var, cov and their sum of every group, then what every group saves]."""
    if torch.compiler.is_compiling():
        return torch.ops.vicreg_fast.terms(sources, indices, *plan)  # type: ignore[no-any-return]
    return backends.stages(plan.backend).terms(plan, sources, indices)  # type: ignore[no-any-return]


def gradient(
    plan: Plan,
    sources: Sequence[Tensor],
    indices: Sequence[Tensor],
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the sources that ``needs`` marks."""
    if torch.compiler.is_compiling():
        return torch.ops.vicreg_fast.gradient(sources, indices, saved, upstream, needs, *plan)  # type: ignore[no-any-return]
    stages = backends.stages(plan.backend)
    return stages.gradient(plan, sources, indices, saved, upstream, needs)  # type: ignore[no-any-return]


def match(
    queries: Tensor, candidates: Tensor, num_matches: int, match_order: str, backend: str
) -> list[Tensor]:
    """[query, candidate] of queries -> candidates and [query, candidate] of candidates -> queries."""
    queries, candidates = queries.detach(), candidates.detach()
    if torch.compiler.is_compiling():
        return torch.ops.vicreg_fast.match(queries, candidates, num_matches, match_order, backend)  # type: ignore[no-any-return]
    return backends.stages(backend).match(queries, candidates, num_matches, match_order)  # type: ignore[no-any-return]


_PLAN = (
    "int[] view_source, int[] group_sizes, int[] pairs, bool across, float gamma, float eps, "
    "str? precision, bool covariance, str backend, float[] weights, bool keep"
)
torch.library.define("vicreg_fast::terms", f"(Tensor[] sources, Tensor[] indices, {_PLAN}) -> Tensor[]")
torch.library.define(
    "vicreg_fast::gradient",
    "(Tensor[] sources, Tensor[] indices, Tensor[] saved, Tensor?[] upstream, bool[] needs, "
    f"{_PLAN}) -> Tensor[]",
)
torch.library.define(
    "vicreg_fast::match",
    "(Tensor queries, Tensor candidates, SymInt num_matches, str match_order, str backend) -> Tensor[]",
)


def _resolved(constants: Sequence[Any], sources: Sequence[Tensor]) -> Plan:
    """The plan that an operator was called with, its backend chosen for these sources."""
    plan = Plan(*constants)
    backend = backends.resolve(plan.backend, sources[0].device, [source.dtype for source in sources])
    return plan._replace(backend=backend)


@torch.library.impl("vicreg_fast::terms", "default")
def _terms(sources: list[Tensor], indices: list[Tensor], *constants: Any) -> list[Tensor]:
    plan = _resolved(constants, sources)
    backends.require(plan.backend, sources[0].device, [source.dtype for source in sources])
    return backends.stages(plan.backend).terms(plan, sources, indices)  # type: ignore[no-any-return]


@torch.library.register_fake("vicreg_fast::terms")  # type: ignore[untyped-decorator]
def _fake_terms(sources: list[Tensor], indices: list[Tensor], *constants: Any) -> list[Tensor]:
    plan = _resolved(constants, sources)
    dtype = precision.accumulation_dtype([s.dtype for s in sources])
    new = sources[0].new_empty
    outputs = [new((), dtype=dtype) for _ in range(4 * len(plan.group_sizes))]
    saved = backends.stages(plan.backend).saved
    for group in plan.groups(sources, indices):
        outputs.extend(new(s, dtype=t) for s, t in saved(plan, sources, len(group), *group[0][1].shape))
    return outputs


@torch.library.impl("vicreg_fast::gradient", "default")
def _gradient(
    sources: list[Tensor],
    indices: list[Tensor],
    saved: list[Tensor],
    upstream: list[Tensor | None],
    needs: list[bool],
    *constants: Any,
) -> list[Tensor]:
    plan = _resolved(constants, sources)
    stages = backends.stages(plan.backend)
    return stages.gradient(plan, sources, indices, saved, upstream, needs)  # type: ignore[no-any-return]


@torch.library.register_fake("vicreg_fast::gradient")  # type: ignore[untyped-decorator]
def _fake_gradient(
    sources: list[Tensor],
    indices: list[Tensor],
    saved: list[Tensor],
    upstream: list[Tensor | None],
    needs: list[bool],
    *constants: Any,
) -> list[Tensor]:
    return [source.new_empty(source.shape) for source, need in zip(sources, needs, strict=True) if need]


@torch.library.impl("vicreg_fast::match", "default")
def _match(
    queries: Tensor, candidates: Tensor, num_matches: int, match_order: str, backend: str
) -> list[Tensor]:
    return backends.stages(backend).match(queries, candidates, num_matches, match_order)  # type: ignore[no-any-return]


@torch.library.register_fake("vicreg_fast::match")  # type: ignore[untyped-decorator]
def _fake_match(
    queries: Tensor, candidates: Tensor, num_matches: int, match_order: str, backend: str
) -> list[Tensor]:
    def index(rows: Tensor) -> Tensor:
        return rows.new_empty((rows.shape[0], min(num_matches, rows.shape[1])), dtype=torch.int64)

    return [index(queries), index(queries), index(candidates), index(candidates)]
