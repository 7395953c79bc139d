"""Who computes a case, under which definition, and who is right: a provider that is wrong gets no time."""

import atexit
import functools
import gc
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_fast import VICRegLLoss, VICRegLoss, backends, functional, reference

from . import libraries
from .cases import Case, Distributed, Inputs, Local, Matching
from .libraries import Definition, Losses

Gradients = dict[str, tuple[Tensor, ...]]

PROVIDERS = {
    "eager": "vicreg_fast/reference.py on the tensors as they are: bfloat16 tensors multiply in bfloat16, float32 ones "
    "in float32 or, at precision high, in TF32; patches are compared by exact differences, in float32 at least",
    "compile": "torch.compile of the same, dynamic=False, default mode",
    "cdist": "the same with torch.cdist's default, a matrix product in float32, as under autocast; matching: cdist, min "
    "and topk",
    "bmm": "matching: norms, torch.bmm (of bfloat16 with float32 sums), min and topk",
    "aten": "vicreg_fast with backend='aten'",
    "triton": "vicreg_fast with backend='triton'",
}
LIBRARIES = tuple(dict.fromkeys([*libraries.VICREG, *libraries.VICREGL]))
OURS = ("triton", "aten")  # whose time is ours: of the first that has one
_OURS_AS = "ours as "  # and the name of the library whose definition it takes
DROP_IN = Definition(25.0, 15.0, 1.0, 0.0)  # VICRegLoss's and VICRegLLoss's defaults
# What an error may be, relative to the size of the result, before a provider gets no time.  Seen on the shapes of
# cases.py (fewer rows at 64 features), on a CPU that rounds as a GPU does, of values and gradients:
#   highest  float32: at most 4e-7.  TF32 operands: 5e-5 and more, so that TF32 in its stead is refused.
#   high     TF32 operands truncated, as cuBLAS takes them: 1.7e-3; rounded to nearest: 2e-4.
#   bf16     eager code: 7e-3.  On a GPU split sums may be rounded to bfloat16 as well.  A tile that nobody wrote, one
#            of 272 at 2048 x 2048, is 6e-2 of a gradient.
BOUNDS = {"highest": 2e-5, "high": 4e-3, "bf16": 3e-2}
# Beside the other terms the covariance's gradient could be lost in the sum: it is judged alone too.
_JUDGED = ("loss", "cov-loss")


class Provider(NamedTuple):
    """Who computes a case, or the ``reason`` why nobody does; ``definition``: of which loss, None: of the case's own."""

    losses: Losses | None
    reason: str | None = None
    definition: Definition | None = None


def names() -> list[str]:
    """What ``--provider`` takes."""
    return [*PROVIDERS, *LIBRARIES, *(_OURS_AS + library for library in LIBRARIES)]


def is_ours(name: str) -> bool:
    """Whether it is this library that computes."""
    return name in OURS or name.startswith(_OURS_AS)


def names_of(case: Case) -> list[str]:
    """Those that may compute a case."""
    if isinstance(case, Distributed):
        return ["eager", "aten", "triton"]
    return list(_makers(case, torch.device("cpu")))


@contextmanager
def products_of(precision: str | None, device: torch.device) -> Iterator[None]:
    """Let torch's own float32 products be TF32 at "high" and float32 else, for eager code and for Inductor.

    By the older of torch's two interfaces, which sets both: where only ``fp32_precision`` was set, Inductor of torch
    2.11 and older reads the older one and raises.  A CPU multiplies float32 whatever is asked.
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


def _weighed(terms: Sequence[reference.VICRegTerms], definition: Definition) -> dict[str, Tensor]:
    """The mean of several losses' terms, weighted, and their sum."""
    weights = (definition.inv_coeff, definition.var_coeff, definition.cov_coeff)
    parts = [w * sum(term) / len(terms) for w, term in zip(weights, zip(*terms, strict=True), strict=True)]
    return {**dict(zip(("inv-loss", "var-loss", "cov-loss"), parts, strict=True)), "loss": sum(parts)}


