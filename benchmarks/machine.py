"""What a result was measured on: device, versions, clocks, commit."""

import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import timing
from .libraries import version
from .results import UsageError

ROOT = Path(__file__).resolve().parent.parent
# The keys of a result, and nvidia-smi's names.
_QUERY = {"driver": "driver_version", "sm_clock_mhz": "clocks.sm", "memory_clock_mhz": "clocks.mem"}
_QUERY |= {"power_w": "power.draw", "power_limit_w": "power.limit", "temperature_c": "temperature.gpu"}
_TRITON = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu")


def _output(*command: str) -> str:
    """The standard output of a command; OSError where it is missing or fails, TimeoutExpired where it hangs."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(f"{command[0]} failed: {(done.stderr or done.stdout).strip().partition(chr(10))[0]}")
    return done.stdout


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return str(models[0]) if models else platform.processor() or platform.machine()


def devices() -> dict[str, str]:
    """The names of this machine's devices."""
    gpus = {f"cuda:{k}": torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())}
    return {"cpu": _cpu()} | gpus


def device(name: str | None) -> torch.device:
    """A device by name; None: the first GPU, or the CPU.  Raises :class:`UsageError` where there is no such device."""
    available = devices()
    if name is None:
        name = "cuda" if "cuda:0" in available else "cpu"
    full = name if name in available else f"{name}:0"  # torch.cuda.set_device needs an index
    if full not in available:
        raise UsageError(f"no device {name!r} here, only {', '.join(available)}")
    return torch.device(full)


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions of the software that runs on it; null for what does not apply."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": devices()[str(device)],
        "kind": device.type,
        "index": device.index,
        "uuid": f"GPU-{gpu.uuid}" if gpu else None,
        "capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "multiprocessors": gpu.multi_processor_count if gpu else None,
        "l2_bytes": gpu.L2_cache_size if gpu else None,
        "memory_bytes": gpu.total_memory if gpu else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": next(filter(None, map(version, _TRITON)), None),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _cpu(),
        "threads": torch.get_num_threads(),
        # These change the kernels' configurations.
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("VICREG_FAST_")},
    }


def load() -> float | None:
    """The average number of processes that waited for a CPU in the last minute; None where the system has no such value."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def clocks(device: torch.device) -> dict[str, Any]:
    """The driver, clocks, power and temperature of a GPU; null, with a ``reason``, for what is unknown, such as ``[N/A]``."""
    unknown: dict[str, Any] = dict.fromkeys(_QUERY)
    if device.type != "cuda":
        return {**unknown, "reason": "no GPU is measured"}
    # torch counts the visible devices and nvidia-smi all of them.  Both know the UUID.
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = f"--query-gpu={','.join(_QUERY.values())}"
    try:
        line = _output("nvidia-smi", query, "--format=csv,noheader,nounits", "-i", which)
        cells = [cell.strip() for cell in line.split(",")]
        numbers = [float(cell) if re.fullmatch(r"\d+(\.\d+)?", cell) else None for cell in cells]
        return dict(zip(_QUERY, numbers, strict=True)) | {"driver": cells[0], "reason": None}
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return {**unknown, "reason": str(error)}


def commit(out: Path | None = None) -> dict[str, Any]:
    """The commit of the checkout and a hash of its changes; null, and the ``reason``, outside of a checkout.

    Result files, kept or in ``out``, are not changes.
    """
    # In a copy of the checkout that another user owns git answers only with this setting.
    git = ("git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT))
    paths = [".", ":!benchmarks/results"]
    if out is not None and out.resolve().is_relative_to(ROOT):
        paths.append(f":(exclude,glob){(out.resolve() / '*.json').relative_to(ROOT)}")
    try:
        head = _output(*git, "rev-parse", "--short=12", "HEAD").strip()
        changes = _output(*git, "diff", "HEAD", "--", *paths).encode()
        untracked = _output(*git, "ls-files", "--others", "--exclude-standard", "-z", "--", *paths)
        for name in filter(None, untracked.split("\0")):
            path = ROOT / name
            changes += name.encode() + (path.read_bytes() if path.is_file() else b"")
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"commit": None, "dirty": None, "changes": None, "reason": str(error)}
    digest = hashlib.sha256(changes).hexdigest()[:12] if changes else None
    return {"commit": head, "dirty": bool(changes), "changes": digest, "reason": None}


def facts(device: torch.device, out: Path | None = None) -> dict[str, Any]:
    """All of the above, and the device's ceilings, which take seconds to measure."""
    about = {"machine": machine(device), "clocks": clocks(device), "commit": commit(out)}
    bench = timing.Bench(device)
    about["ceilings"] = timing.ceilings(bench)
    bench.free()
    return about | {"load": load()}


def describe(name: str | None, path: str | None) -> int:
    """Print the facts of a device and write them to a file.  Returns the exit status."""
    text = json.dumps(facts(device(name)), indent=1)
    if path is not None:
        Path(path).write_text(text + "\n")
    print(text)
    return 0
