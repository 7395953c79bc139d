"""VICRegL on one photograph: are patches matched with themselves in another crop of it?

A pair of overlapping crops is cut from a photograph that scikit-learn ships.  The crops differ in scale and colours, and
each may be mirrored.  A small fully convolutional encoder is trained with VICRegLLoss on the right two thirds of the
photograph.  Matches are measured on the left third, which is not trained on.  The true place of each patch is known, in
pixels of the photograph: a match by feature is right if it lies within one patch of that place.

    python examples/match_patches.py
    python examples/match_patches.py --photo flower --steps 600

Prints the matching error before and after training and draws the matches of one pair of crops.
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
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from sklearn.datasets import load_sample_image
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f'{missing.name} is not installed: pip install -e ".[examples]"')

BACKENDS = {"fast": "auto", "eager": "reference"}
PATCH = 16  # Stride of the encoder: a patch's side, in pixels of the resampled crop.
SCALES = (0.8, 1.25)  # Side of the square that a crop is cut from, in crops.
SHIFT = 0.5  # Largest distance between the centres of a pair, along each axis, in crops.
HELD_OUT_PAIRS = 128
EVALUATION_SEED = 1  # The same pairs for every --seed, so that runs are comparable.
GRADES = (  # Largest error in patches, colour and name of a match.
    (1.0, "tab:green", "right: within 1 patch of the true place"),
    (2.0, "tab:orange", "near: 1 to 2 patches away"),
    (float("inf"), "tab:red", "wrong: farther away"),
)


class Crops(NamedTuple):
    """A batch of crops and their places; all lengths in pixels of the photograph."""

    images: Tensor  # (B, 3, crop, crop), about 0 ... 1
    locations: Tensor  # (B, P, 2): centres (x, y) of the patches, row by row
    centres: Tensor  # (B, 2)
    sides: Tensor  # (B,)
    flipped: Tensor  # (B,), bool


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Uniform random values in [low, high)."""
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
    """Images (B, 3, H, W), each with random contrast, brightness, colour cast, blur and noise."""
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
    return a._replace(images=augmented(a.images, generator)), b._replace(images=augmented(b.images, generator))


class Encoder(nn.Module):
    """Patch and global embeddings for the loss, and the features before the projector, by which patches are matched.

    Kernel sizes and strides are both even or both odd, so that patch p of the map is centred on patch p of the crop.
    """

    def __init__(self, width: int = 128, channels: int = 64, embedding: int = 128) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - stride + 1) // 2)
            return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.ReLU())

        self.trunk = nn.Sequential(
            block(3, width // 4, kernel=8, stride=4),
            block(width // 4, width // 2, kernel=4, stride=2),
            block(width // 2, width, kernel=4, stride=2),
            block(width, width, kernel=3, stride=1),
        )
        self.projector = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, channels))
        self.expander = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, embedding))

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to patch features (B, HW / PATCH², width), row by row."""
        features: Tensor = self.trunk(images - 0.5)
        return features.flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) to patch embeddings (B, HW / PATCH², channels) and global ones (B, embedding)."""
        patches = self.features(images)
        return self.projector(patches), self.expander(patches.mean(dim=1))


class Matches(NamedTuple):
    """For each patch of the first crop, its match in the second; B pairs, P patches, lengths in photograph pixels."""

    places: Tensor  # (B, P, 2): centre of the patch in the first crop, its true place
    matched: Tensor  # (B, P, 2): centre of its match in the second crop
    shared: Tensor  # (B, P), bool: whether the second crop's patch centres surround the true place
    patch: Tensor  # (B, 1): side of a patch of the second crop

    @property
    def error(self) -> Tensor:
        """Distance (B, P) from the match to the true place."""
        distance: Tensor = torch.linalg.vector_norm(self.matched - self.places, dim=-1)
        return distance

    @property
    def right(self) -> Tensor:
        """Whether each match (B, P) is within one patch of its true place."""
        return self.error <= self.patch

    def summary(self, pair: int | None = None) -> tuple[float, float]:
        """Median error and share of right matches, over the shared patches of one pair or of all."""
        chosen = slice(None) if pair is None else slice(pair, pair + 1)
        shared = self.shared[chosen]
        share = self.right[chosen][shared].float().mean().item()
        return self.error[chosen][shared].median().item(), share


def matches(first: Crops, second: Crops, queries: Tensor, candidates: Tensor, backend: str) -> Matches:
    """Match every patch of the first crops by rows (B, P, C): features, pixels or locations."""
    query, candidate, _ = match_patches(queries, candidates, backend=backend)
    places, matched = (
        crops.locations.gather(1, index[..., None].expand(-1, -1, 2))
        for crops, index in ((first, query), (second, candidate))
    )
    side = second.sides[:, None]
    patch = side * PATCH / second.images.shape[-1]
    shared = (places - second.centres[:, None]).abs().amax(dim=-1) <= (side - patch) / 2
    return Matches(places, matched, shared, patch)


