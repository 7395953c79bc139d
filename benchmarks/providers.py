"""The providers: the implementations that are compared, and the definition of the loss that each computes."""

import atexit
import functools
import gc
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from vicreg_fast import VICRegLLoss, VICRegLoss, backends, functional, reference

from . import libraries
from .cases import Case
from .libraries import Definition, Losses

PROVIDERS = {
    "eager": "vicreg_fast/reference.py on the inputs as they are: bfloat16 inputs multiply in bfloat16, float32 inputs in "
    "float32 or, at precision high, in TF32; patches are compared by exact differences, in float32 at least",
    "compile": "torch.compile of eager, dynamic=False, default mode",
    "cdist": "eager with torch.cdist's default, a matmul in float32, as under autocast; matching: cdist, min and topk",
    "bmm": "matching: norms, torch.bmm (of bfloat16 with float32 sums), min and topk",
    "aten": "vicreg_fast with backend='aten'",
    "triton": "vicreg_fast with backend='triton'",
}
LIBRARIES = tuple(dict.fromkeys([*libraries.VICREG, *libraries.VICREGL]))
OURS = ("triton", "aten")  # vicreg_fast's time is that of the first that is available, as with backend="auto"
AS = "vicreg_fast-as-"  # with a library's name: vicreg_fast computing that library's definition
DROP_IN = Definition(25.0, 15.0, 1.0, 0.0)  # the defaults of VICRegLoss and VICRegLLoss
Distances = Callable[[Tensor, Tensor], Tensor]


class Provider(NamedTuple):
    """An implementation, or the ``reason`` why there is none."""

    losses: Losses | None
    reason: str | None = None
    definition: Definition = DROP_IN


def names() -> list[str]:
    """The names that ``--provider`` takes."""
    return [*PROVIDERS, *LIBRARIES, *(AS + library for library in LIBRARIES)]


@contextmanager
def matmul_precision(precision: str | None, device: torch.device) -> Iterator[None]:
    """Let torch's float32 matmuls use TF32 at "high" and float32 otherwise, in eager code and in Inductor.

    This uses the older of torch's two interfaces, which sets both: with ``fp32_precision`` alone, Inductor of torch 2.11
    and older reads the older one and raises.  A CPU multiplies in float32 whatever is set.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def definition_of(case: Case) -> Definition:
    """The definition of all providers except other libraries."""
    if case.suite == "vicregl":
        return DROP_IN._replace(statistics=case.shape["statistics"], match_order=case.shape["match_order"])
    return DROP_IN


# -- eager code ---------------------------------------------------------------------------------------------------


def _weighted(terms: Sequence[reference.VICRegTerms], definition: Definition) -> dict[str, Tensor]:
    """The mean of several losses' terms, weighted, and their sum."""
    means = [sum(term) / len(terms) for term in zip(*terms, strict=True)]
    weighted = [w * mean for w, mean in zip(definition[:3], means, strict=True)]
    return {**dict(zip(("inv-loss", "var-loss", "cov-loss"), weighted, strict=True)), "loss": sum(weighted)}


