"""VICReg on Triton kernels on a GPU (pytest -m gpu), by the rule of parity.py.  Compilation takes most of the time."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from vicreg_fast import functional
from vicreg_fast import precision as policy

from .data import HARD, U, both_sides, decorrelated, normal
from .parity import (
    BF16,
    BFLOAT,
    HALF,
    KINDS,
    SINGLE,
    TF32,
    assert_nan_stays,
    assert_parity,
    assert_same_bits,
    truncated,
)
from .parity import pair as any_pair

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

DEVICE = torch.device("cuda")
pair = partial(any_pair, device=DEVICE)
every_kind = pytest.mark.parametrize("kind", KINDS)
dual_and_primal = both_sides(dual=[(200, 1000)], primal=[(1000, 200)])


# -- parity -----------------------------------------------------------------------------------------------------


@every_kind
@both_sides(
    dual=[(31, 257), (128, 512), (257, 1031), (200, 3000), (5, 40, 90)],
    primal=[(130, 70), (257, 257), (512, 128), (1000, 333), (20000, 65), (5, 90, 40)],
)
def test_as_good_as_eager(shape: tuple[int, ...], kind: str) -> None:
    dtype, precision, unit = KINDS[kind]
    x, y = pair(*shape, dtype=dtype)
    # Of 10^6 elements, gradients are too small for float16 as they are.
    assert_parity(x, y, precision, unit, eps=1e-4 if shape[-1] % 2 else 0.0, scale=2.0**16)


@both_sides(
    dual=[(2, 65), (3, 1000), (7, 2, 5)], primal=[(2, 1), (2, 64), (3, 31), (31, 3), (2000, 1), (7, 5, 2)]
)
def test_few_samples_or_features(shape: tuple[int, ...]) -> None:
    assert_parity(*pair(*shape), "highest", 0.0)


@both_sides(dual=[(70, 130)], primal=[(300, 70)])
@pytest.mark.parametrize("data", HARD, ids=lambda data: data.__name__)
def test_hard_data(data: Callable[[int, int], Tensor], shape: tuple[int, int]) -> None:
    assert_parity(*(data(*shape).to(DEVICE, SINGLE) for _ in range(2)), "highest", 0.0)


@pytest.mark.parametrize("precision", [None, "highest"])
@both_sides(dual=[(200, 1000)], primal=[(1000, 200)])
def test_float16_beyond_its_range(shape: tuple[int, int], precision: str | None) -> None:
    x, y = (200 * z.detach() for z in pair(*shape, dtype=HALF))
    assert shape[0] * x.float().var(0).min() > 10 * torch.finfo(HALF).max
    assert_parity(x, y, precision, 0.0 if precision else TF32)


# An operand that is finer than asked for is right too: some devices have no TF32.
@pytest.mark.parametrize("kind", ["high", "medium", "float16", "bfloat16"])
@both_sides(dual=[(40, 90), (100, 128)], primal=[])
def test_the_dual_subtracts_what_its_product_used(shape: tuple[int, int], kind: str) -> None:
    """But for float32's rounding, cov is that of the rounded operand: decorrelated features show any other diagonal."""
    dtype, precision, unit = KINDS[kind]
    N, D = shape
    z = decorrelated(N, D).to(DEVICE, dtype).requires_grad_()
    cov = functional.variance_covariance(z, backend="triton", precision=precision)[1].detach().double()
    c = z.detach().double()
    c -= c.mean(0)
    errors = {}
    for product in ("ieee", "tf32", "bf16") if unit == BF16 else ("ieee", "tf32"):
        # c has been rounded twice to float32 before; where that decides, either neighbour may be the operand.
        lower, o, upper = (
            policy.round_operand((c * (1 + step * U)).float(), product).double() for step in (-2, 0, 2)
        )
        undecided = upper - lower if product != "ieee" else c * 2 * U
        C = o.T @ o / (N - 1)
        C0 = C - C.diagonal().diag()
        norm = float(C.square().sum())
        outside = max(norm - float((o.square().sum(1) / (N - 1)).square().sum()), 0.0)
        allowed = 4 * U * norm / D + 2 * truncated(D, DEVICE) * outside / D
        allowed += float((4 / (D * (N - 1)) * (o @ C0) * undecided).abs().sum())
        errors[product] = float((cov - C0.square().sum() / D).abs()) / allowed
    assert min(errors.values()) <= 1, errors


@every_kind
@dual_and_primal
def test_nan_of_any_bits_stays_nan(shape: tuple[int, ...], kind: str) -> None:
    assert_nan_stays(shape, kind, DEVICE)


