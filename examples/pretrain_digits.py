"""Pretrain a small encoder with VICReg on the handwritten digits of scikit-learn, without a label or a download.

Two random views of each 8x8 image pass through a convolutional encoder and an expander, and the loss compares their
embeddings.  Then a linear probe with a few labels is trained on the encoder's features, on those of the untrained encoder
and on raw pixels.  The training takes 13 seconds on two free CPU cores.

    python examples/pretrain_digits.py                  # vicreg_fast's loss
    python examples/pretrain_digits.py --loss eager     # the same training on the eager reference
    python examples/pretrain_digits.py --overlay        # both, and their curves over each other
"""

import argparse
import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vicreg_fast import VICRegLoss

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.manifold import TSNE
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    raise SystemExit(f'{missing.name} is not installed; run: pip install -e ".[examples]"') from None

BACKENDS = {"fast": "auto", "eager": "reference"}
TERMS = {"loss": "total", "inv-loss": "invariance", "var-loss": "variance", "cov-loss": "covariance"}
SIZE = 16  # pixels a side of a view: enough for three resolutions in the encoder
FEATURES = 128  # of the encoder: twice the pixels of a digit
PROBE_DRAWS = 10  # random choices of labelled images: the standard error of the mean is well under one point


@dataclass
class Digits:
    """Images (n, 1, 8, 8) in [0, 1] and labels (n,), for training and held out."""

    train: Tensor
    train_labels: Any
    test: Tensor
    test_labels: Any


@dataclass
class Run:
    """One training: its encoder, loss terms per step (total and the three), and seconds per step."""

    name: str
    encoder: nn.Module
    curves: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in TERMS})
    step_seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)
    interrupted: bool = False


def load(seed: int) -> Digits:
    """Three quarters of the digits for training, a quarter held out, with equal shares of each class."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=seed)
    return Digits(images[train], labels[train], images[test], labels[test])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of each image: (n, 1, 8, 8) to (n, 1, SIZE, SIZE).

    Rotation by up to 20 degrees; scale, shift and shear by up to a fifth; contrast, brightness and noise; an erased square
    of a third of the side.  The digit stays readable.
    """
    n = len(images)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * 2 - 1

    angle, scale, shear = 0.35 * uniform(), 1 + 0.2 * uniform(), 0.2 * uniform()
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = ((cos, shear - sin, 0.2 * uniform()), (sin, cos, 0.2 * uniform()))
    transform = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    # One interpolation transforms and enlarges the image.
    views = F.grid_sample(
        images, F.affine_grid(transform, [n, 1, SIZE, SIZE], align_corners=False), align_corners=False
    )
    views = views * (1 + 0.4 * uniform(1, 1, 1)) + 0.1 * uniform(1, 1, 1)
    views = views + 0.1 * torch.randn(views.shape, generator=generator)
    side = SIZE // 3
    corner = torch.randint(0, SIZE - side + 1, (n, 2, 1), generator=generator)
    inside = (torch.arange(SIZE) >= corner) & (torch.arange(SIZE) < corner + side)
    return views.masked_fill((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], 0.0)


