"""``python -m vicreg_fast``: versions, devices and backends, parity with the definition, and speed."""

import argparse
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import VICRegLLoss, VICRegLoss, __version__, backends, functional

# Allowed error relative to a result's scale.  In float32 it is a few roundings, because eager code may be exact by chance, and
# in bfloat16 the last place of a gradient.
_FLOORS = {torch.float64: 1e-10, torch.float32: 8 * 2.0**-24, torch.bfloat16: 2.0**-8}
_SECONDS = 3.0  # for the speed of one shape; a round is not interrupted
_ROUNDS = 200  # at most: enough for a median


class Case(NamedTuple):
    """A loss and its shape: (..., N, D), or (B, P1, P2, C) of VICRegL's local part where ``matches`` is not 0."""

    shape: tuple[int, ...]
    matches: int = 0
    eps: float = 0.0
    statistics: str = "image"
    match_order: str = "distance"

    def __str__(self) -> str:
        name = "x".join(map(str, self.shape)) + (f" eps={self.eps:g}" if self.eps else "")
        local = f"VICRegL local {name} m={self.matches} {self.statistics}/{self.match_order}"
        return local if self.matches else f"VICReg {name}"


_PARITY = [Case(shape) for shape in ((2, 70), (8, 80), (80, 100), (33, 257))]  # dual: N x N
_PARITY += [Case(shape) for shape in ((8, 16), (16, 8), (81, 100), (64, 64), (257, 33))]  # primal: D x D
_PARITY += [Case(shape) for shape in ((2, 1), (33, 1), (5, 33, 20), (3, 2, 9, 40))]  # one feature; batched
_PARITY += [Case(shape, eps=1e-4) for shape in ((64, 32), (32, 80), (4, 7, 12))]
for _order in ("distance", "patch"):
    _PARITY += [Case((6, 12, 9, C), 5, 0.0, s, _order) for s in ("image", "slot") for C in (4, 16)]
_PARITY += [Case((6, 12, 9, 16), 5, 1e-4, s) for s in ("image", "slot")]
# The quick check, by type: both sides, few features, matched patches.  It differentiates only the weighted sum of the terms.
# On a GPU that takes 16 kernels; all of the above take 150.  They are compiled one after the other, each in a second or two.
_LOCAL = Case((6, 12, 9, 16), 5)
_FEW = [Case((33, 257)), Case((257, 33)), _LOCAL]
_QUICK = {torch.float64: _FEW, torch.float32: _FEW, torch.bfloat16: [Case((257, 100)), _LOCAL]}
_ALL = _QUICK | {torch.float64: _PARITY, torch.float32: _PARITY}
_SPEED = [Case(shape) for shape in ((8, 16), (256, 2048), (2048, 512), (256, 4096))]
_SPEED += [Case((8, 49, 49, 128), 10)]


def _inputs(
    case: Case, dtype: torch.dtype, device: torch.device, values: torch.dtype = torch.float32
) -> list[Tensor]:
    """Two views, the second a noisy copy of the first, and locations for local cases: the same values in every type.

    ``values``: the type that the values are rounded to first.
    """
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    B, P1, P2, C = case.shape if case.matches else (1, 1, 1, 1)
    x = 0.7 * normal((B, max(P1, P2), C) if case.matches else case.shape)
    y = x + 0.1 * normal(x.shape)
    inputs = [x[:, :P1], y[:, :P2], normal((B, P1, 2)), normal((B, P2, 2))] if case.matches else [x, y]
    return [z.to(values).to(device, dtype).detach().requires_grad_(index < 2) for index, z in enumerate(inputs)]


def _losses(case: Case, backend: str) -> Callable[..., dict[str, Tensor]]:
    """The loss as users call it.  The backend "reference" is the definition in eager code."""
    options: dict[str, Any] = {"eps": case.eps, "backend": backend, "precision": "highest"}
    if case.matches:
        options |= {"statistics": case.statistics, "match_order": case.match_order}
        local = VICRegLLoss(case.matches, 0.0, **options)
        return lambda x, y, *locations: dict(local(x, y, None, None, *locations))
    if len(case.shape) == 2:
        return VICRegLoss(**options)
    return lambda x, y: functional.vicreg_terms(x, y, **options)._asdict()


