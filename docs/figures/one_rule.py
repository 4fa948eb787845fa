"""Draws docs/figures/one_rule.svg: `python docs/figures/one_rule.py`.

For each dimension of Y[T, N] = X[T, K] · W[K, N] that a mesh axis of two ranks can cut, which operands lie cut (in the
colours of the two ranks) and which one moves (hatched).
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

T, N, K = 2.4, 2.0, 1.6
RANKS = ("#4c78a8", "#f58518")
PANELS = [
    ("T", "the axis cuts tokens: W moves", "gather W · scatter-sum dW", "FSDP, the rows of 2D"),
    ("N", "the axis cuts outputs: X moves", "gather X · scatter-sum dX", "Megatron's column-parallel layer"),
    ("K", "the axis cuts inputs: Y moves", "scatter-sum Y · gather dY", "Megatron's row-parallel layer"),
]


def operand(axes: Axes, corner: tuple[float, float], size: tuple[float, float], name: str, dims: str, cut: str) -> None:
    """A matrix of dims rows × columns, cut in two along `cut`; hatched where it lacks that dimension and must move."""
    (x, y), (height, width) = corner, size
    if cut in dims:
        for rank, colour in enumerate(RANKS):
            if dims[0] == cut:
                part = Rectangle((x, y + height * (1 - rank) / 2), width, height / 2, color=colour, alpha=0.85)
            else:
                part = Rectangle((x + width * rank / 2, y), width / 2, height, color=colour, alpha=0.85)
            axes.add_patch(part)
    else:
        axes.add_patch(Rectangle((x, y), width, height, facecolor="#eeeeee", edgecolor="#54a24b", hatch="//", lw=1.5))
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="black", linewidth=0.8))
    label = f"{name} [{dims[0]}, {dims[1]}]"
    axes.text(x + width / 2, y - 0.12, label, ha="center", va="top", fontsize=9)


def main() -> None:
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    for axes, (cut, title, moves, known) in zip(panels, PANELS, strict=True):
        operand(axes, (0, 0), (T, K), "X", "TK", cut)
        operand(axes, (K + 0.7, T + 0.6), (K, N), "W", "KN", cut)
        operand(axes, (K + 0.7, 0), (T, N), "Y", "TN", cut)
        axes.set_title(title, fontsize=11)
        axes.text((K + 0.7 + N) / 2, -0.62, f"{moves}\n{known}", ha="center", va="top", fontsize=9)
        axes.set(xlim=(-0.2, K + N + 0.9), ylim=(-1.3, T + K + 0.8), aspect="equal")
        axes.axis("off")
    pyplot.rcParams["svg.hashsalt"] = "tessera"
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
