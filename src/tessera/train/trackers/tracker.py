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
    """The numbers of a line of metrics.jsonl, by the names that transformers gives them: eval_loss is "eval/loss".

    Those within others have both names: the seconds of communication along row and col together are
    "train/seconds/communication/row_col", for MLflow takes no dots between.
    """
    numbers: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            inner = numbers_of(value)
            numbers |= {f"train/{key}/{name.removeprefix('train/')}": number for name, number in inner.items()}
        elif isinstance(value, int | float) and key != "step":
            name = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
            numbers[name.replace("·", "_")] = float(value)
    return numbers
