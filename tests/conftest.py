"""Fixtures of every test: fixed seeds, and fresh memory that is full of NaN."""

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

# Triton's own functions are made for the interpreter, or not, when they are defined.  Tests of the kernels say so again
# (test_triton.py); to all others this is a machine without a GPU.
os.environ["TRITON_INTERPRET"] = "1"
with contextlib.suppress(ImportError):
    import triton  # noqa: F401
del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every ``torch.empty`` is filled with NaN, so that an element nobody wrote is seen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors gain nothing from threads, and on a busy machine waiting for one costs ten times the work."""
    torch.set_num_threads(1)
