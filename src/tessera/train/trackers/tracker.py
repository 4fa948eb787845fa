"""Tracker: what a run tells of its steps to a library that keeps or shows them."""

from collections.abc import Mapping
from typing import Any, Protocol


class Tracker(Protocol):
    """One tracker of a run. `where` says in a few words where its numbers can be seen.

    Every method may raise whatever its library raises.
    """

    where: str

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers after optimizer step `step`, by names such as "train/loss" and "eval/loss"."""

    def close(self) -> None:
        """Write what is left."""


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, by the names that transformers gives them: eval_loss is "eval/loss"."""
    return {
        f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": float(value)
        for key, value in record.items()
        if isinstance(value, int | float) and key != "step"
    }
