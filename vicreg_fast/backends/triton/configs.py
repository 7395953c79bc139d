"""Tile sizes and splits of the kernels, by shape: no search.

Not tuned: no GPU has run them yet.  They are what the compilation matrix accepts on every target.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """Block sizes of a group's kernels, warps, and how many programs should share a product."""

    moments_rows: int = 32
    moments_columns: int = 32
    tile: int = 64  # of M
    inner: int = 32  # of one multiplication
    primal_inner: int = 32  # the same, of the primal product
    strip: int = 16  # rows of a tile that one program of the combination handles
    gradient_rows: int = 64
    gradient_columns: int = 64
    warps: int = 8
    programs: int = 264  # two for each of an H200's 132 processors


def choose(dot: str) -> Config:
    """The configuration for a product (Triton's ``input_precision``); one for every shape so far."""
    # Three products keep twice the operands in registers: with 32 the primal's spill on compute capability 12.0.
    return Config(primal_inner=16) if dot == "tf32x3" else Config()


def split(inner: int, tiles: int, config: Config) -> tuple[int, int]:
    """(length, count) of the parts into which a product's inner dimension is cut, so that programs fill the device.

    A part is at least eight multiplications long, or its partial product costs more than it saves.
    """
    parts = max(1, min(config.programs // max(1, tiles), inner // (8 * config.inner)))
    length = -(-inner // (parts * config.inner)) * config.inner
    return length, -(-inner // length)
