"""The configurations that a search tries for a kernel, those that differ least from the table's first.

Blocks are at most as large as what they cover.  A tile of float32 sums takes at most 128 of a thread's 255 registers, which
also hold operands and addresses, and at least 8: with fewer, most instructions are not arithmetic.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from . import configs
from .configs import Key

_MOST_SUMS, _LEAST_SUMS = 128, 8
_CTAS_PER_SM = (1, 2, 3, 4)


def candidates(key: Key) -> list[Any]:
    """Every configuration that a search tries beside the table's own, which is not among them."""
    table = configs.from_table(key)
    found = [config for config in dict.fromkeys(_ALL[key.kernel](key)) if config != table]
    return sorted(found, key=lambda config: _steps(config, table))


def _steps(config: Sequence[int], other: Sequence[int]) -> float:
    """How far apart two configurations are: in doublings, over all fields."""
    return sum(abs(math.log2(a / b)) for a, b in zip(config, other, strict=True))


def _blocks(sizes: Sequence[int], count: int) -> list[int]:
    """Those of the sizes that are not larger than the power of two that covers ``count``; at least the smallest."""
    return [size for size in sizes if size <= max(sizes[0], 1 << (count - 1).bit_length())]


def _fits(elements: int, warps: int) -> bool:
    """Whether a tile of so many sums suits so many warps."""
    return _LEAST_SUMS <= elements / (32 * warps) <= _MOST_SUMS


def _moments(key: Key) -> Iterator[Any]:
    sizes = _blocks((16, 32, 64, 128, 256), key.first), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
    for block_n, block_d, warps, stages in itertools.product(*sizes):
        config = configs.Moments(block_n, block_d, warps, stages)
        # Three tiles of sums at a time.  All rows in one block are read once, without a loop that stages could overlap.
        if 1024 <= block_n * block_d <= 8192 and (
            block_n < key.first or stages == configs.Moments(1, 1).stages
        ):
            yield config


def _product(key: Key) -> Iterator[Any]:
    side = key.first if key.kernel == "gram" else key.second
    sizes = _blocks((32, 64, 128), side), (16, 32, 64), (4, 8), (2, 3, 4), _CTAS_PER_SM
    for block_m, block_k, warps, stages, ctas_per_sm in itertools.product(*sizes):
        # A program of few features has a tile of each view.
        tiles = 2 if key.kernel == "second_moment" and side <= block_m else 1
        if _fits(tiles * block_m**2, warps) and (block_m < 128 or ctas_per_sm <= 2):
            yield configs.Product(block_m, block_k, warps, stages, ctas_per_sm)


def _gradient(key: Key) -> Iterator[Any]:
    sizes = (
        _blocks((32, 64, 128), key.first),
        _blocks((64, 128, 256), key.second),
        (16, 32, 64),
        (4, 8),
        (2, 3, 4),
    )
    for block_n, block_d, block_k, warps, stages in itertools.product(*sizes):
        if _fits(block_n * block_d, warps) and block_d <= 2 * block_n:
            yield configs.Gradient(block_n, block_d, block_k, warps, stages)


def _narrow_gradient(key: Key) -> Iterator[Any]:
    sizes = _blocks((32, 64, 128), key.first), (4, 8), (1, 2, 3, 4), _CTAS_PER_SM
    for block_n, warps, stages, ctas_per_sm in itertools.product(*sizes):
        yield configs.NarrowGradient(block_n, warps, stages, ctas_per_sm)


def _matching(key: Key) -> Iterator[Any]:
    sizes = _blocks((32, 64, 128), key.first), (16, 32, 64, 128), (4, 8), (2, 3, 4)
    for tile, block_k, warps, stages in itertools.product(*sizes):
        if _fits(tile**2, warps):
            yield configs.Matching(tile, block_k, warps, stages)


def _local(key: Key) -> Iterator[Any]:
    for block_d, warps in itertools.product((16, 32, 64, 128, 256), (1, 2, 4, 8)):
        yield configs.Local(block_d, warps)


def _local_gradient(key: Key) -> Iterator[Any]:
    sizes = _blocks((32, 64, 128, 256), key.second), (16, 32, 64, 128), (1, 2, 4, 8)
    for block_l, block_d, warps in itertools.product(*sizes):
        if _fits(block_l * block_d, warps):
            yield configs.LocalGradient(block_l, block_d, warps)


_ALL = {
    "moments": _moments,
    "gram": _product,
    "second_moment": _product,
    "gradient": _gradient,
    "narrow_gradient": _narrow_gradient,
    "matching": _matching,
    "local": _local,
    "local_gradient": _local_gradient,
}
