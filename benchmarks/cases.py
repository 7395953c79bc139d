"""What is measured: the shapes of each suite by name, their inputs, the least that each needs, and what is asked.

A shape is one line at the end of this file.  Who computes it stands in ``providers.py``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]
Work = Mapping[str, int]  # operations by kind of product: "highest", "high", "bf16"
DTYPES = {"highest": torch.float32, "high": torch.float32, "bf16": torch.bfloat16}
PARTS = ("forward", "backward", "both")


@dataclass(frozen=True, eq=False)
class Case:
    """One shape: float32 with products at precision "highest" or "high", or bfloat16 ("bf16").

    ``targets``: by kind of device, how many times as fast as a provider ours must be, and its share of the "floor".
    ``devices``: where it is measured without being asked for.  ``compiled``: so is ``torch.compile``, which takes up to
    half a minute a shape.
    """

    suite: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = PARTS
    products: str
    title: str = ""
    targets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    devices: Sequence[str] = ("cuda",)
    compiled: bool = False

    @property
    def name(self) -> str:
        """As ``--shape`` takes it."""
        raise NotImplementedError

    @property
    def shape(self) -> dict[str, Any]:
        """What the name says, by the letters of the documentation."""
        raise NotImplementedError

    @property
    def samples(self) -> int:
        """Images, or rows, that a step handles: what throughput counts."""
        raise NotImplementedError

    @property
    def elements(self) -> int:
        """Of both views or maps together."""
        raise NotImplementedError

    def work(self) -> dict[str, Work]:
        """Operations of each part that no way of computing it avoids, a multiplication and an addition being two."""
        raise NotImplementedError

    def inputs(self, seed: int, device: torch.device) -> Inputs:
        """Tensors as after some training: the views of a sample resemble each other."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of views and maps."""
        return DTYPES[self.products]

    @property
    def precision(self) -> str | None:
        """As the losses take it; None: the inputs' own type decides."""
        return self.products if self.dtype == torch.float32 else None

    @property
    def exact(self) -> str:
        """The kind of product that is exact enough for distances: float32's, or that of 16-bit numbers."""
        return "highest" if self.dtype == torch.float32 else "bf16"

    def bytes(self) -> dict[str, int]:
        """What each part must read and write: forward both views; backward both again, and two gradients."""
        once = self.elements * self.dtype.itemsize
        return {"forward": once, "backward": 2 * once, "both": 3 * once}

    def asked(self, device: str) -> Mapping[str, float]:
        """Targets on a kind of device.  Nowhere may ours be slower than what it replaces there."""
        return self.targets.get(device, {"eager": 1.0} if device == "cpu" else {"aten": 1.0})


def _parts(forward: Work, backward: Work) -> dict[str, Work]:
    kinds = {**forward, **backward}
    return {
        "forward": forward,
        "backward": backward,
        "both": {kind: forward.get(kind, 0) + backward.get(kind, 0) for kind in kinds},
    }


@dataclass(frozen=True, eq=False)
class VICReg(Case):
    """Two views (N, D)."""

    suite = "vicreg"
    N: int = field(kw_only=True)
    D: int = field(kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.N}x{self.D}-{self.products}"

    @property
    def shape(self) -> dict[str, Any]:
        return {"N": self.N, "D": self.D}

    @property
    def samples(self) -> int:
        return self.N

    @property
    def elements(self) -> int:
        return 2 * self.N * self.D

    def work(self) -> dict[str, Work]:
        """Of each view half a Gram matrix of the smaller side, then a product with all of it."""
        half = 2 * self.N * self.D * min(self.N, self.D)
        return _parts({self.products: half}, {self.products: 2 * half})

    def inputs(self, seed: int, device: torch.device) -> Inputs:
        """The second view is a noisy copy of the first; features correlate and have means, as embeddings do."""
        generator = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device)
        factors = 16
        mixing = 0.4 / math.sqrt(factors) * normal(factors, self.D)
        x = normal(self.N, self.D).mul_(0.5).addmm_(normal(self.N, factors), mixing).add_(0.3 * normal(self.D))
        y = normal(self.N, self.D).mul_(0.1).add_(x)
        return x.to(self.dtype).requires_grad_(), y.to(self.dtype).requires_grad_()


