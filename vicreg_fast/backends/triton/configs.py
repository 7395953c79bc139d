"""Which block sizes the kernels run with: a table for each family of GPUs, chosen from by shape, without any search.

Nothing here was measured on a GPU yet: sizes are what the compilation matrix accepts on every target of a family
(``python -m benchmarks resources``) and what the traffic of each size suggests.  ``VICREG_FAST_AUTOTUNE=1`` searches
where the library runs, see tuning.py.
"""

import functools
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

# Bytes that the parts of split products may take: 256 parts of 128 x 128.
WORKSPACE = 16 << 20
# Numbers that a tensor core may add up.  It truncates its float32 sums: about 0.3 of 2^-24 at each step of 8 or more
# (arXiv:2203.03341), after 2^16 a third of what rounding to TF32 does.
LONGEST = 1 << 16
# Writing a part's tile and reading it again costs about as much as this many more multiplications of its inner dimension:
# of 128 x 128, 131 KB at 30 GB/s a processor are 4 us, or 600 steps of bfloat16 products at 4.5 TFLOP/s a
# processor (an H200's memory and products, estimated, not measured); parts stay in the cache, about twice as fast.
_PART_COST = 256


class Moments(NamedTuple):
    """Rows at a time and columns of a program of the dual side's first kernel."""

    rows: int
    columns: int
    warps: int = 8
    stages: int = 2


class Product(NamedTuple):
    """Tile of M, inner length of one multiplication, and how many programs share a processor."""

    tile: int
    inner: int
    warps: int = 8
    stages: int = 3
    resident: int = 2


class Matching(NamedTuple):
    """The largest tile of distances, square, and inner length of one multiplication."""

    tile: int
    inner: int
    warps: int = 4
    stages: int = 3


class Local(NamedTuple):
    """Columns at a time of a program of the local loss's forward pass, and the registers that a thread may have."""

    columns: int
    warps: int = 4
    registers: int = 255


class LocalGradient(NamedTuple):
    """Patches and columns of a program of the local loss's backward pass."""

    patches: int
    columns: int
    warps: int = 4


class Gradient(NamedTuple):
    """Tile of the gradient and inner length of one multiplication."""

    rows: int
    columns: int
    inner: int
    warps: int = 8
    stages: int = 3


Config = TypeVar("Config", Moments, Product, Gradient, Matching, Local, LocalGradient)


# What a kernel's configuration is.
KINDS: dict[str, type] = {
    "moments": Moments,
    "gram": Product,
    "second_moment": Product,
    "gradient": Gradient,
    "matching": Matching,
    "local": Local,
    "local_gradient": LocalGradient,
}


class Row(NamedTuple, Generic[Config]):
    """The configuration up to these limits; of the local loss's kernels, of matches and of patches."""

    samples: float
    features: float
    config: Config


ANY = float("inf")
Rows = Sequence[Row[Config]]


class Table(NamedTuple):
    """Rows of each kernel, and of each kind of product: "fp32" (float32-accurate), "tf32", "half"."""

    moments: Rows[Moments]
    gram: dict[str, Rows[Product]]
    second_moment: dict[str, Rows[Product]]
    gradient: dict[str, Rows[Gradient]]
    matching: dict[str, Rows[Matching]]
    local: dict[str, Rows[Local]]
    local_gradient: Rows[LocalGradient]


class Kind(NamedTuple):
    """What a kind of product can afford: the largest tile, the inner length of one multiplication, a small tile's warps."""

    largest: int
    inner: int
    warps: int = 4


def _moments(columns: int) -> Rows[Moments]:
    return (
        Row(16, ANY, Moments(16, 128, warps=4)),
        Row(32, ANY, Moments(32, 64, warps=4)),
        Row(64, ANY, Moments(64, 32, warps=4)),
        # Few columns fill the device only in narrow programs; many rows at a time, or each would wait for memory.
        Row(ANY, 4096, Moments(128, 16, warps=4)),
        Row(1024, ANY, Moments(64, 32, warps=4)),
        Row(ANY, ANY, Moments(64, columns)),
    )


