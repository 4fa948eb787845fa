"""What a run says: metrics.jsonl, one JSON object a step, and on a terminal a progress bar or plain lines."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from tessera.core import terminal
from tessera.core.text import duration
from tessera.train.notes import METRICS, Notes
from tessera.train.trackers.all import Trackers


class Log:
    """Written by the rank that has `notes`, where others have None. With `first_step` above 0 it goes on with the file.

    Raises OSError when the file of the run that it goes on from cannot be read.
    """

    trackers: Trackers | None = None
    """They are told of the steps that are shown and of those with an evaluation."""

    def __init__(self, notes: Notes | None, total_steps: int, first_step: int, every: int) -> None:
        self.every, self.notes, self.total = every, notes, total_steps
        if notes is None:
            return
        # in one move: a run killed at this moment still has the lines of its steps
        notes.write(METRICS, self._steps_before(notes, first_step))
        self._pace = Pace(total_steps)
        self._console = terminal.console(soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(BarColumn(20), TextColumn("{task.description}"), console=self._console)
            self._task = self._bar.add_task("", total=total_steps, completed=first_step)
            self._bar.start()

    @staticmethod
    def _steps_before(notes: Notes, first_step: int) -> bytes:
        """The lines of an earlier part of this run: steps after its checkpoint will be done again."""
        path = notes.folder / METRICS
        if first_step == 0 or not path.exists():
            return b""
        return b"".join(line for line in path.read_bytes().splitlines(True) if _step_of(line) <= first_step)

    def step(self, record: dict[str, Any]) -> None:
        """Record one optimizer step, and show it if its number is a multiple of `every`."""
        if self.notes is None:
            return
        step, evaluated = record["step"], "eval_loss" in record
        if evaluated:
            record = record | {"eval_ppl": perplexity(record["eval_loss"])}
        self.notes.append(METRICS, json.dumps(record))
        place = f"step {step} of {self.total}"
        numbers, left, due = parts(record), self._pace.left(step), step % self.every == 0
        if self._bar is not None:  # a narrow terminal cuts the line: what matters most comes first
            self._bar.update(self._task, completed=step, description=" · ".join([place, *left, *numbers]))
        elif due or record["loss"] is None:
            self.say(" · ".join([place, *numbers, *left]))
        if evaluated:
            shown = record["eval_ppl"]
            self.say(f"{place} · eval_loss {record['eval_loss']:.4f}" + (f" · eval_ppl {shown:.4g}" if shown else ""))
        if self.trackers is not None and (due or evaluated):
            self.trackers.step(record)

    def say(self, text: str) -> None:
        """One line for the user."""
        if self.notes is not None:
            self._console.print(text, markup=False)

    def close(self) -> None:
        if self.trackers is not None:
            self.trackers.close()
        if self.notes is not None and self._bar is not None:
            self._bar.stop()


def _step_of(line: bytes) -> float:
    """The step that a line is about; none for what a killed run left unfinished, or a disk has spoilt."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def perplexity(loss: float) -> float | None:
    """e to the loss; None for one so large that no number holds it."""
    return math.exp(loss) if loss < 700 else None


def parts(record: Mapping[str, Any]) -> list[str]:
    """What the line of a step shows of its record: loss, rate, norm, speed, use of the device, memory."""
    rate, speed = f"lr {record['learning_rate']:.2e}", f"{record['tokens_per_second']:,.0f} tokens/s"
    if record["loss"] is None:
        return [f"not finite, skipped ({record['skipped_steps']} so far)", rate, speed]
    mfu = [] if record["mfu"] is None else [f"MFU {record['mfu']:.1%}"]
    numbers = [f"loss {record['loss']:.4f}", rate, f"norm {record['grad_norm']:.3f}"]
    return [*numbers, speed, *mfu, f"{record['memory_gib']:.3g} GiB"]


class Pace:
    """How long a run of `total` steps still takes: its steps since the first one, which is slow, with all between."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._first: tuple[int, float] | None = None

    def left(self, step: int) -> list[str]:
        """After `step`: e.g. ["3 min left"]; nothing after the first step, or the last."""
        now = time.perf_counter()
        if self._first is None:
            self._first = (step, now)
        done = step - self._first[0]
        if not done or step >= self.total:
            return []
        return [f"{duration((now - self._first[1]) / done * (self.total - step))} left"]


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
