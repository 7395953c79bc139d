"""The gradient kernel of whole images: values, rows that are not finite, and where it is used."""

import pytest
import torch

from vicreg_fast import VICRegLLoss

from .conftest import Launches
from .data import U
from .parity import KINDS
from .vicregl_parity import assert_parity, local_views, maps_of

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.filterwarnings(
    "ignore:All-NaN slice encountered:RuntimeWarning"
)  # of the rows that are not finite
@pytest.mark.parametrize(
    ("kind", "patches"),  # all patches of an image, or those that have a match
    [
        *((kind, (49, 50)) for kind in ("highest", "high", "medium")),
        ("highest", (70, 65)),
        ("float16", (70, 65)),
    ],
)
def test_gradient_of_whole_images(kind: str, patches: tuple[int, int], launches: Launches) -> None:
    """The kernel that multiplies patches; rows of images that are not finite, and rows that no match has, do not spread."""
    dtype, precision, unit = KINDS[kind]
    maps = maps_of(2, patches, 256, dtype=dtype)
    locations = [torch.rand(2, P, 2) for P in patches]
    assert_parity(maps, locations, (20, 20), False, precision, unit, scale=2.0**10)
    assert launches[-1].name == "vicregl_image_gradient"
    maps[0][0, 3, 7] = float("nan")
    gradients = []
    for backend in ("triton", "reference"):
        x, y = (z.clone().requires_grad_() for z in maps)
        losses = VICRegLLoss(20, 0.0, backend=backend, precision=precision).local_loss(x, y, *locations)
        gradients += [torch.autograd.grad(losses["location/loss"], (x, y))]
    for actual, truth in zip(*gradients, strict=True):
        assert torch.equal(actual.isnan(), truth.isnan())
        error = (actual.double() - truth.double()).nan_to_num().norm()
        rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 32 * U  # of both gradients
        assert (
            error <= (2 * unit + rounding) * truth.double().nan_to_num().norm()
        )  # M and o are rounded by a unit each


def test_offsets_within_an_image_that_pass_2_to_the_31_are_left_to_the_other_kernel() -> None:
    from vicreg_fast.backends.triton import configs, launch_vicregl

    plan, device = local_views((20, 20)), configs.Device("sm90", 132)
    for patches, of_images in ((65, True), (2**23, False)):
        map_ = torch.empty(1, 1, 256, dtype=torch.bfloat16).expand(1, patches, 256)
        assert launch_vicregl._by_image(plan, [map_, map_], device) == of_images
