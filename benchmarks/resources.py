"""Compiles every kernel for a GPU that need not be present, and prints its registers, shared memory and opcodes.

The launchers run on tensors without data, as if on the target.  Each launch is recorded instead of made, so the variants are
those that the library launches.  A variant has a defect if

- it spills, exceeds the target's shared memory, or fewer of its CTAs share an SM than the launcher plans with;
- it has a matmul without tensor cores, or offsets that are not 64-bit;
- it reads or writes a tile of aligned inputs in pieces of less than 16 bytes a thread;
- a loop loads a tile without an asynchronous copy, where the target has one;
- it divides or takes a root approximately.

``defects.py`` has the exceptions from the last three, each with its reason.
"""

import functools
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction

from vicreg_fast.backends import triton_backend
from vicreg_fast.backends.triton import arguments, configs, launch_matching
from vicreg_fast.plan import LOCAL_VIEWS, ONE_VIEW, TWO_VIEWS, Matches, Plan, local_views

from . import defects, disassembly
from .variant import Variant, compile_for, variant_of

# Bytes of shared memory: the most that a CTA may have, and those of an SM.
SHARED_MEMORY = {
    "cuda:80": (166912, 167936),
    "cuda:86": (101376, 102400),
    "cuda:89": (101376, 102400),
    "cuda:90": (232448, 233472),
    "cuda:100": (232448, 233472),
    "cuda:120": (101376, 102400),
    "hip:gfx942": (65536, 65536),
}
# (P, N, D): together they reach every row of the tables, both sides, full tiles, split tiles, and both; and sizes that are
# no multiple of 16, which compile to other code.
SHAPES = (
    (64, 16, 512),
    (64, 20, 512),
    (64, 40, 64),
    (1, 128, 2048),
    (1, 256, 8192),
    (1, 512, 8192),
    (1, 2048, 8192),
    (1, 257, 1001),
    (1, 4096, 32),
    (1, 655360, 64),
    (1, 128, 96),
    (1, 4096, 256),
    (1, 6528, 512),
    (1, 1001, 257),
    (1, 7, 8),
    (1, 1_500_000, 1024),
)


class Maps(NamedTuple):
    """Two maps of B images, P1 and P2 patches and C channels, and the numbers of matches."""

    B: int
    P1: int
    P2: int
    C: int
    counts: tuple[int, int]
    coordinates: int = 2
    locations: torch.dtype = torch.float32
    channels_first: bool = False