def eager(x: Tensor, y: Tensor, definition: Definition = DROP_IN) -> dict[str, Tensor]:
    """The published code: no upcast, unlike ``backend="reference"``, which is there to be right."""
    return _weighed([reference.vicreg_terms(x, y, 1.0, definition.eps)], definition)


def eager_local(
    case: Local,
    distances: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *locations: Tensor,
    definition: Definition = DROP_IN,
) -> dict[str, Tensor]:
    """VICRegL's local part in eager code; patches are compared in float32 at least, as autocast does."""
    wide = [z.detach().float() if z.dtype.itemsize < 4 else z.detach() for z in (x, y)]
    order, statistics = definition.match_order, definition.statistics
    terms = []
    for a, b in (locations, wide):
        for first, second, maps, m in ((a, b, (x, y), case.counts[0]), (b, a, (y, x), case.counts[1])):
            matches = reference.select(distances(first, second), m, order)
            terms.append(reference.matched_terms(*maps, matches, 1.0, definition.eps, statistics))
    return _weighed(terms, definition)


def _cdist(queries: Tensor, candidates: Tensor) -> Tensor:
    return torch.cdist(queries.float(), candidates.float())


def _squares(queries: Tensor, candidates: Tensor) -> Tensor:
    """Squared distances but for the queries' own norms, which do not change who is nearest."""
    if queries.dtype.itemsize == 2 and queries.device.type == "cuda":
        product = torch.bmm(queries, candidates.mT, out_dtype=torch.float32)
    else:
        product = torch.bmm(queries.float(), candidates.float().mT)
    return candidates.float().square().sum(-1)[:, None, :] - 2 * product


