"""Which configuration a kernel runs with, how products are shared out, and the search for better ones."""

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
from vicreg_fast.backends.triton import configs
from vicreg_fast.backends.triton.configs import Key, Moments, Product

from .data import U

pytest.importorskip("triton")

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


@pytest.mark.parametrize("family", configs.FAMILIES)
def test_every_shape_has_a_configuration(family: str) -> None:
    kinds = [("moments", ""), ("local_gradient", ""), ("matching", "fp32"), ("matching", "half")]
    products = ("gram", "second_moment", "gradient", "local")
    kinds += [(kernel, kind) for kernel in products for kind in ("fp32", "tf32", "half")]
    for aligned, (kernel, kind), N, D in itertools.product((True, False), kinds, SIZES, SIZES):
        key = Key(family, 132, aligned, kernel, kind, 2, N, D)
        assert type(configs.from_table(key)) is configs.KINDS[kernel]


@pytest.mark.parametrize(
    ("capability", "family"),
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
def test_families(capability: tuple[int, int], family: str) -> None:
    assert configs.family(*capability) == family


@given(
    tiles=st.integers(1, 10**5),
    inner=st.integers(1, 3 * 10**6),
    tile=st.sampled_from([32, 64, 128]),
    step=st.sampled_from([16, 32, 64]),
    resident=st.sampled_from([1, 2, 4]),
    processors=st.integers(1, 304),
    whole_tiles=st.booleans(),
)
def test_parts_hold_everything_once(
    tiles: int, inner: int, tile: int, step: int, resident: int, processors: int, whole_tiles: bool
) -> None:
    product = Product(tile, step, resident=resident)
    whole, parts, length = configs.split(tiles, inner, product, processors, whole_tiles)
    assert 0 <= whole <= tiles
    assert whole == 0 or whole_tiles
    assert (parts - 1) * length < inner <= parts * length  # none is empty
    rest = tiles - whole
    assert rest or (parts, length) == (1, inner)
    # A tensor core's sum stays short, whatever the memory; otherwise the memory does.
    assert (length if rest else inner) <= configs.LONGEST + step
    if rest and parts > max(1, -(-inner // configs.LONGEST)):
        assert rest * parts * 4 * tile**2 <= configs.WORKSPACE


def test_a_product_that_would_leave_processors_idle_is_split() -> None:
    # 2048 x 8192 in 128 x 128 tiles: 272 of them on 132 processors; two rounds are whole, the last 8 tiles are split.
    whole, parts, _ = configs.split(272, 8192, Product(128, 64, resident=1), 132, whole_tiles=True)
    assert whole == 264
    assert 8 * parts > 100
    # Two tiles of 2.6 million rows.
    _, parts, length = configs.split(1, 2_600_000, Product(64, 32, resident=2), 132, whole_tiles=False)
    assert parts == 264
    assert length < 10_000


# -- search -----------------------------------------------------------------------------------------------------


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A search is asked for; its file."""
    from vicreg_fast.backends.triton import tuning

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("VICREG_FAST_AUTOTUNE", "1")
    monkeypatch.setenv("VICREG_FAST_AUTOTUNE_FILE", str(tmp_path / "cache" / "configs.jsonl"))
    monkeypatch.setattr(configs, "found", {})
    monkeypatch.setattr(tuning, "_read", set())
    return tmp_path / "cache" / "configs.jsonl"


WANTED = {
    "moments": Moments(32, 32, 4),
    "gram": Product(32, 32, 8, 2, 2),
    "gradient": configs.Gradient(32, 64, 16, 4, 2),
}


def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Time is made up: WANTED is fastest.  Returns what was timed."""
    from triton.runtime.errors import OutOfResources

    from vicreg_fast.backends.triton import tuning

    tried: list[Any] = []

    def milliseconds(run: Any) -> float:
        tried.append(dict(configs.found))
        current = {key.kernel: config for key, config in configs.found.items()}
        if any(getattr(config, "stages", 0) == 4 for config in current.values()):
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 3.0 - sum(current.get(kernel) == config for kernel, config in WANTED.items())

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return tried


def gradient_of(x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    terms = functional.vicreg_terms(x, x.detach() + 0.1, backend="triton")
    return torch.autograd.grad(sum(terms), x)[0]


def test_a_search_finds_the_fastest_and_writes_it_down(search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch)
    x = torch.randn(20, 96)
    gradient_of(x)
    assert {key.kernel: config for key, config in configs.found.items()} == WANTED
    lines = [json.loads(line) for line in search.read_text().splitlines()]
    assert [line["key"][3] for line in lines] == ["moments", "gram", "gradient"]
    assert all(line["ms"] < line["table_ms"] for line in lines)
    # The next call, and the next process, search no more.
    count = len(tried)
    gradient_of(x)
    configs.found.clear()
    from vicreg_fast.backends.triton import tuning

    tuning._read.clear()
    gradient_of(x)
    assert len(tried) == count
    assert {key.kernel: config for key, config in configs.found.items()} == WANTED


def test_a_search_changes_no_result(search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(20, 96)
    timed(monkeypatch)
    found = gradient_of(x)
    monkeypatch.delenv("VICREG_FAST_AUTOTUNE")
    configs.found.clear()
    # Other tiles add in another order: a few roundings, as in data.py.
    assert (found - gradient_of(x)).norm() <= 8 * U * found.norm()


@pytest.mark.parametrize(
    "line", ['{"key": [1, 2]}', '{"key": ["sm90", 1', "", "[]"], ids=["short", "cut", "empty", "list"]
)
def test_a_broken_line_is_named_and_left_out(line: str, search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch)
    search.parent.mkdir()
    search.write_text(line + "\n")
    with pytest.warns(UserWarning, match=r"configs\.jsonl, line 1, is no row of a search and is left out"):
        gradient_of(torch.randn(20, 96))
    assert {key.kernel: config for key, config in configs.found.items()} == WANTED


def test_no_search_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from vicreg_fast.backends.triton import tuning

    for value in ("0", ""):
        monkeypatch.setenv("VICREG_FAST_AUTOTUNE", value)
        assert not tuning.enabled()
    monkeypatch.delenv("VICREG_FAST_AUTOTUNE")
    assert not tuning.enabled()
