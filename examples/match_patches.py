"""VICRegL on one photograph: do patches find themselves again in another crop of it?

Two overlapping crops, at random scales and in random colours, are cut from a photograph that scikit-learn ships.
A small fully convolutional encoder, trained from scratch with VICRegLLoss, sees the left two thirds of it only;
matches are measured on the right third.  Where a patch truly lies is known, in pixels of the photograph, so a
match by feature is right when it lands within one patch of that place.

    python examples/match_patches.py
    python examples/match_patches.py --photo flower --steps 600

Prints the matching error before and after training and draws both for one pair of crops.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vicreg_fast import VICRegLLoss
from vicreg_fast.functional import match_patches

try:
    import matplotlib
    import PIL  # noqa: F401  what scikit-learn reads its photographs with
    from sklearn.datasets import load_sample_image
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f'{missing.name} is not installed: pip install -e ".[examples]"')

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  after its backend is chosen
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.collections import LineCollection  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

PATCH = 8  # Stride of the encoder: a patch's side, in pixels of the crop.
SCALES = (0.8, 1.25)  # Side of the square that a crop is cut from, in crops.
SHIFT = 0.5  # Largest distance between the centres of a pair, along each axis, in crops.
HELD_OUT_PAIRS = 64
EVALUATION_SEED = 1  # The same pairs whatever --seed, so that runs compare.


class Crops(NamedTuple):
    """A batch of crops and where they lie; all lengths in pixels of the photograph."""

    images: Tensor  # (B, 3, crop, crop), about 0 ... 1
    locations: Tensor  # (B, P, 2): centres (x, y) of the patches, row by row
    centres: Tensor  # (B, 2)
    sides: Tensor  # (B,)
    flipped: Tensor  # (B,), bool


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def cut(region: Tensor, left: int, centres: Tensor, sides: Tensor, crop: int, flipped: Tensor) -> Crops:
    """Squares of a region (3, H, W), resampled to crop × crop pixels; the region begins at column ``left``."""
    height, width = region.shape[1:]
    signs = torch.stack([1.0 - 2.0 * flipped, torch.ones_like(sides)], dim=-1)
    half = sides[:, None] / 2 * signs  # a flipped crop is read from right to left

    def places(n: int) -> Tensor:
        steps = (2 * torch.arange(n) + 1) / n - 1  # centres of n cells on -1 ... 1
        grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)
        return centres[:, None, None] + half[:, None, None] * grid

    sampling = 2 * (places(crop) - torch.tensor([left, 0])) / torch.tensor([width, height]) - 1
    images = F.grid_sample(
        region.expand(len(sides), -1, -1, -1), sampling, padding_mode="border", align_corners=False
    )
    return Crops(images, places(crop // PATCH).flatten(1, 2), centres, sides, flipped)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) with their own contrast, brightness, colour cast, blur and noise each."""
    batch = (len(images), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, uniform(batch, 0.0, 1.0, generator))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * uniform(batch, 0.6, 1.4, generator)
    cast = uniform((len(images), 3, 1, 1), 0.75, 1.25, generator)
    images = images * cast + uniform(batch, -0.2, 0.2, generator)
    return images + 0.03 * torch.randn(images.shape, generator=generator)


def crop_pairs(
    region: Tensor, left: int, count: int, crop: int, generator: torch.Generator
) -> tuple[Crops, Crops]:
    """Pairs of overlapping, differently augmented crops of a region (3, H, W), half of the crops flipped."""
    extent = torch.tensor([region.shape[2], region.shape[1]])
    largest = min(SCALES[1], min(region.shape[1:]) / crop)
    sides = uniform((2, count), SCALES[0], largest, generator) * crop
    margins = sides[..., None] / 2
    offset = torch.tensor([left, 0])
    first = margins[0] + uniform((count, 2), 0.0, 1.0, generator) * (extent - 2 * margins[0])
    second = first + uniform((count, 2), -SHIFT, SHIFT, generator) * crop
    second = torch.minimum(torch.maximum(second, margins[1]), extent - margins[1])
    flipped = torch.rand((2, count), generator=generator) < 0.5
    a, b = (
        cut(region, left, centres + offset, sides[i], crop, flipped[i])
        for i, centres in enumerate((first, second))
    )
    return (
        a._replace(images=augmented(a.images, generator)),
        b._replace(images=augmented(b.images, generator)),
    )


class Encoder(nn.Module):
    """Patch embeddings (B, P, C) for the local part, one embedding (B, D) for the global part of the loss.

    Kernels are as even as their strides, so that patch p of the map is centred on patch p of the crop.
    """

    def __init__(self, width: int = 96, channels: int = 64, embedding: int = 128) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width // 2, 8, stride=4, padding=2),
            nn.GroupNorm(8, width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.ReLU(),
        )
        self.projector = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, channels))
        self.expander = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, embedding))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) to patch embeddings (B, HW / 64, C) and global embeddings (B, D)."""
        patches = self.trunk(images - 0.5).flatten(2).transpose(1, 2)
        return self.projector(patches), self.expander(patches.mean(dim=1))
