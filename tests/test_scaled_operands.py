"""The dual side's scaled float16 operands and its one pass over the rows, on data that need their scales, interpreted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vicreg_fast import functional
from vicreg_fast.sides import uses_dual

from .conftest import Launch, Launches
from .data import U, normal
from .parity import KINDS, assert_parity

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("kind", ["highest", "high"])
@pytest.mark.parametrize("decades", [2, 17])
def test_features_of_different_scales(kind: str, decades: int, launches: Launches) -> None:
    """Every column's gradient is right, the weakest too: beside the strong ones it is nothing in the norm of all."""
    N, D = 40, 90
    strength = 10.0 ** torch.linspace(-decades / 2, decades / 2, D, dtype=torch.float64)
    x, y = ((normal(N, D) * strength).float() for _ in range(2))
    _, precision, unit = KINDS[kind]
    assert_parity(x, y, precision, unit)
    scales = {
        float(s) for launch in launches if launch.name == "gram_forward" for s in moments_of(launch)[4].unique()
    }
    assert len(scales) == 1 if decades == 2 else len(scales) > 1

    def gradient(z: Tensor, **options: Any) -> Tensor:
        z = z.clone().requires_grad_()
        return torch.autograd.grad(functional.variance_covariance(z, **options)[1], z)[0].double()

    truth, fast = gradient(x.double(), backend="aten"), gradient(x, backend="triton", precision=precision)
    # The median column errs by one unit.  Of the worst, G o and vhat o cancel: 56 U with these kernels, 69 U in ATen's float32.
    errors = (fast - truth).norm(dim=0) / truth.norm(dim=0)
    assert float(errors.median()) <= 2 * (unit or 4 * U)
    assert float(errors.max()) <= 16 * (unit or 4 * U)


def moments_of(launch: Launch) -> Tensor:
    """hi, lo, slope, vhat and the scale of each column."""
    return launch.arguments["moments_ptr"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["highest", "high", "float16"])
@pytest.mark.parametrize("largest", [2.0**-4, 2.0**12])
def test_features_on_both_sides_of_a_limit(kind: str, largest: float, launches: Launches) -> None:
    """Equally strong columns of two scales: no product may be lost, or rounded, between them."""
    dtype, precision, unit = KINDS[kind]
    x, y = (normal(40, 90) for _ in range(2))
    x, y = ((z * (largest / (z - z.mean(0)).abs().max(0).values.median())).to(dtype) for z in (x, y))
    assert_parity(x, y, precision, unit, scale=2.0**-24 if largest > 1 and dtype == torch.float16 else 1.0)
    (gram,) = {launch.name: launch for launch in launches if launch.name == "gram_forward"}.values()
    assert len(moments_of(gram)[4].unique()) == 2


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the pass that is repeated
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_value_near_the_largest_float32() -> None:
    z = normal(100, 130).float()
    expected = functional.variance_covariance(z[:, 1:], backend="triton")[0] * 129 / 130
    z[3, 0] = 3e38
    var, cov = functional.variance_covariance(z, backend="triton")
    torch.testing.assert_close(var, expected, rtol=8 * U, atol=0)
    assert cov == torch.inf


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the pass that is repeated
def test_squares_beyond_float32() -> None:
    z = torch.full((360, 450), 9.9e17)
    z[::2] *= -1
    var, _ = functional.variance_covariance(z, gamma=2e18, backend="triton")
    std = float(z.double().std(0)[0])
    assert abs(float(var) - (2e18 - std)) <= 4 * U * std


@pytest.mark.parametrize("shift", [1.0, 1e4])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e4])
def test_first_rows_far_from_the_mean(shift: float, scale: float) -> None:
    """One pass around the first rows' mean would lose the digits of the variance, or leave the range of float32."""
    N, D = 400, 520
    assert uses_dual(1, N, D)
    z = normal(N, D)
    z[:32] = 0.01 * z[:32] - shift * 0.7
    z = (scale * z).float()
    var, _ = functional.variance_covariance(z, gamma=2 * shift * scale, backend="triton")
    std = z.double().var(0).sqrt()
    truth = float((2 * shift * scale - std).relu().mean())
    assert abs(float(var) - truth) <= 4 * U * (truth + float(std.mean()))


def test_first_rows_far_from_the_mean_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the mean of the first 32 of 2000 rows the squares are 60 times those around the mean of all."""
    from vicreg_fast.backends.triton import arguments, launch_vicreg

    for module in (arguments, launch_vicreg):
        monkeypatch.setattr(module, "uses_dual", lambda *_: True)
    z = normal(2000, 16)
    z[:32] = 1e-3 * z[:32] - 700
    z = z.float()
    var, _ = functional.variance_covariance(z, gamma=100.0, backend="triton")
    std = z.double().var(0).sqrt()
    assert abs(float(var) - float((100 - std).mean())) <= 8 * U * float(std.mean())
