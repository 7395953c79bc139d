"""Which block sizes the kernels run with: a table for each family of GPUs, chosen from by shape, without any search.

Nothing here was measured on a GPU yet: sizes are what the compilation matrix accepts on every target of a family
(``python -m benchmarks resources``) and what the traffic of each size suggests.  ``VICREG_FAST_AUTOTUNE=1`` measures
them where the library runs, see tuning.py.
"""

import functools
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch

# Bytes that the parts of split products may take: 256 parts of 128 x 128.
WORKSPACE = 16 << 20
# Writing and adding a part's tile costs about as much as this many more multiplications of its inner dimension.
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


class Gradient(NamedTuple):
    """Tile of the gradient and inner length of one multiplication."""

    rows: int
    columns: int
    inner: int
    warps: int = 8
    stages: int = 3


Config = TypeVar("Config", Moments, Product, Gradient)


class Row(NamedTuple, Generic[Config]):
    """The configuration up to these limits."""

    samples: float
    features: float
    config: Config


ANY = float("inf")
Rows = Sequence[Row[Config]]


class Table(NamedTuple):
    """A family's rows; of each kind of product where that matters: "fp32" (float32-accurate), "tf32", "half"."""

    moments: Rows[Moments]
    gram: dict[str, Rows[Product]]
    second_moment: dict[str, Rows[Product]]
    gradient: dict[str, Rows[Gradient]]


def pick(rows: Rows[Config], N: int, D: int) -> Config:
    """The first row whose limits hold."""
    return next(row.config for row in rows if row.samples >= N and row.features >= D)


def _moments() -> Rows[Moments]:
    return (
        Row(16, ANY, Moments(16, 128, warps=4)),
        # Few columns fill the device only in narrow programs; many rows at a time, or each would wait for memory.
        Row(ANY, 4096, Moments(128, 16)),
        Row(1024, ANY, Moments(64, 32)),
        Row(ANY, ANY, Moments(64, 64)),
    )


def _gram(inner: int, stages: int, largest: int = 128) -> Rows[Product]:
    small = (
        Row(32, ANY, Product(32, inner, 4, stages, resident=4)),
        Row(512 if largest > 64 else ANY, ANY, Product(64, inner, 4, stages, resident=4)),
    )
    return small if largest == 64 else (*small, Row(ANY, ANY, Product(128, inner, 8, stages, resident=1)))


def _second_moment(inner: int, stages: int, largest: int = 128) -> Rows[Product]:
    small = (
        Row(ANY, 32, Product(32, inner, 4, stages, resident=4)),
        Row(ANY, 256 if largest > 64 else ANY, Product(64, inner, 8, stages, resident=2)),
    )
    return small if largest == 64 else (*small, Row(ANY, ANY, Product(128, inner, 8, stages, resident=1)))


def _gradient(inner: int, stages: int, largest: int = 128) -> Rows[Gradient]:
    small = (
        Row(32, ANY, Gradient(32, 64, inner, 4, stages)),
        Row(ANY, 64, Gradient(largest, 64, inner, 8, stages)),
        Row(128 if largest > 64 else ANY, ANY, Gradient(64, 128, inner, 8, stages)),
    )
    return small if largest == 64 else (*small, Row(ANY, ANY, Gradient(128, 128, inner, 8, stages)))


def _table(stages: int, fp32: int, tf32: int, half: int, half_inner: int = 64) -> Table:
    """Every kernel's rows: stages of the pipeline, the largest tile of each kind of product."""
    return Table(
        _moments(),
        {
            "fp32": _gram(32, stages, fp32),
            "tf32": _gram(32, stages, tf32),
            "half": _gram(half_inner, stages, half),
        },
        {
            # Three products keep twice the operands in registers.
            "fp32": _second_moment(32 if fp32 == 128 else 16, stages, fp32),
            "tf32": _second_moment(32, stages, tf32),
            "half": _second_moment(32, stages, half),
        },
        {
            "fp32": _gradient(32, stages, fp32),
            "tf32": _gradient(32, stages, tf32),
            "half": _gradient(half_inner, stages, half),
        },
    )


TABLES = {
    "sm80": _table(stages=3, fp32=64, tf32=128, half=128),
    # 8.6, 8.9, 12.0 and what is not known: the least shared memory.
    "sm86": _table(stages=2, fp32=64, tf32=64, half=64, half_inner=32),
    "sm90": _table(stages=3, fp32=128, tf32=128, half=128),
    "sm100": _table(stages=3, fp32=128, tf32=128, half=128),
    "gfx942": _table(stages=2, fp32=128, tf32=128, half=128),
    "gfx950": _table(stages=2, fp32=128, tf32=128, half=128),
}


class Machine(NamedTuple):
    """What configurations depend on."""

    family: str  # of TABLES
    processors: int

    @property
    def table(self) -> Table:
        """The rows to choose from."""
        return TABLES[self.family]


# The interpreter runs one program after the other: it wants few, and yet products that are split.
INTERPRETER = Machine("sm90", 4)


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
        amd = "gfx950" if "gfx95" in properties.gcnArchName else "gfx942"
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


def split(tiles: int, inner: int, config: Product, processors: int, whole_tiles: bool) -> Split:
    """Share ``tiles`` out so that no processor waits long for another.

    ``whole_tiles``: a tile that is not split may be left to one program, which finishes it.
    """
    slots = processors * config.resident
    whole = tiles // slots * slots if whole_tiles else 0
    rest = tiles - whole
    if rest == 0:
        return Split(tiles, 1, inner)
    room = max(1, WORKSPACE // (4 * config.tile**2) // rest)
    # A part is at least four multiplications long.
    most = max(1, min(room, inner // (4 * config.inner), -(-4 * slots // rest)))
    parts = min(range(1, most + 1), key=lambda k: -(-rest * k // slots) * (inner / k + _PART_COST))
    length = -(-inner // (parts * config.inner)) * config.inner
    parts = -(-inner // length)
    if whole_tiles and parts == 1:
        return Split(tiles, 1, inner)
    return Split(whole, parts, length)
