"""The functions that kernels share (views.py, numerics.py, epilogue.py), each in a kernel of its own, interpreted."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_more_partial_sums_than_are_added_at_a_time(columns: int) -> None:
    from vicreg_fast.kernels.epilogue import _sum_partials as sum_partials

    @triton.jit
    def kernel(out_ptr, partials_ptr, count, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
        first, second, third = sum_partials(partials_ptr, count, COLUMNS, 1024)
        tl.store(out_ptr, first)
        tl.store(out_ptr + 1, second)
        tl.store(out_ptr + 2, third)

    kernel.fn.__globals__.update(sum_partials=sum_partials, tl=tl)
    partials, out = torch.randn(2500, columns, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    kernel[(1,)](out, partials, len(partials), columns)
    torch.testing.assert_close(out[:columns], partials.sum(0))
    assert torch.equal(out[columns:], torch.zeros(3 - columns, dtype=torch.float64))


def offset_of(p: int, n: int, strides: tuple[int, int, int]) -> int:
    """The offset that the kernels compute for a row."""

    @triton.jit(do_not_specialize=["p", "n", "source"])
    def kernel(out_ptr, source, p, n):  # type: ignore[no-untyped-def]
        rows = n + tl.arange(0, 1)
        tl.store(out_ptr + tl.arange(0, 1), row_offsets(source, None, p, p, rows, 1, 1))

    from vicreg_fast.kernels.views import Source, row_offsets

    kernel.fn.__globals__.update(row_offsets=row_offsets)
    out = torch.zeros(1, dtype=torch.int64)
    kernel[(1,)](out, Source(out, *strides, 1), p, n)
    return int(out)


@pytest.mark.parametrize(
    ("p", "n", "strides"),
    [(0, 2_599_999, (0, 1024, 0)), (2_599_999, 0, (1024, 0, 0)), (49, 65_535, (2**26, 2**16, 0))],
    ids=["rows", "problems", "both"],
)
def test_offsets_pass_32_bits(p: int, n: int, strides: tuple[int, int, int]) -> None:
    assert offset_of(p, n, strides) == p * strides[0] + n * strides[1] > 2**31


@pytest.mark.parametrize("row", [0, 1, 2, 4095, 4096, 5792, 11585, 30000])
def test_a_tile_finds_its_row_and_column(row: int) -> None:
    """float32 has no root exact enough beyond 4096 rows of tiles."""
    from vicreg_fast.kernels.numerics import tril_tile

    @triton.jit
    def kernel(out_ptr, t):  # type: ignore[no-untyped-def]
        i, j = tril_tile(t)
        tl.store(out_ptr, i)
        tl.store(out_ptr + 1, j)

    kernel.fn.__globals__.update(tril_tile=tril_tile)
    first = row * (row + 1) // 2
    for column in {0, row // 2, row}:
        out = torch.zeros(2, dtype=torch.int32)
        kernel[(1,)](out, first + column)
        assert out.tolist() == [row, column]


def test_a_pair_of_float16_holds_a_float32() -> None:
    """To 2^-23 of it, and to 2^-36."""
    from vicreg_fast.kernels.numerics import float16_pair

    @triton.jit
    def kernel(a_ptr, out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, BLOCK)
        high, low = float16_pair(tl.load(a_ptr + at))
        tl.store(out_ptr + at, high)
        tl.store(out_ptr + BLOCK + at, low)

    kernel.fn.__globals__.update(float16_pair=float16_pair, tl=tl)
    exponents = torch.arange(-45, 15).repeat_interleave(64)
    a = (1 + torch.rand(len(exponents), dtype=torch.float64)) * 2.0**exponents
    a = torch.cat([a.float(), -a.float()])[:4096]
    out = torch.empty(2, 4096, dtype=torch.float16)
    kernel[(1,)](a, out, 4096)
    error = (out[0].double() + out[1].double() / 2048 - a.double()).abs()
    assert bool((error <= torch.maximum(2.0**-23 * a.double().abs(), torch.tensor(2.0**-36))).all())
    assert bool((error > 0).any())


def test_scales_of_columns_are_coarse_powers_of_two() -> None:
    from vicreg_fast.kernels.numerics import float16_scale

    @triton.jit
    def kernel(a_ptr, out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, BLOCK)
        scale, inverse = float16_scale(tl.load(a_ptr + at))
        tl.store(out_ptr + at, scale)
        tl.store(out_ptr + BLOCK + at, inverse)

    kernel.fn.__globals__.update(float16_scale=float16_scale, tl=tl)
    a = torch.cat([2.0 ** torch.arange(-126, 128), 1.99 * 2.0 ** torch.arange(-126, 127), torch.zeros(5)])
    a[-4:] = torch.tensor([torch.inf, torch.nan, 1e-40, 0.0])
    out = torch.empty(2, 512)
    kernel[(1,)](a, out, 512)
    scale, inverse = out
    assert torch.equal(scale * inverse, torch.ones(512))
    assert set(scale.log2().tolist()) == {16.0 * k for k in range(-7, 8)}
    assert scale[-4:].tolist() == [1.0] * 4
    scaled = a[:-4] * inverse[:-4]
    usual = (a[:-4] >= 2.0**-116) & (a[:-4] < 2.0**124)
    assert bool(((scaled >= 2.0**-4) & (scaled < 2.0**12) | ~usual).all())
    assert bool((scale[(a >= 2.0**-4) & (a < 2.0**12)] == 1).all())
