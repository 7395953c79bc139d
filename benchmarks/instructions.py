"""How many warp instructions and matmul operations a launch executes, counted from the machine code.

A loop of the code belongs to the loop of the kernel's source that most of its instructions come from.  LOOPS has how often
each loop of ``kernels/`` runs in the average program, and BRANCHES the share of programs that take a branch; both arms of
others are counted.
"""

import ast
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import vicreg_fast.kernels

from . import disassembly

Arguments = Mapping[str, Any]  # of a launch, by name; "grid": its programs


def _steps(length: str, block: str) -> Callable[[Arguments], float]:
    return lambda a: float(math.ceil(a[length] / a[block]))


def _tile_rows(a: Arguments) -> int:
    """Rows of tiles of M."""
    side: int = a["N"] if a.get("chunk_sums_ptr") is None else a["D"]
    return math.ceil(side / int(a["BLOCK_M"]))


def _on_diagonal(a: Arguments) -> float:
    """The share of tiles that lie on the diagonal: those of a triangle of n rows are 2 / (n + 1)."""
    return 2 / (_tile_rows(a) + 1)


def _gram_steps(a: Arguments) -> float:
    """Full tiles take all features, splits their share."""
    full = min(a["full_tiles"], a["grid"])
    steps = full * math.ceil(a["D"] / a["BLOCK_K"]) + (a["grid"] - full) * math.ceil(
        a["split_length"] / a["BLOCK_K"]
    )
    return float(steps / a["grid"])


