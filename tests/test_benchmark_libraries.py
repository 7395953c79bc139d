"""The libraries that benchmarks compare with: found or not, and equal to the reference at the stated definition."""

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import libraries
from benchmarks.libraries import VICREG, VICREGL, Definition, Library, Losses
from vicreg_fast import VICRegLLoss, VICRegLoss

from .data import assert_exact

ONES = Definition(1.0, 1.0, 1.0, 0.0)


@pytest.fixture(autouse=True)
def nothing_found_yet() -> Iterator[None]:
    libraries.find.cache_clear()
    yield
    libraries.find.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package is, as version 1.2.3."""
    monkeypatch.setattr(libraries, "version", lambda package: "1.2.3")


def failing(error: Exception) -> Library:
    def load() -> Losses:
        raise error

    return Library("some-library", ONES, load)


# -- found or not -------------------------------------------------------------------------------------------------


def test_library_that_is_not_installed_is_named() -> None:
    library = failing(AssertionError("must not be loaded"))
    assert libraries.version(library.package) is None
    assert libraries.find(library) == "some-library is not installed"


def test_version_is_the_installed_one() -> None:
    assert libraries.version("torch") is not None
    assert torch.__version__.startswith(str(libraries.version("torch")).split("+")[0])


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        pytest.param(
            ModuleNotFoundError("No module named 'torchvision'"),
            "ModuleNotFoundError: No module named 'torchvision'",
            id="missing-dependency",
        ),
        pytest.param(
            RuntimeError("operator nms is gone\nat line 1"), "RuntimeError: operator nms is gone", id="broken"
        ),
        pytest.param(ImportError(), "ImportError", id="wordless"),
    ],
)
def test_library_that_cannot_be_imported_is_named_with_one_line(error: Exception, reason: str) -> None:
    assert libraries.find(failing(error)) == f"some-library 1.2.3 cannot be imported: {reason}"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", VICREG)
def test_module_that_is_missing_is_a_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lightly", "lightly.loss", "solo", "stable_pretraining", "stable_pretraining.losses"):
        monkeypatch.setitem(sys.modules, module, None)
    found = libraries.find(VICREG[name])
    assert isinstance(found, str)
    assert found.startswith(f"{name} 1.2.3 cannot be imported: ")
    assert "\n" not in found


@pytest.mark.usefixtures("installed")
def test_failed_import_is_not_tried_again() -> None:
    errors = [ImportError("second"), ImportError("first")]

    def load() -> Losses:
        raise errors.pop()

    library = Library("some-library", ONES, load)
    assert libraries.find(library) == libraries.find(library)
    assert len(errors) == 1


@pytest.mark.usefixtures("installed")
def test_what_an_import_does_to_the_process_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VICREG_FAST_CHANGED", "before")
    monkeypatch.setenv("VICREG_FAST_REMOVED", "before")
    root = logging.getLogger()
    handlers, level, environment = list(root.handlers), root.level, dict(os.environ)

    def load() -> Losses:
        os.environ["VICREG_FAST_ADDED"] = os.environ["VICREG_FAST_CHANGED"] = "after"
        del os.environ["VICREG_FAST_REMOVED"]
        root.handlers.clear()
        root.setLevel(level + 1)
        return VICRegLoss()

    assert callable(libraries.find(Library("some-library", ONES, load)))
    assert dict(os.environ) == environment
    assert root.handlers == handlers
    assert root.level == level


def test_nothing_is_imported_before_use() -> None:
    script = (
        "import sys, benchmarks.libraries; print({'lightly', 'solo', 'stable_pretraining'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(libraries.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "set()"


# -- libraries that are played ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "module"), [("lightly", "lightly.loss"), ("stable-pretraining", "stable_pretraining.losses")]
)
def test_global_loss_is_the_default_one(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made without arguments, called with both views in order."""
    played = SimpleNamespace(VICRegLoss=lambda: lambda x, y: x - 2 * y)
    monkeypatch.setitem(sys.modules, module.split(".")[0], SimpleNamespace())
    monkeypatch.setitem(sys.modules, module, played)
    found = libraries.find(VICREG[name])
    assert callable(found)
    assert found(torch.tensor(3.0), torch.tensor(5.0)) == {"loss": torch.tensor(-7.0)}


