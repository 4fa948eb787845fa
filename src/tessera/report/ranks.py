"""What monitor.jsonl holds: the seconds of every rank by term, and its memory.

The file has an object for each start of the run, with the ranks and their machines, then one for each logging step.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tessera.core.errors import cut_short
from tessera.core.json_lines import nested, number, whole
from tessera.report.curves import Curves
from tessera.report.metrics import MOST_AXES, TERMS

MOST_RANKS = 4096
OWN = ("compute", "data", "optimizer", "other")
"""Terms that a rank spends by itself: a rank is slow when these are longer than those of others."""
COLUMNS = 120
"""Buckets of steps that a picture of all ranks has."""


class Ranks:
    """The ranks of one run's last start; an earlier start with as many ranks counts too.

    `means` are the mean seconds of each rank by term. `own` has a curve for each rank: the seconds of a step that it
    spends by itself.
    """

    def __init__(self) -> None:
        self.machines: list[str] = []
        self.mesh: dict[str, int] = {}
        self.device = ""
        self.unusable = 0
        """Lines that are neither a start nor a step with a number of each rank."""
        self._begin(0)

    def _begin(self, count: int) -> None:
        self.count = count
        self.last_step: int | None = None
        """Of the last start; a start may go on from an earlier step than the one before had come to."""
        self.own = Curves(map(str, range(count)), COLUMNS)
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, int] = {}
        self.peak = np.full(count, -np.inf)
        """GiB, of each rank; -inf where no line says it."""

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Take the objects of some lines, in their order."""
        steps: list[int] = []
        own: list[np.ndarray] = []
        for record in records:
            if "ranks" in record and "step" not in record:
                self._take(steps, own)
                steps, own = [], []
                self._start(record)
                continue
            step = whole(record.get("step"))
            late = step is None or not self.count or (self.last_step is not None and step <= self.last_step)
            if step is None or late or not self._take_memory(record):
                self.unusable += 1
                continue
            if "seconds" not in record:  # a step that was counted whole has no times
                continue
            seconds = self._seconds(record)
            if seconds is None:
                self.unusable += 1
                continue
            if self.last_step is None:
                self.own.go_back_to(step)
            self.last_step = step
            steps.append(step)
            own.append(seconds)
        self._take(steps, own)

    def _take(self, steps: list[int], own: list[np.ndarray]) -> None:
        if steps:
            self.own.add(steps, np.stack(own, axis=1))

    def _start(self, record: dict[str, Any]) -> None:
        """A start of the run: with as many ranks as before it goes on, from a step that may be an earlier one."""
        count = whole(record.get("ranks")) or 0
        machines = record.get("machines")
        if not 0 < count <= MOST_RANKS:
            self.unusable += 1
            return
        if count != self.count:
            self._begin(count)
        self.last_step = None
        self.machines = [cut_short(name, 100) for name in machines[:count]] if isinstance(machines, list) else []
        mesh = nested(record.get("mesh")).items()
        self.mesh = {cut_short(axis, 60): size for axis, size in list(mesh)[:MOST_AXES] if whole(size)}
        self.device = cut_short(record.get("device") or "", 200)

    def _take_memory(self, record: dict[str, Any]) -> bool:
        """Keep the peak of each rank; False where the line has memory, but not a number of each rank."""
        peak = self._row(record.get("memory_peak_gib"))
        if peak is not None:
            self.peak = np.maximum(self.peak, peak)
        return peak is not None or "memory_peak_gib" not in record

    def _seconds(self, record: dict[str, Any]) -> np.ndarray | None:
        """The seconds that each rank spent by itself; None unless the line has a number of each rank."""
        seconds = nested(record.get("seconds"))
        found = {term: self._row(seconds.get(term)) for term in TERMS}
        communication = nested(seconds.get("communication"))
        for axis, given in list(communication.items())[:MOST_AXES]:
            found[f"communication over {cut_short(axis, 60)}"] = self._row(given)
        rows = {name: row for name, row in found.items() if row is not None}
        if not any(term in rows for term in OWN):
            return None
        for name, row in rows.items():
            if name in self._sums or len(self._sums) < len(TERMS) + MOST_AXES:
                self._sums[name] = self._sums.get(name, 0.0) + row
                self._counts[name] = self._counts.get(name, 0) + 1
        total = np.zeros(self.count)
        for term in OWN:
            total += rows.get(term, 0.0)
        return total

    def _row(self, given: object) -> np.ndarray | None:
        """A number of each rank, or None."""
        if not isinstance(given, list) or len(given) != self.count:
            return None
        values = [number(value) for value in given]
        return None if None in values else np.array(values, dtype=float)

    @property
    def means(self) -> dict[str, np.ndarray]:
        """The mean seconds of a step by term, of each rank."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def machine(self, rank: int) -> str:
        """The machine of a rank, "" where that is not known."""
        return self.machines[rank] if rank < len(self.machines) else ""

    def excess(self) -> tuple[list[int], np.ndarray]:
        """The first step of each bucket, and of each rank (down) and bucket (across) its own time as a share above the
        lower median of all ranks: 0.1 is a tenth longer. NaN where that is not known."""
        means = [self.own.means(str(rank)) for rank in range(self.count)]
        own = np.array([[np.nan if value is None else value for value in row] for row in means], dtype=float)
        if not own.size:
            return [], own.reshape(self.count, 0)
        usual = np.sort(own, axis=0)[(self.count - 1) // 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.own.steps(), np.where(usual > 0, own / usual - 1, np.nan)
