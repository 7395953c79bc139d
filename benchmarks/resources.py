"""Compiles every kernel for a GPU that need not be there, and says what it would take: registers, shared memory, opcodes.

What is compiled is what the library launches: its launchers run on tensors without data, as if on the target, and each
launch is taken down in place of being made.  A variant is a defect if it spills, overruns the target's shared memory,
misses the tensor cores, or if its offsets are not 64-bit.
"""

import concurrent.futures
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vicreg_fast.backends.triton import configs, launch, matching, stages
from vicreg_fast.plan import LOCAL_VIEWS, ONE_VIEW, TWO_VIEWS, Plan, local_views

# Bytes of shared memory: of a program, and of a processor.
SHARED_MEMORY = {
    "cuda:80": (166912, 167936),
    "cuda:86": (101376, 102400),
    "cuda:89": (101376, 102400),
    "cuda:90": (232448, 233472),
    "cuda:100": (232448, 233472),
    "cuda:120": (101376, 102400),
    "hip:gfx942": (65536, 65536),
}
# (P, N, D): between them every row of the tables, both sides, products whole, split, and both; odd sizes, whose code
# is another.
SHAPES = (
    (64, 16, 512),
    (64, 20, 512),
    (1, 128, 2048),
    (1, 256, 8192),
    (1, 2048, 8192),
    (1, 257, 1001),
    (1, 4096, 32),
    (1, 655360, 64),
    (1, 4096, 256),
    (1, 6528, 512),
    (1, 1001, 257),
    (1, 7, 8),
    (1, 1_500_000, 1024),
)