def build_encoder() -> nn.Sequential:
    """Four convolutions and a mean over positions: (n, 1, SIZE, SIZE) to (n, FEATURES)."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2), (64, FEATURES, 1)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_expander(width: int, hidden: int = 512) -> nn.Sequential:
    """Two linear layers, (n, FEATURES) to embeddings (n, width), used by the loss only."""
    return nn.Sequential(
        nn.Linear(FEATURES, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
    )


def pretrain(images: Tensor, initial: nn.Module, name: str, args: argparse.Namespace) -> Run:
    """Train a copy of ``initial`` on images (n, 1, 8, 8); Ctrl-C ends the training early and keeps its results.

    Weights, batches and augmentations depend on the seed, not on the loss's implementation.
    """
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    run = Run(name, copy.deepcopy(initial).train())
    model = nn.Sequential(run.encoder, build_expander(args.width))
    # The paper's weights and epsilon (arXiv:2105.04906, section 4).
    criterion = VICRegLoss(25.0, 25.0, 1.0, eps=1e-4, backend=BACKENDS[name])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    batches = len(images) // args.batch_size
    steps = args.epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps + 1, pct_start=0.1)
    with tqdm(total=steps, desc=f"{name} loss", unit="step") as bar:
        try:
            for _ in range(args.epochs):
                order = torch.randperm(len(images), generator=generator)[: batches * args.batch_size]
                for index in order.view(batches, args.batch_size):
                    train_step(run, model, criterion, optimizer, images[index], generator)
                    schedule.step()
                    bar.set_postfix(loss=f"{run.curves['loss'][-1]:.2f}", refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            run.interrupted = True
    return run


def train_step(
    run: Run,
    model: nn.Module,
    criterion: VICRegLoss,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    generator: torch.Generator,
) -> None:
    """One step on images (n, 1, 8, 8), appended to ``run``; the loss's forward and backward are timed separately."""
    start = time.perf_counter()
    embeddings = model(torch.cat([augment(images, generator), augment(images, generator)]))
    # Detached from the model, the loss's backward ends at x and y, so that its time is the loss's own.
    x, y = (view.detach().requires_grad_() for view in embeddings.chunk(2))
    before = time.perf_counter()
    losses = criterion(x, y)
    gradients = torch.autograd.grad(losses["loss"], (x, y))
    after = time.perf_counter()
    optimizer.zero_grad()
    embeddings.backward(torch.cat(gradients))
    optimizer.step()
    # All lists grow after the step: an interrupt before this line leaves them with equal lengths.
    run.loss_seconds.append(after - before)
    run.step_seconds.append(time.perf_counter() - start)
    for key, curve in run.curves.items():
        curve.append(losses[key].item())


@torch.no_grad()
def encode(encoder: nn.Module, digits: Digits) -> tuple[Any, Any]:
    """Features of the training and held-out images, (n, FEATURES) each, with plain images' statistics.

    Batch normalisation takes new statistics from the training images.  Otherwise the untrained encoder would have none, and
    the comparison would favour the trained one.
    """
    encoder = copy.deepcopy(encoder).train()
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over all batches: here, one batch
    train, test = (F.interpolate(x, size=SIZE, mode="bilinear") for x in (digits.train, digits.test))
    encoder(train)
    encoder.eval()
    return encoder(train).numpy(), encoder(test).numpy()


def probe(
    train: Any, test: Any, digits: Digits, labels_per_class: int, seed: int
) -> tuple[float, float, float]:
    """Held-out accuracy of a linear classifier of features (n, d), in percent.

    Returns:
        Mean and standard deviation over draws of ``labels_per_class`` labelled images a class, and the accuracy
        with the labels of all training images.
    """
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)

    def accuracy(index: Any) -> float:
        classifier = LogisticRegression(max_iter=2000).fit(train[index], digits.train_labels[index])
        return 100 * float(classifier.score(test, digits.test_labels))

    members = [np.flatnonzero(digits.train_labels == label) for label in range(10)]
    draws = []
    for draw in range(PROBE_DRAWS):
        rng = np.random.default_rng([seed, draw])  # the same images for every representation
        draws.append(
            accuracy(np.concatenate([rng.choice(m, labels_per_class, replace=False) for m in members]))
        )
    return float(np.mean(draws)), float(np.std(draws)), accuracy(np.arange(len(train)))