def _evaluate(
    case: Case, backend: str, inputs: Sequence[Tensor], differentiated: Sequence[str] | None
) -> dict[str, Tensor]:
    """Every loss, and its gradient where ``differentiated`` names it or is None, by name, in float64 on the CPU."""
    results: dict[str, Tensor] = {}
    for name, value in _losses(case, backend)(*inputs).items():
        results[name] = value.detach()
        if differentiated is None or name in differentiated:
            grads = torch.autograd.grad(value, inputs[:2], retain_graph=True, materialize_grads=True)
            results[f"gradient of {name}"] = torch.cat([grad.flatten() for grad in grads])
    return {name: result.cpu().double() for name, result in results.items()}


def _ratio(error: float, allowed: float) -> float:
    """An error relative to what is allowed; infinite for NaN, and for any error if none is allowed."""
    return 0.0 if error == 0 else error / allowed if error < math.inf and allowed > 0 else math.inf


def _check(
    case: Case, device: torch.device, dtype: torch.dtype, differentiated: Sequence[str] | None
) -> tuple[float, float, str]:
    """The worst result in one type, compared with the definition in float64 on the CPU.

    Returns its error relative to what is allowed, its error relative to its scale, and a line that gives both.
    """
    values = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    def evaluate(backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return _evaluate(case, backend, _inputs(case, dtype, device, values), differentiated)

    truth = evaluate("reference", torch.float64, torch.device("cpu"))
    fast = evaluate("auto", dtype, device)
    eager = truth if dtype == torch.float64 else evaluate("reference", dtype, device)
    results: list[tuple[float, float, str]] = []
    for name, true in truth.items():
        # The hinge subtracts from gamma = 1, so its scale is at least 1, times the variance's weight.  The covariance
        # needs no such allowance: for normal data the dual side subtracts less than half.
        scale = float(true.norm()) + {"var": 1, "var-loss": 15, "loss": 15}.get(name.split("/")[-1], 0)
        error = float((fast[name] - true).norm())
        allowed = 2 * float((eager[name] - true).norm()) + _FLOORS[dtype] * scale
        of_allowed, of_scale = _ratio(error, allowed), _ratio(error, scale)
        line = f"{case}, {name}: error {of_scale:.1e} of its scale, {of_allowed:.2g} of what is allowed"
        results.append((of_allowed, of_scale, line))
    return max(results)


def _parity(device: torch.device, quick: bool) -> bool:
    """Check every case, or a few, and print the results; returns whether all passed."""
    cases = dict(_QUICK if quick else _ALL)
    count = len(dict.fromkeys(case for of_type in cases.values() for case in of_type))
    print(f"\nParity with the definition in float64: losses and gradients of {count} cases on {device}")
    if device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64):
        del cases[torch.float64]
        print("  this device has no float64: the other types are checked")
    print("  shapes: N x D, before them batches; local: B x P1 x P2 x C, m matches, statistics/match order")
    failures: list[str] = []
    for dtype, of_type in cases.items():
        results: list[tuple[float, float, str]] = []
        for case in of_type:
            try:
                results.append(_check(case, device, dtype, ("loss",) if quick else None))
            except RuntimeError as raised:  # the device lacks an operator or memory: the other cases still run
                failures.append(f"{dtype} {case}: {raised}")
        failures += [f"{dtype} {line}" for of_allowed, _, line in results if of_allowed > 1]
        worst = max((of_scale for _, of_scale, _ in results), default=math.nan)
        rule = f"{_FLOORS[dtype]:.1e} x scale" + (" + 2 x eager's error" if dtype != torch.float64 else "")
        print(f"  {dtype}: worst relative error {worst:.1e}; allowed {rule}; nearest to that:")
        print(f"    {max(results)[2] if results else 'nothing ran'}")
    if reason := backends.failure(device):
        failures.append(f"the Triton kernels cannot run on {device}, ATen computed these results: {reason}")
    for failure in failures:
        print(f"  FAILED {failure}")
    print(f"  {len(failures)} FAILED" if failures else "  all passed")
    return not failures