@dataclass(frozen=True, eq=False)
class Distributed(VICReg):
    """Two views of N rows a rank, statistics over the rows of all ranks: ``distributed.py``."""

    suite = "distributed"

    @property
    def name(self) -> str:
        return f"ranks-{super().name}"


@dataclass(frozen=True, eq=False)
class _Maps(Case):
    """Two maps (B, P1, C) and (B, P2, C)."""

    B: int = field(kw_only=True)
    patches: tuple[int, int] = field(kw_only=True)
    C: int = field(kw_only=True)

    @property
    def name(self) -> str:
        P1, P2 = self.patches
        return f"{self.suite}-{self.B}x{P1 if P1 == P2 else f'{P1}+{P2}'}x{self.C}"

    @property
    def samples(self) -> int:
        return self.B

    @property
    def elements(self) -> int:
        return self.B * sum(self.patches) * self.C

    def _matching(self) -> Work:
        P1, P2 = self.patches
        return {self.exact: 2 * self.B * P1 * P2 * self.C}

    def _maps(self, seed: int, device: torch.device) -> tuple[list[Tensor], torch.Generator]:
        """Patches lie in any order in the second map; each image has some that changed little and some that did much.

        Noise grows by 8 % from one to the next, so that float32 tells which are nearest and every provider finds the
        same; from the 32nd on it stays.
        """
        generator = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device)
        (P1, P2), few = self.patches, min(self.patches)
        x, y = 0.7 * normal(self.B, P1, self.C), 0.7 * normal(self.B, P2, self.C)
        noise = 0.05 * 1.08 ** torch.arange(few, device=device).clamp(max=32).float()
        y[:, :few] = x[:, :few] + noise[:, None] * normal(self.B, few, self.C)
        for z in (x, y):
            order = torch.rand(z.shape[:2], generator=generator, device=device).argsort(1)
            z.copy_(z.gather(1, order[..., None].expand_as(z)))
        return [z.to(self.dtype) for z in (x, y)], generator


@dataclass(frozen=True, eq=False)
class Local(_Maps):
    """VICRegL's local part: both maps and the locations (B, P, 2) of their patches; ``matches`` None: all of them."""

    suite = "vicregl"
    matches: tuple[int, int] | None = field(kw_only=True)
    statistics: str = "image"
    match_order: str = "distance"

    @property
    def counts(self) -> tuple[int, int]:
        """Matches of each direction."""
        return self.patches if self.matches is None else self.matches

    @property
    def name(self) -> str:
        m1, m2 = self.counts
        matches = "all" if self.matches is None else f"m{m1}" if m1 == m2 else f"m{m1}+{m2}"
        slot = "" if self.statistics == "image" else "-slot"
        return f"{super().name}-{matches}{slot}-{self.products}"

    @property
    def shape(self) -> dict[str, Any]:
        return {
            "B": self.B,
            "P": list(self.patches),
            "C": self.C,
            "m": list(self.counts),
            "statistics": self.statistics,
            "match_order": self.match_order,
        }

    def work(self) -> dict[str, Work]:
        """Distances between features, then VICReg of four match sets; locations take nothing beside them."""
        half = 0
        for m in self.counts:
            P, N = (self.B, m) if self.statistics == "image" else (m, self.B)
            half += 2 * 2 * P * N * self.C * min(N, self.C)  # two match sets of this direction
        matching = self._matching()
        forward = {**matching, self.products: matching.get(self.products, 0) + half}
        return _parts(forward, {self.products: 2 * half})

    def inputs(self, seed: int, device: torch.device) -> Inputs:
        """Two maps, and locations somewhere in the unit square: no two distances are equal."""
        maps, generator = self._maps(seed, device)
        locations = [torch.rand(self.B, P, 2, generator=generator, device=device) for P in self.patches]
        return (*(z.requires_grad_() for z in maps), *locations)


@dataclass(frozen=True, eq=False)
class Matching(_Maps):
    """Nearest neighbours of the patches of one map in another, nearest first; nothing is differentiated."""

    suite = "matching"
    parts = ("forward",)
    matches: int | None = None

    @property
    def name(self) -> str:
        return f"{super().name}-{'all' if self.matches is None else f'm{self.matches}'}-{self.products}"

    @property
    def shape(self) -> dict[str, Any]:
        return {"B": self.B, "P": list(self.patches), "C": self.C, "m": self.matches or self.patches[0]}

    def work(self) -> dict[str, Work]:
        return {"forward": self._matching()}

    def inputs(self, seed: int, device: torch.device) -> Inputs:
        """Two maps."""
        return tuple(self._maps(seed, device)[0])


