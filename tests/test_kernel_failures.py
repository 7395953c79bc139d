"""Kernels that cannot run: which errors say so, the one warning, and what ``python -m vicreg_fast`` says of it."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vicreg_fast import __main__ as command
from vicreg_fast import backends
from vicreg_fast.backends import kernel_failures

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_failures, "reasons", {})
    monkeypatch.setattr(kernel_failures, "_warned", set())


# -- errors that Triton itself raises, in a process where it compiles ------------------------------------------------

# What a failure's reason contains.
CANNOT_RUN = {
    "no driver": "active drivers",
    "no C compiler": "Failed to find C compiler",
    "C compiler that fails": "returned non-zero exit status 7",
    "C compiler that is absent": "FileNotFoundError",
    "cache that cannot be written": "NotADirectoryError",
    "too little shared memory": "OutOfResources: out of resource: shared memory",
    "unknown architecture": "RuntimeError",
    "no kernel image": "no kernel image is available",
    "PTX of a newer version": "unsupported toolchain",
}
NOT_THEIR_OWN = {"earlier illegal access": "illegal memory access", "out of memory": "out of memory"}
Outcomes = dict[str, Any]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    python = [sys.executable, "-W", "ignore", "-m", "tests.fake_driver"]
    done = subprocess.run(python, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    outcomes: Outcomes = json.loads(done.stdout)
    assert outcomes.keys() == {"aten", *CANNOT_RUN, *NOT_THEIR_OWN}
    return outcomes


@needs_triton
@pytest.mark.parametrize("name", CANNOT_RUN)
def test_kernels_that_cannot_run_give_one_warning_and_atens_loss(name: str, outcomes: Outcomes) -> None:
    auto, aten = outcomes[name]["auto"], outcomes["aten"]
    (warning,) = auto["warnings"]
    assert warning.startswith("the Triton kernels cannot run on cpu: ")
    assert CANNOT_RUN[name] in warning
    assert "backend='triton'" in warning
    assert (auto["loss"], auto["gradient"]) == (aten["loss"], aten["gradient"])
    assert auto["remembered"]


@needs_triton
@pytest.mark.parametrize("name", [*CANNOT_RUN, *NOT_THEIR_OWN])
def test_the_triton_backend_raises_the_reason(name: str, outcomes: Outcomes) -> None:
    strict = outcomes[name]["triton"]
    assert (CANNOT_RUN | NOT_THEIR_OWN)[name] in strict["raised"]
    assert not strict["remembered"]


@needs_triton
@pytest.mark.parametrize("name", NOT_THEIR_OWN)
def test_an_error_that_a_launch_only_reports_is_raised(name: str, outcomes: Outcomes) -> None:
    assert NOT_THEIR_OWN[name] in outcomes[name]["auto"]["raised"]
    assert not outcomes[name]["auto"]["remembered"]


# -- which errors ---------------------------------------------------------------------------------------------------


def function_of(module: str) -> Callable[..., Any]:
    """A function of a module of that name, which calls its argument."""
    scope: dict[str, Any] = {"__name__": module}
    exec("def call(function): return function()", scope)
    return scope["call"]  # type: ignore[no-any-return]


def raised(error: Exception, *modules: str) -> Exception:
    """The error, raised below functions of these modules, the outermost first."""

    def call() -> None:
        raise error

    for module in reversed(modules):
        call = lambda module=module, inner=call: function_of(module)(inner)  # noqa: E731
    with pytest.raises(type(error)) as caught:
        call()
    return caught.value


LAUNCHER, TRITON = "vicreg_fast.backends.triton.launch_vicreg", "triton.runtime.jit"
RECORDER = "vicreg_fast.backends.triton.launch_timing"


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ((LAUNCHER, TRITON), True),
        ((LAUNCHER, TRITON, "subprocess"), True),  # Triton calls a C compiler
        ((LAUNCHER,), False),
        ((LAUNCHER, "torch"), False),
        ((LAUNCHER, TRITON, RECORDER), False),
        ((LAUNCHER, TRITON, RECORDER, "torch"), False),
        ((LAUNCHER, TRITON, RECORDER, TRITON), True),
        ((LAUNCHER, "tritonclient.http"), False),
    ],
)
def test_what_triton_raised_is_told_by_the_innermost_call(modules: tuple[str, ...], expected: bool) -> None:
    assert kernel_failures.caused_by_kernels(raised(ValueError("any"), *modules)) is expected


def driver(text: str) -> Exception:
    return RuntimeError(f"Triton Error [CUDA]: {text}")


@pytest.mark.parametrize(
    "error",
    [
        driver("invalid argument"),
        driver("device kernel image is invalid"),
        driver("a PTX JIT compilation failed"),
        driver("too many resources requested for launch"),
        RuntimeError("Triton Error [HIP]:  Code: 209, Messsage: no kernel image is available for execution"),
        PermissionError(errno.EACCES, "the cache"),
        KeyError("an option that this version does not know"),
    ],
    ids=str,
)
def test_errors_of_the_kernels(error: Exception) -> None:
    assert kernel_failures.caused_by_kernels(raised(error, LAUNCHER, TRITON))


@pytest.mark.parametrize(
    "error",
    [
        driver("device-side assert triggered"),
        driver("unspecified launch failure"),
        driver("operation not supported on global/shared address space"),
        driver("operation not permitted when stream is capturing"),
        driver("an error that no list has"),
        RuntimeError("Triton Error [HIP]:  Code: 2, Messsage: out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        DeprecationWarning("a filter makes it an error"),
    ],
    ids=repr,
)
def test_errors_that_are_not_the_kernels(error: Exception) -> None:
    assert not kernel_failures.caused_by_kernels(raised(error, LAUNCHER, TRITON))


def test_a_cause_that_triton_wrapped_is_seen() -> None:
    wrapper = ValueError("at 1:2: ...")
    assert kernel_failures.caused_by_kernels(raised(wrapper, LAUNCHER, TRITON))
    wrapper.__cause__ = MemoryError()
    assert not kernel_failures.caused_by_kernels(wrapper)


# -- the warning ----------------------------------------------------------------------------------------------------


def test_a_reason_is_given_once_for_all_devices() -> None:
    same, other = RuntimeError("no compiler"), RuntimeError("no driver")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index, error in enumerate((same, same, other)):
            kernel_failures.record(torch.device("cuda", index), error)
    first, second = (str(warning.message) for warning in caught)
    assert "on cuda:0: RuntimeError: no compiler. " in first
    assert "on cuda:2: RuntimeError: no driver. " in second
    assert list(kernel_failures.reasons.values()) == [
        f"RuntimeError: no {x}" for x in ("compiler", "compiler", "driver")
    ]


def test_a_devices_first_reason_is_kept() -> None:
    device = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match="first"):
        kernel_failures.record(device, RuntimeError("first"))
    kernel_failures.record(device, RuntimeError("second"))
    assert kernel_failures.reasons == {device: "RuntimeError: first"}


def test_a_long_reason_keeps_its_ends_on_one_line() -> None:
    text = kernel_failures.describe(ValueError("at 1:2:\n" + "x" * 5000 + "\nthe cause"))
    assert text.startswith("ValueError: at 1:2: xxx")
    assert text.endswith("xxx the cause")
    assert len(text) < 500


# -- Triton that cannot be imported ---------------------------------------------------------------------------------

BROKEN = """
import contextlib, io, warnings
import torch
from vicreg_fast import VICRegLoss, __main__, backends

