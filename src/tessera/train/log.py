"""What a run says: metrics.jsonl, one JSON object a step, and on a terminal a progress bar or plain lines."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Log:
    """Written by rank 0 alone; on other ranks nothing happens. With `first_step` above 0 it goes on with the file."""

    def __init__(self, output_dir: Path, total_steps: int, first_step: int, every: int, enabled: bool) -> None:
        self.every, self.enabled = every, enabled
        if not enabled:
            return
        path = output_dir / "metrics.jsonl"
        kept = self._steps_before(path, first_step)
        new = path.with_name(f".{path.name}.part")
        new.write_text("".join(kept))
        os.replace(new, path)  # a run killed at this moment still has the lines of its steps
        self._file = path.open("a")
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")]
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=total_steps, completed=first_step)
            self._bar.start()

    @staticmethod
    def _steps_before(path: Path, first_step: int) -> list[str]:
        """The lines of an earlier part of this run: steps after its checkpoint will be done again."""
        if first_step == 0 or not path.exists():
            return []
        return [line for line in path.read_text().splitlines(True) if _step_of(line) <= first_step]

    def step(self, record: dict[str, Any]) -> None:
        """Record one optimizer step, and show it if its number is a multiple of `every`."""
        if not self.enabled:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
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
        if self.enabled:
            self._console.print(text, markup=False)

    def close(self) -> None:
        if self.enabled:
            if self._bar is not None:
                self._bar.stop()
            self._file.close()


def _step_of(line: str) -> float:
    """The step that a line is about; none for what a killed run left unfinished."""
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
