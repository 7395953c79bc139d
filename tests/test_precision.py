"""The product that a precision means, the rounding of its operands, and the type of sums and gradients."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vicreg_fast import functional, precision, reference
from vicreg_fast.backends.aten import backward, blocks, forward
from vicreg_fast.plan import ONE_VIEW
from vicreg_fast.rows import Rows
from vicreg_fast.sides import uses_dual

from .data import U, assert_as_good_as_eager, assert_exact, both_sides, evaluate, normal

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HALF, BFLOAT, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
matmul = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def setting() -> Iterator[None]:
    """Restore torch's settings after the test; "none" follows ``torch.backends.fp32_precision``, as by default."""
    before = torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = before
    matmul.fp32_precision = "none"


def name_of(types: tuple[torch.dtype, ...]) -> str:
    return "-".join(str(dtype)[6:] for dtype in types)


HALVES = [(HALF,), (BFLOAT,), (HALF, BFLOAT), (BFLOAT, BFLOAT)]
SINGLES = [(SINGLE,), (SINGLE, SINGLE), (SINGLE, BFLOAT), (HALF, SINGLE)]
DOUBLES = [(DOUBLE,), (DOUBLE, SINGLE), (BFLOAT, DOUBLE)]
# What a precision means under torch's setting "ieee" and under "tf32", by the kind of the inputs.
MEANINGS = {
    "halves": {
        None: ("tf32", "tf32"),
        "highest": ("ieee", "ieee"),
        "high": ("tf32", "tf32"),
        "medium": ("bf16", "bf16"),
    },
    "singles": {
        None: ("ieee", "tf32"),
        "highest": ("ieee", "ieee"),
        "high": ("tf32", "tf32"),
        "medium": ("bf16", "bf16"),
    },
    "doubles": dict.fromkeys(precision.PRECISIONS, ("ieee", "ieee")),
}
KINDS = {"halves": HALVES, "singles": SINGLES, "doubles": DOUBLES}


def test_every_precision_has_a_meaning() -> None:
    assert all(tuple(meanings) == precision.PRECISIONS for meanings in MEANINGS.values())


@pytest.mark.parametrize("requested", precision.PRECISIONS, ids=str)
@pytest.mark.parametrize(
    ("kind", "types"),
    [pytest.param(kind, types, id=name_of(types)) for kind, of_kind in KINDS.items() for types in of_kind],
)
@pytest.mark.parametrize("setting_of_torch", ["ieee", "tf32"])
def test_product_of_a_gpu(
    setting_of_torch: str, kind: str, types: tuple[torch.dtype, ...], requested: str | None
) -> None:
    matmul.fp32_precision = setting_of_torch
    assert (
        precision.resolve_matmul_precision(requested, CUDA, types)
        == MEANINGS[kind][requested][setting_of_torch == "tf32"]
    )


@pytest.mark.parametrize("requested", precision.PRECISIONS, ids=str)
@pytest.mark.parametrize("types", [*HALVES, *SINGLES, *DOUBLES], ids=name_of)
@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_other_devices_have_one_product(
    device: str, types: tuple[torch.dtype, ...], requested: str | None
) -> None:
    matmul.fp32_precision = "tf32"
    assert precision.resolve_matmul_precision(requested, torch.device(device), types) == "ieee"


# Some builds of torch warn of the older setting.
@pytest.mark.filterwarnings("ignore:Please use the new API settings:UserWarning")
def test_set_float32_matmul_precision_counts() -> None:
    products = []
    for name in ("highest", "high", "medium", "highest"):  # ends with the default
        torch.set_float32_matmul_precision(name)
        products.append(precision.resolve_matmul_precision(None, CUDA, [SINGLE]))
    assert products == ["ieee", "tf32", "tf32", "ieee"]


def test_the_setting_of_all_backends_counts() -> None:
    products = []
    for name in ("ieee", "tf32"):
        torch.backends.fp32_precision = name
        products.append(precision.resolve_matmul_precision(None, CUDA, [SINGLE]))
    assert products == ["ieee", "tf32"]