@pytest.mark.usefixtures("installed")
def test_solo_learn_is_read_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "solo" / "losses").mkdir(parents=True)
    (tmp_path / "solo" / "__init__.py").write_text("raise ImportError('needs too much')\n")
    (tmp_path / "solo" / "losses" / "vicreg.py").write_text(
        "def vicreg_loss_func(z1, z2): return z1 - 2 * z2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    found = libraries.find(VICREG["solo-learn"])
    assert callable(found)
    assert found(torch.tensor(3.0), torch.tensor(5.0)) == {"loss": torch.tensor(-7.0)}


@pytest.mark.usefixtures("installed")
def test_local_loss_takes_maps_and_locations_as_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    given: dict[str, Any] = {}

    def loss(**arguments: Any) -> Tensor:
        given.update(arguments)
        return torch.ones(1)

    def make(**arguments: Any) -> Any:
        made.append(arguments)
        return loss

    monkeypatch.setitem(sys.modules, "lightly", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lightly.loss", SimpleNamespace(VICRegLLoss=make))
    found = libraries.find(VICREGL["lightly"], (3, 2))
    assert callable(found)
    assert made == [{"alpha": 0.0, "num_matches": (3, 2)}]

    x, y, x_locations, y_locations = (torch.rand(2, P, C) for C in (4, 2) for P in (5, 6))
    assert found(x, y, x_locations, y_locations)["loss"].shape == ()
    ((x_global, x_grid),) = given["global_view_features"]
    ((y_global, y_grid),) = given["local_view_features"]
    assert x_global.shape == y_global.shape == (2, 1)
    grids = [x_grid, y_grid, *given["global_view_grids"], *given["local_view_grids"]]
    for grid, rows in zip(grids, (x, y, x_locations, y_locations), strict=True):
        assert torch.equal(grid.flatten(1, 2), rows)


# -- libraries that are there -------------------------------------------------------------------------------------


def found_or_skip(library: Library, *arguments: Any) -> Losses:
    found = libraries.find(library, *arguments)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def value_and_gradients(losses: Losses, views: list[Tensor], *others: Tensor | None) -> list[Tensor]:
    loss = losses(*views, *others)["loss"]
    assert loss.shape == ()
    return [loss, *torch.autograd.grad(loss, views)]


# Importing some of them warns, of matters that are theirs.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shape", [(32, 16), (9, 40)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", VICREG)
def test_global_loss_is_ours_at_its_definition(name: str, shape: tuple[int, int]) -> None:
    library = VICREG[name]
    theirs = found_or_skip(library)
    inv, var, cov, eps, *_ = library.definition
    ours = VICRegLoss(inv, var, cov, eps=eps, backend="reference")
    x = 0.7 * torch.randn(shape, dtype=torch.float64)
    y = x + 0.1 * torch.randn_like(x)
    # One feature varies so little that eps shows, far above the error that is allowed.
    x[:, 0] *= 1e-3
    views = [x.requires_grad_(), y.requires_grad_()]
    assert_exact(value_and_gradients(theirs, views), value_and_gradients(ours, views))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("num_matches", [(4, 4), (5, 3)], ids="{0[0]}-{0[1]}".format)
@pytest.mark.parametrize("patches", [(9, 9), (36, 30)], ids="{0[0]}-{0[1]}".format)
@pytest.mark.parametrize("name", VICREGL)
def test_local_loss_is_ours_at_its_definition(
    name: str, patches: tuple[int, int], num_matches: tuple[int, int]
) -> None:
    library = VICREGL[name]
    theirs = found_or_skip(library, num_matches)
    inv, var, cov, *_ = library.definition
    options = {key: getattr(library.definition, key) for key in ("eps", "statistics", "match_order")}
    loss = VICRegLLoss(num_matches, 0.0, inv, var, cov, **options, backend="reference")

    def ours(x: Tensor, y: Tensor, x_locations: Tensor, y_locations: Tensor) -> dict[str, Tensor]:
        return loss(x, y, None, None, x_locations, y_locations)

    views = [(0.7 * torch.randn(6, P, 8, dtype=torch.float64)).requires_grad_() for P in patches]
    locations = [torch.rand(6, P, 2, dtype=torch.float64) for P in patches]
    assert_exact(value_and_gradients(theirs, views, *locations), value_and_gradients(ours, views, *locations))
