"""The shapes that are measured, and one training step of a loss on each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_fast import VICRegLLoss, VICRegLoss, functional, reference


@dataclass(frozen=True)
class Case:
    """Inputs of one loss: ``target`` is the least speed-up over eager that the project asks of it on a CPU, if any."""

    name: str
    shape: tuple[int, ...]  # (N, D), (P, N, D) of many problems, or (B, P, C, m) of the local part
    target: float | None = None
    dtype: torch.dtype = torch.float32
    statistics: str = "image"  # of the local part
    # Published eager code takes torch.cdist's default for the distances: a matrix product, less exact than the
    # reference and up to nine times as fast.
    default_cdist: bool = False

    def inputs(self) -> list[Tensor]:
        """Two views, the second a noisy copy of the first, as after some training; fixed seed."""
        generator = torch.Generator().manual_seed(0)
        x = 0.7 * torch.randn(self.shape[:3] if self.local else self.shape, generator=generator)
        y = x + 0.1 * torch.randn(x.shape, generator=generator)
        views = [z.to(self.dtype).requires_grad_() for z in (x, y)]
        if self.local:
            views += [torch.rand(*self.shape[:2], 2, generator=generator) for _ in range(2)]
        return views

    @property
    def local(self) -> bool:
        """Whether this is VICRegL's local part."""
        return len(self.shape) == 4

    def _losses(self, backend: str) -> Callable[..., dict[str, Tensor]]:
        if self.local:
            local = VICRegLLoss(self.shape[3], alpha=0.0, statistics=self.statistics, backend=backend)
            return lambda x1, x2, l1, l2: local(x1, x2, None, None, l1, l2)
        if len(self.shape) == 3:
            return lambda x, y: {"loss": torch.stack(functional.vicreg_terms(x, y, backend=backend)).sum()}
        return VICRegLoss(backend=backend)

    def loss(self, backend: str, inputs: list[Tensor]) -> float:
        """The value alone."""
        with torch.no_grad():
            return float(self._losses(backend)(*inputs)["loss"])

    @contextmanager
    def _distances(self) -> Iterator[None]:
        exact = reference.distances
        if self.default_cdist:
            reference.distances = torch.cdist  # type: ignore[assignment]  # its other arguments have defaults
        try:
            yield
        finally:
            reference.distances = exact

    def step(self, backend: str, inputs: list[Tensor]) -> Callable[[], None]:
        """Forward and backward of the loss, as a training step calls them."""
        losses = self._losses(backend)

        def step() -> None:
            with self._distances():
                losses(*inputs)["loss"].backward()  # type: ignore[no-untyped-call]
            # Here and not before the next step, which is the other side's: freeing what lies above eager code's
            # matrices returns them to the system, 4 ms at 256x2048.
            for tensor in inputs[:2]:
                tensor.grad = None

        return step


CASES = (
    Case("VICReg 256x8192", (256, 8192), 60),
    Case("VICReg 1024x8192", (1024, 8192), 12),
    Case("VICReg 256x2048", (256, 2048), 10),
    Case("VICReg 2048x2048", (2048, 2048), 1.7),
    Case("VICReg 2048x512", (2048, 512), 1.7),
    Case("VICReg 655360x64", (655360, 64), 4),
    Case("VICRegL local B=32 P=49 C=512 m=10", (32, 49, 512, 10), 45),
    Case("VICRegL local B=16 P=196 C=384 m=20", (16, 196, 384, 20), 12),
    Case("VICRegL local B=32, eager with default cdist", (32, 49, 512, 10), default_cdist=True),
    Case("VICRegL local B=16, eager with default cdist", (16, 196, 384, 20), default_cdist=True),
    # Never slower than eager, however small.
    Case("VICReg 2x1", (2, 1), 1),
    Case("VICReg 2x4096", (2, 4096), 1),
    Case("VICReg 8x16", (8, 16), 1),
    Case("VICReg 33x31", (33, 31), 1),
    Case("VICReg 64x64", (64, 64), 1),
    Case("VICReg 128x32", (128, 32), 1),
    Case("VICReg 4096x1", (4096, 1), 1),
    Case("VICReg 4096x8", (4096, 8), 1),
    Case("VICReg 256x256", (256, 256), 1),
    Case("VICReg 512x512", (512, 512), 1),
    Case("VICReg 8192x256", (8192, 256), 1),
    Case("VICRegL local B=2 P=4 C=8 m=2", (2, 4, 8, 2), 1),
)