def _gram(kind: Kind, stages: int) -> Rows[Product]:
    large = kind.largest > 64
    rows = (
        Row(32, ANY, Product(32, kind.inner, 4, stages, resident=4)),
        Row(512 if large else ANY, ANY, Product(64, kind.inner, kind.warps, stages, resident=16 // kind.warps)),
    )
    return (*rows, Row(ANY, ANY, Product(128, kind.inner, 8, stages, resident=1))) if large else rows


def _second_moment(kind: Kind, stages: int, inner: int) -> Rows[Product]:
    large = kind.largest > 64
    rows = (
        Row(ANY, 32, Product(32, 16, 4, stages=2, resident=4)),
        Row(ANY, 256 if large else ANY, Product(64, inner, 8, stages)),
    )
    return (*rows, Row(ANY, ANY, Product(128, inner, 8, stages, resident=1))) if large else rows


def _gradient(kind: Kind, stages: int, columns: int) -> Rows[Gradient]:
    large = kind.largest > 64
    rows = (
        Row(32, ANY, Gradient(32, 64, kind.inner, 8, stages)),
        Row(ANY, 64, Gradient(64, columns, kind.inner, 8, stages)),
        Row(128 if large else ANY, ANY, Gradient(64, 128 if large else columns, kind.inner, 8, stages)),
    )
    return (*rows, Row(ANY, ANY, Gradient(128, 128, kind.inner, 8, stages))) if large else rows


def _matching(stages: int, fp32: Kind, half: Kind) -> dict[str, Rows[Matching]]:
    # Many patches are bound by products: larger tiles multiply more for each byte.  Of float32, three products keep a
    # processor busy with small ones.
    rows = (Row(64 if half.largest > 64 else ANY, ANY, Matching(64, half.inner, half.warps, stages)),)
    # Where float32 products need eight warps, compute capability 8.0, so do longer multiplications of large tiles.
    inner = half.inner if fp32.warps == 4 else 32
    many = (Row(ANY, ANY, Matching(half.largest, inner, 8, stages)),) if half.largest > 64 else ()
    return {"fp32": (Row(ANY, ANY, Matching(64, fp32.inner, fp32.warps, stages)),), "half": (*rows, *many)}


def _local_gradient(warps: int) -> Rows[LocalGradient]:
    # All of an image's patches in one program, as far as they go: others compute the same rows again.
    return (
        Row(32, 64, LocalGradient(64, 32)),
        Row(32, 128, LocalGradient(128, 32, 8)),
        Row(32, ANY, LocalGradient(256, 16, 8)),
        Row(ANY, ANY, LocalGradient(32, 16, warps)),
    )


def _table(stages: int, fp32: Kind, tf32: Kind, half: Kind, columns: int = 64) -> Table:
    kinds = {"fp32": fp32, "tf32": tf32, "half": half}
    # The primal's operands pass through registers: shorter multiplications.
    short = {name: min(kind.inner, 16 if name == "fp32" else 32) for name, kind in kinds.items()}
    return Table(
        _moments(columns),
        gram={name: _gram(kind, stages) for name, kind in kinds.items()},
        second_moment={name: _second_moment(kind, stages, short[name]) for name, kind in kinds.items()},
        gradient={name: _gradient(kind, stages, columns) for name, kind in kinds.items()},
        matching=_matching(stages, fp32, half),
        # Programs wait for memory at every step: with 128 registers a thread four share a processor.  The float64 squares of
        # float32-accurate operands take more.
        local={
            name: (Row(32, ANY, Local(32, 4, registers)), Row(ANY, ANY, Local(16, 4)))
            for name, registers in (("fp32", 255), ("tf32", 128), ("half", 128))
        },
        local_gradient=_local_gradient(fp32.warps),
    )


class Family(NamedTuple):
    """Tables of a family of GPUs."""

    aligned: Table
    odd: Table  # of rows by number or not aligned to 16 elements: each element keeps an address in registers


def _large(stages: int) -> Table:
    return _table(stages, Kind(128, 32), Kind(128, 32), Kind(128, 64))


def _sm100() -> Family:
    """As the other large ones, but for tiles of distances and gradients of many matches, which spilled there."""
    matching: dict[str, Rows[Matching]] = {
        kind: (Row(ANY, ANY, Matching(64, inner, 8)),) for kind, inner in (("fp32", 32), ("half", 64))
    }
    aligned = _large(3)._replace(matching=matching, local_gradient=_local_gradient(8))
    return Family(aligned, _odd(3))


def _odd(stages: int) -> Table:
    return _table(stages, Kind(64, 16, 8), Kind(64, 16), Kind(64, 16), columns=32)


FAMILIES = {
    "sm80": Family(_table(3, Kind(64, 16, 8), Kind(128, 32), Kind(128, 64)), _odd(3)),
    # 8.6, 8.9, 12.0 and what is not known: the least shared memory.
    "sm86": Family(_table(2, Kind(64, 16, 8), Kind(64, 32), Kind(64, 32)), _odd(2)),
    "sm90": Family(_large(3), _odd(3)),
    "sm100": _sm100(),
    "gfx942": Family(_large(2), _odd(2)),
    "gfx950": Family(_large(2), _odd(2)),
}


def _few_programs(table: Table) -> Table:
    """Programs of the local loss have so few registers that there are many of them; the interpreter has as many as it likes.

    Of 256 channels or columns at a time: two rounds of the 512 that tests go up to, where 64 took eight.
    """
    return table._replace(
        matching={kind: (Row(ANY, ANY, Matching(64, 256)),) for kind in table.matching},
        local={kind: (Row(ANY, ANY, Local(256)),) for kind in table.local},
        local_gradient=(Row(ANY, ANY, LocalGradient(128, 256)),),
    )


FAMILIES["interpreter"] = Family(*map(_few_programs, FAMILIES["sm90"]))


class Machine(NamedTuple):
    """What configurations depend on."""

    family: str  # of FAMILIES
    processors: int


def launch_options(machine: Machine, warps: int, stages: int = 1, registers: int = 255) -> dict[str, Any]:
    """Triton's options of every launch; ``registers`` of a thread at most, for NVIDIA's.

    Multiply-add fusion is off whatever Triton's default.  Left alone, NVIDIA's assembler spills a few bytes to fit one more
    program on a processor (in 42 of 520 variants for compute capability 8.0); told that a thread may have 255 registers,
    which is all there are, it does not.
    """
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if machine.family.startswith("sm"):
        options["maxnreg"] = registers
    return options


class Key(NamedTuple):
    """What a configuration is chosen by; ``kind`` is empty for kernels without a product."""

    family: str
    processors: int
    aligned: bool
    kernel: str  # a field of Table
    kind: str
    problems: int  # P times views
    samples: int
    features: int


# What a search has found for one shape (tuning.py); empty without one.
found: dict[Key, Any] = {}


def choose(key: Key) -> Any:
    """The configuration that the key's kernel takes."""
    return found.get(key) or from_table(key)


def from_table(key: Key) -> Any:
    """The table's configuration: of the first row whose limits hold."""
    family = FAMILIES[key.family]
    rows = getattr(family.aligned if key.aligned else family.odd, key.kernel)
    if key.kind:
        rows = rows[key.kind]
    return next(row.config for row in rows if row.samples >= key.samples and row.features >= key.features)


# The interpreter runs one program after the other: it wants few, and yet products that are split.
INTERPRETER = Machine("interpreter", 1)


def family(major: int, minor: int) -> str:
    """The family of a CUDA device of this compute capability."""
    exact = {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}
    return exact.get((major, minor), "sm86")


@functools.cache
def machine(device: torch.device) -> Machine:
    """A device's family and size, asked for once: the properties do not change and their look-up costs a launch."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        # Of AMD's, only gfx942 has TF32.
        amd = "gfx942" if "gfx942" in properties.gcnArchName else "gfx950"
        return Machine(amd, properties.multi_processor_count)
    return Machine(family(properties.major, properties.minor), properties.multi_processor_count)


class Split(NamedTuple):
    """How a product's tiles are shared out: the first ``whole`` to one program each, the others in ``parts``."""

    whole: int
    parts: int
    length: int  # of a part, in the inner dimension

    def programs(self, tiles: int) -> int:
        """Programs of the product's kernel."""
        return self.whole + (tiles - self.whole) * self.parts


@functools.lru_cache(maxsize=1024)  # it takes as long as several launches
def split(tiles: int, inner: int, config: Product, processors: int, whole_tiles: bool) -> Split:
    """Share ``tiles`` out so that no processor waits long for another.

    ``whole_tiles``: a tile that is not split may be left to one program, which finishes it.
    """
    slots = processors * config.resident
    least = -(-inner // LONGEST)
    whole = tiles // slots * slots if whole_tiles and least == 1 else 0
    rest = tiles - whole
    if rest == 0:
        return Split(tiles, 1, inner)
    room = WORKSPACE // (4 * config.tile**2) // rest
    # A part is at least four multiplications long, its pipeline's length and one; more than four rounds gain little.
    most = max(least, min(room, inner // (4 * config.inner), -(-4 * slots // rest)))
    parts = min(range(least, most + 1), key=lambda k: -(-rest * k // slots) * (inner / k + _PART_COST))
    length = -(-inner // (parts * config.inner)) * config.inner
    parts = -(-inner // length)
    if whole_tiles and parts == 1:
        return Split(tiles, 1, inner)
    return Split(whole, parts, length)
