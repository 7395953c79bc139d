"""Other libraries' losses under their own definitions, where they are installed.  Each is imported at first use."""

import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

Losses = Callable[..., dict[str, Tensor]]  # from a shape's inputs to losses by name; "loss" is differentiated


class Definition(NamedTuple):
    """Arguments with which VICRegLoss or VICRegLLoss equals a library's loss.

    vicreg_fast takes means over the two views, over the two directions, and over location and feature.  A term that a
    library sums instead has twice its coefficient here.
    """

    inv_coeff: float
    var_coeff: float
    cov_coeff: float
    eps: float
    statistics: str = "image"
    match_order: str = "distance"


class Library(NamedTuple):
    """A loss of another library.  ``load`` imports it and raises what the import raises."""

    package: str  # its name on the package index
    definition: Definition
    load: Callable[..., Losses]


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache  # a failed import takes seconds, and the second attempt may fail at the remains of the first
def find(library: Library, *arguments: Any) -> tuple[Losses | None, str | None]:
    """The loss that ``load`` returns, or in one line the reason why it is unavailable."""
    installed = version(library.package)
    if installed is None:
        return None, f"{library.package} is not installed"
    try:
        with _process_unchanged():
            return library.load(*arguments), None
    except Exception as error:  # a library built for another torch raises more than ImportError
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}".rstrip(": ")
        return None, f"{library.package} {installed} cannot be imported: {reason}"


@contextmanager
def _process_unchanged() -> Iterator[None]:
    """Undo side effects of imports: stable-pretraining sets CUDA's allocator and takes over all logging."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            root.handlers = handlers
            root.setLevel(level)


def _named(loss: Callable[..., Tensor]) -> Losses:
    return lambda x, y: {"loss": loss(x, y)}


def _default(module: str) -> Losses:
    return _named(importlib.import_module(module).VICRegLoss())


def _solo_learn() -> Losses:
    # Its file by itself: that needs only torch, while the package needs torch 1.9.1 and PyTorch Lightning 1.4.7.
    package = importlib.util.find_spec("solo")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'solo'")
    module = ModuleType("vicreg_of_solo_learn")
    path = Path(package.submodule_search_locations[0], "losses", "vicreg.py")
    SourceFileLoader(module.__name__, str(path)).exec_module(module)
    return _named(module.vicreg_loss_func)


def _lightly_local(num_matches: tuple[int, int]) -> Losses:
    loss = importlib.import_module("lightly.loss").VICRegLLoss(alpha=0.0, num_matches=num_matches)

    def local(x_maps: Tensor, y_maps: Tensor, x_locations: Tensor, y_locations: Tensor) -> dict[str, Tensor]:
        # One view is global, one local: of two global views lightly computes (x, y) and (y, x), the same work twice.
        # Patches are a grid with one row.  The global loss, of one feature, has weight 0: it cannot be left out.
        embeddings = x_maps.new_zeros(len(x_maps), 1)
        total = loss(
            global_view_features=[(embeddings, x_maps.unsqueeze(1))],
            global_view_grids=[x_locations.unsqueeze(1)],
            local_view_features=[(embeddings, y_maps.unsqueeze(1))],
            local_view_grids=[y_locations.unsqueeze(1)],
        )
        return {"loss": total.squeeze()}

    return local


_SUM_COV = Definition(25.0, 25.0, 2.0, 1e-4)  # the sum of the views' covariance terms
_SUM_VAR_COV = Definition(25.0, 50.0, 2.0, 1e-4)  # and of their variance terms
# x, y of (N, D) -> {"loss": ...}.  One process gathers nothing.
VICREG = {
    "lightly": Library("lightly", _SUM_COV, partial(_default, "lightly.loss")),
    "solo-learn": Library("solo-learn", _SUM_VAR_COV, _solo_learn),
    "stable-pretraining": Library(
        "stable-pretraining", _SUM_COV, partial(_default, "stable_pretraining.losses")
    ),
}
# load(num_matches) -> (x_maps, y_maps, x_locations, y_locations) -> {"loss": ...}, the local loss alone.
VICREGL = {
    # The sum of location and feature, each a mean over directions and views.
    "lightly": Library("lightly", Definition(50.0, 50.0, 2.0, 1e-4, "slot"), _lightly_local),
}
