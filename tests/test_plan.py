"""Plan: the layout of the match index, the groups of views, and the operators' schema that its fields make."""

import math

import pytest
import torch

from vicreg_fast import operators  # noqa: F401  registers the operators
from vicreg_fast.plan import LOCAL_VIEWS, ONE_VIEW, TWO_VIEWS, Plan, index_shapes, index_size, local_views

B, P1, P2, C = 3, 9, 8, 5
COUNTS = [(4, 4), (4, 7), (7, 1), (1, 1)]
counts_of_matches = pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: f"{counts[0]}and{counts[1]}")
both_statistics = pytest.mark.parametrize("per_slot", [False, True], ids=["image", "slot"])


def index_of(kind, direction, side, image, k):
    """A value that names its place: kind of match, direction, query or candidate, image, match."""
    return (((kind * 2 + direction) * 2 + side) * 10 + image) * 100 + k


def flat_index(counts, per_slot):
    """The match index as Matches documents it: (2, B, m), or (2, m, B) per slot, for each kind and direction."""
    values = []
    for kind in range(2):
        for direction, m in enumerate(counts):
            for side in range(2):
                pairs = [(image, k) for image in range(B) for k in range(m)]
                pairs = sorted(pairs, key=lambda pair: pair[::-1]) if per_slot else pairs
                values += [index_of(kind, direction, side, image, k) for image, k in pairs]
    return torch.tensor(values)


@counts_of_matches
@both_statistics
def test_match_sets_hold_what_the_layout_says(per_slot, counts):
    plan = local_views(counts)._replace(per_slot=per_slot)
    sets = plan.match_sets(flat_index(counts, per_slot), B)
    # Views of every group in order: queries and candidates of x to y, then of y to x.
    views = [view.mT if per_slot else view for match_set in sets for view in match_set]
    expected = [
        torch.tensor([[index_of(kind, direction, side, image, k) for k in range(m)] for image in range(B)])
        for kind in range(2)
        for direction, m in enumerate(counts)
        for side in range(2)
    ]
    assert [view.tolist() for view in views] == [view.tolist() for view in expected]


@counts_of_matches
@both_statistics
def test_match_sets_are_views_that_cover_the_index(per_slot, counts):
    plan = local_views(counts)._replace(per_slot=per_slot)
    index = flat_index(counts, per_slot)
    sets = plan.match_sets(index, B)
    assert torch.equal(torch.cat([match_set.flatten() for match_set in sets]), index)
    assert {match_set.untyped_storage().data_ptr() for match_set in sets} == {
        index.untyped_storage().data_ptr()
    }


@counts_of_matches
@pytest.mark.parametrize("kinds", [1, 2])
@both_statistics
def test_index_size_is_that_of_the_shapes(per_slot, kinds, counts):
    shapes = index_shapes(B, counts, per_slot) * kinds
    assert index_size(B, counts, kinds) == sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("m", [1, 6])
@both_statistics
def test_index_of_one_direction(per_slot, m):
    assert index_shapes(B, (m,), per_slot) == [(2, m, B) if per_slot else (2, B, m)]
    assert index_size(B, (m,), 1) == 2 * B * m


@counts_of_matches
@both_statistics
def test_groups_have_the_rows_that_the_index_names(per_slot, counts):
    plan = local_views(counts)._replace(per_slot=per_slot)
    maps = [torch.randn(B, P, C) for P in (P1, P2)]
    patches = (P1, P2), (P2, P1)  # of query and candidate, by direction
    parts = [
        torch.randint(patches[direction][side], (m, B) if per_slot else (B, m))
        for _ in range(2)
        for direction, m in enumerate(counts)
        for side in range(2)
    ]
    groups = list(plan.groups(maps, torch.cat([part.flatten() for part in parts])))
    assert [len(group) for group in groups] == list(plan.group_sizes)
    views = [view for group in groups for view in group]
    assert [source for source, _ in views] == [0, 1, 1, 0] * 2
    for (source, rows), patch in zip(views, parts, strict=True):
        assert torch.equal(rows.patch, patch)
        assert rows.source.data_ptr() == maps[source].data_ptr()
        assert rows.shape == (*patch.shape, C)


@pytest.mark.parametrize(
    ("plan", "losses", "outputs"),
    [
        pytest.param(ONE_VIEW, 1, 4, id="one-view"),
        pytest.param(TWO_VIEWS, 1, 4, id="two-views"),
        pytest.param(LOCAL_VIEWS, 2, 9, id="local"),
        pytest.param(local_views((4, 7)), 2, 9, id="local-unequal"),
    ],
)
def test_number_of_losses_and_outputs(plan, losses, outputs):
    assert (plan.losses, plan.outputs) == (losses, outputs)


def test_outputs_of_several_groups_a_loss_are_their_sums():
    plan = local_views((4, 7))
    values = list(torch.arange(16.0).unbind())  # four groups of inv, var, cov and their sum
    outputs = [float(value) for value in plan.outputs_of(values)]
    location, feature = [0 + 4, 1 + 5, 2 + 6, 3 + 7], [8 + 12, 9 + 13, 10 + 14, 11 + 15]
    assert outputs == [*location, *feature, location[3] + feature[3]]


@pytest.mark.parametrize("name", ["terms", "gradient"])
def test_schema_names_every_field_of_the_plan_in_order(name):
    schema = getattr(torch.ops.vicreg_fast, name).default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[-len(Plan._fields) :] == list(Plan._fields)


FIELD_TYPES = {
    "view_source": "List[int]",
    "per_slot": "bool",
    "eps": "float",
    "precision": "Optional[str]",
    "backend": "str",
    "weights": "List[float]",
    "groups_per_loss": "int",
    "match_order": "str",
}


@pytest.mark.parametrize("field", FIELD_TYPES)
def test_schema_has_the_type_of_a_field(field):
    schema = torch.ops.vicreg_fast.terms.default._schema
    (argument,) = [argument for argument in schema.arguments if argument.name == field]
    assert str(argument.type) == FIELD_TYPES[field]
