"""How the tiles of M are shared out among programs: which are computed by one program, and how the others are split."""

import functools
from typing import NamedTuple

from .configs import Product

# Bytes that the split tiles may take: 256 splits of 128 x 128.
WORKSPACE = 16 << 20
# The longest inner dimension that one program may accumulate.  Tensor cores truncate their float32 sums by about 0.3 of
# 2^-24 at each step of 8 or more (arXiv:2203.03341); after 2^16 elements that is a third of the error of rounding to TF32.
LONGEST = 1 << 16
# Writing a split's tile and reading it again costs about as much as this many more elements of the inner dimension.  For
# 128 x 128, 131 KB at 30 GB/s an SM are 4 us, or 600 elements of a bfloat16 matmul at 4.5 TFLOP/s an SM (an H200's memory
# and matmuls, estimated, not measured).  Splits stay in the L2 cache, which is about twice as fast.
_SPLIT_COST = 256


class Split(NamedTuple):
    """The first ``full_tiles`` tiles have one program each; every later tile has ``splits`` programs."""

    full_tiles: int
    splits: int
    split_length: int  # of the inner dimension, in elements

    def programs(self, tiles: int) -> int:
        """Programs for all ``tiles``."""
        return self.full_tiles + (tiles - self.full_tiles) * self.splits


def tril_tiles(side: int, block_m: int) -> int:
    """Tiles on and below the diagonal of one M."""
    count = -(-side // block_m)
    return count * (count + 1) // 2


@functools.lru_cache(maxsize=1024)  # computing it takes as long as several launches
def split(tiles: int, inner: int, config: Product, num_sms: int, allow_full_tiles: bool) -> Split:
    """Share ``tiles`` out so that the last wave of programs leaves few SMs idle.

    ``allow_full_tiles``: the kernel can finish a tile that is not split.
    """
    slots = num_sms * config.ctas_per_sm
    least = -(-inner // LONGEST)
    full_tiles = tiles // slots * slots if allow_full_tiles and least == 1 else 0
    split_tiles = tiles - full_tiles
    if split_tiles == 0:
        return Split(tiles, 1, inner)
    in_workspace = WORKSPACE // (4 * config.block_m**2) // split_tiles
    # A split is at least four steps of BLOCK_K long: the pipeline's length and one.  More than four waves gain little.
    most = max(least, min(in_workspace, inner // (4 * config.block_k), -(-4 * slots // split_tiles)))
    splits = min(range(least, most + 1), key=lambda k: -(-split_tiles * k // slots) * (inner / k + _SPLIT_COST))
    split_length = -(-inner // (splits * config.block_k)) * config.block_k
    splits = -(-inner // split_length)
    if allow_full_tiles and splits == 1:
        return Split(tiles, 1, inner)
    return Split(full_tiles, splits, split_length)
