"""The libraries that benchmarks compare with: available or not, and equal to the reference at the stated definition."""

import logging
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from benchmarks import libraries, machine, providers
from benchmarks.cases import Case, local, vicreg
from benchmarks.libraries import VICREG, VICREGL, Definition, Library, Losses
from vicreg_fast import VICRegLoss

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


INSTALLED = [(VICREG[name], vicreg("highest", N, D)) for name in VICREG for N, D in ((32, 16), (9, 40))]
INSTALLED += [
    (VICREGL[name], local("highest", 6, patches, 8, matches, statistics="slot"))
    for name in VICREGL
    for patches in ((9, 9), (36, 30))
    for matches in ((4, 4), (5, 3))
]


@pytest.mark.filterwarnings("default")  # some libraries warn when they are imported
@pytest.mark.parametrize(("library", "case"), INSTALLED, ids=[f"{a.package}-{b.name}" for a, b in INSTALLED])
def test_loss_equals_ours_at_its_definition(library: Library, case: Case) -> None:
    theirs, reason = libraries.find(library, *([tuple(case.shape["m"])] if case.suite == "vicregl" else []))
    if theirs is None:
        pytest.skip(str(reason))
    views = [z.detach().double() for z in case.inputs(0, torch.device("cpu"))]
    # One feature varies so little that eps shows, far above the error that is allowed.
    views[0][..., 0] *= 1e-3 if case.suite == "vicreg" else 1
    pair = [z.requires_grad_() for z in views[:2]]
    ours = providers.ours_of(case, "reference", library.definition)
    actual, exact = (losses(*views)["loss"] for losses in (theirs, ours))
    assert actual.shape == ()
    assert_exact([actual, *torch.autograd.grad(actual, pair)], [exact, *torch.autograd.grad(exact, pair)])


def test_kernels_that_fail_are_not_timed_as_those_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """ATen would take their place, and its times would pass for theirs."""
    monkeypatch.setattr(providers.backends, "choose", lambda backend, *args: backend)
    made: list[str] = []
    monkeypatch.setattr(providers, "ours_of", lambda case, backend, definition: made.append(backend))
    for backend in ("auto", "aten"):
        providers.ours(vicreg("highest", 8, 16), backend, torch.device("cuda"), ONES)
    assert made == ["triton", "aten"]
