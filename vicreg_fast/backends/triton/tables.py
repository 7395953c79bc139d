"""Block sizes of the kernels for each GPU architecture.

Nothing here was measured on a GPU yet.  The sizes are those that compile without a defect on every target of an architecture
(``python -m benchmarks resources``), chosen by the traffic that each size implies.  ``python -m benchmarks tune`` writes rows
for this file.
"""

from typing import NamedTuple

from .config_types import (
    ANY,
    Gradient,
    Local,
    LocalGradient,
    Matching,
    Moments,
    NarrowGradient,
    Product,
    Row,
    Rows,
    Table,
    Tables,
)


class Kind(NamedTuple):
    """What a kind of matmul allows: the largest tile, BLOCK_K, and the warps of a small tile."""

    largest: int
    block_k: int
    warps: int = 4


def _moments(block_n: int, warps: int) -> Rows[Moments]:
    return (
        Row(16, ANY, Moments(16, 128, warps=4)),
        Row(32, ANY, Moments(32, 64, warps=4)),
        Row(64, ANY, Moments(64, 32, warps=4)),
        # One warp of aligned rows: what is computed once a column is not repeated by others, and sums over rows need no barrier.
        Row(ANY, ANY, Moments(block_n, 32, warps, stages=3)),
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


def _kinds(fp32: Kind, tf32: Kind, half: Kind, pair: Kind) -> dict[str, Kind]:
    return {"fp32": fp32, "tf32": tf32, "half": half, "pair": pair}


def _table(
    stages: int,
    kinds: dict[str, Kind],
    block_d: int = 64,
    local_fp32: int = 16,
    local_half: int = 64,
    wide_block_k: int = 64,
) -> Table:
    """``kinds``: "fp32", "tf32", "half" and "pair"."""
    primal_kinds = {name: kind for name, kind in kinds.items() if name != "pair"}
    # The primal side's operands pass through registers, so its BLOCK_K is smaller.  wide_block_k: of 16-bit operands in tiles of
    # 128, two of which fit a register.
    primal = {name: min(kind.block_k, 16 if name == "fp32" else 32) for name, kind in primal_kinds.items()}
    return Table(
        _moments(32, warps=1),
        gram={name: _gram(kind, stages) for name, kind in kinds.items()},
        second_moment={
            name: _second_moment(kind, stages, primal[name], wide_block_k if name == "half" else primal[name])
            for name, kind in primal_kinds.items()
        },
        gradient={name: _gradient(kind, stages, block_d) for name, kind in kinds.items()},
        # 64 rows of float32 spill: three TF32 matmuls keep more of their operands in registers.
        narrow_gradient={
            name: (Row(ANY, ANY, NarrowGradient(32 if name == "fp32" else 64, 4, stages)),)
            for name in primal_kinds
        },
        matching=_matching(stages, kinds["fp32"], kinds["half"]),
        # One warp: sums over rows are of its own registers, and what is computed once a column is not repeated by other warps.
        # 32 columns of float32 spilled on compute capability 9.0.
        local={
            name: (Row(32, ANY, Local(block_d, 1)), Row(ANY, ANY, Local(16, 4)))
            for name, block_d in (("fp32", local_fp32), ("tf32", 32), ("half", local_half))
        },
        local_gradient=_local_gradient(kinds["fp32"].warps),
    )


def _aligned(table: Table) -> Table:
    """Without the rows that no aligned views use: float32 and TF32 on the dual side are of gathered rows, which are unaligned."""
    gradient: dict[str, Rows[Gradient]] = {
        kind: tuple(row for row in rows if kind in ("half", "pair") or min(row[:2]) > 64)
        for kind, rows in table.gradient.items()
    }
    # Many problems have a program each, which reduces the terms too: with four warps it spilled.
    smallest, *others = table.gram["pair"]
    config = others[0].config._replace(warps=8, ctas_per_sm=1)
    gram = {"half": table.gram["half"], "pair": (smallest, Row(64, ANY, config), *others)}
    return table._replace(gram=gram, gradient=gradient)


def _large(stages: int, local_half: int = 64, wide_block_k: int = 64) -> Table:
    kinds = _kinds(Kind(128, 32), Kind(128, 32), Kind(128, 64), Kind(128, 32))
    return _aligned(_table(stages, kinds, local_half=local_half, wide_block_k=wide_block_k))


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


def _without_warp_groups(stages: int, *kinds: Kind) -> Table:
    """Compute capability 8 and 12: a warp multiplies for itself.

    Two accumulators of 128 x 128 spill; of chained matmuls each warp takes 16 rows, so eight would do 64 rows twice.
    """
    table = _aligned(_table(stages, _kinds(*kinds), local_fp32=32))
    pair = (Row(ANY, ANY, Gradient(128, 64, 32, 8, stages)),)
    # Of 16-bit operands a second CTA would need four registers less.
    half = tuple(row._replace(config=row.config._replace(ctas_per_sm=1)) for row in table.second_moment["half"])
    matching = table.matching
    if stages > 2:  # on compute capability 8.0 four warps spilled a few bytes beside locations
        matching = {**matching, "fp32": (Row(ANY, ANY, Matching(64, 16, 8, stages)),)}
    gradient = {**table.gradient, "pair": pair}
    return table._replace(
        gradient=gradient, matching=matching, second_moment={**table.second_moment, "half": half}
    )


def _unaligned(stages: int, local_warps: int = 4) -> Table:
    kinds = _kinds(Kind(64, 16, 8), Kind(64, 16), Kind(64, 16), Kind(64, 16, 8))
    table = _table(stages, kinds, block_d=32)
    return table._replace(
        moments=_moments(32, warps=4),
        matching={**table.matching, "fp32": (Row(ANY, ANY, Matching(64, 16, 8, stages)),)},
        local={kind: (Row(32, ANY, Local(32)), Row(ANY, ANY, Local(16))) for kind in table.local},
        local_gradient=dict.fromkeys(table.local_gradient, _local_gradient(local_warps, 32)["fp32"]),
    )


ARCHITECTURES = {
    "sm80": Tables(
        _without_warp_groups(3, Kind(64, 16, 8), Kind(128, 32), Kind(128, 64), Kind(128, 32)),
        _unaligned(3, local_warps=8),
    ),
    # 8.6, 8.9, 12.0 and unknown ones: the least shared memory.
    "sm86": Tables(
        _without_warp_groups(2, Kind(64, 16, 8), Kind(64, 32), Kind(64, 32), Kind(64, 32)),
        _unaligned(2, local_warps=8),
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
