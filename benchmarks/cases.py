"""The shapes of every suite: their names, inputs, operation counts and speed targets.

A shape is one element of the lists at the end of this file.  ``providers.py`` has the code that computes it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .results import UsageError

Inputs = tuple[Tensor, ...]
Operations = dict[str, Counter[str]]  # by part, and by the matmul precision that they may use
DTYPES = {"highest": torch.float32, "high": torch.float32, "bf16": torch.bfloat16}
PARTS = ("forward", "backward", "both")


@dataclass(frozen=True, eq=False)
class Case:
    """One shape at one matmul precision: "highest" or "high" of float32 inputs, or "bf16" inputs.

    ``shape``: N samples, D features; B images, P patches, C channels, m matches of both directions.
    """

    suite: str
    name: str
    matmul: str
    shape: dict[str, Any]
    samples: int  # rows or images in a step
    elements: int  # of both views or maps together
    operations: Operations  # the least of each part; a multiplication and an addition are two
    title: str = ""
    # By device type, the least speed-up over a provider and the least share of the roofline bound ("floor").
    targets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    devices: Sequence[str] = ("cuda",)  # the device types that measure the shape by default
    compiled: bool = False  # they measure torch.compile too, which takes up to half a minute a shape

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a step: matching has no backward pass."""
        return tuple(self.operations)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of views and maps."""
        return DTYPES[self.matmul]

    @property
    def precision(self) -> str | None:
        """The losses' argument ``precision``; None for bfloat16, whose dtype decides."""
        return None if self.matmul == "bf16" else self.matmul

    def bytes(self) -> dict[str, int]:
        """The least traffic: forward reads both views; backward reads them again and writes two gradients."""
        once = self.elements * self.dtype.itemsize
        return {"forward": once, "backward": 2 * once, "both": 3 * once}

    def targets_on(self, device: str) -> Mapping[str, float]:
        """The targets of a device type.  The default: no slower than the code that vicreg_fast replaces there."""
        return self.targets.get(device, {"eager": 1.0} if device == "cpu" else {"aten": 1.0})

    def inputs(self, seed: int, device: torch.device) -> Inputs:
        """Tensors as after some training: the two views of a sample are similar."""
        make = _views if "N" in self.shape else _maps
        return make(self, torch.Generator(device).manual_seed(seed), device)


