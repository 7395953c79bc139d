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
from .multiview import Plan, index_shapes


def terms(plan: Plan, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """[the plan's outputs: weighted inv, var, cov and their sum of every loss, their total; then what is saved]."""
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
    maps: Sequence[Tensor],
    locations: Sequence[Tensor],
    counts: Sequence[int],
    match_order: str,
    across: bool,
    backend: str,
) -> list[Tensor]:
    """Numbers of matched patches: by location, if there are locations, and by the maps' features.

    ``maps``, ``locations``: of both views.  ``counts``: matches from the first view to the second and back; of one
    direction alone, that one.  Tensors as :func:`multiview.index_shapes` says; of both directions' views, queries and
    then their candidates.  Kernels add a zero, the ticket that the terms' programs are counted with.
    """
    maps, locations = [z.detach() for z in maps], [z.detach() for z in locations]
    if torch.compiler.is_compiling():
        return torch.ops.vicreg_fast.match(maps, locations, counts, match_order, across, backend)  # type: ignore[no-any-return]
    return backends.stages(backend).match(maps, locations, counts, match_order, across)  # type: ignore[no-any-return]


def match_distances(queries: Tensor, candidates: Tensor, matches: Tensor, backend: str) -> Tensor:
    """Euclidean distances (B, m) of matches (2, B, m); carries no gradient."""
    if torch.compiler.is_compiling():
        return torch.ops.vicreg_fast.match_distances(queries, candidates, matches, backend)  # type: ignore[no-any-return]
    return backends.stages(backend).match_distances(queries, candidates, matches)  # type: ignore[no-any-return]


_PLAN = (
    "int[] view_source, int[] group_sizes, int[] pairs, bool across, float gamma, float eps, "
    "str? precision, bool covariance, str backend, float[] weights, bool keep, int averaged"
)
torch.library.define("vicreg_fast::terms", f"(Tensor[] sources, Tensor[] indices, {_PLAN}) -> Tensor[]")
torch.library.define(
    "vicreg_fast::gradient",
    "(Tensor[] sources, Tensor[] indices, Tensor[] saved, Tensor?[] upstream, bool[] needs, "
    f"{_PLAN}) -> Tensor[]",
)
torch.library.define(
    "vicreg_fast::match",
    "(Tensor[] maps, Tensor[] locations, SymInt[] counts, str match_order, bool across, str backend) -> Tensor[]",
)
torch.library.define(
    "vicreg_fast::match_distances",
    "(Tensor queries, Tensor candidates, Tensor matches, str backend) -> Tensor",
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
    outputs = [new((), dtype=dtype) for _ in range(plan.outputs)]
    saved = backends.stages(plan.backend).saved(plan, sources, indices)
    return [*outputs, *(new(shape, dtype=dtype) for shape, dtype in saved)]


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


def _resolved_backend(backend: str, maps: Sequence[Tensor]) -> str:
    """The backend that "auto" means for these maps; raises where the one that is asked for cannot run on them."""
    dtypes = [z.dtype for z in maps]
    backend = backends.resolve(backend, maps[0].device, dtypes)
    backends.require(backend, maps[0].device, dtypes)
    return backend


@torch.library.impl("vicreg_fast::match", "default")
def _match(
    maps: list[Tensor],
    locations: list[Tensor],
    counts: list[int],
    match_order: str,
    across: bool,
    backend: str,
) -> list[Tensor]:
    stages = backends.stages(_resolved_backend(backend, maps))
    return stages.match(maps, locations, counts, match_order, across)  # type: ignore[no-any-return]


@torch.library.register_fake("vicreg_fast::match")  # type: ignore[untyped-decorator]
def _fake_match(
    maps: list[Tensor],
    locations: list[Tensor],
    counts: list[int],
    match_order: str,
    across: bool,
    backend: str,
) -> list[Tensor]:
    shapes = index_shapes(maps[0].shape[0], counts, across) * (2 if locations else 1)
    found = [maps[0].new_empty(shape, dtype=torch.int64) for shape in shapes]
    if _resolved_backend(backend, maps) == "triton":
        found.append(maps[0].new_empty(1, dtype=torch.int32))
    return found


@torch.library.impl("vicreg_fast::match_distances", "default")
def _match_distances(queries: Tensor, candidates: Tensor, matches: Tensor, backend: str) -> Tensor:
    stages = backends.stages(_resolved_backend(backend, [queries, candidates]))
    return stages.match_distances(queries, candidates, matches)  # type: ignore[no-any-return]


@torch.library.register_fake("vicreg_fast::match_distances")  # type: ignore[untyped-decorator]
def _fake_match_distances(queries: Tensor, candidates: Tensor, matches: Tensor, backend: str) -> Tensor:
    dtype = precision.accumulation_dtype([queries.dtype, candidates.dtype])
    return queries.new_empty(matches.shape[1:], dtype=dtype)
