"""What a compiled kernel does with memory and how it divides: read from Triton's IR, from PTX and from the machine code.

The disassembler comes with Triton.  Line information ties an instruction to the line of the kernel that it was made from.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton

_KINDS = {"LDG": "load", "STG": "store", "LDGSTS": "copy"}
_AMD_KINDS = {"load": "load", "store": "store"}
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_AMD_BYTES = {
    "ubyte": 1,
    "sbyte": 1,
    "ushort": 2,
    "short": 2,
    "byte": 1,
    "dword": 4,
    "b8": 1,
    "b16": 2,
    "b32": 4,
    "b64": 8,
}
_AMD_BYTES |= {"dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b96": 12, "b128": 16}
_ELEMENT_BITS = {"f64": 64, "i64": 64, "f32": 32, "i32": 32, "f16": 16, "bf16": 16, "i16": 16, "i8": 8, "i1": 8}
APPROXIMATE = re.compile(r"\b(?:div\.(?:full|approx)|(?:sqrt|rcp|rsqrt)\.approx)\S*f32")


class Access(NamedTuple):
    """An instruction that reads or writes global memory."""

    kind: str  # "load", "store" or "copy", an asynchronous one to shared memory
    bytes: int  # a thread
    line: str  # of the kernel, as views.py:102


class Tile(NamedTuple):
    """A load, store or asynchronous copy of a tile, a tensor of two or more dimensions, in Triton's IR."""

    kind: str
    bytes: int  # a thread
    line: str
    in_loop: bool


def tool(name: str) -> str:
    """The path of a program that comes with Triton."""
    return str(next(Path(triton.__file__).parent.rglob(f"bin/{name}")))


@functools.lru_cache(maxsize=8)  # resources and estimate read the same kernel one after the other
def disassembled(compiled: Any) -> str:
    """The machine code with its lines: of a cubin by nvdisasm, of AMD's as the compiler prints it."""
    if "amdgcn" in compiled.asm:
        return str(compiled.asm["amdgcn"])
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tool("cuobjdump"), "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        )
        code = subprocess.run(
            [tool("nvdisasm"), "-c", "-gi", cubin], capture_output=True, text=True, check=True
        )
    return usage.stdout + code.stdout


def with_lines(code: str) -> Iterator[tuple[str, list[str]]]:
    """Every line of the text of a disassembly, and the lines of the source, as views.py:102, that it was made from.

    First the line itself, then those that call the function it stands in, outwards.
    """
    lines: list[str] = [""]
    files: dict[str, str] = {}
    in_comment = False
    for text in code.splitlines():
        if source := re.search(r'//## File "([^"]*)", line (\d+)', text):
            lines = [*(lines if in_comment else []), f"{Path(source[1]).name}:{source[2]}"]
            in_comment = True
            continue
        in_comment = False
        if source := re.match(r'\s*\.file\s+(\d+) (?:"[^"]*" )?"([^"]*)"', text):
            files[source[1]] = Path(source[2]).name
        elif source := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            callers = re.findall(r"@\[ (\S+?:\d+):\d+", text)
            lines = [f"{files.get(source[1], '')}:{source[2]}", *(Path(caller).name for caller in callers)]
        else:
            yield text, lines


def accesses(code: str) -> Iterator[Access]:
    """Every access to global memory, in the order of the code."""
    for text, (line, *_) in with_lines(code):
        if found := re.search(r"\b(LDGSTS|LDG|STG)\b((?:\.\w+)*)", text):
            width = next((_BYTES[part] for part in found[2].split(".") if part in _BYTES), 4)
            yield Access(_KINDS[found[1]], width, line)
        elif found := re.search(r"\b(?:global|buffer)_(load|store)_(\w+)", text):
            yield Access(_AMD_KINDS[found[1]], _AMD_BYTES.get(found[2].split("_")[0], 4), line)


def tiles(ttgir: str, threads: int) -> list[Tile]:
    """Every access to a tile."""
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))

    def line_of(name: str) -> str:
        text = locations.get(name, "")
        if source := re.match(r'"([^"]*)":(\d+)', text):
            return f"{Path(source[1]).name}:{source[2]}"
        inner = re.search(r"#loc\d*", text)
        return line_of(inner[0]) if inner else ""

    found: list[Tile] = []
    loops: list[int] = []
    kinds = {"tt.load": "load", "tt.store": "store", "ttg.async_copy_global_to_local": "copy"}
    for text in ttgir.splitlines():
        indent = len(text) - len(text.lstrip())
        while loops and indent <= loops[-1]:
            loops.pop()
        if "scf.for" in text or "scf.while" in text:
            loops.append(indent)
        pointer = re.search(r"tensor<((?:\d+x){2,})!tt\.ptr<(\w+)", text)
        operation = re.search(r"\b(?:tt\.load|tt\.store|ttg\.async_copy_global_to_local)\b", text)
        if operation and pointer:
            elements = 1
            for size in pointer[1].split("x")[:-1]:
                elements *= int(size)
            size = elements * _ELEMENT_BITS[pointer[2]] // 8 // threads
            location = re.findall(r"loc\((#loc\d*)\)", text)
            found.append(
                Tile(kinds[operation[0]], size, line_of(location[-1]) if location else "", bool(loops))
            )
    return found


def narrow(code: str, tile_accesses: list[Tile]) -> dict[str, int]:
    """Lines of tiles with an access of fewer bytes than 16, or than a thread has of the tile, and the bytes."""
    expected: dict[str, int] = {}
    for tile in tile_accesses:
        expected[tile.line] = min(expected.get(tile.line, 16), max(tile.bytes, 1))
    least: dict[str, int] = {}
    for access in accesses(code):
        if access.line in expected and access.bytes < expected[access.line]:
            least[access.line] = min(least.get(access.line, 16), access.bytes)
    return least


def matmul_operations(name: str) -> tuple[float, str] | None:
    """Operations of one warp's matmul instruction and the kind of its operands; None for other instructions.

    A warp group's HGMMA is issued by four warps; it names the operands' type unless that is float16.  Those of compute
    capability 10.0 do not name their size.
    """
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.F32", name):
        M, N, K = map(int, found.groups())
        return 2 * M * N * K / 4, "tf32" if "TF32" in name else "half"
    if found := re.match(r"HMMA\.(16)(8)(\d+)\.", name):
        M, N, K = map(int, found.groups())
        return 2 * M * N * K, "tf32" if "TF32" in name else "half"
    if found := re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_?(?:\d+b_)?(\w+)", name):
        M, N, K = map(int, found.groups()[:3])
        return 2 * M * N * K, {"xf32": "tf32", "f32": "fp32"}.get(found[4], "half")
    return None


def approximations(ptx: str) -> Counter[str]:
    """Approximate divisions and roots in float32, by line."""
    counts: Counter[str] = Counter()
    line, files = "", dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]*)"', ptx, re.MULTILINE))
    for text in ptx.splitlines():
        if source := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            line = f"{Path(files.get(source[1], '')).name}:{source[2]}"
        elif APPROXIMATE.search(text):
            counts[line] += 1
    return counts