def _nearest(
    case: Matching, distances: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Matches by a matrix of distances: its row minima, and the least of them."""
    d, candidate = distances(x, y).min(-1)
    if distances is _squares:
        d = (d + x.float().square().sum(-1)).clamp(min=0).sqrt()
    m = case.matches or x.shape[1]
    distance, query = d.topk(m, dim=-1, largest=False, sorted=True)
    return {"query": query, "candidate": candidate.gather(-1, query), "distance": distance}


def _exact_distances(queries: Tensor, candidates: Tensor) -> Tensor:
    return reference.distances(queries.float(), candidates.float())


def _matched(case: Matching, backend: str, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    query, candidate, distance = functional.match_patches(x, y, case.matches, backend=backend)
    return {"query": query, "candidate": candidate, "distance": distance}


def eager_of(case: Case, definition: Definition) -> Losses:
    """The reference of a case."""
    if isinstance(case, Local):
        return functools.partial(eager_local, case, reference.distances, definition=definition)
    if isinstance(case, Matching):
        return functools.partial(_nearest, case, _exact_distances)
    return functools.partial(eager, definition=definition)


def ours_of(case: Case, backend: str, definition: Definition) -> Losses:
    """vicreg_fast on a backend."""
    weights = (definition.inv_coeff, definition.var_coeff, definition.cov_coeff)
    options: dict[str, Any] = {"eps": definition.eps, "backend": backend, "precision": case.precision}
    if isinstance(case, Matching):
        return functools.partial(_matched, case, backend)
    if isinstance(case, Local):
        local = VICRegLLoss(
            case.counts, 0.0, *weights, statistics=definition.statistics, match_order=definition.match_order, **options
        )  # fmt: skip
        return lambda x, y, a, b: dict(local(x, y, None, None, a, b))
    loss = VICRegLoss(*weights, **options)
    return lambda x, y: dict(loss(x, y))


def definition_of(case: Case) -> Definition:
    """Of all providers but other libraries."""
    if isinstance(case, Local):
        return DROP_IN._replace(statistics=case.statistics, match_order=case.match_order)
    return DROP_IN


def _sum_alone(losses: Losses) -> Losses:
    # Compiled backward passes take a gradient of every output, zeros where nobody asks: no output but the sum.
    return lambda *inputs: {"loss": losses(*inputs)["loss"]}


@functools.cache
def _keep_compiler() -> None:
    """Import the compiler, whose objects every later garbage collection would go through in vain, 0.3 s each."""
    importlib.import_module("torch._inductor.compile_fx")
    gc.freeze()
    atexit.register(gc.unfreeze)  # or extensions complain of what is left when the interpreter ends


def _compiled(case: Case, device: torch.device, leave_out: str | None) -> Provider:
    if leave_out is not None:
        return Provider(None, leave_out)
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return Provider(None, "Inductor needs Triton")
    # Compiled anew for each shape, as a user with one shape has it: Dynamo gives up after eight recompilations.
    torch.compiler.reset()
    _keep_compiler()
    losses = eager_of(case, definition_of(case))
    return Provider(torch.compile(losses if isinstance(case, Matching) else _sum_alone(losses), dynamic=False))


def ours(case: Case, backend: str, device: torch.device, definition: Definition) -> Provider:
    """vicreg_fast on a backend, where it can be timed."""
    try:
        chosen = backends.choose(backend, device, (case.dtype,))
    except ValueError as error:
        return Provider(None, str(error), definition)
    if chosen == "triton" and device.type == "cpu":
        return Provider(None, "Triton's interpreter is not timed", definition)
    return Provider(ours_of(case, chosen, definition), None, definition)


def _library(case: Case, library: libraries.Library) -> Provider:
    found = libraries.find(library, *([case.counts] if isinstance(case, Local) else []))
    missing = isinstance(found, str)
    return Provider(None if missing else found, found if missing else None, library.definition)  # type: ignore[arg-type]  # told apart by missing


def _makers(
    case: Case, device: torch.device, leave_out: str | None = None
) -> dict[str, Callable[[], Provider]]:
    """By name, what makes each provider of a case; nothing is imported or compiled before.

    ``leave_out``: why ``torch.compile`` is.
    """
    makers: dict[str, Callable[[], Provider]] = {
        "eager": lambda: Provider(eager_of(case, definition_of(case))),
        "compile": lambda: _compiled(case, device, leave_out),
    }
    if isinstance(case, Local):
        published = functools.partial(eager_local, case, _cdist, definition=definition_of(case))
        makers["cdist"] = lambda: Provider(published)
    elif isinstance(case, Matching):
        makers["cdist"] = lambda: Provider(functools.partial(_nearest, case, _cdist))
        makers["bmm"] = lambda: Provider(functools.partial(_nearest, case, _squares))
    for backend in ("aten", "triton"):
        makers[backend] = functools.partial(ours, case, backend, device, definition_of(case))
    known = {Matching: {}, Local: libraries.VICREGL}.get(type(case), libraries.VICREG)
    for name, library in known.items():
        definition = library.definition
        if isinstance(case, Local) and definition[4:] != (case.statistics, case.match_order):
            continue  # another loss: a case of its own has its statistics
        makers[name] = functools.partial(_library, case, library)
        makers[_OURS_AS + name] = functools.partial(ours, case, "auto", device, definition)
    return makers


def providers(
    case: Case, device: torch.device, wanted: Sequence[str] | None = None, late: bool = False
) -> Iterator[tuple[str, Provider]]:
    """By name, who computes a case; ``wanted``: these alone; ``late``: without what takes long to begin."""
    leave_out = None
    if wanted is None and (late or not case.compiled):
        why = "no time is left" if case.compiled else "compiled at other shapes"
        leave_out = f"{why}; --provider compile measures it"
    absent = set()
    for name, make in _makers(case, device, leave_out).items():
        library = name.removeprefix(_OURS_AS)
        if (wanted is None or name in wanted) and library not in absent:
            provider = make()
            if name in LIBRARIES and provider.losses is None and wanted is None:
                absent.add(name)  # nor is there anything to set beside it
            yield name, provider._replace(definition=provider.definition or definition_of(case))


class Evaluation(NamedTuple):
    """What is judged: values by name, and gradients by name with respect to the inputs that need one."""

    values: dict[str, Tensor]
    gradients: Gradients


def differentiated(inputs: Inputs) -> Inputs:
    """The inputs that need a gradient."""
    return tuple(z for z in inputs if z.requires_grad)


def values_of(case: Case, results: Mapping[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Losses; of matches the distances that were returned, and those in float64 of the patches that were chosen.

    Not the numbers: where two candidates are equally near up to rounding, either is right.
    """
    if not isinstance(case, Matching):
        return {name: value.detach() for name, value in results.items()}
    x, y = (
        reference.gather_rows(z.double(), results[name])
        for z, name in zip(inputs, ("query", "candidate"), strict=True)
    )
    return {"distance": results["distance"], "distance of the chosen": (x - y).square().sum(-1).sqrt()}


def _as_one_loss(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Terms of the losses by location and by feature as those of their mean, which eager code has."""
    if "location/loss" not in results:
        return results
    terms = ("inv-loss", "var-loss", "cov-loss")
    means = {term: (results[f"location/{term}"] + results[f"feature/{term}"]) / 2 for term in terms}
    return {**means, "loss": results["loss"]}


def evaluate(case: Case, losses: Losses, inputs: Inputs) -> Evaluation:
    """What a provider finds, in memory that was full of NaN: an element that it leaves unwritten is seen."""
    full_of_nan = [torch.full_like(z, math.nan) for z in 2 * inputs]
    # And of the sizes of buffers, 512 bytes to 1 MiB, a few of each: the allocator keeps such small blocks apart.
    small = [torch.full((1 << k,), math.nan, device=inputs[0].device) for k in range(7, 19) for _ in range(4)]
    del full_of_nan, small
    results = _as_one_loss(losses(*inputs))
    wanted = differentiated(inputs)
    judged = [name for name in _JUDGED if name in results and wanted]
    gradients = {
        name: torch.autograd.grad(results[name], wanted, retain_graph=name != judged[-1]) for name in judged
    }
    return Evaluation(values_of(case, results, inputs), gradients)


def truth(case: Case, definition: Definition, inputs: Inputs) -> Evaluation:
    """The definition in float64, its gradients kept in float32: 6e-8 beside bounds of 2e-5 and more."""
    wide = tuple(z.detach().double().requires_grad_(z.requires_grad) for z in inputs)
    if isinstance(case, Matching):
        d = reference.distances(*wide).min(-1).values.sort(-1).values[:, : case.matches]
        return Evaluation({"distance": d, "distance of the chosen": d}, {})
    values, gradients = evaluate(case, eager_of(case, definition), wide)
    return Evaluation(values, {name: tuple(g.float() for g in all_) for name, all_ in gradients.items()})


def _distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of tensors that belong together, relative to their size."""
    error = sum(float((f.double() - e).square().sum()) for f, e in zip(found, exact, strict=True))
    size = sum(float(e.double().square().sum()) for e in exact)
    if size > 0:
        return math.sqrt(error / size)
    return 0.0 if error == 0 else math.inf


def errors(found: Evaluation, true: Evaluation) -> dict[str, float]:
    """Relative error of every value and of every gradient, all inputs together, by the Euclidean norm."""
    relative = {name: _distance([value], [true.values[name]]) for name, value in found.values.items()}
    for name, gradients in found.gradients.items():
        relative[f"gradient of {name}"] = _distance(gradients, true.gradients[name])
    return relative


def wrong(relative: dict[str, float], bound: float) -> str | None:
    """The worst of the errors in words where it passes the bound or is not a number; None where all is well."""
    bad: dict[str, Any] = {name: error for name, error in relative.items() if not error <= bound}
    if not bad:
        return None
    name = max(bad, key=lambda name: math.inf if math.isnan(bad[name]) else bad[name])
    return f"{name}: error {bad[name]:.1e} of its size against float64, {bound:.0e} allowed"