def _views(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Two views.  Features correlate and have means, as embeddings do.  The second view is a noisy copy of the first."""
    normal = partial(torch.randn, generator=generator, device=device)
    N, D, factors = case.shape["N"], case.shape["D"], 16
    mixing = 0.4 / math.sqrt(factors) * normal(factors, D)
    x = normal(N, D).mul_(0.5).addmm_(normal(N, factors), mixing).add_(0.3 * normal(D))
    y = normal(N, D).mul_(0.1).add_(x)
    return x.to(case.dtype).requires_grad_(), y.to(case.dtype).requires_grad_()


def _maps(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Two maps, and for VICRegL random locations in the unit square, no two of whose distances are equal.

    Patch k of the second map is patch k of the first plus noise; then both are shuffled.  The noise grows by 8 % from
    patch to patch, up to patch 32, so that float32 tells which matches are nearest and all providers return the same ones.
    """
    normal = partial(torch.randn, generator=generator, device=device)
    B, (P1, P2), C = (case.shape[letter] for letter in "BPC")
    few = min(P1, P2)
    x, y = 0.7 * normal(B, P1, C), 0.7 * normal(B, P2, C)
    noise = 0.05 * 1.08 ** torch.arange(few, device=device).clamp(max=32).float()
    y[:, :few] = x[:, :few] + noise[:, None] * normal(B, few, C)
    for z in (x, y):
        order = torch.rand(z.shape[:2], generator=generator, device=device).argsort(1)
        z.copy_(z.gather(1, order[..., None].expand_as(z)))
    maps = [z.to(case.dtype) for z in (x, y)]
    if case.suite == "matching":
        return tuple(maps)
    locations = [torch.rand(B, P, 2, generator=generator, device=device) for P in (P1, P2)]
    return (*(z.requires_grad_() for z in maps), *locations)


def _by_part(forward: Counter[str], backward: Counter[str]) -> Operations:
    return {"forward": forward, "backward": backward, "both": forward + backward}


def vicreg(matmul: str, N: int, D: int, title: str = "", suite: str = "vicreg", **options: Any) -> Case:
    """Two views (N, D); with suite "distributed" N rows on each rank, statistics over the rows of all ranks.

    For each view half a Gram matrix of the smaller side, then a matmul with the whole of it.
    """
    half = 2 * N * D * min(N, D)
    operations = _by_part(Counter({matmul: half}), Counter({matmul: 2 * half}))
    name = f"{'ranks-' if suite == 'distributed' else ''}{N}x{D}-{matmul}"
    return Case(suite, name, matmul, {"N": N, "D": D}, N, 2 * N * D, operations, title, **options)


Pair = int | tuple[int, int]  # one number for both maps or directions, or one for each


def local(
    matmul: str, B: int, patches: Pair, C: int, matches: Pair | None = None, title: str = "", *,
    statistics: str = "image", match_order: str = "distance", suite: str = "vicregl", **options: Any,
) -> Case:  # fmt: skip
    """VICRegL's local loss: two maps (B, P, C) and the locations (B, P, 2) of their patches.  ``matches`` None: all.

    Feature distances, for which TF32 is too coarse, then VICReg of four match sets.  Location distances are negligible.
    With suite "matching" only the nearest patches of the second map for those of the first, nearest first.
    """
    P, m = (pair if isinstance(pair, tuple) else (pair, pair) for pair in (patches, matches or patches))
    of_patches, of_matches = ("+".join(map(str, dict.fromkeys(pair))) for pair in (P, m))
    distances = Counter({"bf16" if matmul == "bf16" else "highest": 2 * B * P[0] * P[1] * C})
    shape: dict[str, Any] = {"B": B, "P": [*P], "C": C}
    if suite == "matching":
        shape["m"], operations = m[0], {"forward": distances}
    else:
        shape |= {"m": [*m], "statistics": statistics, "match_order": match_order}
        # The samples of a problem are an image's matches, or a match slot of all images.
        half = sum(2 * 2 * B * k * C * min(k if statistics == "image" else B, C) for k in m)
        operations = _by_part(distances + Counter({matmul: half}), Counter({matmul: 2 * half}))
    count = f"m{of_matches}" if matches else "all"
    slot = "-slot" if statistics == "slot" else ""
    name = f"{suite}-{B}x{of_patches}x{C}-{count}{slot}-{matmul}"
    return Case(suite, name, matmul, shape, B, B * sum(P) * C, operations, title, **options)


matching = partial(local, suite="matching")


def _vicreg_cases() -> Iterator[Case]:
    """On a GPU ResNet-50's projector, a world model, video pixels; lines over N and over D, there and on a CPU.

    A CPU has one matmul precision, float32.  At its small shapes the number of operators sets the time.
    """
    targets = {
        (256, 8192, "highest"): {"eager": 60, "compile": 25, "aten": 1.5, "floor": 0.40},
        (256, 8192, "high"): {"eager": 40, "compile": 20, "aten": 1.5, "floor": 0.35},
        (2048, 8192, "bf16"): {"eager": 6, "compile": 5, "aten": 1.2, "floor": 0.60},
        (2048, 8192, "high"): {"eager": 8, "compile": 6, "aten": 1.2, "floor": 0.65},
        (6528, 512, "bf16"): {"eager": 4, "compile": 2.5, "aten": 1.5, "floor": 0.50},
        (2_600_000, 64, "bf16"): {"eager": 5, "compile": 2, "aten": 2, "floor": 0.70},
    }
    cpu_targets = {(256, 8192): 60, (1024, 8192): 12, (256, 2048): 10, (2048, 2048): 1.7, (2048, 512): 1.7}
    cpu_targets |= {(655360, 64): 4}
    titles = {(256, 2048): "solo-learn; ResNet-50, 256 a GPU"}
    titles |= {(N, D): f"ResNet-50, {N} a GPU" for N in (64, 128, 256) for D in (8192, 16384)}
    titles |= {(N, 2048): f"ResNet-50, {N} a GPU" for N in (64, 128)}
    titles |= {(N, D): f"ResNet-50, batch of {N}" for N in (512, 2048, 4096) for D in (2048, 8192, 16384)}
    titles |= {(6528, 512): "world model", (2_600_000, 64): "pixels of a video"}
    # Over N at D = 2048 and over D at N = 2048: the smaller side changes at 2048 x 2048.
    powers = [2**k for k in range(6, 15)]
    lines = [(N, 2048) for N in powers] + [(2048, D) for D in powers] + [(64, 64), (512, 4096), (8192, 256)]
    on_gpu = {(N, D, matmul): title for (N, D), title in titles.items() for matmul in DTYPES}
    on_gpu |= {(N, D, "high"): titles.get((N, D), "small" if N == D else "scaling") for N, D in lines}
    small = [(2, 1), (2, 4096), (8, 16), (33, 31), (64, 64), (128, 32), (4096, 1), (4096, 8), (256, 256)]
    cpu_lines = [(N, 512) for N in powers[:-1]] + [(512, D) for D in powers[:-1]]
    cpu_sizes = [*cpu_targets, *small, (8192, 256), *cpu_lines]
    on_cpu = {(N, D, "highest"): {"eager": cpu_targets.get((N, D), 1.0)} for N, D in cpu_sizes}
    compiled = {*targets, (256, 2048, "highest"), (256, 2048, "high"), (2048, 512, "highest")}
    compiled |= {key for key in on_gpu if key[1:] == (8192, "high")}
    for key in on_gpu | on_cpu:
        goals = {device: table[key] for device, table in (("cuda", targets), ("cpu", on_cpu)) if key in table}
        devices = [device for device, keys in (("cuda", on_gpu), ("cpu", on_cpu)) if key in keys]
        N, D, matmul = key
        title = on_gpu.get(key, "on a CPU")
        yield vicreg(matmul, N, D, title, targets=goals, devices=devices, compiled=key in compiled)


def _cuda(**targets: float) -> dict[str, Any]:
    return {"targets": {"cuda": targets}, "compiled": True}


def _cpu(**targets: float) -> dict[str, Any]:
    return {"targets": {"cpu": targets} if targets else {}, "devices": ("cpu",)}


_VICREG = (*_vicreg_cases(),)
_LOCAL = (
    local("highest", 128, 49, 512, 20, "ResNet-50 maps", **_cuda(eager=60, aten=4, floor=1 / 3.5)),
    local("bf16", 128, 49, 512, 20, "ResNet-50 maps", **_cuda(eager=60, aten=4, floor=1 / 4)),
    local("high", 64, 49, 512, (20, 4), "VICRegL ResNet-50", compiled=True),
    local("bf16", 64, 49, 512, (20, 4), "VICRegL ResNet-50"),
    local("bf16", 64, (49, 9), 768, (9, 4), "ConvNeXt, large and small crop"),
    local("bf16", 64, 49, 768, (20, 4), "ConvNeXt, two large crops"),
    local("bf16", 64, 196, 768, 20, "ViT-S/16 maps", **_cuda(eager=20, aten=3, floor=1 / 4)),
    local("high", 64, 196, 384, 20, "ViT-S/16 maps"),
    local("high", 256, 49, 512, None, "per slot, as facebookresearch",
          statistics="slot", match_order="patch", **_cuda(eager=8, aten=1.5)),
    local("high", 64, 49, 512, (20, 4), "per slot, as lightly", statistics="slot"),
    local("highest", 32, 49, 512, 10, "ResNet-50 maps on a CPU", compiled=True, **_cpu(eager=45)),
    local("highest", 16, 196, 384, 20, "ViT-S/16 maps on a CPU", **_cpu(eager=12)),
    local("highest", 16, 49, 256, (20, 4), "per slot on a CPU", statistics="slot", **_cpu()),
    local("highest", 2, 4, 8, 2, "small, on a CPU", **_cpu()),
)  # fmt: skip
_MATCHING = (
    matching("highest", 64, 1024, 768, 20, "dense correspondence", **_cuda(cdist=3, bmm=1.5, floor=0.5)),
    matching("bf16", 64, 1024, 768, 20, "dense correspondence", **_cuda(cdist=3, bmm=1.5, floor=0.5)),
    matching("highest", 8, 4096, 256, None, "all patches"),
    matching("bf16", 64, 196, 384, 20, "ViT-S/16 maps"),
    matching("highest", 64, 49, 512, 20, "ResNet-50 maps", devices=("cuda", "cpu")),
    matching("highest", 8, 196, 384, 20, "ViT-S/16 maps on a CPU", **_cpu()),
)
_DISTRIBUTED = (
    vicreg("high", 256, 8192, "ResNet-50, 256 a rank", "distributed", targets={"cuda": {}}),
    vicreg("bf16", 256, 8192, "ResNet-50, 256 a rank", "distributed", targets={"cuda": {}}),
    vicreg("highest", 256, 2048, "256 a rank, on a CPU", "distributed", **_cpu()),
    vicreg("highest", 1024, 256, "1024 a rank, on a CPU", "distributed", **_cpu()),
)


CASES = (*_VICREG, *_LOCAL, *_MATCHING, *_DISTRIBUTED)
SUITES = tuple(dict.fromkeys(case.suite for case in CASES))
# Every suite in one minute: one shape of each kind on a GPU, small ones on a CPU.
QUICK = {
    "cuda": ("256x8192-high", "2048x8192-bf16", "6528x512-bf16", "vicregl-128x49x512-m20-bf16",
             "matching-64x1024x768-m20-bf16", "ranks-256x8192-high"),
    "cpu": ("64x64-highest", "256x2048-highest", "2048x512-highest", "vicregl-32x49x512-m10-highest",
            "matching-64x49x512-m20-highest", "ranks-256x2048-highest"),
}  # fmt: skip


def case_of(name: str) -> Case:
    """A shape by its name.  Raises StopIteration for an unknown one."""
    return next(case for case in CASES if case.name == name)


def require_gpu_shapes(names: Iterable[str]) -> None:
    """Raise :class:`UsageError` for the name of a shape that one GPU does not measure."""
    known = [case.name for case in CASES if "cuda" in case.devices and case.suite != "distributed"]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"no shape {unknown[0]!r} on a GPU; known are {', '.join(known)}")
