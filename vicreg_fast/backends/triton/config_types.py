"""The configurations of the kernels, and the rows of the tables that have them."""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar


class Moments(NamedTuple):
    """Of the dual side's moments kernel: rows at a time, columns of a program."""

    block_n: int
    block_d: int
    warps: int = 8
    stages: int = 2


class Product(NamedTuple):
    """Of the kernels that compute M: the side of a tile, BLOCK_K, and how many CTAs share an SM."""

    block_m: int
    block_k: int
    warps: int = 8
    stages: int = 3
    ctas_per_sm: int = 2


class Gradient(NamedTuple):
    """Of the backward kernel: the tile of the gradient, and BLOCK_K."""

    block_n: int
    block_d: int
    block_k: int
    warps: int = 8
    stages: int = 3


class NarrowGradient(NamedTuple):
    """Of the backward kernel for few features: rows at a time, and how many CTAs share an SM."""

    block_n: int
    warps: int = 4
    stages: int = 3
    ctas_per_sm: int = 2


class Matching(NamedTuple):
    """Of patch matching: the largest side of a tile of distances, and BLOCK_K."""

    largest_tile: int
    block_k: int
    warps: int = 4
    stages: int = 3


class Local(NamedTuple):
    """Of VICRegL's forward kernel: columns at a time."""

    block_d: int
    warps: int = 4


class LocalGradient(NamedTuple):
    """Of VICRegL's backward kernel: patches and columns of a program."""

    block_l: int
    block_d: int
    warps: int = 4


Config = TypeVar("Config", Moments, Product, Gradient, NarrowGradient, Matching, Local, LocalGradient)


class Tuned(NamedTuple):
    """A kernel whose configuration is looked up: the configuration's type, and the two sizes that it is chosen by."""

    config: type
    sizes: tuple[str, str]


# The kernels that have rows in Table.
KERNELS = {
    "moments": Tuned(Moments, ("samples", "features")),
    "gram": Tuned(Product, ("samples", "features")),
    "second_moment": Tuned(Product, ("samples", "features")),
    "gradient": Tuned(Gradient, ("samples", "features")),
    "narrow_gradient": Tuned(NarrowGradient, ("samples", "features")),
    "matching": Tuned(Matching, ("patches", "channels")),
    "local": Tuned(Local, ("matches", "patches")),
    "local_gradient": Tuned(LocalGradient, ("matches", "patches")),
}


class Row(NamedTuple, Generic[Config]):
    """A configuration, and the largest two sizes of KERNELS that it is for."""

    first: float
    second: float
    config: Config


ANY = float("inf")
Rows = Sequence[Row[Config]]


class Table(NamedTuple):
    """Rows of each kernel; of kernels with a matmul, by its kind.

    "fp32" (accurate to float32), "tf32", "half"; of kernels that read the dual side's operand also "pair", of two float16.
    """

    moments: Rows[Moments]
    gram: dict[str, Rows[Product]]
    second_moment: dict[str, Rows[Product]]
    gradient: dict[str, Rows[Gradient]]
    narrow_gradient: dict[str, Rows[NarrowGradient]]
    matching: dict[str, Rows[Matching]]
    local: dict[str, Rows[Local]]
    local_gradient: dict[str, Rows[LocalGradient]]


class Tables(NamedTuple):
    """The tables of an architecture."""

    aligned: Table  # see _aligned()
    # For gathered rows and for rows not aligned to 16 elements: each element keeps an address in registers.
    unaligned: Table
