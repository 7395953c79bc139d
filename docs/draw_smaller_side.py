"""Draw docs/smaller_side.png: the two squares whose Frobenius norms are equal, to scale.

python docs/draw_smaller_side.py
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

N, D = 256, 8192  # samples, features
BYTES = 4  # of a float32
DATA, PRIMAL, DUAL, INK = "#8a8a8a", "#d1495b", "#00798c", "#222222"


def size(count: float, units: tuple[str, ...] = ("bytes", "KiB", "MiB", "GiB")) -> str:
    """Bytes in the largest unit that leaves at least one."""
    for unit in units[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.0f} {units[-1]}"


def products(side: int) -> float:
    """Floating-point operations of both views, forward and backward, by the closed form: side is N or D.

    One product and one more for the gradient, 2 N D side each; symmetry is not counted.
    """
    return 2 * 2 * (2 * N * D * side)


def square(axes: Axes, left: float, top: float, width: float, height: float, colour: str) -> None:
    """A matrix, to scale, its upper left corner at (left, top)."""
    axes.add_patch(Rectangle((left, top), width, height, facecolor=colour, edgecolor="none"))


def main() -> None:
    """Draw and save."""
    eager = 2 * 3 * (2 * N * D * D)  # autograd of c'c takes two products in the backward
    figure, axes = plt.subplots(figsize=(9.6, 6.0), facecolor="white")
    gap = 0.09 * D
    across = D + 1.5 * gap

    square(axes, 0, 0, D, D, PRIMAL)
    square(axes, 0, D + gap, D, N, DATA)  # the data, N x D, under the side it shares with c'c
    square(axes, across, 0, N, N, DUAL)

    middle: dict[str, Any] = {"ha": "center", "va": "center", "color": "white"}
    axes.text(D / 2, 0.40 * D, r"$c^{\mathsf{T}}c$", fontsize=38, **middle)
    axes.text(D / 2, 0.53 * D, f"D × D = {D} × {D}", fontsize=14, **middle)
    axes.text(D / 2, 0.61 * D, f"{size(D * D * BYTES)} a view", fontsize=14, **middle)
    axes.text(D / 2, D + gap + N + 0.25 * gap, f"the centred batch c, N × D = {N} × {D}", ha="center", va="top",
              fontsize=11, color=INK)  # fmt: skip

    text: dict[str, Any] = {"ha": "left", "va": "center", "color": INK}
    axes.text(across + 2.2 * N, N / 2, r"$c\,c^{\mathsf{T}}$", fontsize=22, **(text | {"color": DUAL}))
    axes.text(across, 0.13 * D, f"N × N = {N} × {N}", fontsize=14, **text)
    axes.text(across, 0.20 * D, f"{size(N * N * BYTES)} a view", fontsize=14, **text)

    formula = r"$\Vert c^{\mathsf{T}}c\,\Vert_F = \Vert c\,c^{\mathsf{T}}\,\Vert_F$"
    axes.text(across, 0.42 * D, formula, fontsize=22, **text)
    axes.text(across, 0.51 * D, "the same number", fontsize=12, **text)

    axes.text(
        across,
        0.68 * D,
        "Multiplications and additions,\nboth views, forward and backward",
        fontsize=12,
        **text,
    )
    for row, (name, count, colour) in enumerate(
        (
            ("eager, D × D", eager, PRIMAL),
            ("closed form, D × D", products(D), PRIMAL),
            ("closed form, N × N", products(N), DUAL),
        )
    ):
        y = (0.78 + 0.07 * row) * D
        axes.text(across, y, name, fontsize=12, **(text | {"color": colour}))
        axes.text(across + 0.86 * D, y, f"{count / 1e9:.1f} billion", fontsize=12,
                  **(text | {"ha": "right", "color": colour}))  # fmt: skip

    axes.set_xlim(-0.02 * D, across + 0.9 * D)
    axes.set_ylim(D + gap + N + 0.9 * gap, -0.02 * D)
    axes.set_aspect("equal")
    axes.set_axis_off()
    figure.subplots_adjust(left=0.02, right=0.98, top=0.98, bottom=0.02)
    path = Path(__file__).with_name("smaller_side.png")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
