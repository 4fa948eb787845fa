"""What metrics.jsonl holds, as curves and totals: read once from beginning to end, in bounded memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tessera.core.errors import cut_short
from tessera.core.json_lines import nested, number, whole
from tessera.report.curves import Curves

PLAIN = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "step_seconds",
    "mfu",
    "memory_gib",
    "eval_loss",
    "eval_ppl",
)
TERMS = ("compute", "data", "optimizer", "idle", "other", "save", "evaluation")
"""What the time of a step is made of, beside communication, which is by axis."""
BETWEEN = ("save", "evaluation")
"""Those of them that are between steps: the others are the step."""
KINDS = ("states", "activations", "gathered", "other")
"""What lies in memory."""
_OF_TERMS = {term: f"seconds.{term}" for term in TERMS}
_OF_MEMORY = {"now_gib": "memory.now_gib", "peak_gib": "memory.peak_gib"}
MOST_AXES = 12
"""Names of axes that are read of one file: a mesh has nine, and some collectives run over several at once."""
MOST_NAMED = 4096
"""Ranks that are remembered as the slowest of some step."""


class Metrics:
    """The curves of one run by name, such as `loss`, `seconds.compute`, `communicated_bytes.col`.

    `axes` are those that communicate, `kinds` the memory by kind at the last line that has it (GiB).
    """

    def __init__(self) -> None:
        self.curves = Curves(PLAIN)
        self.axes: list[str] = []
        self.axes_left_out = False
        self._known: dict[tuple[str, str], str] = {}
        self.kinds: dict[str, float] = {}
        self.slowest: dict[tuple[int, str], tuple[int, float, int]] = {}
        """How often each (rank, machine) was the slowest, by how many seconds all together, and how often every rank of
        its machine was slower than all others."""
        self.first_step: int | None = None
        self.last_step: int | None = None
        self.best: tuple[float, int] | None = None
        """The lowest eval_loss and its step."""
        self.trained_seconds = self.tokens_trained = 0.0
        self.timed_tokens = 0.0
        self.skipped: list[int] = []
        """Steps without a finite loss, the first hundred."""
        self.skipped_count = 0
        self.out_of_order = 0
        """Lines that could not be used: without a step, or with one that is not greater than that before."""
        self.epoch: float | None = None

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Take the objects of some lines, in their order."""
        steps: list[int] = []
        found: dict[str, tuple[list[int], list[float]]] = {}
        for record in records:
            step = whole(record.get("step"))
            if step is None or (self.last_step is not None and step <= self.last_step):
                self.out_of_order += 1
                continue
            place = len(steps)
            steps.append(step)
            self.last_step = step
            if self.first_step is None:
                self.first_step = step
            for name, value in self._numbers(record):
                places, values = found.setdefault(name, ([], []))
                places.append(place)
                values.append(value)
            self._count(step, record)
        rows = {name: self.curves.row(name) for name in found}
        block = np.full((len(self.curves.names), len(steps)), np.nan)
        for name, (places, values) in found.items():
            block[rows[name], places] = values
        self.curves.add(steps, block)

    def _numbers(self, record: dict[str, Any]) -> list[tuple[str, float]]:
        """The names of curves and the values that a record gives them."""
        seconds, memory = nested(record.get("seconds")), nested(record.get("memory"))
        given = [(name, record[name]) for name in PLAIN if name in record]
        if seconds:
            given += [(name, seconds[term]) for term, name in _OF_TERMS.items() if term in seconds]
            given += self._by_axis("seconds.communication", seconds.get("communication"))
        given += [(name, memory[key]) for key, name in _OF_MEMORY.items() if key in memory]
        given += self._by_axis("communicated_bytes", record.get("communicated_bytes"))
        return [(name, found) for name, value in given if (found := number(value)) is not None]

    def _by_axis(self, group: str, given: object) -> list[tuple[str, object]]:
        """The values of an object by axis with the names of their curves; the first axes that are met are read."""
        found = []
        for axis, value in nested(given).items():
            name = self._known.get((group, axis)) or self._meet(group, axis)
            if name is not None:
                found.append((name, value))
        return found

    def _meet(self, group: str, axis: str) -> str | None:
        """The name of the curve of an axis that is new in its group; None where there are too many."""
        said = cut_short(axis, 60)
        if said not in self.axes and len(self.axes) >= MOST_AXES:
            self.axes_left_out = True
            return None
        if said not in self.axes:
            self.axes.append(said)
        return self._known.setdefault((group, axis), f"{group}.{said}")

    def _count(self, step: int, record: dict[str, Any]) -> None:
        """What is summed, and what the last or best record says."""
        seconds, speed = number(record.get("step_seconds")), number(record.get("tokens_per_second"))
        if seconds is not None:
            self.trained_seconds += seconds
            self.timed_tokens += seconds * (speed or 0.0)
        self.tokens_trained = number(record.get("tokens")) or self.tokens_trained
        self.epoch = number(record.get("epoch")) if record.get("epoch") is not None else self.epoch
        if "loss" in record and number(record["loss"]) is None:
            self.skipped_count += 1
            if len(self.skipped) < 100:
                self.skipped.append(step)
        evaluated = number(record.get("eval_loss"))
        if evaluated is not None and (self.best is None or evaluated < self.best[0]):
            self.best = (evaluated, step)
        if "memory" in record:
            kinds = nested(nested(record["memory"]).get("kinds_gib"))
            held = {kind: value for kind in KINDS if (value := number(kinds.get(kind))) is not None}
            self.kinds = held or self.kinds
        if "slowest" in record:
            self._count_slowest(nested(record["slowest"]))

    def _count_slowest(self, told: dict[str, Any]) -> None:
        """Which rank was the slowest of a step, and by how much."""
        rank, excess = whole(told.get("rank")), number(told.get("excess_seconds"))
        if rank is None or excess is None:
            return
        who = (rank, cut_short(told.get("machine") or "", 100))
        if who in self.slowest or len(self.slowest) < MOST_NAMED:
            times, seconds, machine = self.slowest.get(who, (0, 0.0, 0))
            self.slowest[who] = (times + 1, seconds + excess, machine + (told.get("whole_machine") is True))

    @property
    def steps(self) -> int:
        """The last step's number, 0 where there is none."""
        return self.last_step or 0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all steps by the seconds of all steps."""
        return self.timed_tokens / self.trained_seconds if self.trained_seconds else None

    @property
    def monitored(self) -> bool:
        """Whether any line says where the time went."""
        return any(f"seconds.{term}" in self.curves for term in TERMS)

    def seconds(self) -> dict[str, float]:
        """The mean seconds of a step by term, of communication by axis as `communication over col`; greatest first."""
        names = {f"seconds.{term}": term for term in TERMS}
        names |= {f"seconds.communication.{axis}": f"communication over {axis}" for axis in self.axes}
        found = {said: mean for name, said in names.items() if (mean := self.curves.mean(name)) is not None}
        return dict(sorted(found.items(), key=lambda item: -item[1]))