# Both sides, one tile of distances and several, every row of the tables.
MAPS = (
    Maps(128, 49, 49, 512, (20, 20)),
    Maps(32, 49, 49, 512, (20, 16)),
    Maps(128, 49, 49, 512, (20, 20), channels_first=True),
    Maps(64, 196, 196, 768, (20, 4)),
    Maps(64, 128, 9, 130, (49, 9), coordinates=3),
    Maps(64, 100, 72, 96, (20, 20)),
    Maps(16, 64, 64, 384, (64, 64), locations=torch.float64),
    Maps(16, 300, 196, 384, (20, 20), locations=torch.float64),
    Maps(8, 50, 49, 33, (49, 20)),
    Maps(8, 64, 80, 72, (64, 64)),
    Maps(8, 30, 30, 32, (30, 30)),
    Maps(8, 50, 49, 3, (10, 10)),
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Resources(NamedTuple):
    """What a compiled variant takes, and its defects."""

    registers: int
    spilled: int  # bytes a thread
    shared: int
    ctas_per_sm: int
    narrowest_load: int | None  # bytes a thread, of loads and asynchronous copies of tiles
    copies: int  # asynchronous, in the code
    opcodes: tuple[str, ...]
    defects: tuple[str, ...]


def device_of(target: str) -> configs.Device:
    """What configurations are chosen by on a target."""
    backend, arch = target.split(":")
    name = configs.architecture(*divmod(int(arch), 10)) if backend == "cuda" else arch
    return configs.Device(name, 132 if backend == "cuda" else 304)


def _run(plan: Plan, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Forward and backward of a plan on tensors of this shape and type."""
    P, N, D = shape
    indexed = bool(plan.match_counts)
    sources = [torch.empty(P, 2 * N if indexed else N, D, dtype=dtype, device="cuda")] * plan.source_count
    if P * N * D > 1 << 30:  # strides of x are 32-bit numbers, those of y are not
        sources[1] = torch.empty_strided(shape, (2 * N * D, 2 * D, 1), dtype=dtype, device="cuda")
    index = torch.empty(4 * P * N, dtype=torch.int64, device="cuda") if indexed else None
    results = triton_backend.terms(plan, sources, None if index is None else Matches(index))
    if plan.save_for_backward:
        upstream = results[:3]
        alone = [[k == which for k in range(len(sources))] for which in range(len(sources))]
        for needs in ([True] * len(sources), *alone):
            triton_backend.gradient(plan, sources, index, results[plan.outputs :], upstream, needs)


def _run_local(maps: Maps, dtype: torch.dtype, precision: str | None) -> None:
    """Matches of both kinds and of features alone, and VICRegL's local part, forward and backward."""

    def empty(P: int, channels: int, dtype: torch.dtype) -> Tensor:
        shape = (maps.B, P, channels)
        if maps.channels_first:
            return torch.empty_strided(shape, (P * channels, 1, P), dtype=dtype, device="cuda")
        return torch.empty(shape, dtype=dtype, device="cuda")

    sources = [empty(P, maps.C, dtype) for P in (maps.P1, maps.P2)]
    locations = [empty(P, maps.coordinates, maps.locations) for P in (maps.P1, maps.P2)]
    matches = triton_backend.match(sources, locations, maps.counts, "distance", False)
    triton_backend.match(sources, locations, maps.counts, "patch", True)
    features_alone = triton_backend.match(sources, [], maps.counts[:1], "distance", False)
    one_direction = features_alone.match_index.view(2, maps.B, maps.counts[0])
    triton_backend.match_distances(sources[0], sources[1], one_direction)
    plan = local_views(maps.counts)._replace(precision=precision)
    triton_backend.terms(plan._replace(save_for_backward=False), sources, matches)
    results = triton_backend.terms(plan, sources, matches)
    ups: list[Tensor | None] = [*results[:3]] * len(plan.group_sizes)
    for upstream, needs in (
        (ups, [True, True]),
        (ups, [False, True]),
        ([None, None, *ups[2:]], [True, False]),
    ):
        triton_backend.gradient(plan, sources, matches.match_index, results[plan.outputs :], upstream, needs)


def as_if_on(
    target: str, record: Callable[..., None], device: configs.Device | None = None
) -> Iterator[AbstractContextManager[Any]]:
    """Contexts in which tensors have no data, the launchers choose as on a target, and ``record`` is called to launch."""
    yield FakeTensorMode()
    yield mock.patch.object(JITFunction, "run", record)
    yield mock.patch.object(configs, "device_of", return_value=device or device_of(target))
    yield mock.patch.object(arguments, "on_device", return_value=nullcontext())
    # No kernel, and not for tensors without data.
    yield mock.patch.object(launch_matching, "_sort_by_query", return_value=None)


def variants(target: str) -> Iterator[Variant]:
    """Every different variant that the library launches on a target, for SHAPES, types, precisions and kinds of views."""
    seen: dict[str, Variant] = {}

    def record(kernel: Any, *, grid: Any, warmup: bool, **keywords: Any) -> None:
        variant = variant_of(kernel, keywords)
        seen.setdefault(variant.key(), variant)

    # One loss of gathered rows: VICReg's kernels compute it.
    one_group = LOCAL_VIEWS._replace(view_source=LOCAL_VIEWS.view_source[:4], group_sizes=(4,))
    with ExitStack() as stack:
        for context in as_if_on(target, record):
            stack.enter_context(context)
        for shape in SHAPES:
            for dtype in DTYPES.values():
                if shape[0] * shape[1] * shape[2] > 1 << 30:
                    _run(TWO_VIEWS, shape, dtype)
                    continue
                for precision in (None, "highest", "high", "medium"):
                    plan = TWO_VIEWS._replace(precision=precision)
                    _run(plan, shape, dtype)
                    if precision is None:
                        _run(plan._replace(save_for_backward=False), shape, dtype)
                        _run(ONE_VIEW._replace(precision=precision), shape, dtype)
                    if precision is None or dtype == torch.float32:
                        gathered = one_group._replace(precision=precision, match_counts=(shape[1],) * 2)
                        _run(gathered, shape, dtype)
        for maps in MAPS:
            for dtype in DTYPES.values():
                precisions = (None, "highest", "high", "medium") if dtype == torch.float32 else (None,)
                for precision in precisions:
                    _run_local(maps, dtype, precision)
    yield from seen.values()


def examine(variant: Variant, target: str, compiled: Any = None) -> Resources:
    """Look at what the compiler made of a variant; ``compiled`` None: compile it."""
    backend, compiled = target.partition(":")[0], compiled or compile_for(variant, target)
    threads = variant.options["num_warps"] * (32 if backend == "cuda" else 64)
    limit, per_sm = SHARED_MEMORY[target]
    code = disassembly.disassembled(compiled)
    if backend == "cuda":
        registers = int(re.findall(r"REG:(\d+)", code)[0])
        # The stack holds nothing else; its instructions are looked for too, so that none is missed.
        spilled = max(int(re.findall(r"STACK:(\d+)", code)[0]), len(re.findall(r"\b(?:LDL|STL)\b", code)))
        opcodes = re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA|UTMALDG|LDGSTS)\b", code)
        ctas_per_sm = 65536 // (-(-registers // 8) * 8 * threads)
    else:
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", code)[0])
        spilled = 4 * int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", code)[0])
        opcodes = re.findall(r"v_mfma\w+", code)
        # Four SIMD units, each with 512 registers a lane.
        ctas_per_sm = 4 * (512 // (-(-registers // 8) * 8)) // variant.options["num_warps"]
    distinct = tuple(sorted(set(opcodes)))
    ctas_per_sm = max(1, min(ctas_per_sm, per_sm // (compiled.metadata.shared + 1024)))
    found = []
    if spilled:
        found.append(f"{spilled} bytes spilled")
    if backend == "cuda" and -(-registers // 8) * 8 * threads > 65536:
        found.append(f"{registers} registers in each of {threads} threads, of 65536")
    if compiled.metadata.shared > limit:
        found.append(f"{compiled.metadata.shared} bytes of shared memory, of {limit}")
    if ctas_per_sm < _planned_ctas(variant, target):
        found.append(f"{_planned_ctas(variant, target)} CTAs on an SM planned")
    if _multiplies(variant) and not any("MMA" in op or "mfma" in op for op in distinct):
        found.append("no tensor cores")
    if "i64" not in compiled.asm["ttir"]:
        found.append("no 64-bit offsets")
    tiles = disassembly.tiles(compiled.asm["ttgir"], threads)
    found += defects.defects(variant.name, target, compiled, code, tiles, variant.is_aligned)
    lines = {tile.line for tile in tiles if tile.kind != "store"}
    loads = [access for access in disassembly.accesses(code) if access.kind != "store"]
    return Resources(
        registers, spilled, compiled.metadata.shared, ctas_per_sm,
        min((access.bytes for access in loads if access.line in lines), default=None),
        sum(access.kind == "copy" for access in loads), distinct, tuple(found),
    )  # fmt: skip


def _planned_ctas(variant: Variant, target: str) -> int:
    """How many CTAs on an SM the launcher plans with, from the rows of the tables with the variant's blocks."""
    table, named = variant.name.removesuffix("_forward").removeprefix("narrow_"), variant.named_constants
    if table not in ("gram", "second_moment"):
        return 1
    blocks = (named["BLOCK_M"], named["BLOCK_K"], variant.options["num_warps"], variant.options["num_stages"])
    tables = configs.ARCHITECTURES[device_of(target).arch]
    kind = {"fp32": "fp32", "tf32": "tf32", "scaled_fp16_pair": "pair"}.get(str(named["FORMAT"]), "half")
    rows = [row for layout in tables for row in getattr(layout, table).get(kind, ())]
    narrow = variant.name.startswith("narrow")
    planned = [
        row.config.ctas_per_sm for row in rows if row.config[:4] == blocks and (row.second <= 64) == narrow
    ]
    return max(planned, default=1)


def _multiplies(variant: Variant) -> bool:
    """Whether a variant has a matmul: not if maps of few channels are matched, nor if the covariance has no gradient."""
    constants = variant.named_constants
    if variant.kernel.__name__ == "_gradient_kernel":
        upstream = variant.signature["upstream"]
        return bool(upstream.cov_ptr != "constexpr")
    return "DOT_PRECISION" in constants and not constants.get("AXES")


def _examine_nth(target: str, every: int, n: int) -> tuple[str, Resources]:
    variant = _listed(target, every)[n]
    return str(variant), examine(variant, target)


@functools.cache
def _listed(target: str, every: int) -> list[Variant]:
    return list(variants(target))[::every]


@contextmanager
def compilers() -> Iterator[ProcessPoolExecutor]:
    """Processes that compile.  Ctrl-C ends them at once: the executor alone would do everything that it was given first."""
    with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.kill()
            raise


def report(target: str, every: int = 1) -> int:
    """Print a row for every variant, or for one in ``every``; return the number of defects."""
    print(f"{'kernel':92}{'registers':>10}{'spilled':>8}{'shared':>8}{'CTAs/SM':>10}  opcodes")
    defects = 0
    count = len(_listed(target, every))
    # Variants cannot be pickled, so each process lists them again and receives a position.
    with compilers() as pool:
        for name, resources in pool.map(functools.partial(_examine_nth, target, every), range(count)):
            numbers = f"{resources.registers:>10}{resources.spilled:>8}{resources.shared:>8}{resources.ctas_per_sm:>10}"
            marks = "".join(f"  DEFECT: {defect}" for defect in resources.defects)
            print(f"{name:92}{numbers}  {' '.join(resources.opcodes)}{marks}", flush=True)
            defects += len(resources.defects)
    print(f"{count} variants, {defects} defects on {target}")
    return defects
