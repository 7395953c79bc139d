"""How views are cut into blocks.

A block is centred in a buffer that stays in the cache, so the data are read from memory once a pass and working
memory does not grow with the batch.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ...rows import WHOLE, Block, Rows
from ...sides import keeps_moments, uses_dual

# Elements of all the buffers of a block: 6 MiB of float32.  On two cores half of it took 0.94 to 1.1 times as long over
# ten shapes, a quarter 1.0 to 1.25 times, twice as much 0.95 to 1.1 times.
CACHE_ELEMENTS = 3 << 19
# Small inputs need not be cut to save memory: their buffers have at most this many elements, 256 KiB of float32.
SMALL_ELEMENTS = 1 << 16
# A block's inner dimension is at least this long, or the product is bound by rereading its M x M result.
MIN_INNER = 256


def _equal(count: int, most: int) -> int:
    """The size of the fewest parts of ``count`` that are about equal and not above ``most``, or 1."""
    return count if most >= count else -(-count // -(-count // max(1, most)))


def spare_elements(
    groups: Sequence[Sequence[tuple[int, Rows]]], sources: Sequence[Tensor], match_index: Tensor | None
) -> int:
    """How many elements working buffers may have: memory is bounded by twice the inputs, M apart.

    The moments that are kept for the backward pass and the rows' numbers count against it.
    """
    spare = 2 * sum(source.numel() for source in sources)
    if match_index is not None:
        spare -= 2 * match_index.numel()  # int64 beside float32
    if spare <= SMALL_ELEMENTS:
        return spare  # not asked for more precisely
    for group in groups:
        P, N, D = group[0][1].shape
        spare -= 3 * len(group) * P * D if keeps_moments(P, N, D) else 0
    return spare


def blocks(P: int, N: int, D: int, buffers: int, spare: int) -> Iterator[tuple[slice, list[Block]]]:
    """Cut views of P problems (N, D) into groups of problems, each a list of blocks.

    ``buffers`` of a block's size exist at once; together they have at most ``spare`` elements, unless they are small.
    Small problems share a block; a large one is cut along the dimension that its product sums over: features
    on the dual side, rows on the primal.
    """
    dual = uses_dual(P, N, D)
    inner, outer = (D, N) if dual else (N, D)
    size = min(CACHE_ELEMENTS, max(SMALL_ELEMENTS, spare)) // buffers
    problems = _equal(P, size // (N * D))
    step = _equal(inner, max(MIN_INNER, size // (problems * outer)))
    if problems == P and step == inner:
        yield slice(None), [WHOLE]
        return
    for start in range(0, P, problems):
        group = slice(start, min(start + problems, P))
        cuts = (slice(at, min(at + step, inner)) for at in range(0, inner, step))
        if dual:
            yield group, [Block(group, slice(0, N), cut) for cut in cuts]
        else:
            yield group, [Block(group, cut, slice(0, D)) for cut in cuts]
