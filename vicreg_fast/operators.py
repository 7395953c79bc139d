"""A backend's stages behind one call each: direct calls in eager mode, opaque operators while compiling.

A registered operator costs tens of microseconds more than the call, and a traced loop over blocks would put thousands of
nodes into a graph.  So eager code calls the backend, and traced code the operator.  The operators have no autograd of their
own: :mod:`vicreg_fast.autograd` differentiates both.  No operator writes to its inputs.
"""

from collections.abc import Sequence
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from . import backends, precision
from .plan import Matches, Plan, index_size


def terms(plan: Plan, sources: Sequence[Tensor], locations: Sequence[Tensor] = ()) -> list[Tensor]:
    """[the plan's outputs; the match index, if the plan matches patches; what the backward pass needs besides].

    Outputs: weighted inv, var, cov and their sum of every loss, then the sum of all losses if there are several.
    ``locations``: of both maps' patches; only plans that match patches have them.  The index: see :class:`plan.Matches`.
    """
    if torch.compiler.is_compiling():
        return torch.ops.vicreg_fast.terms(sources, locations, *plan)  # type: ignore[no-any-return]
    return _terms_of(plan, sources, locations)


def gradient(
    plan: Plan,
    sources: Sequence[Tensor],
    match_index: Tensor | None,
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the sources that ``needs`` marks, in their own types.

    ``upstream``, three scalars a group, multiplies the weighted terms; None: the term has no upstream gradient.
    """
    if torch.compiler.is_compiling():
        return torch.ops.vicreg_fast.gradient(sources, match_index, saved, upstream, needs, *plan)  # type: ignore[no-any-return]
    backend = backends.module(plan.backend)
    return backend.gradient(plan, sources, match_index, saved, upstream, needs)  # type: ignore[no-any-return]


def match(queries: Tensor, candidates: Tensor, num_matches: int, backend: str) -> Tensor:
    """Matches (2, B, m) of patches (B, P1, C) among (B, P2, C), nearest first: the queries' indices, the candidates'."""
    queries, candidates = queries.detach(), candidates.detach()
    if torch.compiler.is_compiling():
        return torch.ops.vicreg_fast.match(queries, candidates, num_matches, backend)  # type: ignore[no-any-return]
    return _match_of(queries, candidates, num_matches, backend)


def match_distances(queries: Tensor, candidates: Tensor, matches: Tensor, backend: str) -> Tensor:
    """Euclidean distances (B, m) of matches (2, B, m); carries no gradient."""
    if torch.compiler.is_compiling():
        return torch.ops.vicreg_fast.match_distances(queries, candidates, matches, backend)  # type: ignore[no-any-return]
    return backends.module(backend).match_distances(queries, candidates, matches)  # type: ignore[no-any-return]


def _terms_of(plan: Plan, sources: Sequence[Tensor], locations: Sequence[Tensor]) -> list[Tensor]:
    backend = backends.module(plan.backend)
    if not plan.match_counts:
        return backend.terms(plan, sources, None)  # type: ignore[no-any-return]
    # The arrival counter that matching zeroes never leaves this call.
    matches: Matches = backend.match(sources, locations, plan.match_counts, plan.match_order, plan.per_slot)
    results = backend.terms(plan, sources, matches)
    return [*results[: plan.outputs], matches.match_index, *results[plan.outputs :]]


def _match_of(queries: Tensor, candidates: Tensor, num_matches: int, backend: str) -> Tensor:
    matches: Matches = backends.module(backend).match(
        (queries, candidates), (), (num_matches,), "distance", False
    )
    return matches.match_index.view(2, queries.shape[0], num_matches)


# -- the same as operators ----------------------------------------------------------------------------------------

_SCHEMA_TYPES = {bool: "bool", int: "int", float: "float", str: "str"}


def _schema_type(annotation: Any) -> str:
    """The schema's word for the annotation of a field of :class:`Plan`."""
    if get_origin(annotation) is Sequence:
        return f"{_SCHEMA_TYPES[get_args(annotation)[0]]}[]"
    options = get_args(annotation)
    if type(None) in options:
        (given,) = (option for option in options if option is not type(None))
        return f"{_SCHEMA_TYPES[given]}?"
    return _SCHEMA_TYPES[annotation]


def _plan_schema() -> str:
    """The fields of :class:`Plan` as a schema has them; the number of matches may be symbolic."""
    fields = {name: _schema_type(hint) for name, hint in get_type_hints(Plan).items()}
    fields["match_counts"] = "SymInt[]"
    return ", ".join(f"{kind} {name}" for name, kind in fields.items())


torch.library.define(
    "vicreg_fast::terms", f"(Tensor[] sources, Tensor[] locations, {_plan_schema()}) -> Tensor[]"
)
torch.library.define(
    "vicreg_fast::gradient",
    "(Tensor[] sources, Tensor? match_index, Tensor[] saved, Tensor?[] upstream, bool[] needs, "
    f"{_plan_schema()}) -> Tensor[]",
)
torch.library.define(
    "vicreg_fast::match",
    "(Tensor queries, Tensor candidates, SymInt num_matches, str backend) -> Tensor",
)
torch.library.define(
    "vicreg_fast::match_distances",
    "(Tensor queries, Tensor candidates, Tensor matches, str backend) -> Tensor",
)


def _resolved_backend(backend: str, tensors: Sequence[Tensor]) -> str:
    """The backend that "auto" means for these tensors; raises if the requested one cannot run on them."""
    dtypes = [z.dtype for z in tensors]
    backend = backends.resolve(backend, tensors[0].device, dtypes)
    backends.require(backend, tensors[0].device, dtypes)
    return backend


def _resolved(constants: Sequence[Any], sources: Sequence[Tensor], *, fake: bool = False) -> Plan:
    """The plan that an operator was called with, its backend resolved for these sources.

    ``fake``: while tracing, where the compiler would report an error of the traced code in its own words.
    """
    plan = Plan(*constants)
    if fake:
        dtypes = [z.dtype for z in sources]
        return plan._replace(backend=backends.resolve(plan.backend, sources[0].device, dtypes))
    return plan._replace(backend=_resolved_backend(plan.backend, sources))


@torch.library.impl("vicreg_fast::terms", "default")
def _terms(sources: list[Tensor], locations: list[Tensor], *constants: Any) -> list[Tensor]:
    return _terms_of(_resolved(constants, sources), sources, locations)


@torch.library.register_fake("vicreg_fast::terms")  # type: ignore[untyped-decorator]
def _fake_terms(sources: list[Tensor], locations: list[Tensor], *constants: Any) -> list[Tensor]:
    plan = _resolved(constants, sources, fake=True)
    dtype = precision.accumulation_dtype([s.dtype for s in sources])
    new = sources[0].new_empty
    results = [new((), dtype=dtype) for _ in range(plan.outputs)]
    index = None
    if plan.match_counts:
        index = new(index_size(sources[0].shape[0], plan.match_counts, plan.losses), dtype=torch.int64)
        results.append(index)
    saved = backends.module(plan.backend).saved(plan, sources, index)
    return [*results, *(new(shape, dtype=kind) for shape, kind in saved)]


@torch.library.impl("vicreg_fast::gradient", "default")
def _gradient(
    sources: list[Tensor],
    match_index: Tensor | None,
    saved: list[Tensor],
    upstream: list[Tensor | None],
    needs: list[bool],
    *constants: Any,
) -> list[Tensor]:
    plan = _resolved(constants, sources)
    backend = backends.module(plan.backend)
    return backend.gradient(plan, sources, match_index, saved, upstream, needs)  # type: ignore[no-any-return]


@torch.library.register_fake("vicreg_fast::gradient")  # type: ignore[untyped-decorator]
def _fake_gradient(
    sources: list[Tensor],
    match_index: Tensor | None,
    saved: list[Tensor],
    upstream: list[Tensor | None],
    needs: list[bool],
    *constants: Any,
) -> list[Tensor]:
    return [source.new_empty(source.shape) for source, need in zip(sources, needs, strict=True) if need]


@torch.library.impl("vicreg_fast::match", "default")
def _match(queries: Tensor, candidates: Tensor, num_matches: int, backend: str) -> Tensor:
    return _match_of(queries, candidates, num_matches, _resolved_backend(backend, [queries, candidates]))


@torch.library.register_fake("vicreg_fast::match")  # type: ignore[untyped-decorator]
def _fake_match(queries: Tensor, candidates: Tensor, num_matches: int, backend: str) -> Tensor:
    return queries.new_empty((2, queries.shape[0], num_matches), dtype=torch.int64)


@torch.library.impl("vicreg_fast::match_distances", "default")
def _match_distances(queries: Tensor, candidates: Tensor, matches: Tensor, backend: str) -> Tensor:
    module = backends.module(_resolved_backend(backend, [queries, candidates]))
    return module.match_distances(queries, candidates, matches)  # type: ignore[no-any-return]


@torch.library.register_fake("vicreg_fast::match_distances")  # type: ignore[untyped-decorator]
def _fake_match_distances(queries: Tensor, candidates: Tensor, matches: Tensor, backend: str) -> Tensor:
    dtype = precision.accumulation_dtype([queries.dtype, candidates.dtype])
    return queries.new_empty(matches.shape[1:], dtype=dtype)
