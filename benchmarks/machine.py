"""What a result was measured on: device, versions, clocks, commit."""

import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .results import RefusedError

ROOT = Path(__file__).resolve().parent.parent
# Measured results are no change of what was measured.
_RESULTS = ":!benchmarks/results"
_QUERY = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def _output(*command: str) -> str:
    """Standard output of a command; OSError where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} did not answer") from error
    if done.returncode:
        raise OSError(f"{command[0]} failed: {(done.stderr or done.stdout).strip().partition(chr(10))[0]}")
    return done.stdout


def devices() -> dict[str, str]:
    """Names of the devices that can be measured here."""
    found = {"cpu": _processor()}
    return found | {f"cuda:{k}": torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())}


def device(name: str | None) -> torch.device:
    """A device by its name, None: the first GPU, or the CPU where there is none; :class:`RefusedError` for what is not there."""
    there = devices()
    if name is None:
        name = "cuda" if "cuda:0" in there else "cpu"
    full = name if name in there else f"{name}:0"
    if full not in there:
        raise RefusedError(f"no device {name!r} here, only {', '.join(there)}")
    return torch.device(full)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return str(models[0]) if models else platform.processor() or platform.machine()


def _triton() -> str | None:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions of what runs on it; null where there is no such thing."""
    found: dict[str, Any] = {
        "device": devices()[str(device)],
        "kind": device.type,
        "index": device.index,
        "uuid": None,
        "capability": None,
        "multiprocessors": None,
        "l2_bytes": None,
        "memory_bytes": None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        # What changes the kernels' configurations.
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("VICREG_FAST_")
        },
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "uuid": _uuid(device),
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "l2_bytes": about.L2_cache_size,
            "memory_bytes": about.total_memory,
        }
    return found


def _uuid(device: torch.device) -> str | None:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else f"GPU-{uuid}"


def load() -> float | None:
    """How many processes wanted a CPU in the last minute, on average; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def clocks(device: torch.device) -> dict[str, Any]:
    """Driver, clocks, power and temperature of a GPU; null, and the ``reason``, where they cannot be known."""
    unknown: dict[str, Any] = dict.fromkeys(_QUERY)
    if device.type != "cuda":
        return {**unknown, "reason": "no GPU is measured"}
    # torch numbers the visible devices, nvidia-smi all of them: the identifier is the same for both.
    which = _uuid(device) or str(device.index)
    query = f"--query-gpu={','.join(_QUERY.values())}"
    try:
        line = _output("nvidia-smi", query, "--format=csv,noheader,nounits", "-i", which).strip()
        return {**_parsed(line), "reason": None}
    except (OSError, ValueError) as error:
        return {**unknown, "reason": str(error)}


def _parsed(line: str) -> dict[str, Any]:
    """Values of one line of nvidia-smi; null for what the card does not tell, such as ``[N/A]``."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(_QUERY):
        raise ValueError(f"nvidia-smi printed {line!r}")
    found: dict[str, Any] = {}
    for name, cell in zip(_QUERY, cells, strict=True):
        if name == "driver":
            found[name] = cell
        else:
            found[name] = float(cell) if re.fullmatch(r"\d+(\.\d+)?", cell) else None
    return found


def commit(out: Path | None = None) -> dict[str, Any]:
    """The commit of the checkout, and whether it has changes and which, as a hash; null, and the ``reason``, outside of a
    checkout.  Result files in ``out`` are no changes."""
    git = ("git", "-C", str(ROOT))
    which = [".", _RESULTS]
    if out is not None and out.resolve().is_relative_to(ROOT):
        which.append(f":(exclude,glob){(out.resolve() / '*.json').relative_to(ROOT)}")
    try:
        head = _output(*git, "rev-parse", "--short=12", "HEAD").strip()
        changes = _output(*git, "diff", "HEAD", "--", *which).encode()
        unknown = _output(*git, "ls-files", "--others", "--exclude-standard", "-z", "--", *which)
        for name in filter(None, unknown.split("\0")):
            path = ROOT / name
            changes += name.encode() + (path.read_bytes() if path.is_file() else b"")
        digest = hashlib.sha256(changes).hexdigest()[:12] if changes else None
        return {"commit": head, "dirty": bool(changes), "changes": digest, "reason": None}
    except OSError as error:
        return {"commit": None, "dirty": None, "changes": None, "reason": str(error)}
