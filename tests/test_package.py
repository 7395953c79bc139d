"""What is installed and promised: packages, version, imports, docstrings and their examples."""

import doctest
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vicreg_fast
from vicreg_fast import functional, modules

ROOT = Path(vicreg_fast.__file__).parent.parent
DISTRIBUTION = "vicreg_fast"


@pytest.fixture
def run_python(tmp_path):
    """Run code in a fresh interpreter outside the checkout, whose folder ``kernels`` would be importable there."""

    def run(code: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture(scope="module")
def distribution() -> importlib.metadata.Distribution:
    # An editable install leaves an egg-info folder in the checkout, which lists sources and not what is installed.
    installed = [
        found
        for found in importlib.metadata.distributions(name=DISTRIBUTION)
        if any(file.parts[0].endswith(".dist-info") for file in found.files or ())
    ]
    assert installed, "the tests need the installed distribution: pip install -e ."
    return installed[0]


# -- imports ----------------------------------------------------------------------------------------------------


def test_the_promised_import_line():
    from vicreg_fast import VICReg, VICRegLLoss, VICRegLoss

    assert VICReg is VICRegLoss
    assert issubclass(VICRegLoss, torch.nn.Module)
    assert issubclass(VICRegLLoss, torch.nn.Module)


def test_every_exported_name_exists():
    assert all(hasattr(vicreg_fast, name) for name in vicreg_fast.__all__)


def test_importing_does_not_import_triton(distribution, run_python):
    code = """
import sys, torch
before = set(sys.modules)
import vicreg_fast
from vicreg_fast import VICRegLoss
print([name for name in sorted(set(sys.modules) - before) if name.split(".")[0] == "triton"])
"""
    assert run_python(code) == "[]"


def test_a_loss_where_triton_is_absent(distribution, run_python):
    code = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import torch
from vicreg_fast import VICRegLoss
x = torch.tensor([[0.0, 0.0], [2.0, 1.0]], requires_grad=True)
y = torch.zeros(2, 2)
losses = VICRegLoss(1.0, 1.0, 1.0)(x, y)
losses["loss"].backward()
assert "triton" not in sys.modules
print(*(f"{losses[name].item():.6f}" for name in ("inv-loss", "var-loss", "cov-loss")))
print(bool(x.grad.isfinite().all()))
"""
    # inv: (4 + 1) / 4; var: x has std sqrt(2) and sqrt(1/2), y 0 and 0: ((1 - sqrt(1/2)) / 2 + 1) / 2;
    # cov: x has the off-diagonal covariance 1, twice, over D = 2, and y none: (2 / 2 + 0) / 2.
    assert run_python(code).split() == ["1.250000", "0.573223", "0.500000", "True"]


def test_kernels_are_importable_under_the_package(distribution, run_python):
    assert (
        run_python("import vicreg_fast.kernels; print(vicreg_fast.kernels.__name__)") == "vicreg_fast.kernels"
    )


def test_no_top_level_package_kernels_comes_with_it(distribution, run_python):
    code = """
import importlib.metadata, importlib.util
spec = importlib.util.find_spec("kernels")
print(spec is None or "vicreg_fast" not in importlib.metadata.packages_distributions().get("kernels", ["vicreg_fast"]))
"""
    assert run_python(code) == "True"


# -- the distribution -------------------------------------------------------------------------------------------


def test_no_file_is_installed_under_kernels(distribution):
    assert distribution.files
    assert "kernels" not in {file.parts[0] for file in distribution.files}
    assert DISTRIBUTION not in importlib.metadata.packages_distributions().get("kernels", [])


def test_the_version_is_the_metadatas(distribution):
    assert vicreg_fast.__version__ == distribution.version


def test_triton_is_an_extra(distribution):
    required = [r for r in distribution.requires or [] if "extra ==" not in r]
    assert [r for r in required if r.startswith("torch")]
    assert not [r for r in required if r.startswith("triton")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """The names in a wheel that is built from a copy of the checkout."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("needs the checkout")
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools")
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools >= 77, as pyproject.toml says")
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    (copy / "README.md").touch()
    for name in ("vicreg_fast", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('out')"],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (copy / "out").glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_a_wheel_ships_the_type_marker(wheel):
    assert "vicreg_fast/py.typed" in wheel


def test_a_wheel_holds_every_module_and_no_other_package(wheel):
    """``setup.py`` lists the packages by hand: one that is forgotten works in the checkout only."""
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "vicreg_fast").rglob("*.py")}
    expected |= {"vicreg_fast/" + p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in wheel if name.endswith(".py")} == expected


# -- docstrings -------------------------------------------------------------------------------------------------


def public(module: ModuleType) -> dict[str, object]:
    """Functions and classes of the library that a module shows, and the methods that the classes define."""
    found: dict[str, object] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if not value.__module__.startswith(DISTRIBUTION):
            continue
        found[f"{module.__name__}.{name}"] = value
        # A NamedTuple's own methods are not written here.
        methods = {} if not inspect.isclass(value) else vars(value)
        for method, function in methods.items():
            function = inspect.unwrap(getattr(function, "__func__", function))
            ours = inspect.isfunction(function) and function.__qualname__ == f"{value.__qualname__}.{method}"
            if ours and not method.startswith("_") and function.__module__ == value.__module__:
                found[f"{module.__name__}.{name}.{method}"] = function
    return found


PUBLIC = public(vicreg_fast) | public(functional) | public(modules)


def test_the_public_names_are_found():
    names = (
        "vicreg_fast.VICReg",
        "vicreg_fast.functional.vicreg_terms",
        "vicreg_fast.modules.VICRegLLoss.forward",
    )
    assert all(name in PUBLIC for name in names)


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_a_docstring(name):
    value = PUBLIC[name]
    doc = value.__doc__
    assert doc
    assert doc.strip()
    # What NamedTuple writes for a class without one.
    assert not doc.startswith(f"{value.__name__}(")


def examples() -> dict[str, doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [
        test
        for module in (vicreg_fast, functional, modules)
        for test in finder.find(module, extraglobs={"torch": torch})
    ]
    return {test.name: test for test in found if test.examples}


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_docstrings_example_runs(name):
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(EXAMPLES[name], out=report.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)


def test_every_public_loss_has_an_example():
    names = [
        *(
            f"vicreg_fast.functional.{name}"
            for name in ("vicreg_terms", "variance_covariance", "match_patches")
        ),
        *(f"vicreg_fast.modules.{name}" for name in ("VICRegLoss", "VICRegLLoss")),
    ]
    assert [name for name in names if name not in EXAMPLES] == []
