"""Other libraries' losses under their own definitions, where they are installed.  Each is imported at its first use."""

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

Losses = Callable[..., dict[str, Tensor]]  # from a case's inputs; "loss" is what is differentiated


class Definition(NamedTuple):
    """Coefficients and options with which ours equal the library's loss; VICRegLoss's / VICRegLLoss's arguments.

    Ours are means over the two views, over the two directions, and over location and feature.  What a library sums
    instead has twice its coefficient here.
    """

    inv_coeff: float
    var_coeff: float
    cov_coeff: float
    eps: float
    statistics: str = "image"
    match_order: str = "distance"


class Library(NamedTuple):
    """A loss of another library: ``load`` imports it and raises what the import raises."""

    package: str  # as pip knows it
    definition: Definition
    load: Callable[..., Losses]


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache  # A failed import takes seconds, and a second one may fail for another reason, at the remains of the first.
def find(library: Library, *arguments: Any) -> Losses | str:
    """What ``load`` gives, or in one line why it is not there."""
    found = version(library.package)
    if found is None:
        return f"{library.package} is not installed"
    try:
        with _process_unchanged():
            return library.load(*arguments)
    except Exception as error:  # A library of another torch fails with more than ImportError.
        lines = str(error).strip().splitlines() or [""]
        return f"{library.package} {found} cannot be imported: {type(error).__name__}: {lines[0]}".rstrip(": ")


@contextmanager
def _process_unchanged() -> Iterator[None]:
    """Undo what imports do to the process: stable-pretraining sets how CUDA allocates and takes over all logging."""
    environment = dict(os.environ)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _named(loss: Callable[..., Tensor]) -> Losses:
    return lambda x, y: {"loss": loss(x, y)}


def _lightly() -> Losses:
    return _named(importlib.import_module("lightly.loss").VICRegLoss())


def _stable_pretraining() -> Losses:
    return _named(importlib.import_module("stable_pretraining.losses").VICRegLoss())


def _solo_learn() -> Losses:
    # The file by itself: it needs torch alone, where its package asks for torch 1.9.1 and PyTorch Lightning 1.4.7.
    package = importlib.util.find_spec("solo")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'solo'")
    path = Path(package.submodule_search_locations[0], "losses", "vicreg.py")
    spec = importlib.util.spec_from_file_location("vicreg_of_solo_learn", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no loader for {path.name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where torch.compile looks for the globals of its functions
    spec.loader.exec_module(module)
    return _named(module.vicreg_loss_func)


def _lightly_local(num_matches: tuple[int, int]) -> Losses:
    loss = importlib.import_module("lightly.loss").VICRegLLoss(alpha=0.0, num_matches=num_matches)

    def local(x_maps: Tensor, y_maps: Tensor, x_locations: Tensor, y_locations: Tensor) -> dict[str, Tensor]:
        # One view is passed as global, one as local.  Of two global views lightly takes (x, y) and (y, x), which is
        # the same work twice.  Patches are a grid of one row.  The global part cannot be left out: its embeddings
        # have one feature, and weight 0.
        embeddings = x_maps.new_zeros(len(x_maps), 1)
        total = loss(
            global_view_features=[(embeddings, x_maps.unsqueeze(1))],
            global_view_grids=[x_locations.unsqueeze(1)],
            local_view_features=[(embeddings, y_maps.unsqueeze(1))],
            local_view_grids=[y_locations.unsqueeze(1)],
        )
        return {"loss": total.squeeze()}

    return local


# x, y of (N, D) -> {"loss": ...}; nothing is gathered in a process that is alone.
VICREG = {
    "lightly": Library("lightly", Definition(25.0, 25.0, 2.0, 1e-4), _lightly),  # sums cov
    "solo-learn": Library("solo-learn", Definition(25.0, 50.0, 2.0, 1e-4), _solo_learn),  # sums var and cov
    "stable-pretraining": Library(
        "stable-pretraining", Definition(25.0, 25.0, 2.0, 1e-4), _stable_pretraining
    ),  # sums cov
}

# load(num_matches) -> (x_maps, y_maps, x_locations, y_locations) -> {"loss": ...}, the local part alone.
VICREGL = {
    # Sums location and feature, each a mean over directions and views.
    "lightly": Library("lightly", Definition(50.0, 50.0, 2.0, 1e-4, "slot"), _lightly_local),
}
