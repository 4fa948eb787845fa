"""The plot of a run, from its metrics.jsonl."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.train.notes import METRICS


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The records of a run's optimizer steps, in order."""
    return [json.loads(line) for line in (output_dir / METRICS).read_text().splitlines()]


def plot_loss(records: Sequence[dict[str, Any]], reference: tuple[str, float] | None = None) -> bytes:
    """loss and eval_loss (nats a token) against the optimizer step, as a PNG; `reference` is a labelled level."""
    # slow to import, and for drawing alone; without pyplot, which would choose a window system
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.12, 0.89, 0.85))
    trained = [(r["step"], r["loss"]) for r in records if r["loss"] is not None]
    evaluated = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    for points, style, label in ((trained, "-", "loss"), (evaluated, "o-", "eval_loss")):
        if points:  # a line of one point would not be seen
            axes.plot(*zip(*points, strict=True), "o" if len(points) == 1 else style, linewidth=1.2, ms=4, label=label)
    if reference is not None:
        label, level = reference
        axes.axhline(level, color="grey", linestyle="--", linewidth=1, label=f"{label} ({level:.2f})")
    axes.set(xlabel="optimizer step", ylabel="nats a token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
