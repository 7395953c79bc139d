"""Imports modules that import kernels: a kernel's first import decides whether Triton interprets it in this process."""

import importlib
from types import ModuleType

import pytest


def import_interpreted(name: str) -> ModuleType:
    """The module.  Skips the test module where Triton compiles, in a run of the GPU's tests, or where a package is missing."""
    pytest.importorskip("triton")
    language = importlib.import_module("triton.language")
    kind = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    if not isinstance(language.cdiv, kind):
        pytest.skip("Triton is no interpreter in a run of the GPU's tests", allow_module_level=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return pytest.importorskip(name)  # type: ignore[no-any-return]