@every_kind
@both_sides(dual=[(3, 40, 90)], primal=[(3, 90, 40)])
def test_nan_stays_in_its_problem(shape: tuple[int, ...], kind: str) -> None:
    dtype, precision, _ = KINDS[kind]
    x, y = pair(*shape, dtype=dtype)
    spoilt = x.detach().clone()
    spoilt[1, 5, 7] = math.nan
    spoilt.requires_grad_()
    actual = [
        torch.autograd.grad(sum(functional.vicreg_terms(z, y, backend="triton", precision=precision)), z)[0]
        for z in (x, spoilt)
    ]
    assert actual[1][1].isnan().any()
    assert_same_bits([actual[1][0], actual[1][2]], [actual[0][0], actual[0][2]])


# -- where tensors lie ------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "transposed": lambda N, D: normal(D, N).to(DEVICE, SINGLE).t(),
    "every third column": lambda N, D: normal(N, 3 * D).to(DEVICE, SINGLE)[:, ::3],
    "a row of odd length": lambda N, D: normal(N, D + 1).to(DEVICE, SINGLE)[:, :D],
    "off 16 bytes": lambda N, D: normal(1, N * D + 1).to(DEVICE, SINGLE)[0, 1:].view(N, D),
    "half of 4 bytes": lambda N, D: normal(1, N * D + 1).to(DEVICE, BFLOAT)[0, 1:].view(N, D),
    "expanded": lambda N, D: normal(N, 1).to(DEVICE, SINGLE).expand(N, D),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@both_sides(dual=[(64, 256)], primal=[(256, 64)])
def test_any_layout(shape: tuple[int, int], layout: str) -> None:
    x = LAYOUTS[layout](*shape)
    assert_parity(x, normal(*shape).to(DEVICE, x.dtype), "highest", 0.0)


@dual_and_primal
def test_another_device_than_the_current(shape: tuple[int, int]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    with torch.cuda.device(0):
        assert_parity(*pair(*shape, device=torch.device("cuda", 1)), "highest", 0.0)
        assert torch.cuda.current_device() == 0


def needs_free(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of the device's memory, {free / 2**30:.1f} are free")


# 5 GiB each of x and its gradient, and of what the backend may copy of either view.
@pytest.mark.alone
def test_more_elements_than_32_bits_count(clean_memory: None) -> None:
    needs_free(24)
    N, D, last = 2_600_000, 1024, 1000
    x = torch.empty(N, D, dtype=HALF, device=DEVICE).normal_(std=0.3)
    # The last rows, behind element 2^31, have signs in common: off the diagonal, C is theirs: 0.3, the others' 6e-5.
    signs = [torch.randint(0, 2, shape, device=DEVICE) * 2 - 1 for shape in ((last, 1), (1, D))]
    x[-last:] = 28 * signs[0] * signs[1]
    x.requires_grad_()
    y = torch.zeros(1, D, dtype=HALF, device=DEVICE).expand(N, D)
    actual = functional.vicreg_terms(x, y, backend="triton")
    (gradient,) = torch.autograd.grad(actual.cov, x, torch.tensor(2.0**20, device=DEVICE))  # 1e-6 is no float16

    parts = x.detach().split(1 << 16)
    m = sum(part.double().sum(0) for part in parts) / N
    C = sum((part.double() - m).T @ (part.double() - m) for part in parts) / (N - 1)
    v = C.diagonal().clone()
    C.diagonal().zero_()
    hinge = (1 - v.sqrt()).relu().mean()
    truth = torch.stack([(v * (N - 1) / N + m.square()).mean(), (hinge + 1) / 2, C.square().sum() / D / 2])
    # The operand's rounding, M's, the gradient's and one to spare.
    assert ((torch.stack(actual).double() - truth).abs() <= 4 * TF32 * truth).all()
    for rows in (slice(-last, None), slice(0, last), slice(N // 2, N // 2 + last)):
        true = 2.0**20 * 2 / (D * (N - 1)) * (x.detach()[rows].double() - m) @ C
        assert (gradient[rows].double() - true).norm() <= 4 * TF32 * true.norm()


FAR_APART: dict[str, Callable[[Tensor], Tensor]] = {
    "rows, dual": lambda buffer: buffer[::10_000],
    "rows, primal": lambda buffer: buffer[::10_000, :128],
    "columns": lambda buffer: buffer[::10_000].t(),
    "problems": lambda buffer: buffer.view(26, 100_000, 1024)[:, :20],
}


@pytest.mark.alone
@pytest.mark.parametrize("which", FAR_APART)
def test_strides_that_pass_32_bits(which: str, clean_memory: None) -> None:
    needs_free(7)
    x = FAR_APART[which](torch.empty(2_600_000, 1024, dtype=HALF, device=DEVICE))
    assert sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) > 2**31
    values, y = (z.detach() for z in pair(*x.shape, dtype=HALF))
    x.copy_(values)
    assert_parity(x, y, "highest", 0.0, scale=2.0**16)
