"""A backend's stages behind one call each: direct calls in eager mode, opaque operators while compiling.

A registered operator costs tens of microseconds more than the call, and a traced loop over blocks would put thousands of
nodes into a graph.  So eager code calls the backend, and traced code the operator.  The operators have no autograd of their
own: :mod:`vicreg_fast.autograd` differentiates both.  No operator writes to its inputs.

The backend "auto" is Triton's kernels until one of them fails, and ATen from then on.  A failed call is computed by ATen as a
whole: matching with terms, and in the backward pass what ATen saves with its gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from . import backends, precision
from .backends import kernel_failures
from .plan import Matches, Plan, index_size

Result = TypeVar("Result")


def terms(plan: Plan, sources: Sequence[Tensor], locations: Sequence[Tensor] = ()) -> tuple[Plan, list[Tensor]]:
    """The plan to differentiate by, and results.

    The plan has the backend "aten" where ATen took the place of the kernels.  Results: [the plan's outputs; the match index,
    if the plan matches patches; what the backward pass needs besides].
    Outputs: weighted inv, var, cov and their sum of every loss, then the sum of all losses if there are several.
    ``locations``: of both maps' patches; only plans that match patches have them.  The index: see :class:`plan.Matches`.
    """
    if torch.compiler.is_compiling():
        return plan, torch.ops.vicreg_fast.terms(sources, locations, *plan)
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

    ``plan`` and what follows ``sources`` are of :func:`terms`.  ``upstream``, three scalars a group, multiplies the weighted
    terms; None: the term has no upstream gradient.
    """
    if torch.compiler.is_compiling():
        return torch.ops.vicreg_fast.gradient(sources, match_index, saved, upstream, needs, *plan)  # type: ignore[no-any-return]
    return _gradient_of(plan, sources, match_index, saved, upstream, needs)


def match(queries: Tensor, candidates: Tensor, num_matches: int, backend: str) -> Tensor:
    """Matches (2, B, m) of patches (B, P1, C) among (B, P2, C), nearest first: the queries' indices, the candidates'."""
    queries, candidates = queries.detach(), candidates.detach()
    if torch.compiler.is_compiling():
        return torch.ops.vicreg_fast.match(queries, candidates, num_matches, backend)  # type: ignore[no-any-return]
    return _match_of(queries, candidates, num_matches, backend)


def match_distances(queries: Tensor, candidates: Tensor, matches: Tensor, backend: str) -> Tensor:
    """Euclidean distances (B, m) of matches (2, B, m) of any backend; carries no gradient."""
    if torch.compiler.is_compiling():
        return torch.ops.vicreg_fast.match_distances(queries, candidates, matches, backend)  # type: ignore[no-any-return]
    return _match_distances_of(queries, candidates, matches, backend)


def _with_fallback(backend: str, device: torch.device, run: Callable[[str], Result]) -> tuple[str, Result]:
    """(backend, ``run`` of it); for "auto", "triton" is run, or "aten" if the kernels fail or did before on this device."""
    if backend != "auto":
        return backend, run(backend)
    if device not in kernel_failures.reasons:
        try:
            return backend, run("triton")
        except Exception as error:
            if not kernel_failures.caused_by_kernels(error):
                raise
            kernel_failures.record(device, error)
    # Outside of the handler, where the error's traceback would keep the memory of the failed call.
    return "aten", run("aten")


def _terms_of(plan: Plan, sources: Sequence[Tensor], locations: Sequence[Tensor]) -> tuple[Plan, list[Tensor]]:
    def compute(name: str) -> list[Tensor]:
        backend = backends.module(name)
        if not plan.match_counts:
            return backend.terms(plan, sources, None)  # type: ignore[no-any-return]
        # The arrival counter that matching zeroes never leaves this call.
        matches: Matches = backend.match(sources, locations, plan.match_counts, plan.match_order, plan.per_slot)
        results = backend.terms(plan, sources, matches)
        return [*results[: plan.outputs], matches.match_index, *results[plan.outputs :]]

    backend, results = _with_fallback(plan.backend, sources[0].device, compute)
    return plan if backend == plan.backend else plan._replace(backend=backend), results


def _gradient_of(
    plan: Plan,
    sources: Sequence[Tensor],
    match_index: Tensor | None,
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    def differentiate(name: str) -> list[Tensor]:
        backend, kept = backends.module(name), saved
        if name == "aten" and plan.backend == "auto":
            # The kernels saved something else, or the operator nothing.
            matches = None if match_index is None else Matches(match_index)
            kept = backend.terms(plan, sources, matches)[plan.outputs :]
        return backend.gradient(plan, sources, match_index, kept, upstream, needs)  # type: ignore[no-any-return]

    return _with_fallback(plan.backend, sources[0].device, differentiate)[1]


def _match_of(queries: Tensor, candidates: Tensor, num_matches: int, backend: str) -> Tensor:
    def find(name: str) -> Matches:
        maps = (queries, candidates)
        return backends.module(name).match(maps, (), (num_matches,), "distance", False)  # type: ignore[no-any-return]

    _, matches = _with_fallback(backend, queries.device, find)
    return matches.match_index.view(2, queries.shape[0], num_matches)


def _match_distances_of(queries: Tensor, candidates: Tensor, matches: Tensor, backend: str) -> Tensor:
    def measure(name: str) -> Tensor:
        return backends.module(name).match_distances(queries, candidates, matches)  # type: ignore[no-any-return]

    return _with_fallback(backend, queries.device, measure)[1]


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
    """The backend for these tensors, see :func:`backends.resolve`; raises if the requested one cannot run on them."""
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


def _saved(plan: Plan, sources: Sequence[Tensor], match_index: Tensor | None) -> list[Tensor]:
    """Uninitialised memory of the shapes and types in which the operator saves.  Those of "auto" are the kernels'."""
    backend = backends.module("triton" if plan.backend == "auto" else plan.backend)
    return [
        sources[0].new_empty(shape, dtype=dtype) for shape, dtype in backend.saved(plan, sources, match_index)
    ]


@torch.library.impl("vicreg_fast::terms", "default")
def _terms(sources: list[Tensor], locations: list[Tensor], *constants: Any) -> list[Tensor]:
    plan = _resolved(constants, sources)
    computed, results = _terms_of(plan, sources, locations)
    if computed.backend != plan.backend:
        # The compiler knows the shapes that the kernels save.  ``gradient`` does not read these after a failure.
        promised = plan.outputs + bool(plan.match_counts)
        index = results[plan.outputs] if plan.match_counts else None
        results = [*results[:promised], *_saved(plan, sources, index)]
    return results


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
    return [*results, *_saved(plan, sources, index)]


@torch.library.impl("vicreg_fast::gradient", "default")
def _gradient(
    sources: list[Tensor],
    match_index: Tensor | None,
    saved: list[Tensor],
    upstream: list[Tensor | None],
    needs: list[bool],
    *constants: Any,
) -> list[Tensor]:
    return _gradient_of(_resolved(constants, sources), sources, match_index, saved, upstream, needs)


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
    return _match_distances_of(queries, candidates, matches, _resolved_backend(backend, [queries, candidates]))


@torch.library.register_fake("vicreg_fast::match_distances")  # type: ignore[untyped-decorator]
def _fake_match_distances(queries: Tensor, candidates: Tensor, matches: Tensor, backend: str) -> Tensor:
    dtype = precision.accumulation_dtype([queries.dtype, candidates.dtype])
    return queries.new_empty(matches.shape[1:], dtype=dtype)
