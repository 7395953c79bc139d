"""Block sizes of the kernels: a table for each GPU architecture, looked up by shape, without a search.

Nothing here was measured on a GPU yet.  The sizes are those that compile without a defect on every target of an architecture
(``python -m benchmarks resources``), chosen by the traffic that each size implies.  ``VICREG_FAST_AUTOTUNE=1`` searches on
the machine where the library runs, see autotune.py; ``python -m benchmarks tune`` writes rows for this file.
"""

import functools
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch


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
    """Rows of each kernel; of kernels with a matmul, by its kind: "fp32" (accurate to float32), "tf32", "half"."""

    moments: Rows[Moments]
    gram: dict[str, Rows[Product]]
    second_moment: dict[str, Rows[Product]]
    gradient: dict[str, Rows[Gradient]]
    narrow_gradient: dict[str, Rows[NarrowGradient]]
    matching: dict[str, Rows[Matching]]
    local: dict[str, Rows[Local]]
    local_gradient: dict[str, Rows[LocalGradient]]


class Kind(NamedTuple):
    """What a kind of matmul allows: the largest tile, BLOCK_K, and the warps of a small tile."""

    largest: int
    block_k: int
    warps: int = 4


def _moments(block_d: int) -> Rows[Moments]:
    return (
        Row(16, ANY, Moments(16, 128, warps=4)),
        Row(32, ANY, Moments(32, 64, warps=4)),
        Row(64, ANY, Moments(64, 32, warps=4)),
        # Few columns fill the device only in narrow programs.  Many rows at a time, or each would wait for memory.
        Row(ANY, 4096, Moments(128, 16)),
        Row(1024, ANY, Moments(64, 32, warps=4)),
        Row(ANY, ANY, Moments(64, block_d, warps=4)),
    )