def draw_figure(
    path: Path,
    runs: list[Run],
    digits: Digits,
    accuracies: dict[str, tuple[float, float, float]],
    features: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Loss curves, probe accuracies, augmented pairs and maps of the held-out features, as one PNG."""
    figure = plt.figure(figsize=(14, 11.5), layout="constrained")
    rows: Any = figure.subfigures(3, 1, height_ratios=[1.15, 0.75, 1.3])
    top, middle, bottom = rows
    figure.suptitle(
        f"VICReg on scikit-learn's digits: {' and '.join(run.name for run in runs)} loss, {args.width} features, "
        f"batch {args.batch_size}, {len(runs[0].step_seconds)} steps; CPU, {args.threads} thread{'s' * (args.threads > 1)}"
    )
    curves, bars = top.subplots(1, 2, width_ratios=[1.7, 1])
    for colour, (key, label) in enumerate(TERMS.items()):
        for run, style in zip(runs, ("-", ":"), strict=False):
            shown = f"{label} ({run.name})" if len(runs) > 1 else label
            curves.plot(run.curves[key], style, color=f"C{colour}", label=shown, lw=1.6 if style == "-" else 3)
    curves.set(
        xlabel="training step", ylabel="weighted loss", yscale="log", title="Training loss and its terms"
    )
    curves.grid(alpha=0.3, which="both")
    curves.legend(ncols=len(runs), fontsize=9)

    place, (mean, deviation, full) = np.arange(len(accuracies)), np.array(list(accuracies.values())).T
    few_label = f"{args.labels_per_class} labels a class, ± sd of {PROBE_DRAWS} draws"
    few_bars = bars.bar(place - 0.2, mean, 0.38, yerr=deviation, capsize=3, color="C0", label=few_label)
    all_bars = bars.bar(place + 0.2, full, 0.38, color="C7", label=f"all {len(digits.train)} labels")
    for bar in (few_bars, all_bars):
        bars.bar_label(bar, fmt="%.1f", label_type="center", color="white", fontsize=9)
    bars.set_xticks(place, [name.replace(" ", "\n", 2) for name in accuracies], fontsize=9)
    bars.set(ylabel="held-out accuracy, %", title="Linear probe", ylim=(0, 119), yticks=range(0, 101, 20))
    bars.legend(fontsize=8, loc="upper center", ncols=2)

    count = 14
    generator = torch.Generator().manual_seed(args.seed)
    shown_images = digits.train[:count]
    strips = [shown_images, augment(shown_images, generator), augment(shown_images, generator)]
    middle.suptitle("Training images (top) and the two views that the loss compares", fontsize=12)
    grid: Any = middle.subplots(3, count)
    for row, strip in zip(grid, strips, strict=True):
        for axes, image in zip(row, strip, strict=True):
            axes.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
            axes.axis("off")

    bottom.suptitle("Held-out images by t-SNE; colour: the digit, which training never saw", fontsize=12)
    panels: Any = bottom.subplots(1, len(features))
    for axes, (name, values) in zip(panels, features.items(), strict=True):
        scaled = StandardScaler().fit_transform(values)
        points = TSNE(random_state=args.seed).fit_transform(scaled)
        dots = axes.scatter(*points.T, c=digits.test_labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=9)
        axes.set(title=name, xticks=[], yticks=[])
    bottom.colorbar(dots, ax=list(panels), ticks=range(10), label="digit", pad=0.01)
    figure.savefig(path, dpi=110)


def report(
    runs: list[Run], accuracies: dict[str, tuple[float, float, float]], args: argparse.Namespace
) -> None:
    """Print the time of each run, the probe's table and, of two runs, how far their curves part."""
    for run in runs:
        total, loss = sum(run.step_seconds), sum(run.loss_seconds)
        print(
            f"{run.name:>5}: {len(run.step_seconds)} steps in {total:.1f} s, "
            f"{args.batch_size * len(run.step_seconds) / total:.0f} images/s; loss forward+backward {loss:.2f} s, "
            f"{100 * loss / total:.0f} % of the time (median {1e3 * np.median(run.loss_seconds):.1f} ms "
            f"of {1e3 * np.median(run.step_seconds):.1f} ms a step)"
        )
    if len(runs) > 1:
        fast, eager = (np.array(run.curves["loss"]) for run in runs)
        length = min(len(fast), len(eager))
        apart = np.abs(fast[:length] - eager[:length]) / np.abs(eager[:length])
        print(
            f"largest relative difference of the total loss: {apart.max():.1e}, at the first step {apart[0]:.1e}"
        )
    print(
        f"\n{'linear probe, held-out accuracy in %':<38}{f'{args.labels_per_class} labels a class':>20}{'all':>8}"
    )
    for name, (mean, deviation, full) in accuracies.items():
        print(f"{name:<38}{f'{mean:.1f} ± {deviation:.1f}':>20}{full:>8.1f}")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Digits]:
    """Checked arguments, and the data; exits with an error if an argument is bad."""
    summary = str(__doc__).split("\n\n")[0]
    parser = argparse.ArgumentParser(
        description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--loss", choices=list(BACKENDS), default="fast", help="which VICReg to train on")
    parser.add_argument("--overlay", action="store_true", help="train on both, draw one curve over the other")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=256, help="images a step, each in two views")
    parser.add_argument("--width", type=int, default=2048, help="features of the embeddings that the loss sees")
    parser.add_argument("--lr", type=float, default=3e-3, help="largest learning rate, of a one-cycle schedule")
    parser.add_argument("--labels-per-class", type=int, default=10, help="labels of the few-label probe")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, batches, views and splits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--output",
        type=Path,
        default=argparse.SUPPRESS,
        help="the PNG (default: examples/output/pretrain_digits.png, with _eager or _overlay if asked for)",
    )
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "width", "labels_per_class", "threads"):
        least = 2 if name == "batch_size" else 1
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if not 0 < args.lr < float("inf"):
        parser.error(f"--lr must be positive and finite, got {args.lr}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must lie in [0, 2**32), got {args.seed}")
    digits = load(args.seed)
    if args.batch_size > len(digits.train):
        parser.error(f"--batch-size {args.batch_size} is more than the {len(digits.train)} training images")
    fewest = np.bincount(digits.train_labels).min()
    if args.labels_per_class > fewest:
        parser.error(
            f"--labels-per-class {args.labels_per_class} is more than the {fewest} of the rarest class"
        )
    if "output" not in args:
        suffix = "_overlay" if args.overlay else "_eager" if args.loss == "eager" else ""
        args.output = Path(__file__).resolve().parent / "output" / f"pretrain_digits{suffix}.png"
    if args.output.suffix.lower() != ".png":
        parser.error(f"--output must end in .png, got {args.output}")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        earlier = args.output.exists()
        args.output.open("ab").close()  # does not change an earlier picture
        if not earlier:
            args.output.unlink()
    except OSError as error:
        parser.error(f"--output {args.output} cannot be written: {error.strerror}")
    return args, digits


