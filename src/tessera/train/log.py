"""What a run says: metrics.jsonl, one JSON object a step, and on a terminal a progress bar or plain lines."""

import json
import math
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tessera.core import terminal
from tessera.train.notes import METRICS, Notes


class Log:
    """Written by the rank that has `notes`, where others have None. With `first_step` above 0 it goes on with the file.

    Raises OSError when the file of the run that it goes on from cannot be read.
    """

    def __init__(self, notes: Notes | None, total_steps: int, first_step: int, every: int) -> None:
        self.every, self.notes = every, notes
        if notes is None:
            return
        # in one move: a run killed at this moment still has the lines of its steps
        notes.write(METRICS, self._steps_before(notes, first_step))
        self._console = terminal.console(soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")]
            self._bar = Progress(*columns, console=self._console)
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
        self.notes.append(METRICS, json.dumps(record))
        numbers = f"loss {record['loss']:.4f} · norm {record['grad_norm']:.3f}" if record["loss"] is not None else ""
        skipped = f"not finite, skipped ({record['skipped_steps']} so far)"
        rate, speed = f"lr {record['learning_rate']:.2e}", f"{record['tokens_per_second']:,.0f} tokens/s"
        text = f"{numbers or skipped} · {rate} · {speed}"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=text)
        elif record["step"] % self.every == 0 or not numbers:
            self.say(f"step {record['step']} · {text}")
        if "eval_loss" in record:
            self.say(f"step {record['step']} · held-out loss {record['eval_loss']:.4f}")

    def say(self, text: str) -> None:
        """One line for the user."""
        if self.notes is not None:
            self._console.print(text, markup=False)

    def close(self) -> None:
        if self.notes is not None and self._bar is not None:
            self._bar.stop()


def _step_of(line: bytes) -> float:
    """The step that a line is about; none for what a killed run left unfinished, or a disk has spoilt."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
