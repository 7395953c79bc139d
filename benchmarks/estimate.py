"""``python -m benchmarks estimate``: what a shape would cost on a GPU that need not be there, by a stated model.

Every kernel is compiled as the library would launch it.  Its time is the largest of

    bytes at 80 % of the copy rate; matmul operations at 70 % of the peak; warp instructions at 0.6 a scheduler and cycle

times waves rounded up over waves, plus 3 us a launch.  Bytes are those of its tensors, each read or written once.
Nothing here is measured.  ``--against`` puts a card's measured times beside it: those of each kernel from a file of
``python -m benchmarks kernels``, whose card's rates then take the place of CARDS, or those of each shape from one of ``run``.
"""

import json
import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor

from vicreg_fast.backends.triton import configs
from vicreg_fast.backends.triton.search import flattened

from . import cases, disassembly, instructions, kernel_pass, kernel_results, resources, results, targets
from .cases import Case
from .results import Document
from .shapes import KERNEL_SHAPES
from .text import duration, table
from .variant import Variant, compile_for, variant_of

# The model's constants.
COPY_SHARE, MATMUL_SHARE, ISSUE_RATE, LAUNCH_SECONDS = 0.8, 0.7, 0.6, 3e-6


class Card(NamedTuple):
    """A card's rates: bytes and operations a second; SMs, schedulers of one, and cycles a second."""

    name: str
    source: str
    copy: float
    bf16: float
    tf32: float
    sms: int
    clock: float
    schedulers: int = 4

    def measured(self, document: Document) -> "Card":
        """The card of a file of kernels' times, at the rates that it measured; the clock is this card's."""
        about, ceilings = document["machine"], document["ceilings"]
        if ceilings is None or about["multiprocessors"] is None:
            return self
        rates = ceilings["operations_per_s"]
        return self._replace(
            name=about["device"],
            source=f"rates measured there; the clock, {self.clock / 1e9:g} GHz, is that of {self.name}",
            copy=ceilings["copy_bytes_per_s"],
            bf16=rates["bf16"],
            tf32=rates["high"],
            sms=about["multiprocessors"],
        )

    @property
    def ceilings(self) -> dict[str, Any]:
        """As a result file has them: three TF32 matmuls reach float32 accuracy."""
        rates = {"bf16": self.bf16, "high": self.tf32, "highest": self.tf32 / 3}
        return {"copy_bytes_per_s": self.copy, "operations_per_s": rates}


_SHEET = "nominal peaks of bandwidth and dense matmuls, and boost clock; to be checked against the data sheet"
CARDS = {
    "cuda:80": Card("A100 80GB SXM", _SHEET, 2.04e12, 312e12, 156e12, 108, 1.41e9),
    "cuda:86": Card("RTX A6000", _SHEET, 0.768e12, 155e12, 77e12, 84, 1.8e9),
    "cuda:89": Card("L40S", _SHEET, 0.864e12, 362e12, 183e12, 142, 2.52e9),
    "cuda:90": Card(
        "H200",
        "measured by others: copies of 4.3 TB/s, bfloat16 790 TFLOP/s",
        4.3e12,
        790e12,
        395e12,
        132,
        1.7e9,
    ),
    "cuda:100": Card("B200", _SHEET, 8.0e12, 2250e12, 1125e12, 148, 1.85e9),
    "cuda:120": Card("RTX PRO 6000", _SHEET, 1.79e12, 504e12, 252e12, 188, 2.6e9),
    "hip:gfx942": Card("MI300X", _SHEET, 5.3e12, 1307e12, 653e12, 304, 2.1e9),
}


class Launch(NamedTuple):
    """A launch that the library would make: what is compiled, its arguments by name, its programs, and what came out."""

    variant: Variant
    arguments: dict[str, Any]
    programs: int
    compiled: Any = None  # None: not compiled yet


def launches(case: Case, target: str, device: configs.Device | None = None) -> list[Launch]:
    """Every launch of a step, on tensors without data; ``device``: what the target is taken for."""
    made: list[Launch] = []

    def record(kernel: Any, *, grid: Any, warmup: bool, **keywords: Any) -> None:
        arguments = {**keywords, "grid": math.prod(grid)}
        made.append(Launch(variant_of(kernel, keywords), arguments, math.prod(grid)))

    kernel_pass.make_without_data(case, target, record, device)
    return made


