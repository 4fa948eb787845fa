"""Plots of a run, from its metrics.jsonl."""

import json
from pathlib import Path
from typing import Any


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The records of a run's optimizer steps, in order."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def plot_loss(output_dir: Path, file: Path, reference: tuple[str, float] | None = None) -> None:
    """Training and held-out loss (nats a token) against trained tokens, as a PNG; `reference` is a labelled level."""
    import matplotlib  # slow to import, and for drawing alone

    matplotlib.use("agg")
    from matplotlib import pyplot

    records = read_metrics(output_dir)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([r["tokens"] for r in records], [r["loss"] for r in records], linewidth=1, label="training loss")
    evaluated = [r for r in records if "eval_loss" in r]
    if evaluated:
        x, y = [r["tokens"] for r in evaluated], [r["eval_loss"] for r in evaluated]
        axes.plot(x, y, "o-", label="held-out loss")
    if reference is not None:
        label, level = reference
        axes.axhline(level, color="grey", linestyle="--", linewidth=1, label=f"{label} ({level:.2f})")
    axes.set(xlabel="tokens trained on", ylabel="nats a token")
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
