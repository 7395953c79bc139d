"""Which backend runs, which configuration a kernel is launched with, and how tiles are split."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vicreg_fast import backends
from vicreg_fast.backends.triton import configs, splitk
from vicreg_fast.backends.triton.configs import Key, Product

pytest.importorskip("triton")

SIZES = [1, 2, 16, 17, 64, 65, 300, 2048, 10**5, 3 * 10**6]


# -- which backend ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreted")  # the choice imports the kernels
@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((9, 0), torch.float32, "auto"),  # the kernels, and ATen from the first of them that fails
        ((8, 0), torch.bfloat16, "auto"),
        ((7, 5), torch.float16, "aten"),
        ((9, 0), torch.float64, "aten"),
    ],
)
def test_auto(
    capability: tuple[int, int], dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backends.choose("auto", torch.device("cuda"), (dtype, dtype)) == expected


@pytest.mark.usefixtures("interpreted")
def test_auto_on_rocm_asks_for_no_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backends.choose("auto", torch.device("cuda"), (torch.float32,)) == "auto"


def test_auto_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_installed", lambda: False)
    assert backends.choose("auto", torch.device("cuda"), (torch.float32,)) == "aten"


def test_auto_on_a_cpu_does_not_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose("auto", torch.device("cpu"), (torch.float32,)) == "aten"


# -- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_shape_has_a_configuration(arch: str) -> None:
    kinds = [("moments", ""), ("matching", "fp32"), ("matching", "half")]
    products = ("gram", "second_moment", "gradient", "narrow_gradient", "local", "local_gradient")
    kinds += [(kernel, kind) for kernel in products for kind in ("fp32", "tf32", "half")]
    kinds += [("gram", "pair"), ("gradient", "pair")]
    for aligned, (kernel, kind), N, D in itertools.product((True, False), kinds, SIZES, SIZES):
        if aligned and kernel == "gram" and kind in ("fp32", "tf32"):
            continue  # of gathered rows, which are unaligned
        key = Key(arch, 132, aligned, kernel, kind, 2, N, D)
        assert type(configs.from_table(key)) is configs.KERNELS[kernel].config


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm80"),
        ((8, 6), "sm86"),
        ((8, 9), "sm86"),
        ((9, 0), "sm90"),
        ((10, 0), "sm100"),
        ((12, 0), "sm86"),
    ],
    ids=str,
)
def test_architectures(capability: tuple[int, int], arch: str) -> None:
    assert configs.architecture(*capability) == arch


@given(
    tiles=st.integers(1, 10**5),
    inner=st.integers(1, 3 * 10**6),
    block_m=st.sampled_from([32, 64, 128]),
    block_k=st.sampled_from([16, 32, 64]),
    ctas_per_sm=st.sampled_from([1, 2, 4]),
    num_sms=st.integers(1, 304),
    allow_full_tiles=st.booleans(),
)
def test_splits_cover_the_inner_dimension_once(
    tiles: int, inner: int, block_m: int, block_k: int, ctas_per_sm: int, num_sms: int, allow_full_tiles: bool
) -> None:
    product = Product(block_m, block_k, ctas_per_sm=ctas_per_sm)
    full_tiles, splits, length = splitk.split(tiles, inner, product, num_sms, allow_full_tiles)
    assert 0 <= full_tiles <= tiles
    assert full_tiles == 0 or allow_full_tiles
    assert (splits - 1) * length < inner <= splits * length  # none is empty
    split_tiles = tiles - full_tiles
    assert split_tiles or (splits, length) == (1, inner)
    # A tensor core's sum stays short, whatever memory that takes; otherwise the workspace is bounded.
    assert (length if split_tiles else inner) <= splitk.LONGEST + block_k
    if split_tiles and splits > max(1, -(-inner // splitk.LONGEST)):
        assert split_tiles * splits * 4 * block_m**2 <= splitk.WORKSPACE


def test_tiles_that_would_leave_sms_idle_are_split() -> None:
    # 2048 x 8192 in 128 x 128 tiles: 272 of them on 132 SMs.  Two waves are full tiles, the last 8 tiles are split.
    full_tiles, splits, _ = splitk.split(272, 8192, Product(128, 64, ctas_per_sm=1), 132, True)
    assert full_tiles == 264
    assert 8 * splits > 100
    # One tile of 2.6 million rows.
    _, splits, length = splitk.split(1, 2_600_000, Product(64, 32, ctas_per_sm=2), 132, False)
    assert splits == 264
    assert length < 10_000