def eager(definition: Definition, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The published code.  Unlike ``backend="reference"`` it does not upcast."""
    return _weighted([reference.vicreg_terms(x, y, 1.0, definition.eps)], definition)


def _eager_on_ranks(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Every rank computes the loss of the rows of all ranks, gathered with gradient."""
    return eager(DROP_IN, *(torch.cat(all_gather(z)) for z in (x, y)))  # type: ignore[no-untyped-call]


def eager_local(
    counts: Sequence[int],
    distances: Distances,
    definition: Definition,
    x: Tensor,
    y: Tensor,
    *locations: Tensor,
) -> dict[str, Tensor]:
    """VICRegL's local loss in eager code.  Patches are compared in float32 at least, as under autocast."""
    wide = [z.detach().float() if z.dtype.itemsize < 4 else z.detach() for z in (x, y)]
    terms = []
    for a, b in (locations, wide):
        for first, second, maps, m in ((a, b, (x, y), counts[0]), (b, a, (y, x), counts[1])):
            matches = reference.select(distances(first, second), m, definition.match_order)
            terms.append(reference.matched_terms(*maps, matches, 1.0, definition.eps, definition.statistics))
    return _weighted(terms, definition)


def _cdist(queries: Tensor, candidates: Tensor) -> Tensor:
    return torch.cdist(queries.float(), candidates.float())


def _bmm(queries: Tensor, candidates: Tensor) -> Tensor:
    """Squared distances without the queries' norms, which do not change the nearest candidate."""
    if queries.dtype.itemsize == 2 and queries.device.type == "cuda":
        dots = torch.bmm(queries, candidates.mT, out_dtype=torch.float32)
    else:
        dots = torch.bmm(queries.float(), candidates.float().mT)
    return candidates.float().square().sum(-1)[:, None, :] - 2 * dots


def _nearest(m: int, distances: Distances, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Matches from a matrix of distances: the row minima, and the smallest of them."""
    d, candidate = distances(x, y).min(-1)
    if distances is _bmm:
        d = (d + x.float().square().sum(-1)).clamp(min=0).sqrt()
    distance, query = d.topk(m, dim=-1, largest=False, sorted=True)
    return {"query": query, "candidate": candidate.gather(-1, query), "distance": distance}


def eager_of(case: Case, definition: Definition) -> Losses:
    """The reference of a shape."""
    if case.suite == "vicregl":
        return partial(eager_local, case.shape["m"], reference.distances, definition)
    if case.suite == "matching":
        return partial(_nearest, case.shape["m"], lambda x, y: reference.distances(x.float(), y.float()))
    return partial(eager, definition)


# -- vicreg_fast, torch.compile and other libraries ---------------------------------------------------------------


def _matches(m: int, backend: str, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    matches = functional.match_patches(x, y, m, backend=backend)
    return dict(zip(("query", "candidate", "distance"), matches, strict=True))


def ours_of(case: Case, backend: str, definition: Definition) -> Losses:
    """vicreg_fast on a backend."""
    if case.suite == "matching":
        return partial(_matches, case.shape["m"], backend)
    options: dict[str, Any] = {"eps": definition.eps, "backend": backend, "precision": case.precision}
    if case.suite == "vicregl":
        options |= {"statistics": definition.statistics, "match_order": definition.match_order}
        local = VICRegLLoss(tuple(case.shape["m"]), 0.0, *definition[:3], **options)
        return lambda x, y, x_locations, y_locations: dict(local(x, y, None, None, x_locations, y_locations))
    loss = VICRegLoss(*definition[:3], gather_distributed=case.suite == "distributed", **options)
    return lambda x, y: dict(loss(x, y))


def ours(case: Case, backend: str, device: torch.device, definition: Definition) -> Provider:
    """vicreg_fast on a backend, where that can be timed."""
    try:
        chosen = backends.choose(backend, device, (case.dtype,))
    except ValueError as error:
        return Provider(None, str(error), definition)
    if chosen == "triton" and device.type == "cpu":
        return Provider(None, "Triton's interpreter is not timed", definition)
    return Provider(ours_of(case, chosen, definition), None, definition)


@functools.cache
def _keep_compiler() -> None:
    """Import the compiler and freeze its objects, which would cost every later garbage collection 0.3 s."""
    importlib.import_module("torch._inductor.compile_fx")
    gc.freeze()
    atexit.register(gc.unfreeze)  # extensions complain about frozen objects when the interpreter exits


def _compiled(case: Case, device: torch.device, definition: Definition, skip: str | None) -> Provider:
    needs_triton = device.type == "cuda" and importlib.util.find_spec("triton") is None
    if skip or needs_triton:
        return Provider(None, skip or "Inductor needs Triton", definition)
    # Compiled anew for each shape, as for a user with one shape: Dynamo gives up after eight recompilations.
    torch.compiler.reset()
    _keep_compiler()
    losses = eager_of(case, definition)
    if case.suite == "matching":
        return Provider(torch.compile(losses, dynamic=False), None, definition)
    # A compiled backward pass computes a gradient for every output, also for unused ones: return the sum alone.
    return Provider(torch.compile(lambda *z: {"loss": losses(*z)["loss"]}, dynamic=False), None, definition)


def _library(case: Case, library: libraries.Library) -> Provider:
    losses = libraries.find(library, *([tuple(case.shape["m"])] if case.suite == "vicregl" else []))
    if isinstance(losses, str):
        return Provider(None, losses, library.definition)
    return Provider(losses, None, library.definition)


def makers(case: Case, device: torch.device, skip: str | None = None) -> dict[str, Callable[[], Provider]]:
    """By name, a function that makes each provider of a shape: nothing is imported or compiled before it is called.

    ``skip``: the reason to leave out ``torch.compile``.
    """
    definition, m, on_ranks = definition_of(case), case.shape.get("m", 0), case.suite == "distributed"
    made: dict[str, Callable[[], Provider]] = {}
    losses: Losses = _eager_on_ranks if on_ranks else eager_of(case, definition)
    made["eager"] = lambda: Provider(losses, None, definition)
    if not on_ranks:
        made["compile"] = partial(_compiled, case, device, definition, skip)
    if case.suite == "vicregl":
        made["cdist"] = lambda: Provider(partial(eager_local, m, _cdist, definition), None, definition)
    elif case.suite == "matching":
        made["cdist"] = lambda: Provider(partial(_nearest, m, _cdist))
        made["bmm"] = lambda: Provider(partial(_nearest, m, _bmm))
    for backend in ("aten", "triton"):
        made[backend] = partial(ours, case, backend, device, definition)
    for name, library in {"vicreg": libraries.VICREG, "vicregl": libraries.VICREGL}.get(case.suite, {}).items():
        # A library with other statistics has shapes of its own.
        if case.suite == "vicreg" or library.definition[4:] == definition[4:]:
            made[name] = partial(_library, case, library)
            made[AS + name] = partial(ours, case, "auto", device, library.definition)
    return made


def names_of(case: Case) -> list[str]:
    """The providers that may compute a shape."""
    return list(makers(case, torch.device("cpu")))


def providers(
    case: Case, device: torch.device, only: Sequence[str] | None = None, skip_compile: bool = False
) -> Iterator[tuple[str, Provider]]:
    """The providers of a shape by name.  ``only``: these.  ``skip_compile``: no time is left for ``torch.compile``."""
    skip = None
    if only is None and (skip_compile or not case.compiled):
        why = "no time is left" if case.compiled else "compiled at other shapes"
        skip = f"{why}; --provider compile measures it"
    missing = set()
    for name, make in makers(case, device, skip).items():
        # Without a library, vicreg_fast with its definition has no counterpart.
        if name.removeprefix(AS) in missing if only is None else name not in only:
            continue
        provider = make()
        if provider.losses is None:
            missing.add(name)
        yield name, provider