def main(argv: list[str] | None = None) -> None:
    """Train, probe, print and draw."""
    args, digits = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    initial = build_encoder()
    runs: list[Run] = []
    for name in BACKENDS if args.overlay else (args.loss,):
        run = pretrain(digits.train, initial, name, args)
        runs += [run] if run.step_seconds else []
        if run.interrupted:
            print(
                f"interrupted after {len(run.step_seconds)} steps of the {name} run: going on with what there is"
            )
            break
    if not runs:
        raise SystemExit("interrupted before the first step: nothing to show")
    representations = {
        "raw pixels": (digits.train.flatten(1).numpy(), digits.test.flatten(1).numpy()),
        "untrained encoder": encode(initial, digits),
    }
    for run in runs:
        label = f"trained encoder ({run.name} loss)" if len(runs) > 1 else "trained encoder"
        representations[label] = encode(run.encoder, digits)
    # The probe and t-SNE form small products: more threads would only wait for each other.
    with threadpool_limits(1):
        accuracies = {
            n: probe(*f, digits, args.labels_per_class, args.seed) for n, f in representations.items()
        }
        report(runs, accuracies, args)
        tests = {name: test for name, (_, test) in representations.items()}
        draw_figure(args.output, runs, digits, accuracies, tests, args)
    print(f"\npicture: {args.output}")


if __name__ == "__main__":
    main()