def _gram(kind: Kind, stages: int) -> Rows[Product]:
    large = kind.largest > 64
    # As many as share an SM where no tile is split, which takes the most registers.
    small = Product(64, kind.block_k, kind.warps, stages, ctas_per_sm=8 // kind.warps)
    rows = (
        Row(32, ANY, Product(32, kind.block_k, 4, stages, ctas_per_sm=3)),
        Row(512 if large else ANY, ANY, small),
    )
    return (*rows, Row(ANY, ANY, Product(128, kind.block_k, 8, stages, ctas_per_sm=1))) if large else rows


def _second_moment(kind: Kind, stages: int, block_k: int, wide_block_k: int) -> Rows[Product]:
    large = kind.largest > 64
    rows = (
        Row(ANY, 32, Product(32, 16, 4, stages=2, ctas_per_sm=2)),
        # Of up to 64 features one program has both views.
        Row(ANY, 64, Product(64, block_k, 8, stages, ctas_per_sm=1)),
        Row(ANY, 256 if large else ANY, Product(64, block_k, 8, stages, ctas_per_sm=1 if block_k == 16 else 2)),
    )
    return (*rows, Row(ANY, ANY, Product(128, wide_block_k, 8, stages, ctas_per_sm=1))) if large else rows


def _gradient(kind: Kind, stages: int, block_d: int) -> Rows[Gradient]:
    large = kind.largest > 64
    rows = (
        Row(32, ANY, Gradient(32, 64, kind.block_k, 8, stages)),
        Row(ANY, 64, Gradient(64, block_d, kind.block_k, 8, stages)),
        Row(128 if large else ANY, ANY, Gradient(64, 128 if large else block_d, kind.block_k, 8, stages)),
    )
    return (*rows, Row(ANY, ANY, Gradient(128, 128, kind.block_k, 8, stages))) if large else rows


def _matching(stages: int, fp32: Kind, half: Kind) -> dict[str, Rows[Matching]]:
    # Many patches are bound by arithmetic: larger tiles multiply more for each byte.  The three TF32 matmuls of float32
    # keep an SM busy with small tiles.
    small = Row(64 if half.largest > 64 else ANY, ANY, Matching(64, half.block_k, half.warps, stages))
    # Where float32 matmuls need eight warps, on compute capability 8.0, a larger BLOCK_K of large tiles does too.
    block_k = half.block_k if fp32.warps == 4 else 32
    large = (Row(ANY, ANY, Matching(half.largest, block_k, 8, stages)),) if half.largest > 64 else ()
    return {
        # BLOCK_K 16: with 32 and four warps Triton 3.6 spills beside locations.  Up to three channels are compared as locations
        # are, by differences, which take more registers than a matmul.
        "fp32": (Row(ANY, 3, Matching(64, 16, 8, stages)), Row(ANY, ANY, Matching(64, 16, 4, stages))),
        "half": (small, *large),
    }


def _local_gradient(
    warps: int, fp32_columns: int = 64, half_columns: int = 128
) -> dict[str, Rows[LocalGradient]]:
    # One program for all of an image's patches, up to 256: several would compute the same matched rows again.
    many = Row(ANY, ANY, LocalGradient(32, 16, warps))
    middle = Row(32, 128, LocalGradient(128, 32, 8))
    # Of up to 64 and of more patches: the most columns that spill on neither Triton 3.6 nor 3.9.  float16 is of kind tf32.
    columns = {"fp32": (fp32_columns, 32), "tf32": (64, 32), "half": (half_columns, 64)}
    return {
        kind: (Row(32, 64, LocalGradient(64, few)), middle, Row(32, ANY, LocalGradient(256, more, 8)), many)
        for kind, (few, more) in columns.items()
    }


def _table(
    stages: int,
    fp32: Kind,
    tf32: Kind,
    half: Kind,
    block_d: int = 64,
    local_half: int = 64,
    wide_block_k: int = 64,
) -> Table:
    kinds = {"fp32": fp32, "tf32": tf32, "half": half}
    # The primal side's operands pass through registers, so its BLOCK_K is smaller.  wide_block_k: of 16-bit operands in tiles of
    # 128, two of which fit a register.
    primal = {name: min(kind.block_k, 16 if name == "fp32" else 32) for name, kind in kinds.items()}
    return Table(
        _moments(block_d),
        gram={name: _gram(kind, stages) for name, kind in kinds.items()},
        second_moment={
            name: _second_moment(kind, stages, primal[name], wide_block_k if name == "half" else primal[name])
            for name, kind in kinds.items()
        },
        gradient={name: _gradient(kind, stages, block_d) for name, kind in kinds.items()},
        # 64 rows of float32 spill: three TF32 matmuls keep more of their operands in registers.
        narrow_gradient={
            name: (Row(ANY, ANY, NarrowGradient(32 if name == "fp32" else 64, 4, stages)),) for name in kinds
        },
        matching=_matching(stages, fp32, half),
        # One warp: sums over rows are of its own registers, and what is computed once a column is not repeated by other warps.
        # The float64 squares of float32-accurate operands take more registers.
        local={
            name: (Row(32, ANY, Local(block_d, 1)), Row(ANY, ANY, Local(16, 4)))
            for name, block_d in (("fp32", 16), ("tf32", 32), ("half", local_half))
        },
        local_gradient=_local_gradient(fp32.warps),
    )


class Tables(NamedTuple):
    """The tables of an architecture."""

    aligned: Table
    # For gathered rows and for rows not aligned to 16 elements: each element keeps an address in registers.
    unaligned: Table


def _large(stages: int, local_half: int = 64, wide_block_k: int = 64) -> Table:
    kinds = Kind(128, 32), Kind(128, 32), Kind(128, 64)
    return _table(stages, *kinds, local_half=local_half, wide_block_k=wide_block_k)


def _sm90() -> Tables:
    """As for the other large ones, with gradients of 16-bit operands in wider tiles: fewer bytes of shared memory."""
    table = _large(3)
    *rows, largest = table.gradient["half"]
    wide = (*rows, largest._replace(second=384), Row(ANY, ANY, largest.config._replace(block_d=256)))
    return Tables(table._replace(gradient=table.gradient | {"half": wide}), _unaligned(3))


def _sm100() -> Tables:
    """As for the other large ones, except for tiles of distances and gradients of many matches, which spilled there."""
    matching: dict[str, Rows[Matching]] = {
        kind: (Row(ANY, ANY, Matching(64, block_k, 8)),) for kind, block_k in (("fp32", 32), ("half", 64))
    }
    table = _large(3, local_half=32)
    # Triton 3.6 cannot compile the pipelined loop of few features.
    second_moment: dict[str, Rows[Product]] = {
        kind: tuple(
            row._replace(config=row.config._replace(stages=1)) if 32 < row.second <= 64 else row for row in rows
        )
        for kind, rows in table.second_moment.items()
    }
    local_gradient = _local_gradient(8, fp32_columns=32, half_columns=64)
    aligned = table._replace(matching=matching, local_gradient=local_gradient, second_moment=second_moment)
    return Tables(aligned, _unaligned(3, local_warps=8))


def _unaligned(stages: int, local_warps: int = 4) -> Table:
    table = _table(stages, Kind(64, 16, 8), Kind(64, 16), Kind(64, 16), block_d=32)
    return table._replace(
        local={kind: (Row(32, ANY, Local(32)), Row(ANY, ANY, Local(16))) for kind in table.local},
        local_gradient=dict.fromkeys(table.local_gradient, _local_gradient(local_warps, 32)["fp32"]),
    )


ARCHITECTURES = {
    # 64 columns of 16 bits spilled on compute capability 8 and 10.
    "sm80": Tables(
        _table(3, Kind(64, 16, 8), Kind(128, 32), Kind(128, 64), local_half=32), _unaligned(3, local_warps=8)
    ),
    # 8.6, 8.9, 12.0 and unknown ones: the least shared memory.
    "sm86": Tables(
        _table(2, Kind(64, 16, 8), Kind(64, 32), Kind(64, 32), local_half=32), _unaligned(2, local_warps=8)
    ),
    "sm90": _sm90(),
    "sm100": _sm100(),
    # bfloat16 is subtracted as float32.
    "gfx942": Tables(_large(2, wide_block_k=32), _unaligned(2)),
    "gfx950": Tables(_large(2, wide_block_k=32), _unaligned(2)),
}


def _large_programs(table: Table) -> Table:
    """For the interpreter, which runs one program after the other and has no registers to run out of.

    256 channels or columns at a time: the 512 that the tests go up to take two steps, where 64 took eight.
    """
    return table._replace(
        matching={kind: (Row(ANY, ANY, Matching(64, 256)),) for kind in table.matching},
        local={kind: (Row(ANY, ANY, Local(256)),) for kind in table.local},
        local_gradient={kind: (Row(ANY, ANY, LocalGradient(128, 256)),) for kind in table.local_gradient},
    )


ARCHITECTURES["interpreter"] = Tables(*map(_large_programs, ARCHITECTURES["sm90"]))


class Device(NamedTuple):
    """What configurations depend on."""

    arch: str  # of ARCHITECTURES
    num_sms: int


def launch_options(device: Device, warps: int, stages: int = 1) -> dict[str, Any]:
    """Triton's options of a launch.

    FMA fusion is off, whatever Triton's default.  The register limit is always given: without one, NVIDIA's assembler spills
    a few bytes to fit one more CTA on an SM (in 42 of 520 variants for compute capability 8.0); with a limit of 255, the
    most there is, it does not.
    """
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if device.arch.startswith("sm"):
        options["maxnreg"] = 255
    return options


class Key(NamedTuple):
    """What a configuration is chosen by."""

    arch: str
    num_sms: int
    aligned: bool
    kernel: str  # of KERNELS
    kind: str  # of the matmul; empty for kernels without one
    problems: int  # P times V; images for VICRegL and matching
    first: int  # the sizes of KERNELS
    second: int


# Configurations that a search chose (autotune.py); empty without one.
tuned_configs: dict[Key, Any] = {}


def choose(key: Key) -> Any:
    """The configuration that the key's kernel is launched with."""
    return tuned_configs.get(key) or from_table(key)


def from_table(key: Key) -> Any:
    """The table's configuration: that of the first row whose limits hold."""
    tables = ARCHITECTURES[key.arch]
    rows = getattr(tables.aligned if key.aligned else tables.unaligned, key.kernel)
    if key.kind:
        rows = rows[key.kind]
    return next(row.config for row in rows if row.first >= key.first and row.second >= key.second)


# One SM: the interpreter is fastest with few programs.
INTERPRETER = Device("interpreter", 1)


def architecture(major: int, minor: int) -> str:
    """The architecture of a CUDA device of this compute capability."""
    exact = {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}
    return exact.get((major, minor), "sm86")


@functools.cache
def device_of(device: torch.device) -> Device:
    """A device's architecture and size.  Cached: looking up the properties takes as long as a launch."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        # Of AMD's GPUs only gfx942 has TF32.
        amd = "gfx942" if "gfx942" in properties.gcnArchName else "gfx950"
        return Device(amd, properties.multi_processor_count)
    return Device(architecture(properties.major, properties.minor), properties.multi_processor_count)