# -- the setting is restored ------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["ieee", "tf32"])
@pytest.mark.parametrize(
    ("product", "within"), [("ieee", "ieee"), ("tf32", "tf32"), ("bf16", "tf32")], ids=["ieee", "tf32", "bf16"]
)
def test_products_are_formed_as_requested_and_the_setting_is_restored(
    product: str, within: str, before: str
) -> None:
    matmul.fp32_precision = before
    with precision.set_matmul_precision(product, CUDA):
        actual = matmul.fp32_precision
    assert (actual, matmul.fp32_precision) == (within, before)


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_the_setting_is_restored_after_an_error(before: str) -> None:
    matmul.fp32_precision = before
    with pytest.raises(ZeroDivisionError), precision.set_matmul_precision("ieee", CUDA):
        raise ZeroDivisionError
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("product", ["ieee", "tf32"])
def test_an_inherited_setting_stays_inherited(product: str) -> None:
    matmul.fp32_precision = "none"
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        with precision.set_matmul_precision(product, CUDA):
            pass
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


def test_products_on_the_cpu_leave_the_setting_alone() -> None:
    matmul.fp32_precision = "tf32"
    with precision.set_matmul_precision("ieee", CPU):
        assert matmul.fp32_precision == "tf32"


def test_autocast_is_off_within_and_on_again_after() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with precision.set_matmul_precision("ieee", CPU):
            within = torch.is_autocast_enabled("cpu")
        after = torch.is_autocast_enabled("cpu")
    assert (within, after) == (False, True)


# -- rounding of operands ---------------------------------------------------------------------------------------

# Bits of the mantissa that are kept, of 23, and whether a tie goes to the even neighbour or away from zero.
PRODUCTS = {"tf32": (10, "away"), "bf16": (7, "even")}
every_product = pytest.mark.parametrize("product", PRODUCTS)


def from_bits(*bits: int) -> Tensor:
    return torch.tensor([b - (1 << 32) if b >= 1 << 31 else b for b in bits], dtype=torch.int32).view(
        torch.float32
    )


def nearest(x: Tensor, product: str) -> Tensor:
    """Finite float32 values rounded to nearest, by arithmetic in float64 instead of on bits."""
    mantissa, ties = PRODUCTS[product]
    wide = x.double()
    exponent = (
        wide.abs().clamp_min(2.0**-126).log2().floor()
    )  # of a subnormal: that of the smallest normal value
    exponent -= (2.0**exponent > wide.abs().clamp_min(2.0**-126)).double()  # the logarithm is rounded
    unit = 2.0 ** (exponent - mantissa)
    units = wide / unit
    whole = units.round() if ties == "even" else (units.abs() + 0.5).floor().copysign(units)
    return (whole * unit).float()  # 2^128 becomes infinite


def patterns() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).int()
    exponent = 0x7F800000
    any_bits = any_bits[(any_bits & exponent) != exponent]
    dropped = {product: 23 - mantissa for product, (mantissa, _) in PRODUCTS.items()}
    tied = {p: (any_bits >> n << n) + (1 << (n - 1)) for p, n in dropped.items()}
    near = [ties + step for ties in tied.values() for step in (-1, 0, 1)]
    return {
        "any": any_bits.view(torch.float32),
        "ties": torch.cat(near).view(torch.float32),
        "subnormal": (any_bits & ~exponent).view(torch.float32),
        "zeros": torch.tensor([0.0, -0.0]),
        "huge": from_bits(0x7F7FFFFF, 0xFF7FFFFF, 0x7F7FF000, 0x7F7FEFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F000FFF),
    }


@every_product
@pytest.mark.parametrize("kind", patterns())
def test_operands_are_rounded_to_nearest(kind: str, product: str) -> None:
    x = patterns()[kind]
    assert x.isfinite().all()
    rounded, truth = precision.round_operand(x, product), nearest(x, product)
    assert rounded.dtype == torch.float32
    # Bit for bit, so that the sign of zero counts.
    assert torch.equal(rounded.view(torch.int32), truth.view(torch.int32))


@every_product
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000, 0xFF800001], ids=hex)
@pytest.mark.parametrize("copies", [1, 64], ids=["one", "many"])  # vectorised loops are separate code
def test_nan_of_any_bits_stays_nan(copies: int, bits: int, product: str) -> None:
    assert precision.round_operand(from_bits(*[bits] * copies), product).isnan().all()


@every_product
@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_stays_infinite(sign: int, product: str) -> None:
    x = torch.full((64,), sign * math.inf)
    assert torch.equal(precision.round_operand(x, product), x)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_exact_products_round_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(64, dtype=dtype)
    assert precision.round_operand(x, "ieee") is x


@every_product
def test_rounding_leaves_its_argument_alone(product: str) -> None:
    x = torch.randn(64)
    before = x.clone()
    precision.round_operand(x, product)
    assert torch.equal(x, before)