class Maps(NamedTuple):
    """Two maps of B images, P1 and P2 patches, C channels, and what is matched of them."""

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
_POINTERS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Variant(NamedTuple):
    """A kernel and what Triton compiles it for."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]  # positions of arguments that are multiples of 16
    options: dict[str, Any]

    def key(self) -> str:
        """What tells it from others."""
        return repr((self.kernel.__name__, self.signature, self.constants, self.aligned, self.options))

    def __str__(self) -> str:
        shown: tuple[str, ...] = (
            "VIEWS",
            "HAS_INDEX",
            "DUAL",
            "ROUND",
            "KEEP",
            "LAST",
            "FEW",
            "AXES",
            "LOCATION_AXES",
            "NATIVE",
        )
        shown += ("BOTH", "WHOLE", "PATCH", "X", "Y", "INV", "COV")
        blocks = [v for k, v in self.constants.items() if k.startswith("BLOCK")]
        flags = [
            k.lower() if v is True else f"{k.lower()}={v}"
            for k, v in self.constants.items()
            if k in shown and v
        ]
        inputs = self.signature.get("x_ptr", self.signature.get("operand_ptr", ""))
        name = self.kernel.__name__.strip("_").replace("_kernel", "").replace("_forward", "")
        options = f"w{self.options['num_warps']}s{self.options.get('num_stages', '')}"
        return f"{name} {inputs} {'x'.join(map(str, blocks))} {options} {' '.join(flags)}"


class Resources(NamedTuple):
    """What a compiled variant takes, and what is wrong with it."""

    registers: int
    spilled: int  # bytes a thread
    shared: int
    resident: int  # programs that share a processor
    opcodes: tuple[str, ...]
    defects: tuple[str, ...]


def machine(target: str) -> configs.Machine:
    """What configurations are chosen by on a target."""
    backend, arch = target.split(":")
    name = configs.family(*divmod(int(arch), 10)) if backend == "cuda" else arch
    return configs.Machine(name, 132 if backend == "cuda" else 304)


def _variant(kernel: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Variant:
    """What Triton would compile for a launch: by each argument's type, and whether it is 1 or a multiple of 16."""
    signature, constants, aligned = {}, {}, []
    options = {k: v for k, v in keywords.items() if k not in kernel.arg_names}
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | {
        k: v for k, v in keywords.items() if k in kernel.arg_names
    }
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, named[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _POINTERS[value.dtype]
            aligned.append(position)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(position)
    return Variant(kernel, signature, constants, tuple(aligned), options)


def _run(plan: Plan, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Forward and backward of a plan on tensors of this shape and type."""
    P, N, D = shape
    indexed = len(plan.view_source) > 2
    sources = [torch.empty(P, 2 * N if indexed else N, D, dtype=dtype, device="cuda")] * plan.source_count
    if P * N * D > 1 << 30:  # strides of x are 32-bit numbers, those of y are not
        sources[1] = torch.empty_strided(shape, (2 * N * D, 2 * D, 1), dtype=dtype, device="cuda")
    indices = [torch.empty(4, P, N, dtype=torch.int64, device="cuda")] if indexed else []
    outputs = stages.terms(plan, sources, indices)
    if plan.keep:
        upstream = outputs[:3]
        for needs in ([True] * len(sources), [True] + [False] * (len(sources) - 1)):
            stages.gradient(plan, sources, indices, outputs[plan.outputs :], upstream, needs)


def _run_local(maps: Maps, dtype: torch.dtype, precision: str | None) -> None:
    """Matches of both kinds and of features alone, and the local loss, forward and backward."""

    def empty(P: int, channels: int, dtype: torch.dtype) -> Tensor:
        shape = (maps.B, P, channels)
        if maps.channels_first:
            return torch.empty_strided(shape, (P * channels, 1, P), dtype=dtype, device="cuda")
        return torch.empty(shape, dtype=dtype, device="cuda")

    sources = [empty(P, maps.C, dtype) for P in (maps.P1, maps.P2)]
    locations = [empty(P, maps.coordinates, maps.locations) for P in (maps.P1, maps.P2)]
    indices = stages.match(sources, locations, maps.counts, "distance", False)
    stages.match(sources, locations, maps.counts, "patch", True)
    matches, *_ = stages.match(sources, [], maps.counts[:1], "distance", False)
    stages.match_distances(sources[0], sources[1], matches)
    plan = local_views(maps.counts)._replace(precision=precision)
    stages.terms(plan._replace(keep=False), sources, indices)
    outputs = stages.terms(plan, sources, indices)
    ups: list[Tensor | None] = [*outputs[:3]] * len(plan.group_sizes)
    for upstream, needs in (
        (ups, [True, True]),
        (ups, [False, True]),
        ([None, None, *ups[2:]], [True, False]),
    ):
        stages.gradient(plan, sources, indices, outputs[plan.outputs :], upstream, needs)


def variants(target: str) -> Iterator[Variant]:
    """Every different variant that the library launches on a target, for SHAPES, types, precisions and kinds of views."""
    gpu = machine(target)
    seen: dict[str, Variant] = {}

    def take_down(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        variant = _variant(kernel, arguments, keywords)
        seen.setdefault(variant.key(), variant)

    one_group = LOCAL_VIEWS._replace(view_source=LOCAL_VIEWS.view_source[:4], group_sizes=(4,))
    with (
        FakeTensorMode(),
        mock.patch.object(JITFunction, "run", take_down),
        mock.patch.object(configs, "machine", return_value=gpu),
        mock.patch.object(launch, "on_device", return_value=nullcontext()),
        # ATen's, and not for tensors without a device.
        mock.patch.object(matching, "_by_number", return_value=None),
    ):
        for shape in SHAPES:
            for dtype in DTYPES.values():
                if shape[0] * shape[1] * shape[2] > 1 << 30:
                    _run(TWO_VIEWS, shape, dtype)
                    continue
                for precision in (None, "highest", "high", "medium"):
                    plan = TWO_VIEWS._replace(precision=precision)
                    _run(plan, shape, dtype)
                    if precision is None:
                        _run(plan._replace(keep=False), shape, dtype)
                        _run(ONE_VIEW._replace(precision=precision), shape, dtype)
                    if precision is None or dtype == torch.float32:
                        _run(one_group._replace(precision=precision, across=False), shape, dtype)
        for maps in MAPS:
            for dtype in DTYPES.values():
                for precision in (None, "highest", "high") if dtype == torch.float32 else (None,):
                    _run_local(maps, dtype, precision)
    yield from seen.values()


def examine(variant: Variant, target: str) -> Resources:
    """Compile a variant and look at what came out."""
    backend, arch = target.split(":")
    gpu = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    attributes = {(position,): [["tt.divisibility", 16]] for position in variant.aligned}
    source = ASTSource(variant.kernel, variant.signature, variant.constants, attributes)
    compiled = triton.compile(source, target=gpu, options=variant.options)
    threads = variant.options["num_warps"] * gpu.warp_size
    limit, whole = SHARED_MEMORY[target]
    if backend == "cuda":
        text = _disassembly(compiled)
        registers = int(re.findall(r"REG:(\d+)", text)[0])
        # The stack holds nothing else; its instructions are looked for too, so that none is missed.
        spilled = max(int(re.findall(r"STACK:(\d+)", text)[0]), len(re.findall(r"\b(?:LDL|STL)\b", text)))
        opcodes = re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA|UTMALDG|LDGSTS)\b", text)
        resident = 65536 // (-(-registers // 8) * 8 * threads)
    else:
        text = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        spilled = 4 * int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[0])
        opcodes = re.findall(r"v_mfma\w+", text)
        resident = (
            4 * (512 // (-(-registers // 8) * 8)) // variant.options["num_warps"]
        )  # four units of 512 a lane
    found = tuple(sorted(set(opcodes)))
    resident = max(1, min(resident, whole // (compiled.metadata.shared + 1024)))
    defects = []
    if spilled:
        defects.append(f"{spilled} bytes spilled")
    if backend == "cuda" and -(-registers // 8) * 8 * threads > 65536:
        defects.append(f"{registers} registers in each of {threads} threads, 65536 there")
    if compiled.metadata.shared > limit:
        defects.append(f"{compiled.metadata.shared} bytes of shared memory, {limit} there")
    constants = variant.constants
    # Maps of so few channels are matched without a product.
    multiplies = constants.get("PRECISION") and constants.get("COV", True) and not constants.get("AXES")
    if multiplies and not any("MMA" in op or "mfma" in op for op in found):
        defects.append("no tensor cores")
    if "i64" not in compiled.asm["ttir"]:
        defects.append("no 64-bit offsets")
    return Resources(registers, spilled, compiled.metadata.shared, resident, found, tuple(defects))


def _disassembly(compiled: Any) -> str:
    """Resource usage and code of a cubin, by the tools that come with Triton."""
    tools = {tool.name: tool for tool in Path(triton.__file__).parent.rglob("bin/*")}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        commands = (
            [str(tools["cuobjdump"]), "--dump-resource-usage", str(cubin)],
            [str(tools["nvdisasm"]), "-c", str(cubin)],
        )
        return "\n".join(subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)


def _numbered(target: str, every: int, number: int) -> tuple[str, Resources]:
    variant = _listed(target, every)[number]
    return str(variant), examine(variant, target)


@functools.cache
def _listed(target: str, every: int) -> list[Variant]:
    return list(variants(target))[::every]


def report(target: str, every: int = 1) -> int:
    """Print a row for every variant, or for one of ``every``; the number of defects."""
    print(f"{'kernel':92}{'registers':>10}{'spilled':>8}{'shared':>8}{'resident':>10}  opcodes")
    defects = 0
    count = len(_listed(target, every))
    # Variants cannot be sent to another process, so each lists them again and is told a number.
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for name, found in pool.map(functools.partial(_numbered, target, every), range(count)):
            numbers = f"{found.registers:>10}{found.spilled:>8}{found.shared:>8}{found.resident:>10}"
            marks = "".join(f"  DEFECT: {defect}" for defect in found.defects)
            print(f"{name:92}{numbers}  {' '.join(found.opcodes)}{marks}", flush=True)
            defects += len(found.defects)
    print(f"{count} variants, {defects} defects on {target}")
    return defects
