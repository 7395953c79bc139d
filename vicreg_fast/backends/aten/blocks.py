"""How views are cut into blocks.

A block is centred in a buffer that stays in the cache, so the data are read from memory once a pass and working
memory does not grow with the batch.
"""

from collections.abc import Iterator

from ...rows import WHOLE, Block, uses_dual

# Elements of one block over all its views: 4 MiB of float32.  On two cores 2^19 took 0.94 to 1.1 times as long over
# ten shapes, 2^18 1.0 to 1.25 times, 2^21 0.95 to 1.1 times and twice the memory.
BLOCK_ELEMENTS = 1 << 20
# A block's inner dimension is at least this long, or the product is bound by rereading its M x M result.
MIN_INNER = 256
# With fewer samples the saved moments, three numbers a feature, are most of the memory that there is to work in (twice
# the inputs), so a block is an eighth of one problem or a quarter of many at most.  Many small ones stay together.
FEW_SAMPLES = 8
MIN_GROUP = 1 << 16


def _equal(count: int, most: int) -> int:
    """The size of the fewest parts of ``count`` that are about equal and not above ``most``, or 1."""
    return count if most >= count else -(-count // -(-count // max(1, most)))


def blocks(V: int, P: int, N: int, D: int) -> Iterator[tuple[slice, list[Block]]]:
    """Cut V views of P problems (N, D) into groups of problems, each a list of blocks.

    Small problems share a block; a large one is cut along the dimension that its product sums over: features
    on the dual side, rows on the primal.
    """
    inner, outer = (D, N) if uses_dual(N, D) else (N, D)
    size = BLOCK_ELEMENTS
    if N < FEW_SAMPLES:
        size = min(size, V * N * D // 8 if P == 1 else max(V * P * N * D // 4, MIN_GROUP))
    problems = _equal(P, size // (V * N * D))
    step = _equal(inner, max(MIN_INNER, size // (V * problems * outer)))
    if problems == P and step == inner:
        yield slice(None), [WHOLE]
        return
    for start in range(0, P, problems):
        group = slice(start, min(start + problems, P))
        cuts = (slice(at, min(at + step, inner)) for at in range(0, inner, step))
        if uses_dual(N, D):
            yield group, [Block(group, slice(0, N), cut) for cut in cuts]
        else:
            yield group, [Block(group, cut, slice(0, D)) for cut in cuts]
