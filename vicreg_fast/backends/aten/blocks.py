"""How views are cut into blocks.

A block is centred in a buffer that stays in the cache.  The data are then read from memory once a pass, and working memory
does not grow with the batch.  Letters: docs/notation.md.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ...rows import FULL_VIEW, Block, Rows
from ...sides import keeps_moments, uses_dual

# Elements of all the buffers of a block: 6 MiB of float32.  On two cores half of it took 0.94 to 1.1 times as long over
# ten shapes, a quarter of it 1.0 to 1.25 times, twice as much 0.95 to 1.1 times.
CACHE_ELEMENTS = 3 << 19
# Buffers up to this many elements, 256 KiB of float32, need not be cut to save memory.
SMALL_ELEMENTS = 1 << 16
# Least length of a block's inner dimension.  A shorter matmul is bound by the traffic of its result M.
MIN_INNER = 256


def _equal(count: int, most: int) -> int:
    """Size of the parts when ``count`` is cut into the fewest equal parts of at most ``most`` (at least 1)."""
    return count if most >= count else -(-count // -(-count // max(1, most)))


def workspace_elements(
    groups: Sequence[Sequence[tuple[int, Rows]]], sources: Sequence[Tensor], match_index: Tensor | None
) -> int:
    """The workspace budget: how many elements all buffers may have.

    Memory besides M is bounded by twice the inputs.  The moments that are saved for the backward pass and the match index
    count against the bound.
    """
    workspace = 2 * sum(source.numel() for source in sources)
    if match_index is not None:
        workspace -= 2 * match_index.numel()  # int64 takes twice the memory of float32
    if workspace <= SMALL_ELEMENTS:
        return workspace  # :func:`blocks` allows SMALL_ELEMENTS in any case
    for group in groups:
        P, N, D = group[0][1].shape
        workspace -= 3 * len(group) * P * D if keeps_moments(P, N, D) else 0
    return workspace


def blocks(P: int, N: int, D: int, buffers: int, workspace: int) -> Iterator[tuple[slice, list[Block]]]:
    """Cut views of P problems (N, D) into groups of problems, each a list of blocks.

    ``buffers`` of a block's size exist at once.  Together they have at most ``workspace`` elements, or SMALL_ELEMENTS if
    that is more.  Small problems share a block.  A large problem is cut along the inner dimension of its matmul: features
    on the dual side, rows on the primal side.
    """
    dual = uses_dual(P, N, D)
    inner, outer = (D, N) if dual else (N, D)
    size = min(CACHE_ELEMENTS, max(SMALL_ELEMENTS, workspace)) // buffers
    problems = _equal(P, size // (N * D))
    step = _equal(inner, max(MIN_INNER, size // (problems * outer)))
    if problems == P and step == inner:
        yield slice(None), [FULL_VIEW]
        return
    for start in range(0, P, problems):
        group = slice(start, min(start + problems, P))
        cuts = (slice(at, min(at + step, inner)) for at in range(0, inner, step))
        if dual:
            yield group, [Block(group, slice(0, N), cut) for cut in cuts]
        else:
            yield group, [Block(group, cut, slice(0, D)) for cut in cuts]
