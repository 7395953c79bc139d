"""``python -m benchmarks profile``: what holds back the kernels that miss their estimates by the most.

Nsight Compute (ncu) counts throughputs, occupancy and stalls, where it is on the PATH and may read the counters.  Elsewhere
torch's profiler gives what needs no privileges: time, grid, registers and the occupancy that they allow.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from . import kernel_results, machine, providers
from .cases import Case, case_of, require_gpu_shapes
from .kernel_results import Pair
from .results import UsageError
from .text import table
from .timing import Step

# A kernel that takes a smaller share of its shape is not worth the first look.
_SHARE = 0.1
# Seconds of one ncu: it imports, compiles nothing that the cache has, and replays one launch about forty times.
_SECONDS = 45.0
_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")
# The lines of ncu's report that go into the file; the whole is printed.
_KEPT = (
    "Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "L2 Hit Rate", "L1/TEX Hit Rate",
    "Registers Per Thread", "Achieved Occupancy", "Theoretical Occupancy", "Warp Cycles Per Issued Instruction",
)  # fmt: skip


class Worst(NamedTuple):
    """A launch of a shape's step: its kernel, how often the kernel came before, and how often it comes in a step."""

    shape: str
    kernel: str
    position: int
    per_step: int
    pair: Pair


def worst(measured: Mapping[str, Any], estimates: Sequence[Mapping[str, Any]], count: int) -> list[Worst]:
    """The launches with the largest ratio of measured and estimated time, of those that matter to their shapes."""
    estimated = {entry["shape"]: entry for entry in estimates}
    found = []
    for entry in measured["shapes"]:
        if entry["status"] != "timed" or entry["shape"] not in estimated:
            continue
        pairs = kernel_results.beside(estimated[entry["shape"]], entry)
        names = [pair.kernel for pair in pairs if pair.measured is not None]
        for k, pair in enumerate(pairs):
            before = sum(other.kernel == pair.kernel for other in pairs[:k])
            if pair.ratio is not None and (pair.measured or 0) >= _SHARE * entry["microseconds"]:
                found.append(Worst(entry["shape"], pair.kernel, before, names.count(pair.kernel), pair))
    return sorted(found, key=lambda launch: launch.pair.ratio or 0, reverse=True)[:count]


def step_of(case: Case, device: torch.device) -> Step:
    """The step of a shape on the kernels, run once."""
    return Step(providers.ours_of(case, "triton", providers.definition_of(case)), case.inputs(0, device))


def _ncu(launch: Worst, device: torch.device) -> list[str] | str:
    """Lines of Nsight Compute's report, or why there are none."""
    program = shutil.which("ncu")
    if program is None:
        return "ncu is not on the PATH"
    command = [program, "--clock-control", "none", "--kernel-name", f"regex:^_{launch.kernel}_kernel$"]
    command += ["--launch-skip", str(launch.per_step + launch.position), "--launch-count", "1"]
    command += [word for section in _SECTIONS for word in ("--section", section)]
    command += [sys.executable, "-m", "benchmarks", "profile", "--device", str(device), "--step", launch.shape]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"ncu took more than {_SECONDS:.0f} s"
    print(done.stdout, done.stderr, sep="\n", flush=True)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith(_KEPT)]
    if done.returncode or not lines:
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line]
        return (errors or [f"ncu ended with exit status {done.returncode} and no counters"])[0]
    return [re.sub(r"\s{2,}", "  ", line) for line in lines]


def kernel_events(trace: Mapping[str, Any], kernel: str, position: int, per_step: int) -> list[dict[str, Any]]:
    """Of a profile's trace the events of one launch of each step."""
    events = [e for e in trace["traceEvents"] if e.get("cat") == "kernel" and e["name"] == f"_{kernel}_kernel"]
    return sorted(events, key=lambda event: float(event["ts"]))[position::per_step]


def _torch_profile(launch: Worst, device: torch.device) -> list[str]:
    """What torch's profiler says of a launch, over a few steps."""
    case = case_of(launch.shape)
    with providers.matmul_precision(case.precision, device), tempfile.TemporaryDirectory() as folder:
        step = step_of(case, device)
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(5):
                step.both()
            torch.cuda.synchronize(device)
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    events = kernel_events(trace, launch.kernel, launch.position, launch.per_step)
    if not events:
        return ["torch's profiler saw no such launch"]
    shown = {key: value for key, value in events[0]["args"].items() if not isinstance(value, dict)}
    names = ["grid", "block", "registers per thread", "shared memory", "blocks per SM", "warps per SM"]
    names += ["est. achieved occupancy %"]
    lines = [f"{name}  {shown[name]}" for name in names if name in shown]
    return [f"duration  {median(float(event['dur']) for event in events):.1f} µs, warm L2", *lines]


def run(arguments: Namespace) -> int:
    """Profile, write and print.  Returns the exit status; raises :class:`UsageError` for unusable arguments."""
    device = machine.device(arguments.device)
    if device.type != "cuda":
        raise UsageError(f"kernels are profiled on a GPU, got device {device}")
    torch.cuda.set_device(device)
    if arguments.step is not None:  # under ncu
        require_gpu_shapes([arguments.step])
        case = case_of(arguments.step)
        with providers.matmul_precision(case.precision, device):
            step_of(case, device).both()
            torch.cuda.synchronize(device)
        return 0
    if None in (arguments.times, arguments.estimates, arguments.out):
        raise UsageError("profile needs --times, --estimates and --out, or --step")
    measured = kernel_results.load(Path(arguments.times))
    try:
        estimates = json.loads(Path(arguments.estimates).read_text())["shapes"]
    except (OSError, ValueError, LookupError) as error:
        raise UsageError(f"{arguments.estimates} has no estimates: {error}") from error
    launches = worst(measured, estimates, arguments.worst)
    rows = [(launch.shape, *launch.pair.cells()) for launch in launches]
    parts = [table(("shape", *kernel_results.COLUMNS), rows) or "No kernel has a time and an estimate."]
    out, reason = Path(arguments.out), None
    out.write_text(parts[0] + "\n")
    for launch in launches:
        found = _ncu(launch, device) if reason is None else reason
        lines = (
            found
            if isinstance(found, list)
            else [f"without counters: {found}", *_torch_profile(launch, device)]
        )
        reason = None if isinstance(found, list) else found  # the next ncu would fail in the same way
        parts.append("\n".join([f"{launch.kernel} of {launch.shape}:", *(f"- {line}" for line in lines)]))
        out.write_text("\n\n".join(parts) + "\n")
    print(out.read_text())
    return 0