@torch.no_grad()
def matches_by_feature(encoder: Encoder, first: Crops, second: Crops, backend: str) -> Matches:
    """Match by the encoder's features; the projector after them serves the loss only."""
    return matches(first, second, encoder.features(first.images), encoder.features(second.images), backend)


def train(encoder: Encoder, region: Tensor, left: int, args: argparse.Namespace) -> list[float]:
    """Train on crops of a region (3, H, W) and return the loss of every step; Ctrl-C ends it early."""
    generator = torch.Generator().manual_seed(args.seed)
    # eps: the slope of the standard deviation is infinite where all patches of an image are equal, as in a clear sky.
    criterion = VICRegLLoss(args.num_matches, args.alpha, eps=1e-4, backend=BACKENDS[args.loss])
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=args.lr, weight_decay=1e-4)
    warm_up = max(1, args.steps // 5)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (args.steps - step) / args.steps)
    )
    losses: list[float] = []
    try:
        with tqdm(range(args.steps), desc="training", unit="step", disable=None) as progress:
            for _ in progress:
                first, second = crop_pairs(region, left, args.batch_size, args.crop, generator)
                maps, embeddings = encoder(torch.cat([first.images, second.images]))
                terms = criterion(*maps.chunk(2), *embeddings.chunk(2), first.locations, second.locations)
                optimizer.zero_grad()
                terms["loss"].backward()
                optimizer.step()
                decay.step()
                losses.append(terms["loss"].item())
                progress.set_postfix(loss=f"{losses[-1]:.2f}")
    except KeyboardInterrupt:
        print(f"stopped after {len(losses)} of {args.steps} steps")
    return losses


def typical_pair(crops: tuple[Crops, Crops], before: Matches, after: Matches) -> int:
    """The well overlapping, unmirrored pair whose shares of right matches are nearest to those of all pairs."""
    count = after.shared.sum(dim=1)
    distance = torch.zeros(len(count))
    for result in (before, after):
        share = (result.right & result.shared).sum(dim=1) / count.clamp(min=1)
        distance += (share - result.summary()[1]).abs()
    unusable = crops[0].flipped | crops[1].flipped | (count < count.float().median())
    return int((distance + 10.0 * unusable).argmin())


def draw_matches(axes: Axes, crops: tuple[Crops, Crops], result: Matches, pair: int, title: str) -> None:
    """Both crops of a pair side by side, a line from every shared patch of the first to its match."""
    size = crops[0].images.shape[-1]
    gap = size // 8
    ends = []
    for k, (crop, places) in enumerate(zip(crops, (result.places, result.matched), strict=True)):
        left = k * (size + gap)
        image = crop.images[pair].clamp(0, 1).permute(1, 2, 0).numpy()
        axes.imshow(image, extent=(left, left + size, size, 0), interpolation="bilinear")
        within = (places[pair] - crop.centres[pair]) / crop.sides[pair] + 0.5  # 0 ... 1
        within[:, 0] = torch.where(crop.flipped[pair], 1 - within[:, 0], within[:, 0])
        ends.append(within * size + torch.tensor([left, 0]))
    shared = result.shared[pair]
    errors = (result.error[pair] / result.patch[pair])[shared].tolist()
    for start, end, error in zip(*(e[shared] for e in ends), errors, strict=True):
        colour = next(colour for limit, colour, _ in GRADES if error <= limit)
        (x0, y0), (x1, y1) = start.tolist(), end.tolist()
        axes.plot([x0, x1], [y0, y1], color=colour, linewidth=1.3, marker="o", markersize=3.5, alpha=0.85)
    error, share = result.summary(pair)
    axes.set_title(f"{title}\n{share:.0%} right, median error {error:.1f} px", fontsize=11)
    axes.set_xlim(0, 2 * size + gap)
    axes.set_ylim(size, 0)
    axes.set_axis_off()


