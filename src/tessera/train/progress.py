"""What a run shows on the terminal: a progress bar, or plain lines."""

import time
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from tessera.core import terminal
from tessera.core.text import duration
from tessera.monitor.slow import slow_rank, step_time
from tessera.train.events import Event, Sink


class Terminal(Sink):
    """The terminal of the first rank."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.total = total_steps
        self._pace = Pace(total_steps)
        self._console = terminal.console(soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(BarColumn(20), TextColumn("{task.description}"), console=self._console)
            self._task = self._bar.add_task("", total=total_steps, completed=first_step)
            self._bar.start()

    def step(self, record: Mapping[str, Any], shown: bool) -> None:
        step = record["step"]
        place, numbers, left = f"step {step} of {self.total}", parts(record), self._pace.left(step)
        if self._bar is not None:  # a narrow terminal cuts the line: what matters most comes first
            self._bar.update(self._task, completed=step, description=" · ".join([place, *left, *numbers]))
        elif shown or record["loss"] is None:
            self._say(" · ".join([place, *numbers, *left]))

    def event(self, event: Event) -> None:
        if event.kind in ("said", "warning", "predicted", "evaluated"):
            self._say(event.text)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def parts(record: Mapping[str, Any]) -> list[str]:
    """What the line of a step shows of its record: loss, rate, norm, speed, use of the device, memory."""
    rate, speed = f"lr {record['learning_rate']:.2e}", f"{record['tokens_per_second']:,.0f} tokens/s"
    if record["loss"] is None:
        return [f"not finite, skipped ({record['skipped_steps']} so far)", rate, speed]
    mfu = [] if record["mfu"] is None else [f"MFU {record['mfu']:.1%}"]
    numbers = [f"loss {record['loss']:.4f}", rate, f"norm {record['grad_norm']:.3f}"]
    return [*numbers, speed, *mfu, f"{record['memory_gib']:.3g} GiB", *shares(record)]


SHOWN = 0.05
"""The share of a step's time from which a term is shown beside compute."""


def shares(record: Mapping[str, Any]) -> list[str]:
    """Where a step's time went, largest terms first, and who kept the others waiting; nothing without a monitor.

    E.g. ["compute 71%", "col 12%", "idle 9%", "rank 3 slowest by 0.12 s"].
    """
    seconds = record.get("seconds")
    if not seconds or not (whole := step_time(seconds)):
        return []
    terms = {t: seconds[t] for t in ("data", "optimizer", "idle", "other")} | seconds["communication"]
    large = sorted((t for t in terms if terms[t] >= SHOWN * whole), key=lambda t: -terms[t])
    told = [f"compute {seconds['compute'] / whole:.0%}", *(f"{t} {terms[t] / whole:.0%}" for t in large)]
    if who := slow_rank(record):
        told.append(f"{who} slowest by {record['slowest']['excess_seconds']:.2g} s")
    return told


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
