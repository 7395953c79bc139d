"""Which views there are, which are compared, and which are averaged together.

Every loss is one or more *groups* of views.  Within a group, variance and covariance are the mean over its
views and invariance the mean over its pairs; all its views have the same (P, N, D).  VICReg is one group of two
views and one pair.  VICRegL's local part is two groups (matches by location, by feature), each of four views
(queries and candidates, both directions) and two pairs; or, where the directions have not as many matches, twice
as many groups of two views, of which two and two are averaged.
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
    weights: Sequence[float] = (1.0, 1.0, 1.0)  # of invariance, variance and covariance, of every group
    keep: bool = True  # False: no backward pass will follow, and what only it reads need not be written
    averaged: int = (
        1  # how many groups, one after the other, are added to one loss: their weights say what share each has
    )

    @property
    def source_count(self) -> int:
        """How many sources the views are taken from."""
        return max(self.view_source) + 1

    @property
    def losses(self) -> int:
        """How many losses there are, of three terms and their sum each."""
        return len(self.group_sizes) // self.averaged

    @property
    def outputs(self) -> int:
        """How many scalars the losses are: four each, and the sum of their sums where there are several."""
        return 4 * self.losses + (self.losses > 1)

    def outputs_of(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The outputs from the groups' terms and sums, four a group."""
        if self.losses == len(values) // 4:
            found = list(values)
        else:
            step = 4 * self.averaged
            found = [
                sum(values[at + k + 4 : at + step : 4], start=values[at + k])
                for at in range(0, len(values), step)
                for k in range(4)
            ]
        totals = found[3::4]
        return [*found, sum(totals[1:], start=totals[0])] if self.losses > 1 else found

    @property
    def pair_list(self) -> list[tuple[int, int]]:
        """The pairs as tuples."""
        return list(zip(self.pairs[::2], self.pairs[1::2], strict=True))

    def groups(self, sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Iterator[list[tuple[int, Rows]]]:
        """Per group, each view's source number and rows; ``indices`` has one tensor (V, P, N) a group or is empty."""
        first = 0
        for number, size in enumerate(self.group_sizes):
            patches = indices[number].unbind() if indices else [None] * size
            yield [
                (source, Rows(problems(sources[source]), patch, self.across))
                for source, patch in zip(self.view_source[first : first + size], patches, strict=True)
            ]
            first += size


ONE_VIEW = Plan((0,), (1,), ())
TWO_VIEWS = Plan((0, 1), (2,), (0, 1))
# Two maps; per group: query of 1->2, candidate of 1->2, query of 2->1, candidate of 2->1.
LOCAL_VIEWS = Plan((0, 1, 1, 0, 0, 1, 1, 0), (4, 4), (0, 1, 2, 3))


def local_views(counts: tuple[int, int]) -> Plan:
    """The plan of VICRegL's local part for so many matches in each direction."""
    if counts[0] == counts[1]:
        return LOCAL_VIEWS
    return LOCAL_VIEWS._replace(group_sizes=(2, 2, 2, 2), pairs=(0, 1), averaged=2)


def index_shapes(B: int, counts: Sequence[int], across: bool) -> list[tuple[int, int, int]]:
    """Shapes (V, P, N) of the matches of one kind, a tensor a group: ``counts`` of one direction or of both."""
    alike = len(counts) == 2 and counts[0] == counts[1]
    shapes = [(4, counts[0])] if alike else [(2, m) for m in counts]
    return [(V, m, B) if across else (V, B, m) for V, m in shapes]