backends._ALWAYS_ATEN = ()
backends._obstacle = lambda device, dtypes: None
x, y = torch.randn(2, 16, 6).unbind()
x.requires_grad_()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    losses = [VICRegLoss()(x, y)["loss"] for _ in range(2)]
(text,) = [str(warning.message) for warning in caught if "Triton" in str(warning.message)]
assert text.startswith("the Triton kernels cannot run: ImportError: libtriton.so is broken; sorry. The ATen"), text
expected = VICRegLoss(backend="aten")(x, y)["loss"]
(gradient,) = torch.autograd.grad(expected, x)
for loss in losses:
    assert torch.equal(loss, expected)
    assert torch.equal(*torch.autograd.grad(loss, x), gradient)
for _ in range(2):
    try:
        VICRegLoss(backend="triton")(x, y)
    except ImportError as error:
        assert "libtriton.so is broken" in str(error)
    else:
        raise AssertionError("no error")
__main__._PARITY[:] = __main__._PARITY[:1]
print(__main__.main(["--quick", "--device", "cpu"]))
"""


def test_a_triton_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so is broken; sorry')")
    (tmp_path / "script.py").write_text(BROKEN)
    root = Path(backends.__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    script = [sys.executable, "-W", "ignore", str(tmp_path / "script.py")]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (
        "backend 'auto' is 'aten', for the Triton kernels cannot run: ImportError: libtriton.so is broken; sorry"
        in done.stdout
    )
    assert (
        "FAILED the Triton kernels cannot run on cpu, ATen computed these results: ImportError" in done.stdout
    )
    assert done.stdout.split()[-1] == "1"


def test_a_missing_module_of_the_library_is_no_fault_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'vicreg_fast.kernels'", name="vicreg_fast.kernels")

    monkeypatch.setattr(backends, "module", missing)
    backends._import_failure.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"vicreg_fast\.kernels"):
        backends._import_failure()


# -- python -m vicreg_fast ------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.usefixtures("interpreted")
def test_the_command_reports_kernels_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_ALWAYS_ATEN", ())
    monkeypatch.setattr(command, "_PARITY", [command.Case((8, 16))])
    kind = importlib.import_module("triton.runtime.interpreter").InterpretedFunction

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no C compiler; sorry")

    monkeypatch.setattr(kind, "run", fail)
    with pytest.warns(UserWarning, match="the Triton kernels cannot run on cpu"):
        assert command.main(["--quick", "--device", "cpu"]) == 1
    first = capsys.readouterr().out
    assert "backend 'auto' is 'triton'\n" in first  # not tried yet
    assert (
        "FAILED the Triton kernels cannot run on cpu, ATen computed these results: RuntimeError: no C" in first
    )
    assert "  1 FAILED" in first  # the results themselves are right
    command._machine({"cpu": ""})
    assert (
        "'aten', for the Triton kernels cannot run: RuntimeError: no C compiler; sorry\n"
        in capsys.readouterr().out
    )
