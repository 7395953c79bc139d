"""What the benchmarks record of a machine: devices, clocks, and the commit with its changes."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import machine


def test_missing_tools_are_null_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0-1"))
    clocks, commit = machine.clocks(torch.device("cuda:0")), machine.commit()
    assert "nvidia-smi" in clocks.pop("reason")
    assert "git" in commit.pop("reason")
    assert set(clocks.values()) | set(commit.values()) == {None}


def test_devices_have_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "devices", lambda: {"cpu": "a", "cuda:0": "b", "cuda:1": "c"})
    names = [str(machine.device(name)) for name in (None, "cuda", "cuda:1", "cpu")]
    assert names == ["cuda:0", "cuda:0", "cuda:1", "cpu"]


def test_commit_hashes_changes_but_not_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    hashes = [machine.commit()["changes"]]
    for text in ("a", "b"):
        (tmp_path / "new.py").write_text(text)
        hashes.append(machine.commit()["changes"])
    assert hashes[0] is None
    assert len(set(hashes)) == 3
    (tmp_path / "new.py").unlink()
    (tmp_path / "a.json").touch()
    assert machine.commit(tmp_path)["dirty"] is False
    assert machine.commit()["dirty"] is True


def test_line_of_nvidia_smi_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0-1"))
    monkeypatch.setattr(machine, "_output", lambda *command: "580.159.04, 1980, 2619, 121.5, 700.00, [N/A]\n")
    clocks = machine.clocks(torch.device("cuda:0"))
    assert list(clocks.values()) == ["580.159.04", 1980.0, 2619.0, 121.5, 700.0, None, None]
