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
    """Let torch's float32 matmuls use TF32 at "high" and float32 otherwise; a CPU always multiplies in float32.

    The older of torch's two interfaces sets both; Inductor of torch 2.11 and older raises where they differ.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    torch.set_float32_matmul_precision(precision or "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def definition_of(case: Case) -> Definition:
    """The definition of all providers except other libraries."""
    return DROP_IN._replace(**{k: case.shape[k] for k in ("statistics", "match_order") if k in case.shape})


def _weighted(terms: Sequence[reference.VICRegTerms], definition: Definition) -> dict[str, Tensor]:
    """The mean of several losses' terms, weighted, and their sum."""
    means = (sum(term) / len(terms) for term in zip(*terms, strict=True))
    weighted = [coefficient * mean for coefficient, mean in zip(definition[:3], means, strict=True)]
    return {**dict(zip(("inv-loss", "var-loss", "cov-loss"), weighted, strict=True)), "loss": sum(weighted)}


def eager(definition: Definition, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The published code.  Unlike ``backend="reference"`` it does not upcast."""
    return _weighted([reference.vicreg_terms(x, y, 1.0, definition.eps)], definition)


def _eager_on_ranks(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Every rank computes the loss of the rows of all ranks, gathered with gradient."""
    return eager(DROP_IN, *(torch.cat(all_gather(z)) for z in (x, y)))  # type: ignore[no-untyped-call]


def _eager_local(
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


def _exact(queries: Tensor, candidates: Tensor) -> Tensor:
    wide = torch.promote_types(queries.dtype, torch.float32)
    return reference.distances(queries.to(wide), candidates.to(wide))


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


_DISTANCES: dict[str, dict[str, Distances]] = {
    "vicregl": {"cdist": _cdist},
    "matching": {"cdist": _cdist, "bmm": _bmm},
}
_LIBRARIES_OF = {"vicreg": libraries.VICREG, "vicregl": libraries.VICREGL}


def eager_of(case: Case, definition: Definition, distances: Distances = _exact) -> Losses:
    """The reference of a shape; with other ``distances`` a provider that is named after them."""
    if case.suite == "vicregl":
        return partial(_eager_local, case.shape["m"], distances, definition)
    if case.suite == "matching":
        return partial(_nearest, case.shape["m"], distances)
    return partial(eager, definition)


def ours_of(case: Case, backend: str, definition: Definition) -> Losses:
    """vicreg_fast on a backend."""
    if case.suite == "matching":
        keys = ("query", "candidate", "distance")
        match = partial(functional.match_patches, num_matches=case.shape["m"], backend=backend)
        return lambda x, y: dict(zip(keys, match(x, y), strict=True))
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
    if chosen == "auto":  # times of ATen must not pass for those of kernels that fail
        chosen = "triton"
    if chosen == "triton" and device.type == "cpu":
        return Provider(None, "Triton's interpreter is not timed", definition)
    return Provider(ours_of(case, chosen, definition), None, definition)


@functools.cache
def _keep_compiler() -> None:
    """Import the compiler and freeze its objects, which would cost every later garbage collection 0.3 s."""
    importlib.import_module("torch._inductor.compile_fx")
    gc.freeze()
    atexit.register(gc.unfreeze)  # extensions complain about frozen objects when the interpreter exits


def _compiled(losses: Losses, device: torch.device, definition: Definition) -> Provider:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return Provider(None, "Inductor needs Triton", definition)
    # Compiled anew for each shape, as for a user with one shape: Dynamo gives up after eight recompilations.
    torch.compiler.reset()
    _keep_compiler()

    def compiled(*inputs: Tensor) -> dict[str, Tensor]:
        results = losses(*inputs)
        # A compiled backward pass computes a gradient for every output, also for unused ones: return the sum alone.
        return {"loss": results["loss"]} if "loss" in results else results

    return Provider(torch.compile(compiled, dynamic=False), None, definition)


def _library(case: Case, library: libraries.Library) -> Provider:
    counts = [tuple(case.shape["m"])] if case.suite == "vicregl" else []
    return Provider(*libraries.find(library, *counts), library.definition)


def makers(case: Case, device: torch.device) -> dict[str, Callable[[], Provider]]:
    """By name, a function that makes each provider of a shape: nothing is imported or compiled before it is called."""
    definition, on_ranks = definition_of(case), case.suite == "distributed"
    losses = _eager_on_ranks if on_ranks else eager_of(case, definition)
    made: dict[str, Callable[[], Provider]] = {"eager": partial(Provider, losses, None, definition)}
    if not on_ranks:
        made["compile"] = partial(_compiled, losses, device, definition)
    for name, distances in _DISTANCES.get(case.suite, {}).items():
        made[name] = partial(Provider, eager_of(case, definition, distances), None, definition)
    for backend in ("aten", "triton"):
        made[backend] = partial(ours, case, backend, device, definition)
    for name, library in _LIBRARIES_OF.get(case.suite, {}).items():
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
    made, missing = makers(case, device), set()
    if only is None and "compile" in made and (skip_compile or not case.compiled):
        why = "no time is left" if case.compiled else "compiled at other shapes"
        made["compile"] = partial(Provider, None, f"{why}; --provider compile measures it", definition_of(case))
    for name, make in made.items():
        # Without a library, vicreg_fast with its definition has no counterpart.
        if name.removeprefix(AS) in missing if only is None else name not in only:
            continue
        provider = make()
        if provider.losses is None:
            missing.add(name)
        yield name, provider