def _speed(device: torch.device) -> None:
    """Print a table of speed against eager code."""
    print(f"\nSpeed on {device}: forward and backward in float32, medians of interleaved rounds")
    print(f"  {'':50}{'eager':>10}{'vicreg_fast':>13}{'faster':>9}{'rounds':>8}")
    for case in _SPEED:
        inputs = _inputs(case, torch.float32, device)
        timed = [(_losses(case, backend), list[float]()) for backend in ("reference", "auto")]
        begin, rounds = time.perf_counter(), -1  # the first round is a warm-up
        while rounds < 1 or (rounds < _ROUNDS and time.perf_counter() - begin < _SECONDS):
            for losses, times in timed:
                start = time.perf_counter()
                torch.autograd.grad(losses(*inputs)["loss"], inputs[:2])
                if device.type != "cpu":  # the next measurement then starts on an idle device
                    torch.accelerator.synchronize(device)
                times.append(time.perf_counter() - start)
            rounds += 1
        eager, fast = (statistics.median(times[1:]) * 1e3 for _, times in timed)
        print(f"  {case!s:50}{eager:>7.3g} ms{fast:>10.3g} ms{eager / fast:>8.1f}x{rounds:>8}", flush=True)
    print("  A sketch, made in seconds beside whatever else runs here; benchmarks/ measures properly.")


def _devices() -> dict[str, str]:
    """Every device that torch can use on this machine, with a description."""
    devices = {"cpu": torch.backends.cpu.get_cpu_capability()}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        capability = f"capability {properties.major}.{properties.minor}"
        devices[f"cuda:{index}"] = f"{properties.name}, {runtime}, {capability}"
    devices |= {f"xpu:{index}": torch.xpu.get_device_name(index) for index in range(torch.xpu.device_count())}
    return devices | ({"mps": "Metal"} if torch.backends.mps.is_available() else {})


def _machine(devices: dict[str, str]) -> None:
    """Print the versions and the processor, and the backend of each device."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    processor = models[0] if models else platform.processor() or platform.machine()
    names = sorted(set(metadata.packages_distributions().get("triton", ())))
    triton = ", ".join(f"{metadata.version(name)} ({name})" for name in names) or "not installed"
    print(f"vicreg_fast {__version__} on {platform.platform()}; {processor}; {torch.get_num_threads()} threads")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, Triton {triton}")
    for name, description in devices.items():
        device = torch.device(name)
        chosen, reason = backends.choose("auto", device), ""
        if failure := backends.failure(device):
            reason = f", for the Triton kernels cannot run: {failure}"
        elif chosen == "aten":
            try:
                backends.choose("triton", device)
                reason = ", for Triton's interpreter is slow; backend='triton' takes it"
            except ValueError as error:
                reason = ", for " + str(error).partition(";")[0]  # the advice that follows is left out
        chosen = "triton" if chosen == "auto" else chosen
        print(f"  {name} ({description}): backend 'auto' is {chosen!r}{reason}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vicreg_fast",
        description="Say what this machine is and which backend the losses use on it, check losses and gradients "
        "against their definition in float64, and sketch the speed against eager code. Takes a minute, and minutes the first "
        "time on a GPU.",
        epilog="exit status: 0 where all is well, 1 where a check failed or a GPU cannot run the kernels, "
        "2 for a bad argument, 130 after Ctrl-C",
    )
    parser.add_argument("--device", metavar="NAME", help="where to run: cpu, cuda, cuda:1, xpu or mps "
                        "(default: cuda where there is one, else cpu)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="check a few cases, without the speed: seconds")
    arguments = parser.parse_args(argv)
    try:
        devices = _devices()
        name = arguments.device or ("cuda:0" if "cuda:0" in devices else "cpu")
        name = name if name in devices else f"{name}:0"
        if name not in devices:
            parser.error(f"no device {arguments.device!r} here, only {', '.join(devices)}")
        _machine(devices)
        if not _parity(torch.device(name), arguments.quick):
            return 1
        if not arguments.quick:
            _speed(torch.device(name))
        if sys.stdout is not None:  # the parent process may have closed it
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has ended, as head does
        # Python flushes again at exit, and would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
