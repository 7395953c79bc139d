"""Compiles every kernel for a GPU that need not be there, and says what it would take: registers, shared memory, opcodes.

A variant is a defect if it spills, overruns the target's shared memory, misses the tensor cores, or if its offsets are
not 64-bit.  Found by compiling alone, as the library would launch it: aligned pointers, the options of its launches.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vicreg_fast.kernels import gradient, gram, moments

from vicreg_fast.backends.triton import configs

# Bytes of shared memory that a program may have.
SHARED_MEMORY = {
    "cuda:80": 166912,
    "cuda:86": 101376,
    "cuda:89": 101376,
    "cuda:90": 232448,
    "cuda:100": 232448,
    "cuda:120": 101376,
    "hip:gfx942": 65536,
}
# "none" is float32-accurate, on tensor cores where the target has such products.
ROUNDINGS = ("none", "tf32", "bf16")
DTYPES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
_FLOATS = {"gamma", "eps", "w_inv", "w_var", "w_cov", "k_inv", "k_var", "k_cov"}
_POINTERS = {
    "index_ptr": "i64", "ticket_ptr": "i32", "energy_ptr": "fp64", "partial_ptr": "fp64", "found_ptr": "fp64",
}  # fmt: skip
_INPUTS = {"x_ptr", "y_ptr", "x_grad_ptr", "y_grad_ptr"}
# Counts whose multiples of 16 let loads be wide; strides of contiguous views too.
_DIVISIBLE = {"N", "D", "inner", "chunk", "x_stride_p", "x_stride_n", "y_stride_p", "y_stride_n"}


class Variant(NamedTuple):
    """A kernel, the type of its inputs, and what it is compiled for."""

    kernel: Any
    dtype: str
    constants: dict[str, Any]

    def __str__(self) -> str:
        shown = [
            f"{k}={v}" for k, v in self.constants.items() if k in ("ROUND", "DUAL", "HAS_INDEX", "PRECISION")
        ]
        return f"{self.kernel.__name__.strip('_')} {self.dtype} {' '.join(shown)}"


class Resources(NamedTuple):
    """What a compiled variant takes, and what is wrong with it."""

    registers: int
    spills: int
    shared: int
    opcodes: tuple[str, ...]
    defects: tuple[str, ...]


def variants(target: str) -> Iterator[Variant]:
    """Every kernel, type and precision that the library launches on a target."""
    exact = "tf32x3" if target.startswith("cuda") else "ieee"
    for dtype in DTYPES:
        for rounding in ROUNDINGS:
            dot = exact if rounding == "none" else "tf32"
            config = configs.choose(dot)
            # Rows by index belong to losses that have no kernels yet.
            shared = {"VIEWS": 2, "HAS_INDEX": False, "ROUND": rounding}
            blocks = {"BLOCK_N": config.moments_rows, "BLOCK_D": config.moments_columns}
            yield Variant(moments._moments_forward_kernel, dtype, {**shared, **blocks})
            tile = {"BLOCK_M": config.tile, "BLOCK_K": config.primal_inner}
            product = {**shared, "PRECISION": dot, "FEW": False, **tile}
            yield Variant(gram._second_moment_forward_kernel, dtype, product)
            terms = {"INV": True, "VAR": True, "COV": True, "FIRST": 0}
            blocks = {
                "BLOCK_N": config.gradient_rows,
                "BLOCK_D": config.gradient_columns,
                "BLOCK_K": config.inner,
            }
            for dual in (False, True):
                constants = {**shared, "PRECISION": dot, "DUAL": dual, **terms, **blocks}
                yield Variant(gradient._gradient_kernel, dtype, constants)
    for dot in (exact, "tf32"):
        config = configs.choose(dot)
        tile = {"BLOCK_M": config.tile, "BLOCK_K": config.inner}
        yield Variant(gram._gram_forward_kernel, "fp32", {"PRECISION": dot, **tile})
    for dual in (False, True):
        constants = {"VIEWS": 2, "DUAL": dual, "BLOCK_M": config.tile, "BLOCK_R": config.strip}
        yield Variant(gram._combine_forward_kernel, "fp32", constants)


def examine(variant: Variant, target: str) -> Resources:
    """Compile a variant and look at what came out."""
    backend, arch = target.split(":")
    gpu = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    constants = dict(variant.constants)
    signature, attributes = {}, {}
    for position, name in enumerate(variant.kernel.arg_names):
        if name.endswith("stride_d"):
            constants[name] = 1  # as Triton itself does with an argument that is 1
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + (variant.dtype if name in _INPUTS else _POINTERS.get(name, "fp32"))
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
        if name.endswith("_ptr") or name in _DIVISIBLE:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constants, attributes)
    options = {"num_warps": configs.Config().warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=gpu, options=options)
    text = _disassembly(compiled) if backend == "cuda" else compiled.asm["amdgcn"]
    if backend == "cuda":
        registers = int(re.findall(r"REG:(\d+)", text)[0])
        spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
        opcodes = re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA|UTMALDG|LDGSTS)\b", text)
    else:
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        spills = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[0])
        opcodes = re.findall(r"v_mfma\w+", text)
    found = tuple(sorted(set(opcodes)))
    defects = []
    if spills:
        defects.append(f"{spills} spills")
    if compiled.metadata.shared > SHARED_MEMORY[target]:
        defects.append(f"{compiled.metadata.shared} bytes of shared memory, {SHARED_MEMORY[target]} there")
    if "PRECISION" in constants and not any("MMA" in op or "mfma" in op for op in found):
        defects.append("no tensor cores")
    if "i64" not in compiled.asm["ttir"]:
        defects.append("no 64-bit offsets")
    return Resources(registers, spills, compiled.metadata.shared, found, tuple(defects))


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


def report(target: str, every: int = 1) -> int:
    """Print a row for every variant, or for one of ``every``; the number of defects."""
    print(f"{'kernel':78}{'registers':>10}{'spills':>8}{'shared':>8}  opcodes")
    defects = 0
    for number, variant in enumerate(variants(target)):
        if number % every:
            continue
        found = examine(variant, target)
        print(
            f"{variant!s:78}{found.registers:>10}{found.spills:>8}{found.shared:>8}  {' '.join(found.opcodes)}"
            + "".join(f"  DEFECT: {defect}" for defect in found.defects),
            flush=True,
        )
        defects += len(found.defects)
    print(f"{defects} defects on {target}")
    return defects
