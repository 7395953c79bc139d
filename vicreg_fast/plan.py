"""The structure of a loss: its views, the pairs of views, and the groups of views that are averaged.

A loss has one or more *groups* of views.  Within a group, variance and covariance are means over its views and the
invariance is the mean over its pairs; all its views have the same (P, N, D).

VICReg is one group of two views and one pair.  VICRegL's local part has two losses, of matches by location and by feature.
Each is one group of four views (queries and candidates, x to y and y to x) and two pairs.  If the two directions have
different numbers of matches, each direction is a group, and the two groups of a loss are averaged.
Letters: docs/notation.md.
"""

import math
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
    """The structure and the constants of a loss: plain values, so that it passes through an opaque operator.

    The operators' schema is generated from the fields, in this order.
    """

    view_source: Sequence[int]  # index of each view's source tensor, group after group
    group_sizes: Sequence[int]  # views of each group
    pairs: Sequence[int]  # i0, j0, i1, j1, ...: positions within a group, the same in every group
    per_slot: bool = False  # statistics="slot": problem p is match slot p, its samples are the images (rows.py)
    gamma: float = 1.0
    eps: float = 0.0
    precision: str | None = None
    covariance: bool = True  # False: the covariance term is not computed and is zero
    backend: str = "aten"
    # Of invariance, variance and covariance, the same in every group.
    weights: Sequence[float] = (1.0, 1.0, 1.0)
    save_for_backward: bool = True  # False: no backward pass follows, and nothing is saved for one
    # Consecutive groups whose terms are added to one loss.  The weights contain the factor 1 / groups_per_loss.
    groups_per_loss: int = 1
    # Matches from x to y and from y to x.  Empty: every row of a source is a sample.
    match_counts: Sequence[int] = ()
    match_order: str = "distance"  # "distance": nearest first; "patch": by the query's index

    @property
    def source_count(self) -> int:
        """Number of source tensors."""
        return max(self.view_source) + 1

    @property
    def losses(self) -> int:
        """Number of losses.  Each has three terms and their sum."""
        return len(self.group_sizes) // self.groups_per_loss

    @property
    def outputs(self) -> int:
        """Number of scalar outputs: four a loss, and the sum of all losses if there are several."""
        return 4 * self.losses + (self.losses > 1)

    def outputs_of(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, from the groups' terms and sums (four a group)."""
        if self.losses == len(values) // 4:
            outputs = list(values)
        else:
            step = 4 * self.groups_per_loss
            outputs = [
                sum(values[at + k + 4 : at + step : 4], start=values[at + k])
                for at in range(0, len(values), step)
                for k in range(4)
            ]
        totals = outputs[3::4]
        return [*outputs, sum(totals[1:], start=totals[0])] if self.losses > 1 else outputs

    @property
    def pair_list(self) -> list[tuple[int, int]]:
        """The pairs as tuples."""
        return list(zip(self.pairs[::2], self.pairs[1::2], strict=True))

    def group_sources(self, group: int) -> Sequence[int]:
        """Index of the source of each of a group's views."""
        first = sum(self.group_sizes[:group])
        return self.view_source[first : first + self.group_sizes[group]]

    def match_sets(self, match_index: Tensor, B: int) -> list[Tensor]:
        """Each group's part of a flat match index, (V, P, N): views of it."""
        shapes = index_shapes(B, self.match_counts, self.per_slot) * self.losses
        parts = match_index.split([math.prod(shape) for shape in shapes])  # type: ignore[no-untyped-call]
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def groups(self, sources: Sequence[Tensor], match_index: Tensor | None) -> Iterator[list[tuple[int, Rows]]]:
        """Each group's views: the index of the source, and its rows."""
        sets = None if match_index is None else self.match_sets(match_index, sources[0].shape[0])
        for group, size in enumerate(self.group_sizes):
            patches = [None] * size if sets is None else sets[group].unbind()
            yield [
                (source, Rows(problems(sources[source]), patch, self.per_slot))
                for source, patch in zip(self.group_sources(group), patches, strict=True)
            ]


class Matches(NamedTuple):
    """The result of a backend's matching.

    ``match_index`` is flat.  For each kind of match (location, feature) and each direction (x to y, y to x) it holds the indices
    of the queries and then those of the candidates, (2, B, m), or (2, m, B) per slot.
    """

    match_index: Tensor
    # (1,) int32, zero: the next launch counts its finished programs in it.  None: the backend does not count.
    arrival_counter: Tensor | None = None


ONE_VIEW = Plan((0,), (1,), ())
TWO_VIEWS = Plan((0, 1), (2,), (0, 1))
# Two maps.  Views of each group: queries and candidates from x to y, queries and candidates from y to x.
LOCAL_VIEWS = Plan((0, 1, 1, 0, 0, 1, 1, 0), (4, 4), (0, 1, 2, 3))


def local_views(counts: tuple[int, int]) -> Plan:
    """The plan of VICRegL's local part, with ``counts`` matches from x to y and from y to x."""
    plan = LOCAL_VIEWS._replace(match_counts=counts)
    if counts[0] == counts[1]:
        return plan
    return plan._replace(group_sizes=(2, 2, 2, 2), pairs=(0, 1), groups_per_loss=2)


def index_shapes(B: int, counts: Sequence[int], per_slot: bool) -> list[tuple[int, int, int]]:
    """Shapes (V, P, N) of the match sets of one kind, one for each group; ``counts``: of one direction or of both."""
    equal = len(counts) == 2 and counts[0] == counts[1]
    shapes = [(4, counts[0])] if equal else [(2, m) for m in counts]
    return [(V, m, B) if per_slot else (V, B, m) for V, m in shapes]


def index_size(B: int, counts: Sequence[int], kinds: int) -> int:
    """Number of elements of a flat match index."""
    return 2 * kinds * B * sum(counts)
