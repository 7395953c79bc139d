"""Which backend runs, which configuration a kernel is launched with, how tiles are split, and the search for better ones."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vicreg_fast import backends, functional
from vicreg_fast.backends.triton import configs, splitk
from vicreg_fast.backends.triton.configs import Key, Moments, Product

from .data import U

autotune: Any = pytest.importorskip("vicreg_fast.backends.triton.autotune")

SIZES = [1, 2, 16, 17, 64, 65, 300, 2048, 10**5, 3 * 10**6]


# -- which backend ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((9, 0), torch.float32, "triton"),
        ((8, 0), torch.bfloat16, "triton"),
        ((7, 5), torch.float16, "aten"),
        ((9, 0), torch.float64, "aten"),
    ],
)
def test_auto(
    capability: tuple[int, int], dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backends.choose("auto", torch.device("cuda"), (dtype, dtype)) == expected


def test_auto_on_rocm_asks_for_no_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backends.choose("auto", torch.device("cuda"), (torch.float32,)) == "triton"


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
    for aligned, (kernel, kind), N, D in itertools.product((True, False), kinds, SIZES, SIZES):
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


# -- search -----------------------------------------------------------------------------------------------------


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A search is asked for; its file."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("VICREG_FAST_AUTOTUNE", "1")
    monkeypatch.setenv("VICREG_FAST_AUTOTUNE_FILE", str(tmp_path / "cache" / "configs.jsonl"))
    monkeypatch.setattr(configs, "tuned_configs", {})
    monkeypatch.setattr(autotune, "_files_read", set())
    return tmp_path / "cache" / "configs.jsonl"


WANTED = {
    "moments": Moments(32, 32, 4),
    "gram": Product(32, 32, 8, 2, 2),
    "gradient": configs.Gradient(32, 64, 16, 4, 2),
}


def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Fake times, of which WANTED's are the shortest.  Returns the configurations that were timed."""
    from triton.runtime.errors import OutOfResources

    tried: list[Any] = []

    def milliseconds(run: Any) -> float:
        tried.append(dict(configs.tuned_configs))
        current = {key.kernel: config for key, config in configs.tuned_configs.items()}
        if any(getattr(config, "stages", 0) == 4 for config in current.values()):
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 3.0 - sum(current.get(kernel) == config for kernel, config in WANTED.items())

    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    return tried


def gradient_of(x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    terms = functional.vicreg_terms(x, x.detach() + 0.1, backend="triton")
    return torch.autograd.grad(sum(terms), x)[0]


def test_a_search_finds_the_fastest_and_writes_it_down(search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch)
    x = torch.randn(20, 96)
    gradient_of(x)
    assert {key.kernel: config for key, config in configs.tuned_configs.items()} == WANTED
    lines = [json.loads(line) for line in search.read_text().splitlines()]
    assert [line["key"][3] for line in lines] == ["moments", "gram", "gradient"]
    assert all(line["ms"] < line["table_ms"] for line in lines)
    # The next call, and the next process, search no more.
    count = len(tried)
    gradient_of(x)
    configs.tuned_configs.clear()
    autotune._files_read.clear()
    gradient_of(x)
    assert len(tried) == count
    assert {key.kernel: config for key, config in configs.tuned_configs.items()} == WANTED


def test_a_search_changes_no_result(search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(20, 96)
    timed(monkeypatch)
    grad = gradient_of(x)
    monkeypatch.delenv("VICREG_FAST_AUTOTUNE")
    configs.tuned_configs.clear()
    # Other tiles add in another order: a few roundings, as in data.py.
    assert (grad - gradient_of(x)).norm() <= 8 * U * grad.norm()


@pytest.mark.parametrize(
    "line", ['{"key": [1, 2]}', '{"key": ["sm90", 1', "", "[]"], ids=["short", "cut", "empty", "list"]
)
def test_a_broken_line_is_named_and_left_out(line: str, search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch)
    search.parent.mkdir()
    search.write_text(line + "\n")
    with pytest.warns(UserWarning, match=r"configs\.jsonl, line 1, is no row of a search and is left out"):
        gradient_of(torch.randn(20, 96))
    assert {key.kernel: config for key, config in configs.tuned_configs.items()} == WANTED


def test_no_search_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", ""):
        monkeypatch.setenv("VICREG_FAST_AUTOTUNE", value)
        assert not autotune.enabled()
    monkeypatch.delenv("VICREG_FAST_AUTOTUNE")
    assert not autotune.enabled()
