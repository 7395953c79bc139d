"""What is wrong with a compiled kernel, beside its resources: narrow or waiting accesses to tiles, approximate divisions.

A tile is a tensor of two dimensions or more.  Each exception is listed with its reason, by kernel and by the function of
``kernels/`` that the instruction comes from; "" stands for every kernel, and a target may follow a kernel's name.
"""

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import vicreg_fast.kernels

from . import disassembly

Exceptions = Mapping[tuple[str, str], str]
# Fewer bytes of aligned inputs than 16 a thread and instruction.
NARROW: Exceptions = {
    ("gradient", "load_tile"): "TF32 matmuls of compute capability 9.0 take o along its rows",
    ("gram_forward", "_matmul_by_scale"): "the columns of one scale, any of them; rarely entered",
    ("vicregl_forward", "_finish_gram"): "G has rows of m matches, any number",
    ("vicregl_gradient", "_match_set_gradient"): "G has rows of m matches, any number",
    ("vicregl_image_gradient", "_is_finite"): "the diagonal of G",
    ("vicregl_image_gradient", "own_matrix"): "G has rows of m matches, any number",
    ("vicregl_image_gradient", "_match_set_gradient"): "G has rows of m matches, any number",
    ("vicregl_image_gradient", "match_sets_gradient"): "16 columns of an image that is not finite",
    ("vicregl_image_gradient", "load_columns"): "16 columns of an image that is not finite",
    ("select_forward", "_nearest_of_blocks"): "distances of P patches, any number",
    (
        "splitk_reduction",
        "_load_split",
    ): "tiles above the diagonal are read along the program's rows, which may be two",
}
# Loads in a loop without an asynchronous copy.
SYNCHRONOUS: Exceptions = {
    (
        "narrow_second_moment_forward cuda:100",
        "load_tile",
    ): "Triton 3.6 cannot compile the pipelined loop there",
    ("gram_forward", "_matmul_by_scale"): "rarely entered",
    ("gram_forward", "_extreme_scales"): "a loop of few steps, from the cache",
    ("", "gram_scale"): "a loop that runs once up to 512 blocks of columns",
    ("", "replace_diagonal"): "many blocks at a time, and most often all: the loop runs once",
    ("splitk_reduction", "_load_splits"): "many splits at a time, from the cache",
    ("splitk_reduction", "_load_split"): "many splits at a time, from the cache",
    ("gradient", "_mean_product"): "a loop of few steps, from the cache",
    ("select_forward", "_nearest_of_blocks"): "many blocks at a time, and most often all: the loop runs once",
    ("narrow_gradient", "load_rows"): "Triton 3.6 makes no copy of what both a matmul and other arithmetic use",
    ("vicregl_forward", "load_columns"): "few steps with full registers: with copies they spill",
    ("vicregl_gradient", "load_columns"): "a loop of two steps, over the directions of matching",
    ("vicregl_gradient", "_match_set_gradient"): "a loop of two steps, over the directions of matching",
    ("vicregl_image_gradient", "load_columns"): "an image that is not finite",
    ("vicregl_image_gradient", "_match_set_gradient"): "an image that is not finite",
    ("vicregl_image_gradient", "own_matrix"): "a loop of two steps, over the directions of matching",
    ("vicregl_image_gradient", "_finite_image_gradient"): "matrices that stay in the cache",
    ("vicregl_image_gradient", "matmul_parts"): "matrices that stay in the cache",
    ("vicregl_image_gradient", "_load_columns_of_sets"): "few columns of four match sets, from the cache",
    ("vicregl_image_gradient", "_load_patches"): "full registers: with copies it spills",
}
# The same, where the line has asynchronous copies too.
PARTLY_SYNCHRONOUS: Exceptions = {
    ("moments_forward", "load_tile"): "the other view, in half of the programs: a neighbour has just read it",
    ("second_moment_forward", "load_tile"): "the columns of the sums: the matmul has just read them",
}
# Approximate divisions and roots.
APPROXIMATE: Exceptions = {
    ("", "tril_tile"): "the root is corrected both ways",
}


@functools.cache
def _functions() -> dict[str, str]:
    """The function of every line of ``kernels/``, as views.py:102."""
    names: dict[str, str] = {}
    for file in Path(vicreg_fast.kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                last = node.end_lineno or node.lineno
                names |= {f"{file.name}:{line}": node.name for line in range(node.lineno, last + 1)}
    return names


def _is_listed(exceptions: Exceptions, kernel: str, target: str, line: str) -> bool:
    names = ("", kernel, f"{kernel} {target}")
    return any((name, _functions().get(line, "")) in exceptions for name in names)


def defects(
    kernel: str, target: str, compiled: Any, code: str, tiles: list[disassembly.Tile], aligned: bool
) -> Iterator[str]:
    """A line for each defect.  ``aligned``: of the inputs."""
    copies = target.startswith("cuda")  # asynchronous, from global to shared memory
    if aligned:
        # AMD's compiler stores tiles in the layout that its matmuls leave them in.
        checked = tiles if copies else [tile for tile in tiles if tile.kind != "store"]
        for line, size in disassembly.narrow(code, checked).items():
            if not _is_listed(NARROW, kernel, target, line):
                yield f"{size} bytes a thread at {line}"
    if aligned and copies:  # a thread copies four bytes at least, which narrow elements of odd layouts are not
        copied = {tile.line for tile in tiles if tile.kind == "copy"}
        for line in sorted({tile.line for tile in tiles if tile.in_loop and tile.kind == "load"}):
            partly = line in copied and _is_listed(PARTLY_SYNCHRONOUS, kernel, target, line)
            if not partly and not _is_listed(SYNCHRONOUS, kernel, target, line):
                yield f"no asynchronous copy at {line}"
    for line in disassembly.approximations(compiled.asm.get("ptx", "")):
        if not _is_listed(APPROXIMATE, kernel, target, line):
            yield f"approximate division or root at {line}"
