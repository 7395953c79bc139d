"""``python -m vicreg_fast``: its output, its exit status, and that it reports wrong results."""

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
import torch

import vicreg_fast
from vicreg_fast import __main__ as command
from vicreg_fast.backends.aten import backward, forward

Capture = pytest.CaptureFixture[str]
CASES = [command.Case((8, 16)), command.Case((5, 33, 1)), command.Case((6, 12, 9, 16), 5)]


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_QUICK", "_ALL"):
        monkeypatch.setattr(command, name, dict.fromkeys((torch.float64, torch.float32), CASES))


def test_quick_reports_the_machine_and_passes(capsys: Capture) -> None:
    assert command.main(["--quick", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for word in (torch.__version__, vicreg_fast.__version__, "'aten'", "Triton", "all passed"):
        assert word in out
    assert "FAILED" not in out
    assert "Speed" not in out


def test_quick_checks_few_cases_and_differentiates_the_whole_loss_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    evaluate, results = command._evaluate, list[dict[str, Any]]()

    def recorded(*args: Any) -> Any:
        results.append(evaluate(*args))
        return results[-1]

    monkeypatch.setattr(command, "_evaluate", recorded)
    assert command.main(["--quick", "--device", "cpu"]) == 0
    assert "of 4 cases" in capsys.readouterr().out
    assert len(results) == 2 * 3 + 3 * (3 + 2)  # float64 has no eager result of its own
    for found in results:
        assert [name for name in found if name.startswith("gradient")] == ["gradient of loss"]
        assert len(found) > 4  # every loss has a value


def wrong_by(factor: float, monkeypatch: pytest.MonkeyPatch, features: int | None = None) -> None:
    """Multiply the values of the ATen forward pass by ``factor``, of views with so many features or of all."""
    right: Callable[..., Any] = forward.terms

    def wrong(views: Any, *args: Any, **kwargs: Any) -> Any:
        values, statistics = right(views, *args, **kwargs)
        scale = factor if features in (None, views[0].shape[2]) else 1.0
        return [value * scale for value in values], statistics

    monkeypatch.setattr(forward, "terms", wrong)


@pytest.mark.usefixtures("few_cases")
def test_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    wrong_by(1 + 1e-8, monkeypatch, features=1)
    assert command.main(["--quick", "--device", "cpu"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED torch" in line]
    assert len(failed) == 1, failed
    assert f"FAILED torch.float64 {CASES[1]}" in failed[0]


def test_wrong_bfloat16_value_fails(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    wrong_by(1.03, monkeypatch, features=100)
    assert command.main(["--quick", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAILED torch.bfloat16 VICReg 257x100" in out
    assert "1 FAILED" in out


@pytest.mark.usefixtures("few_cases")
def test_wrong_gradient_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    right: Callable[..., None] = backward.gradient

    def wrong(
        views: Any, plan: Any, product: Any, spare: Any, statistics: Any, *args: Any, **kwargs: Any
    ) -> None:
        shifted = statistics._replace(moments=statistics.moments + 1e-3)
        right(views, plan, product, spare, shifted, *args, **kwargs)

    monkeypatch.setattr(backward, "gradient", wrong)
    assert command.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    for case in CASES:
        for dtype in ("float64", "float32"):
            assert any(
                str(case) in line and "FAILED" in line and "gradient of" in line and dtype in line
                for line in out.splitlines()
            ), out


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan"), float("inf")])
def test_wrong_float32_value_fails(factor: float, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    wrong_by(factor, monkeypatch)
    assert command.main(["--quick", "--device", "cpu"]) == 1
    assert f"{2 * len(CASES)} FAILED" in capsys.readouterr().out


@pytest.mark.usefixtures("few_cases")
def test_fast_path_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def missing(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(forward, "terms", missing)
    assert command.main(["--quick", "--device", "cpu"]) == 1
    assert f"FAILED torch.float64 {CASES[0]}: no such operator" in capsys.readouterr().out


@pytest.mark.usefixtures("few_cases")
def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    wrong_by(1.1, monkeypatch)
    assert command.main(["--device", "cpu"]) == 1
    assert "Speed" not in capsys.readouterr().out


@pytest.mark.usefixtures("few_cases")
def test_speed_table_has_a_row_for_each_shape(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(command, "_SPEED", CASES[::2])
    monkeypatch.setattr(command, "_SECONDS", 0.01)
    assert command.main(["--device", "cpu"]) == 0
    table = capsys.readouterr().out.partition("Speed on cpu")[2]
    for case in CASES[::2]:
        assert str(case) in table
    assert "sketch" in table


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99", "cpu:1"])
def test_absent_device_is_refused_and_present_ones_are_listed(device: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--quick", "--device", device])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert repr(device) in err
    assert "cpu" in err.partition("only")[2]


def test_interrupt_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_evaluate", interrupt)
    assert command.main(["--quick", "--device", "cpu"]) == 130
    assert capsys.readouterr().err.split() == ["interrupted"]


def test_absent_triton_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    command._machine({"cpu": ""})
    assert "Triton not installed" in capsys.readouterr().out


def test_help_of_the_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vicreg_fast", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    for word in ("python -m vicreg_fast", "--device", "--quick", "exit status"):
        assert word in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell's redirection")
def test_closed_output_is_no_error() -> None:
    command_line = f"{sys.executable} -m vicreg_fast --quick --device cpu >&-"
    ran = subprocess.run(["sh", "-c", command_line], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell's pipe")
def test_reader_that_stops_early_is_no_error() -> None:
    ran = subprocess.run(
        ["sh", "-c", f"{sys.executable} -u -m vicreg_fast --quick --device cpu | head -n 1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.stdout.startswith("vicreg_fast ")
    assert ran.stderr == ""