def _share_of_matrix(arguments: dict[str, Any]) -> float:
    """The share of M that a launch writes or reads: the forward pass's kernels write their own tiles each."""
    a = arguments
    if "full_tiles" not in a:
        return 1.0
    reduces = "BLOCK_R" in a
    split_tiles = (
        a["grid"] // (a["BLOCK_M"] // a["BLOCK_R"]) if reduces else (a["grid"] - a["full_tiles"]) // a["splits"]
    )
    own = split_tiles if reduces else a["full_tiles"]
    return float(own / (a["full_tiles"] + split_tiles))


def _traffic(arguments: dict[str, Any]) -> int:
    """The bytes of a launch's tensors, each once; of the distances of matches only the matched rows."""
    if "distance_ptr" in arguments:
        x = arguments["x"].ptr
        return int(2 * arguments["B"] * arguments["m"] * (arguments["C"] * x.element_size() + 8))
    tensors = {id(tensor): tensor for value in arguments.values() for tensor in flattened(value)}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if isinstance(M := arguments.get("M_ptr"), Tensor):
        total -= round((1 - _share_of_matrix(arguments)) * M.numel() * M.element_size())
    return total


def _matmul(name: str, card: Card) -> tuple[float, float]:
    """Operations of an instruction of one warp, and their seconds at the card's peak; zeros if it is no matmul."""
    operations, kind = disassembly.matmul_operations(name) or (0.0, "half")
    # Of AMD's matmuls those of float32 have a quarter of TF32's rate.
    return operations, operations / {"half": card.bf16, "tf32": card.tf32, "fp32": card.tf32 / 4}[kind]


def kernel_record(launch: Launch, target: str, card: Card | None = None) -> dict[str, Any]:
    """What is known of a launch, and its time by the model on a card (default: the target's)."""
    card, arguments, programs = card or CARDS[target], launch.arguments, launch.programs
    compiled = launch.compiled or compile_for(launch.variant, target)
    found = resources.examine(launch.variant, target, compiled)
    text = disassembly.disassembled(compiled)
    code = instructions.parse(text)
    warps = launch.variant.options["num_warps"]
    counts = code.executions(arguments)
    issued = sum(counts) * warps * programs
    matmuls = [(count, *_matmul(name, card)) for name, count in zip(code.instructions, counts, strict=True)]
    operations = sum(count * each for count, each, _ in matmuls) * warps * programs
    multiplying = sum(count * seconds for count, _, seconds in matmuls) * warps * programs
    # Programs are spread over the SMs: a few of them still use all.
    waves = programs / (card.sms * min(found.ctas_per_sm, math.ceil(programs / card.sms)))
    moved = _traffic(arguments)
    seconds = max(
        moved / (COPY_SHARE * card.copy),
        multiplying / MATMUL_SHARE,
        issued / (ISSUE_RATE * card.sms * card.schedulers * card.clock),
    )
    return {
        "kernel": launch.variant.name,
        "configuration": str(launch.variant),
        "programs": programs,
        "registers": found.registers,
        "spill_bytes": found.spilled,
        "shared_bytes": found.shared,
        "programs_per_sm": found.ctas_per_sm,
        "waves": waves,
        "narrowest_load_bytes": found.narrowest_load,
        "async_copies": found.copies,
        "loop_instructions": [loop.last - loop.first + 1 for loop in code.loops],
        "warp_instructions": round(issued),
        "operations": round(operations),
        "bytes": moved,
        "microseconds": 1e6 * (seconds * math.ceil(waves) / waves + LAUNCH_SECONDS),
    }


def floor_microseconds(case: Case, card: Card) -> float:
    """The roofline bound of a shape's step."""
    part = "forward" if case.suite == "matching" else "both"
    return float(1e6 * targets.roofline(case, card.ceilings)[part]["seconds"])


def shape_record(name: str, target: str, card: Card | None = None) -> dict[str, Any]:
    """The estimate of a shape: its kernels, their sum, and its share of the roofline bound."""
    case = cases.case_of(name)
    card = card or CARDS[target]
    device = resources.device_of(target)._replace(num_sms=card.sms)
    kernels = [kernel_record(launch, target, card) for launch in launches(case, target, device)]
    floor = floor_microseconds(case, card)
    total = sum(kernel["microseconds"] for kernel in kernels)
    record = {"shape": name, "target": target, "triton": triton.__version__, "microseconds": total}
    return record | {"floor_microseconds": floor, "share": floor / total, "kernels": kernels}