def draw(
    photo: Tensor,
    border: int,
    crops: tuple[Crops, Crops],
    results: dict[str, Matches],
    losses: list[float],
    path: Path,
) -> None:
    """Draw a typical pair's matches by three methods, the photograph (3, H, W) and the losses."""
    _, before, after = results.values()
    pair = typical_pair(crops, before, after)
    figure = plt.figure(figsize=(14, 8.6), layout="constrained")
    grid = figure.add_gridspec(2, 4)
    for slot, (name, result) in zip((grid[0, :2], grid[0, 2:], grid[1, :2]), results.items(), strict=True):
        draw_matches(figure.add_subplot(slot), crops, result, pair, name)
    axes = figure.add_subplot(grid[1, 2])
    axes.imshow(photo.permute(1, 2, 0).numpy())
    axes.axvspan(border, photo.shape[2], color="tab:blue", alpha=0.35, linewidth=0)
    for crop, colour, name in zip(crops, ("black", "red"), ("left", "right"), strict=True):
        side = crop.sides[pair].item()
        x, y = (crop.centres[pair] - side / 2).tolist()
        axes.add_patch(
            Rectangle((x, y), side, side, fill=False, color=colour, linewidth=2, label=f"{name} crop")
        )
    axes.legend(loc="lower right", fontsize=8)
    axes.set_title("The crops in the photograph;\ntrained on the blue part only", fontsize=11)
    axes.set_axis_off()
    axes = figure.add_subplot(grid[1, 3])
    axes.plot(range(1, len(losses) + 1), losses, color="tab:blue", linewidth=0.8)
    axes.set(xlabel="step")
    axes.set_title("VICRegL loss", fontsize=11)
    axes.grid(which="both", alpha=0.3)
    lines = [Line2D([], [], color=colour, marker="o", label=name) for _, colour, name in GRADES]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_arguments() -> tuple[argparse.Namespace, Tensor]:
    """Checked arguments, and the photograph (3, H, W) in 0 ... 1; exits with an error if an argument is bad."""
    parser = argparse.ArgumentParser(
        description="VICRegL on crops of a photograph: patch matches before and after training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    output = Path(__file__).parent / "output" / "match_patches.png"
    add("--photo", choices=("china", "flower"), default="china", help="scikit-learn's photograph")
    add("--steps", type=int, default=200, help="training steps")
    add("--batch-size", type=int, default=16, help="pairs of crops in a step")
    add("--crop", type=int, default=112, help=f"side of a crop, in pixels: a multiple of {PATCH}")
    add("--num-matches", type=int, default=20, help="matched patches of a crop in the loss")
    add("--alpha", type=float, default=0.25, help="share of the global part of the loss, 0 to 1")
    add("--lr", type=float, default=3e-3, help="highest learning rate of AdamW")
    add("--seed", type=int, default=0, help="of the weights and the training crops")
    add("--threads", type=int, default=1, help="threads of torch; more help on idle cores only")
    add("--output", type=Path, default=output, help="where the picture goes")
    add(
        "--loss", choices=list(BACKENDS), default="fast", help="the fast loss or the plain code that defines it"
    )
    args = parser.parse_args()
    image = load_sample_image(f"{args.photo}.jpg")
    photo = torch.tensor(image).permute(2, 0, 1) / 255
    crop, patches = args.crop, (args.crop // PATCH) ** 2
    largest = min(photo.shape[1], photo.shape[2] // 3) // PATCH * PATCH  # held-out crops lie in the left third
    formats = FigureCanvasBase.get_supported_filetypes()
    checks = [
        (args.steps >= 1, "--steps must be at least 1"),
        (args.batch_size >= 2, "--batch-size must be at least 2"),
        (
            crop % PATCH == 0 and 3 * PATCH <= crop <= largest,
            f"--crop must be a multiple of {PATCH} from {3 * PATCH} to {largest}, to fit the photograph's held-out third",
        ),
        (2 <= args.num_matches <= patches, f"--num-matches must be from 2 to {patches}, the patches of a crop"),
        (0 <= args.alpha <= 1, "--alpha must be from 0 to 1"),
        (0 < args.lr < float("inf"), "--lr must be positive and finite"),
        (0 <= args.seed < 2**63, "--seed must be at least 0 and below 2**63"),
        (args.threads >= 1, "--threads must be at least 1"),
        (
            args.output.suffix[1:].lower() in formats,
            f"--output must end in one of {', '.join(sorted(formats))}",
        ),
    ]
    for good, message in checks:
        if not good:
            option = message.split()[0]
            parser.error(f"{message}, got {getattr(args, option[2:].replace('-', '_'))}")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        existed = args.output.exists()
        args.output.open("ab").close()
        if not existed:
            args.output.unlink()
    except OSError as error:
        parser.error(f"--output {args.output}: {error.strerror}")
    return args, photo


def main() -> None:
    """Train, measure, print, draw."""
    matplotlib.use("Agg")
    args, photo = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    backend = BACKENDS[args.loss]
    border = photo.shape[2] // 3
    first, second = crop_pairs(
        photo[:, :, :border], 0, HELD_OUT_PAIRS, args.crop, torch.Generator().manual_seed(EVALUATION_SEED)
    )
    encoder = Encoder()
    location = matches(first, second, first.locations, second.locations, backend)
    pixels = [F.pixel_unshuffle(crops.images, PATCH).flatten(2).transpose(1, 2) for crops in (first, second)]
    raw = matches(first, second, pixels[0], pixels[1], backend)
    before = matches_by_feature(encoder, first, second, backend)
    start = time.perf_counter()
    losses = train(encoder, photo[:, :, border:], border, args)
    seconds = time.perf_counter() - start
    after = matches_by_feature(encoder, first, second, backend)

    print(
        f"{len(losses)} steps in {seconds:.1f} s; {HELD_OUT_PAIRS} held-out pairs, {int(after.shared.sum())} patches"
    )
    print(f"{'matched by':<28}{'median error':>14}{'within 1 patch':>16}")
    rows = {"location": location, "raw pixels": raw, "feature, before training": before}
    for name, result in {**rows, "feature, after training": after}.items():
        error, share = result.summary()
        print(f"{name:<28}{error:>11.1f} px{share:>16.1%}")
    drawn = {
        "By location: right by construction": location,
        "By feature, before training": before,
        f"By feature, after {len(losses)} steps": after,
    }
    draw(photo, border, (first, second), drawn, losses, args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