def _vicreg() -> list[Case]:
    """The loss of ResNet-50's projector and others', and how it scales with N and with D."""
    targets = {
        (256, 8192, "highest"): {"eager": 60, "compile": 25, "aten": 1.5, "floor": 0.40},
        (256, 8192, "high"): {"eager": 40, "compile": 20, "aten": 1.5, "floor": 0.35},
        (2048, 8192, "bf16"): {"eager": 6, "compile": 5, "aten": 1.2, "floor": 0.60},
        (2048, 8192, "high"): {"eager": 8, "compile": 6, "aten": 1.2, "floor": 0.65},
        (6528, 512, "bf16"): {"eager": 4, "compile": 2.5, "aten": 1.5, "floor": 0.50},
        (2_600_000, 64, "bf16"): {"eager": 5, "compile": 2, "aten": 2, "floor": 0.70},
    }
    titles = {(256, 2048): "solo-learn; ResNet-50, 256 a GPU"}
    titles |= {(N, D): f"ResNet-50, {N} a GPU" for N in (64, 128, 256) for D in (8192, 16384)}
    titles |= {(N, 2048): f"ResNet-50, {N} a GPU" for N in (64, 128)}
    titles |= {(N, D): f"ResNet-50, batch of {N}" for N in (512, 2048, 4096) for D in (2048, 8192, 16384)}
    titles |= {(6528, 512): "world model", (2_600_000, 64): "pixels of a video"}
    named = [(N, D, products) for N, D in titles for products in ("highest", "high", "bf16")]
    # Over N at D = 2048 and over D at N = 2048: the smaller side changes at 2048 x 2048.
    powers = [2**k for k in range(6, 15)]
    sweeps = [(N, 2048, "high") for N in powers] + [(2048, D, "high") for D in powers]
    small = [(64, 64, "high"), (512, 4096, "high"), (8192, 256, "high")]
    return [
        VICReg(
            products,
            titles.get((N, D), "small" if N == D == 64 else "scaling"),
            {"cuda": targets[N, D, products]} if (N, D, products) in targets else {},
            compiled=(products == "high" and (D == 8192 or (N, D) == (256, 2048)))
            or (N, D, products) in targets,
            N=N,
            D=D,
        )
        for N, D, products in dict.fromkeys([*named, *sweeps, *small])
    ]


def _vicreg_on_cpu() -> list[Case]:
    """float32, which is what a CPU multiplies; small ones too, where operators cost more than arithmetic."""
    asked = {
        (256, 8192): 60,
        (1024, 8192): 12,
        (256, 2048): 10,
        (2048, 2048): 1.7,
        (2048, 512): 1.7,
        (655360, 64): 4,
    }
    small = [(2, 1), (2, 4096), (8, 16), (33, 31), (64, 64), (128, 32), (4096, 1), (4096, 8), (256, 256)]
    small += [(8192, 256)]
    powers = [2**k for k in range(6, 14)]
    sweeps = [(N, 512) for N in powers] + [(512, D) for D in powers]
    return [
        VICReg(
            "highest",
            "on a CPU",
            {"cpu": {"eager": asked.get((N, D), 1.0)}},
            devices=("cpu",),
            compiled=(N, D) in ((256, 2048), (2048, 512)),
            N=N,
            D=D,
        )
        for N, D in dict.fromkeys([*asked, *small, *sweeps])
    ]