# -- the dual side subtracts the variances of the rounded operand ------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one block", "several"])
@every_product
def test_rounded_operand_has_its_own_variances(
    product: str, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a faster product the dual side computes the covariance of the rounded operand, up to float32's own rounding.
    # On decorrelated features, exact variances instead of the operand's would make an error of 500 u ||C||^2 / D.
    N, D, spare = 384, 512, 1 << 30
    assert uses_dual(1, N, D)
    if several:
        monkeypatch.setattr(blocks, "CACHE_ELEMENTS", 1 << 13)
    for buffers in (2, 3):  # forward and backward
        assert [len(parts) > 1 for _, parts in blocks.blocks(1, N, D, buffers, spare)] == [several]
    z = (torch.linalg.qr(torch.randn(D, N, dtype=torch.float64))[0].T * 20).float()
    views = [Rows(z[None])]
    values, statistics = forward.terms(views, ONE_VIEW, product, spare)
    grad = torch.empty(1, N, D)
    upstream = [None, None, torch.tensor(1.0)]
    backward.gradient(views, ONE_VIEW, product, spare, statistics, upstream, [grad], add=False)

    hi, lo = statistics.moments[:2, 0, 0]
    assert ((hi.double() + lo - z.double().mean(0)).abs() <= U * z.abs().amax(0)).all()
    o = precision.round_operand(z - hi - lo, product).double()
    C = o.T @ o / (N - 1)
    C0 = C - C.diagonal().diag()
    # Both sums of the subtraction are in float32: 4 u of a value.  A gradient is a difference of two products of up to
    # 512 terms: 5 u were measured.
    assert abs(float(values[2]) - float(C0.square().sum()) / D) <= 4 * U * float(C.square().sum()) / D
    scale = 4 / (D * (N - 1))
    assert float((grad[0] - scale * o @ C0).norm()) <= 16 * U * float((scale * o @ C).norm())


# -- types of inputs, sums and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@both_sides(dual=[(33, 200), (6, 80)], primal=[(64, 33), (20, 33)])
def test_half_precision_inputs_are_computed_in_float32(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_as_good_as_eager(normal(*shape).to(dtype), normal(*shape).to(dtype), 0.0)


@both_sides(dual=[(40, 2000)], primal=[(2000, 40)])
def test_half_precision_that_overflows_its_own_type_stays_right(shape: tuple[int, int]) -> None:
    # N |cov| is 4e7, far above 65504.
    assert_as_good_as_eager((200 * normal(*shape)).half(), (200 * normal(*shape)).half(), 0.0)


@pytest.mark.parametrize(
    ("first", "second"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str
)
@both_sides(dual=[(32, 90)], primal=[(32, 40)])
def test_mixed_types(shape: tuple[int, int], first: torch.dtype, second: torch.dtype) -> None:
    assert_as_good_as_eager(normal(*shape).to(first), normal(*shape).to(second), 0.0)


@both_sides(dual=[(32, 90)], primal=[(32, 40)])
def test_one_float64_input_makes_float64_losses(shape: tuple[int, int]) -> None:
    x, y = normal(*shape).float(), normal(*shape)
    values, gradients = evaluate(functional.vicreg_terms, x, y, 0.0)
    true_values, true_gradients = evaluate(reference.vicreg_terms, x.double(), y, 0.0)
    assert_exact([*values, *(g for _, g in gradients)], [*true_values, *(t for _, t in true_gradients)])
    for (g, _), (t, _) in zip(gradients, true_gradients, strict=True):
        # The gradient of x is exact to 1e-10 and then rounded to float32.
        assert ((g - t).abs() <= 1.01 * U * t.abs()).all()


@pytest.mark.parametrize("x_type", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("y_type", [torch.bfloat16, torch.float64], ids=str)
def test_losses_are_float32_or_float64_and_gradients_of_their_inputs_type(
    x_type: torch.dtype, y_type: torch.dtype
) -> None:
    x, y = (normal(6, 80).to(dtype).requires_grad_() for dtype in (x_type, y_type))
    inv, var, cov = functional.vicreg_terms(x, y)
    gradients = torch.autograd.grad(inv + var + cov, (x, y))
    loss = torch.float64 if torch.float64 in (x_type, y_type) else torch.float32
    assert [t.dtype for t in (inv, var, cov, *gradients)] == [loss, loss, loss, x_type, y_type]
