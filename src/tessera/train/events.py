"""One stream of what happens in a run; what a run says, logs and draws are sinks beside each other that take it.

    sink                      file                   takes
    Files (files.py)          *.jsonl                every step, every event, what each rank measured
    Terminal (progress.py)    terminal               steps that are shown, what the run says
    Trackers (trackers/)      TensorBoard and others steps that are shown, evaluations

A sink lives on the first rank; on the others the stream has none, and costs nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["said", "warning", "predicted", "saved", "evaluated", "ended"]


@dataclass(frozen=True)
class Event:
    """Something that happened after `step` optimizer steps, in words.

    `path`: where it lies, of what was saved; `numbers`: those of a prediction.
    """

    kind: Kind
    text: str
    step: int
    path: Path | None = None
    numbers: Mapping[str, Any] | None = None


class Sink:
    """Takes what happens; by itself it does nothing with it."""

    def step(self, record: Mapping[str, Any], shown: bool) -> None:
        """An optimizer step was done: its line of metrics.jsonl. `shown`: `logging_steps` says so."""

    def event(self, event: Event) -> None:
        """Something else happened."""

    def measured(self, ranks: Mapping[str, Any]) -> None:
        """What each rank has measured since it was told last: a line of monitor.jsonl."""

    def close(self) -> None:
        """The run is over."""


class Events:
    """The stream of one run of `total` steps that begins after `step`; every `every`-th step is shown."""

    def __init__(self, total: int, step: int, every: int) -> None:
        self.total, self.every, self._step = total, every, step
        self.sinks: list[Sink] = []

    def shows(self, step: int) -> bool:
        return step % self.every == 0

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step was done. Where it was evaluated, the perplexity is put beside the loss."""
        self._step = step = record["step"]
        loss = record.get("eval_loss")
        if loss is not None:
            record["eval_ppl"] = perplexity(loss)
        for sink in self.sinks:
            sink.step(record, self.shows(step))
        if loss is not None:
            shown = record["eval_ppl"]
            told = f"step {step} of {self.total} · eval_loss {loss:.4f}"
            self._tell("evaluated", told + (f" · eval_ppl {shown:.4g}" if shown else ""))

    def measured(self, ranks: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.measured(ranks)

    def say(self, text: str) -> None:
        """One line for the user."""
        self._tell("said", text)

    def warn(self, text: str) -> None:
        """One line about what may be wrong; the run goes on."""
        self._tell("warning", f"warning: {text}")

    def predicted(self, text: str, numbers: Mapping[str, Any]) -> None:
        """What a step is expected to take, in one line and in numbers (monitor/predicted.py)."""
        self._tell("predicted", text, numbers=numbers)

    def saved(self, path: Path) -> None:
        """A checkpoint is whole; steps may have been done since those that are in it."""
        self._tell("saved", f"{path.name} is written", path, step=int(path.name.rpartition("-")[2]))

    def ended(self, text: str) -> None:
        self._tell("ended", text)

    def _tell(
        self,
        kind: Kind,
        text: str,
        path: Path | None = None,
        step: int | None = None,
        numbers: Mapping[str, Any] | None = None,
    ) -> None:
        for sink in self.sinks:
            sink.event(Event(kind, text, self._step if step is None else step, path, numbers))

    def close(self) -> None:
        for sink in reversed(self.sinks):
            sink.close()


def perplexity(loss: float) -> float | None:
    """e to the loss; None for one so large that no number holds it."""
    return math.exp(loss) if loss < 700 else None
