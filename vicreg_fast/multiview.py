"""Which views there are, which are compared, and which are averaged together.

Every loss is one or more *groups* of views.  Within a group, variance and covariance are the mean over its
views and invariance the mean over its pairs; all its views have the same (P, N, D).  VICReg is one group of two
views and one pair.  VICRegL's local part is two groups (matches by location, by feature), each of four views
(queries and candidates, both directions) and two pairs.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from .rows import Rows


def problems(z: Tensor) -> Tensor:
    """(..., N, D) as (P, N, D)."""
    if z.ndim == 3:
        return z
    return z.unsqueeze(0) if z.ndim == 2 else z.reshape(-1, *z.shape[-2:])


class Plan(NamedTuple):
    """The structure and the constants of a loss: plain values, so that it passes through an opaque operator."""

    view_source: Sequence[int]  # the source tensor of each view, the groups' views one after the other
    group_sizes: Sequence[int]  # how many views each group has
    pairs: Sequence[int]  # i0, j0, i1, j1, ...: positions within a group, the same for every group
    across: bool = False  # problems run across images (see rows.py)
    gamma: float = 1.0
    eps: float = 0.0
    precision: str | None = None
    covariance: bool = True  # False: the covariance term is left out and is zero
    backend: str = "aten"
    weights: Sequence[float] = (1.0, 1.0, 1.0)  # of invariance, variance and covariance, in every group
    keep: bool = True  # False: no backward pass will follow, and what only it reads need not be written

    @property
    def source_count(self) -> int:
        """How many sources the views are taken from."""
        return max(self.view_source) + 1

    @property
    def pair_list(self) -> list[tuple[int, int]]:
        """The pairs as tuples."""
        return list(zip(self.pairs[::2], self.pairs[1::2], strict=True))

    def groups(self, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Iterator[list[tuple[int, Rows]]]:
        """Per group, each view's source number and rows; ``indices`` has one tensor a view or is empty."""
        first = 0
        for size in self.group_sizes:
            group = []
            for view in range(first, first + size):
                source = self.view_source[view]
                index = indices[view] if indices else None
                group.append((source, Rows(problems(sources[source]), index, self.across)))
            yield group
            first += size


ONE_VIEW = Plan((0,), (1,), ())
TWO_VIEWS = Plan((0, 1), (2,), (0, 1))
# Two maps; per group: query of 1->2, candidate of 1->2, query of 2->1, candidate of 2->1.
LOCAL_VIEWS = Plan((0, 1, 1, 0, 0, 1, 1, 0), (4, 4), (0, 1, 2, 3))
