"""The libraries that benchmarks compare with: available or not, and equal to the reference at the stated definition."""

import logging
import os
import subprocess
import sys
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from benchmarks import libraries, machine
from benchmarks.libraries import VICREG, VICREGL, Definition, Library, Losses
from vicreg_fast import VICRegLLoss, VICRegLoss

from .data import assert_exact

ONES = Definition(1.0, 1.0, 1.0, 0.0)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package is, as version 1.2.3."""
    monkeypatch.setattr(libraries, "version", lambda package: "1.2.3")


def failing(*errors: Exception) -> Library:
    return Library("some-library", ONES, Mock(side_effect=errors))


def test_missing_library_is_named() -> None:
    assert libraries.find(failing(KeyError("must not be loaded"))) == (None, "some-library is not installed")
    assert torch.__version__.startswith(str(libraries.version("torch")).split("+")[0])


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'a'"), "ModuleNotFoundError: No module named 'a'"),
        (RuntimeError("operator nms is gone\nat line 1"), "RuntimeError: operator nms is gone"),
        (ImportError(), "ImportError"),
    ],
    ids=["missing-dependency", "broken", "no-message"],
)
def test_failed_import_is_one_line_and_not_repeated(error: Exception, reason: str) -> None:
    library = failing(error, AssertionError("must not be loaded again"))
    for _ in range(2):
        assert libraries.find(library) == (None, f"some-library 1.2.3 cannot be imported: {reason}")


@pytest.mark.usefixtures("installed")
def test_side_effects_of_an_import_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
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

    assert libraries.find(Library("some-library", ONES, load))[1] is None
    assert dict(os.environ) == environment
    assert (root.handlers, root.level) == (handlers, level)


def test_nothing_is_imported_before_use() -> None:
    names = "{'lightly', 'solo', 'stable_pretraining'}"
    command = [sys.executable, "-c", f"import sys, benchmarks.libraries; assert not {names} & set(sys.modules)"]
    subprocess.run(command, cwd=machine.ROOT, check=True)


# -- installed libraries ------------------------------------------------------------------------------------------


def find_or_skip(library: Library, *arguments: Any) -> Losses:
    losses, reason = libraries.find(library, *arguments)
    if losses is None:
        pytest.skip(str(reason))
    return losses


def value_and_gradients(losses: Losses, views: list[Tensor], *others: Tensor | None) -> list[Tensor]:
    loss = losses(*views, *others)["loss"]
    assert loss.shape == ()
    return [loss, *torch.autograd.grad(loss, views)]


# Some libraries warn when they are imported.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shape", [(32, 16), (9, 40)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", VICREG)
def test_loss_equals_ours_at_its_definition(name: str, shape: tuple[int, int]) -> None:
    theirs = find_or_skip(VICREG[name])
    inv, var, cov, eps, *_ = VICREG[name].definition
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
def test_local_loss_equals_ours_at_its_definition(
    name: str, patches: tuple[int, int], num_matches: tuple[int, int]
) -> None:
    theirs = find_or_skip(VICREGL[name], num_matches)
    inv, var, cov, eps, statistics, match_order = VICREGL[name].definition
    options: dict[str, Any] = {"eps": eps, "statistics": statistics, "match_order": match_order}
    loss = VICRegLLoss(num_matches, 0.0, inv, var, cov, **options, backend="reference")

    def ours(x: Tensor, y: Tensor, x_locations: Tensor, y_locations: Tensor) -> dict[str, Tensor]:
        return loss(x, y, None, None, x_locations, y_locations)

    views = [(0.7 * torch.randn(6, P, 8, dtype=torch.float64)).requires_grad_() for P in patches]
    locations = [torch.rand(6, P, 2, dtype=torch.float64) for P in patches]
    assert_exact(value_and_gradients(theirs, views, *locations), value_and_gradients(ours, views, *locations))