def _diagonal_blocks(a: Arguments) -> float:
    rows: int = a.get("BLOCK_R", a["BLOCK_M"])
    return _on_diagonal(a) * math.ceil(int(a["column_blocks"]) / min(128, 2048 // rows))


def _difference_blocks(a: Arguments) -> float:
    """Blocks of columns whose differences a program has."""
    return _on_diagonal(a)


def _kinds(a: Arguments) -> float:
    """The share of programs that compare features."""
    return 0.5 if a["LOCATION_AXES"] else 1.0


# By function, its loops in the order of the source, but for unrolled ones.
LOOPS: dict[str, list[Callable[[Arguments], float]]] = {
    "_column_moments": [lambda a: math.ceil(a["N"] / a["BLOCK_N"]) - 1.0],
    "_moments_forward_kernel": [_steps("N", "BLOCK_N")],
    "replace_diagonal": [_diagonal_blocks],
    "_tile_of_gathered_rows": [_gram_steps],
    "_operand_matmul": [_gram_steps],
    "_extreme_scales": [lambda a: math.ceil(_gram_steps(a) * a["BLOCK_K"] / 1024)],
    "gram_scale": [lambda a: math.ceil(a["column_blocks"] / 512)],
    "_means": [_steps("splits", "BLOCK_C")],
    "_moments_of_rows": [lambda a: math.ceil(a["splits"] / a["BLOCK_C"]) / _tile_rows(a)],
    "_covariance": [_steps("splits", "BLOCK_C")] * 3,
    "_mean_product": [lambda a: math.ceil(a["D"] / 512)],
    "_splitk_reduction_kernel": [_steps("splits", "BLOCK_C")],
    "_chunk_sums": [lambda a: _on_diagonal(a) * math.ceil(a["split_length"] / a["BLOCK_K"])],
    "_squared_difference": [lambda a: _difference_blocks(a) * math.ceil(a["split_length"] / a["BLOCK_K"]) / 2],
    "_second_moment_forward_kernel": [_steps("split_length", "BLOCK_K"), lambda a: _difference_blocks(a)],
    "_narrow_second_moment_forward_kernel": [_steps("split_length", "BLOCK_K")],
    "_covariance_matmul": [_steps("N", "BLOCK_K"), _steps("D", "BLOCK_K")],
    "_narrow_gradient_kernel": [_steps("chunk_length", "BLOCK_N")],
    "finish_columns": [_steps("D", "BLOCK_S")],
    "_off_diagonal_norms": [_steps("D", "BLOCK_F")],
    "_vicregl_forward_kernel": [_steps("D", "BLOCK_D")],
    "_match_set_gradient": [_steps("D", "BLOCK_F")],
    "match_sets_gradient": [lambda a: 2.0],  # directions
    "own_matrix": [lambda a: 2.0],  # directions
    "kind_pairs": [lambda a: 2.0],
    "_exact_columns_terms": [lambda a: 4.0],  # match sets
    "_finite_image_gradient": [_steps("D", "BLOCK_D"), lambda a: 2.0],
    "_store_zeros": [lambda a: math.ceil(a["L1"] / 32), lambda a: math.ceil(a["D"] / a["BLOCK_D"] / 4)],
    "_vicregl_image_gradient_kernel": [lambda a: 0.0] * 2,  # of an image that is not finite
    "_scatter_backward_kernel": [lambda a: a["VIEWS"], _steps("m", "BLOCK_K")],
    "_norms_of": [lambda a: _kinds(a) * math.ceil(a["C"] / a["BLOCK_K"])],
    "_feature_tile": [lambda a: _kinds(a) * math.ceil(a["C"] / a["BLOCK_K"])],
    "_match_forward_kernel": [_steps("P2", "BLOCK_C")],
    "_nearest_of_blocks": [_steps("blocks", "BLOCKS_AT_ONCE")],
    "_select_forward_kernel": [_steps("P1", "BLOCK_COMPARED")],
    "_distance_forward_kernel": [_steps("C", "BLOCK_K")],
}
# Loops that are hardly ever entered: in one program, for rows that are not finite.  Instructions of theirs may stand in others.
RARE = ("_sum_partials", "add_rows", "_second_pass", "_matmul_by_scale")
# Loops that stand in a branch: their counts contain its share.
IN_BRANCH = (
    "replace_diagonal",
    "_chunk_sums",
    "_moments_of_rows",
    "_squared_difference",
    "_feature_tile",
    "_norms_of",
)
# By function and condition, as it is written, the share of programs in which it holds.
BRANCHES: dict[tuple[str, str], Callable[[Arguments], float]] = {
    ("_moments_forward_kernel", "v % 2 == 1"): lambda a: 0.5,
    ("_vicregl_forward_kernel", "side == 1"): lambda a: 0.5,
    ("_gram_forward_kernel", "is_full"): lambda a: min(a["full_tiles"], a["grid"]) / a["grid"],
    ("finish_gram_tile", "i == j"): _on_diagonal,
    ("finish_gram_tile", "i == 0"): lambda a: 0.0,
    # Columns of embeddings have one scale, and their first rows are not far from the mean.
    ("_tile_of_operand", "least == most"): lambda a: 1.0,
    ("_column_moments", "tl.max(tl.where(in_range & (8.0 * v >= squares), 0, 1), 0) > 0"): lambda a: 0.0,
    ("finish_columns", "tl.max(tl.where(in_range | (d >= D), 0, 1), 0) > 0"): lambda a: 0.0,
    ("_covariance", "j <= i"): lambda a: (_tile_rows(a) + 1) / (2 * _tile_rows(a)),
    ("_covariance", "i == j"): lambda a: 1 / _tile_rows(a),
    ("_reduce_covariance", "j == 0"): lambda a: 1 / _tile_rows(a),
    ("_second_moment_forward_kernel", "i == j"): _on_diagonal,
    ("_store_both", "off_diagonal"): lambda a: 1 - _on_diagonal(a),
    ("reduce_terms", "_arrives_last(partials.arrival_counter_ptr)"): lambda a: 1 / a["grid"],
    ("reduce_losses", "_arrives_last(counter_ptr)"): lambda a: 1 / a["grid"],
    ("_match_forward_kernel", "kind == 0"): lambda a: 0.5,
    # Of the two directions only that from y to x has several blocks.
    ("_nearest_of_blocks", "blocks == 1"): lambda a: 0.5 if a["BOTH"] else 1.0,
    ("_vicregl_image_gradient_kernel", "finite"): lambda a: 1.0,
    ("_feature_tile", "not finite"): lambda a: 0.0,
    ("add_rows", "tl.sum(tl.sum(g * 0.0, 1), 0) != 0.0"): lambda a: 0.0,
}

Branch = tuple[tuple[str, str], bool]  # a key of BRANCHES, and whether the condition holds


def _functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions of ``kernels/``, and the names of their files."""
    for file in Path(vicreg_fast.kernels.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef):
                yield file.name, function


def _lines(node: ast.AST) -> set[int]:
    return {n.lineno for n in ast.walk(node) if hasattr(n, "lineno")}


def _called(node: ast.AST) -> list[str]:
    """The names of the functions that are called in a node, once for each call."""
    return [n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]


@functools.cache
def source_branches() -> dict[str, list[Branch]]:
    """The branches of BRANCHES that every line of ``kernels/`` stands in."""
    found: defaultdict[str, list[Branch]] = defaultdict(list)
    known = set()
    calls = Counter(name for _, function in _functions() for name in _called(function))
    of_function = {function.name: (file, function) for file, function in _functions()}
    for file, function in _functions():
        for node in ast.walk(function):
            if not isinstance(node, ast.If):
                continue
            key = (function.name, ast.unparse(node.test))
            if key not in BRANCHES:
                continue
            known.add(key)
            for body, holds in ((node.body, True), (node.orelse, False)):
                lines = {f"{file}:{line}" for statement in body for line in _lines(statement)}
                for name in {name for statement in body for name in _called(statement)}:
                    if calls[name] == 1 and name in of_function:  # a function of this branch alone
                        lines |= {f"{of_function[name][0]}:{line}" for line in _lines(of_function[name][1])}
                for line in lines:
                    found[line].append((key, holds))
    if missing := BRANCHES.keys() - known:
        raise LookupError(f"kernels have no branch {sorted(missing)[0]}")
    return found


@functools.cache
def source_loops() -> dict[str, tuple[str, int]]:
    """The innermost loop of every line of ``kernels/``: of views.py:102, its function and which of its loops."""
    found: dict[str, tuple[str, int]] = {}
    for file, function in _functions():
        loops = [
            n
            for n in ast.walk(function)
            if isinstance(n, ast.For) and "static_range" not in ast.unparse(n.iter)
        ]
        loops.sort(key=lambda loop: loop.lineno)
        for index, loop in enumerate(loops):  # an inner loop comes later and overwrites
            for line in range(loop.lineno, (loop.end_lineno or loop.lineno) + 1):
                found[f"{file}:{line}"] = (function.name, index)
    return found


class Loop(NamedTuple):
    """A loop of the code: its first and last instruction, and the loop of the source, None where none is known."""

    first: int
    last: int
    source: tuple[str, int] | None
    # Steps of the source's loop in one of the code's; the others follow without a loop, up to the instruction ``rest``.
    unrolled: int = 1
    rest: int = 0


class Code(NamedTuple):
    """The names of a kernel's instructions, with their modifiers, the branches that each stands in, and its loops."""

    instructions: list[str]
    branches: list[set[Branch]]
    loops: list[Loop]

    def executions(self, arguments: Arguments) -> list[float]:
        """How often a warp of the average program executes each instruction."""
        shares = {key: share(arguments) for key, share in BRANCHES.items() if key in self._branches_taken}
        counts = [
            math.prod(shares[key] if holds else 1 - shares[key] for key, holds in b) for b in self.branches
        ]
        for loop in self.loops:  # inner loops first
            trips = self._trips(loop, arguments)
            in_branch = loop.source is not None and loop.source[0] in IN_BRANCH
            for position in range(loop.first, loop.last + 1):
                counts[position] = trips if in_branch else counts[position] * trips
            if loop.unrolled > 1 and loop.source is not None:
                left_over = LOOPS[loop.source[0]][loop.source[1]](arguments) % loop.unrolled
                for position in range(loop.last + 1, loop.rest + 1):
                    counts[position] *= left_over / (loop.unrolled - 1)
        return counts

    @property
    def _branches_taken(self) -> set[tuple[str, str]]:
        return {key for branches in self.branches for key, _ in branches}

    def _trips(self, loop: Loop, arguments: Arguments) -> float:
        """How often a loop runs.  A long and a short loop of one source loop are its unrolled form and the remainder."""
        if loop.source is None:
            return 1.0
        function, index = loop.source
        if function in RARE:
            return 0.0
        trips = LOOPS[function][index](arguments)
        if loop.unrolled > 1:
            return trips // loop.unrolled
        lengths = [other.last - other.first + 1 for other in self.loops if other.source == loop.source]
        own = loop.last - loop.first + 1
        unrolled = round(max(lengths) / min(lengths))
        if unrolled < 2:
            return trips
        return trips // unrolled if own > 1.5 * min(lengths) else trips % unrolled


def parse(code: str) -> Code:
    """The instructions and loops of nvdisasm's text with lines, or of AMD's assembly."""
    names: list[str] = []
    lines: list[list[str]] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for text, source in disassembly.with_lines(code):
        if label := re.match(r"\s*(\.L\w+):", text):
            labels[label[1]] = len(names)
        elif instruction := re.match(
            r"(?:\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)|\t([sv]_\w+|ds_\w+|global_\w+|buffer_\w+)\b)(.*)",
            text,
        ):
            if target := re.search(r"(\.L\w+)", instruction[3]):
                branches.append((len(names), target[1]))
            names.append(instruction[1] or instruction[2])
            lines.append(source)
    regions: dict[int, int] = {}
    skipped: list[range] = []
    for position, target_label in branches:
        first = labels.get(target_label, position)
        if first < position:
            regions[first] = max(regions.get(first, 0), position)
        elif first > position + 1:
            skipped.append(range(position + 1, first))
    # Code that is entered from within a loop and stands behind it jumps back, and is no loop.
    regions = {
        first: last
        for first, last in regions.items()
        if not any(a < first <= z < last for a, z in regions.items())
    }
    loops: list[Loop] = []
    for first, last in sorted(regions.items(), key=lambda region: region[1] - region[0]):  # inner loops first
        inner = {k for loop in loops for k in range(loop.first, loop.last + 1)}
        taken = {loop.source for loop in loops if first <= loop.first and loop.last <= last}
        votes: defaultdict[tuple[str, int], float] = defaultdict(float)
        for k in range(first, last + 1):
            voted = source_loops().get(lines[k][0])
            if k not in inner and voted is not None and voted not in taken:
                votes[voted] += 0.1 if voted[0] in RARE else 1
        loops.append(Loop(first, last, max(votes, key=votes.__getitem__) if votes else None))
    loops = [_unrolled(loop, loops, names, lines) for loop in loops]
    return Code(names, _branches(lines, skipped), loops)


def _unrolled(loop: Loop, loops: list[Loop], names: list[str], lines: list[list[str]]) -> Loop:
    """A loop and by how much it is unrolled: of n steps of a matmul, n - 1 stand behind the loop, for what it leaves over."""
    matmuls = [
        k
        for k, name in enumerate(names)
        if loop.source
        and disassembly.matmul_operations(name)
        and source_loops().get(lines[k][0]) == loop.source
    ]
    inside = sum(loop.first <= k <= loop.last for k in matmuls)
    behind = [k for k in matmuls if k > loop.last and not any(a.first <= k <= a.last for a in loops)]
    step = inside - len(behind)
    if not behind or step <= 0 or inside % step:
        return loop
    return loop._replace(unrolled=inside // step, rest=max(behind))


def _branches(lines: list[list[str]], skipped: list[range]) -> list[set[Branch]]:
    """The branches that each instruction stands in, from its lines and from the instructions that jumps skip.

    Triton 3.6 writes an instruction's own line only, not those of the calls: of a branch that calls functions, the shortest
    skipped code with nine tenths of the branch's own lines is all of the branch.
    """
    found = [{branch for line in source for branch in source_branches().get(line, ())} for source in lines]
    if any(len(source) > 1 for source in lines):
        return found
    of_branch: defaultdict[Branch, set[int]] = defaultdict(set)
    for position, own in enumerate(found):
        for branch in own:
            of_branch[branch].add(position)
    for branch, own_positions in of_branch.items():
        for code in sorted(skipped, key=len):
            inside = sum(position in code for position in own_positions)
            if inside >= 0.9 * len(own_positions) and inside >= 0.2 * len(code):
                for position in code:
                    found[position].add(branch)
                break
    return found