def estimate(target: str | None, names: Sequence[str] | None, out: str | None, against: str | None) -> int:
    """Print and, with ``out``, write the estimates.  Returns the exit status; raises :class:`UsageError` for an unusable argument."""
    cases.require_gpu_shapes(names or ())
    document = None if against is None else _measurement(Path(against))
    target = target or (document and kernel_results.target_of(document, CARDS)) or "cuda:90"
    card, measured = CARDS[target], None
    if document is not None and "fixture" in document:
        print(f"{against} was not measured: {document['fixture']}")
    if document is not None and document["schema"] == kernel_results.SCHEMA:
        names = names or document["asked"]
        card = measured = card.measured(document)
    print(
        f"{target}, {card.name} ({card.source}), Triton {triton.__version__}: estimated by a model, nothing is measured"
    )
    shapes, status = [], 0
    with resources.compilers() as pool:
        waiting = {name: pool.submit(shape_record, name, target, measured) for name in names or KERNEL_SHAPES}
        for name, future in waiting.items():
            try:
                record = future.result()
            except Exception as error:  # of the compiler, which raises several kinds
                print(f"\n{name}: cannot be compiled: {error}", flush=True)
                status = 1
                continue
            shapes.append(record)
            print(f"\n{_summary(record, document)}\n{_table(record)}", flush=True)
            if document is not None and (comparison := _kernels_beside(record, document)):
                print(f"\n{comparison}", flush=True)
            if out is not None:
                Path(out).write_text(json.dumps({"shapes": shapes}, indent=1) + "\n")
    return status


def _measurement(path: Path) -> Document:
    """A file of kernels' times or a result of ``run``, told apart by the schema that it names."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        document = None  # load() below says what is wrong
    is_of_kernels = isinstance(document, dict) and document.get("schema") == kernel_results.SCHEMA
    return kernel_results.load(path) if is_of_kernels else results.load(path)


def _measured(record: dict[str, Any], document: Document) -> float | None:
    """The measured seconds of a shape; None where the document has none."""
    name = record["shape"]
    if document["schema"] == kernel_results.SCHEMA:
        found = [entry["microseconds"] for entry in document["shapes"] if entry["shape"] == name]
        return found[0] * 1e-6 if found and found[0] is not None else None
    mode = targets.mode_of(document)
    times = [targets.seconds(entry, "triton", mode) for entry in document["cases"] if entry["name"] == name]
    return times[0] if times else None


def _summary(record: dict[str, Any], document: Document | None) -> str:
    """A line: the shape's time, its share of the bound, and the measured time where a result has it."""
    time, floor = (duration(record[key] * 1e-6) for key in ("microseconds", "floor_microseconds"))
    words = f"{record['shape']}: {time}, {record['share']:.0%} of the bound of {floor}"
    if document is None:
        return words
    measured = _measured(record, document)
    if measured is None:
        return f"{words}; not in the result"
    ratio = measured / (record["microseconds"] * 1e-6)
    return f"{words}; measured {duration(measured)}, {ratio:.2f} of the estimate"


def _kernels_beside(record: dict[str, Any], document: Document) -> str:
    """A table of a shape's kernels, estimated and measured; empty where the document has no kernels of it."""
    shapes = document.get("shapes", [])
    found = [entry for entry in shapes if entry["shape"] == record["shape"] and entry["kernels"]]
    if not found:
        return ""
    pairs = [*kernel_results.beside(record, found[0]), kernel_results.sums(record, found[0])]
    return table(kernel_results.COLUMNS, [pair.cells() for pair in pairs])


# The columns of the table of a shape's kernels.
_COLUMNS: dict[str, Callable[[dict[str, Any]], object]] = {
    "kernel": itemgetter("kernel"),
    "time": lambda kernel: duration(kernel["microseconds"] * 1e-6),
    "programs": itemgetter("programs"),
    "an SM": itemgetter("programs_per_sm"),
    "waves": lambda kernel: f"{kernel['waves']:.2f}",
    "registers": itemgetter("registers"),
    "spilled": itemgetter("spill_bytes"),
    "shared": itemgetter("shared_bytes"),
    "load": itemgetter("narrowest_load_bytes"),
    "copies": itemgetter("async_copies"),
    "warp instructions": lambda kernel: f"{kernel['warp_instructions']:.3g}",
    "GFLOP": lambda kernel: f"{kernel['operations'] / 1e9:.3g}",
    "MB": lambda kernel: f"{kernel['bytes'] / 1e6:.3g}",
}


def _table(record: dict[str, Any]) -> str:
    """The kernels of a shape."""
    return table([*_COLUMNS], [[cell(kernel) for cell in _COLUMNS.values()] for kernel in record["kernels"]])