_LOCAL: tuple[Case, ...] = (
    Local("highest", "ResNet-50 maps", {"cuda": {"eager": 60, "aten": 4, "floor": 1 / 3.5}}, compiled=True,
          B=128, patches=(49, 49), C=512, matches=(20, 20)),
    Local("bf16", "ResNet-50 maps", {"cuda": {"eager": 60, "aten": 4, "floor": 1 / 4}}, compiled=True,
          B=128, patches=(49, 49), C=512, matches=(20, 20)),
    Local("high", "VICRegL ResNet-50", compiled=True, B=64, patches=(49, 49), C=512, matches=(20, 4)),
    Local("bf16", "VICRegL ResNet-50", B=64, patches=(49, 49), C=512, matches=(20, 4)),
    Local("bf16", "ConvNeXt, large and small crop", B=64, patches=(49, 9), C=768, matches=(9, 4)),
    Local("bf16", "ConvNeXt, two large crops", B=64, patches=(49, 49), C=768, matches=(20, 4)),
    Local("bf16", "ViT-S/16 maps", {"cuda": {"eager": 20, "aten": 3, "floor": 1 / 4}}, compiled=True,
          B=64, patches=(196, 196), C=768, matches=(20, 20)),
    Local("high", "ViT-S/16 maps", B=64, patches=(196, 196), C=384, matches=(20, 20)),
    Local("high", "per slot, as facebookresearch", {"cuda": {"eager": 8, "aten": 1.5}}, compiled=True,
          B=256, patches=(49, 49), C=512, matches=None, statistics="slot", match_order="patch"),
    Local("high", "per slot, as lightly", B=64, patches=(49, 49), C=512, matches=(20, 4), statistics="slot"),
    Local("highest", "ResNet-50 maps on a CPU", {"cpu": {"eager": 45}}, ("cpu",), compiled=True,
          B=32, patches=(49, 49), C=512, matches=(10, 10)),
    Local("highest", "ViT-S/16 maps on a CPU", {"cpu": {"eager": 12}}, ("cpu",),
          B=16, patches=(196, 196), C=384, matches=(20, 20)),
    Local("highest", "per slot on a CPU", {}, ("cpu",),
          B=16, patches=(49, 49), C=256, matches=(20, 4), statistics="slot"),
    Local("highest", "small, on a CPU", {}, ("cpu",), B=2, patches=(4, 4), C=8, matches=(2, 2)),
)  # fmt: skip

_MATCHING: tuple[Case, ...] = (
    *(Matching(products, "dense correspondence", {"cuda": {"cdist": 3, "bmm": 1.5, "floor": 0.5}}, compiled=True,
               B=64, patches=(1024, 1024), C=768, matches=20) for products in ("highest", "bf16")),
    Matching("highest", "all patches", B=8, patches=(4096, 4096), C=256),
    Matching("bf16", "ViT-S/16 maps", B=64, patches=(196, 196), C=384, matches=20),
    Matching("highest", "ResNet-50 maps", {}, ("cuda", "cpu"), B=64, patches=(49, 49), C=512, matches=20),
    Matching("highest", "ViT-S/16 maps on a CPU", {}, ("cpu",), B=8, patches=(196, 196), C=384, matches=20),
)  # fmt: skip

_DISTRIBUTED: tuple[Case, ...] = (
    Distributed("high", "ResNet-50, 256 a rank", {"cuda": {}}, N=256, D=8192),
    Distributed("bf16", "ResNet-50, 256 a rank", {"cuda": {}}, N=256, D=8192),
    Distributed("highest", "256 a rank, on a CPU", {}, ("cpu",), N=256, D=2048),
    Distributed("highest", "1024 a rank, on a CPU", {}, ("cpu",), N=1024, D=256),
)


def _merged(cases: Sequence[Case]) -> tuple[Case, ...]:
    """One case of each name: what two lists ask of it holds on the devices of both."""
    found: dict[str, Case] = {}
    for case in cases:
        if (other := found.get(case.name)) is not None:
            found[case.name] = replace(
                other,
                title=case.title if other.title in ("scaling", "on a CPU") else other.title,
                targets={**case.targets, **other.targets},
                devices=tuple(dict.fromkeys([*other.devices, *case.devices])),
                compiled=other.compiled or case.compiled,
            )
        else:
            found[case.name] = case
    return tuple(found.values())


CASES = _merged([*_vicreg(), *_vicreg_on_cpu(), *_LOCAL, *_MATCHING, *_DISTRIBUTED])
SUITES = tuple(dict.fromkeys(case.suite for case in CASES))
# The whole suite in one minute: one shape of each kind on a GPU, small ones on a CPU.
QUICK = {
    "cuda": (
        "256x8192-high", "2048x8192-bf16", "6528x512-bf16", "vicregl-128x49x512-m20-bf16",
        "matching-64x1024x768-m20-bf16", "ranks-256x8192-high",
    ),
    "cpu": (
        "64x64-highest", "256x2048-highest", "2048x512-highest", "vicregl-32x49x512-m10-highest",
        "matching-64x49x512-m20-highest", "ranks-256x2048-highest",
    ),
}  # fmt: skip
