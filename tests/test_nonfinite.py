"""NaN and infinity in the inputs show in the losses."""

import pytest
import torch

from vicreg_fast import VICRegLoss
from vicreg_fast.backends.aten import blocks

from .check_arguments import BACKENDS, NOT_FINITE, B, C, P, local_arguments, local_loss
from .data import seeded_randn

SHAPES = {"primal": (9, 3), "dual": (3, 90)}
# With CACHE_ELEMENTS = 2^13 the ATen backend reads each of these shapes in two blocks or more.
LARGE = {"primal-blocks": (600, 20), "dual-blocks": (20, 600)}
TERMS = ("inv-loss", "var-loss", "cov-loss", "loss")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
@pytest.mark.parametrize(
    "position", [(0, 0), (0, -1), (-1, 0), (-1, -1)], ids=["first", "right", "down", "last"]
)
@pytest.mark.parametrize("view", ["x", "y"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_vicreg_shows_a_non_finite_element(shape, view, position, value, backend):
    views = {"x": seeded_randn(*shape), "y": seeded_randn(*shape, seed=1)}
    views[view][position] = value
    losses = VICRegLoss(backend=backend)(**views)
    assert [name for name in TERMS if losses[name].isfinite()] == []


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
@pytest.mark.parametrize("position", [(0, 0), (-1, -1)], ids=["first", "last"])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE.keys())
def test_vicreg_shows_a_non_finite_element_in_any_block(shape, position, value, monkeypatch):
    monkeypatch.setattr(blocks, "CACHE_ELEMENTS", 1 << 13)
    assert len([part for _, parts in blocks.blocks(1, *shape, 3, 0) for part in parts]) > 1
    x, y = seeded_randn(*shape), seeded_randn(*shape, seed=1)
    y[position] = value
    losses = VICRegLoss(backend="aten")(x, y)
    assert [name for name in TERMS if losses[name].isfinite()] == []


@pytest.mark.parametrize("statistics", ["image", "slot"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
@pytest.mark.parametrize("patch", [0, -1], ids=["first-patch", "last-patch"])
@pytest.mark.parametrize("image", [0, -1], ids=["first-image", "last-image"])
@pytest.mark.parametrize("view", ["x1_maps", "x2_maps"])
def test_local_loss_shows_a_non_finite_element_in_a_query(view, image, patch, value, backend, statistics):
    arguments = local_arguments()
    arguments[view][image, patch, -1] = value
    # Every patch is a kept query, so the row is part of the loss.
    losses = local_loss(P, alpha=0.0, backend=backend, statistics=statistics)(**arguments)
    finite = [
        f"{part}/{name}"
        for part in ("location", "feature")
        for name in TERMS
        if losses[f"{part}/{name}"].isfinite()
    ]
    assert finite == []
    assert not losses["loss"].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_local_loss_shows_a_non_finite_element_in_a_row_chosen_by_location(value, backend):
    near = torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0], [60.0, 60.0]]).expand(B, 4, 2)
    arguments = local_arguments(
        x1_maps=seeded_randn(B, 4, C),
        x2_maps=seeded_randn(B, 4, C, seed=1),
        x1_locations=near,
        x2_locations=near.flip(1),
    )
    arguments["x1_maps"][1, 0, 2] = value  # query 0 is at distance zero from candidate 3
    losses = local_loss(2, alpha=0.0, backend=backend)(**arguments)
    assert not losses["location/loss"].isfinite()
    assert not losses["loss"].isfinite()
    assert losses["feature/loss"].isfinite()  # by feature the row is farther than all others


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_local_loss_takes_locations_that_are_not_finite(value, backend):
    arguments = local_arguments()
    arguments["x1_locations"][0, 0] = value
    losses = local_loss(2, alpha=0.0, backend=backend)(**arguments)
    assert losses["loss"].isfinite()  # locations only choose the matches, and finite ones are nearer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_global_part_shows_a_non_finite_element(value, backend):
    arguments = local_arguments()
    arguments["x2_glob"][-1, -1] = value
    losses = local_loss(backend=backend)(**arguments)
    assert not losses["loss"].isfinite()
    assert losses["feature/loss"].isfinite()


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_backward_with_a_non_finite_element_does_not_raise(value):
    x, y = seeded_randn(9, 3), seeded_randn(9, 3, seed=1)
    x[2, 1] = value
    x.requires_grad_()
    VICRegLoss()(x, y)["loss"].backward()
    assert not x.grad.isfinite().all()
