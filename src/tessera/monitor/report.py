"""What all ranks measured, put together: the line of metrics.jsonl and a number of each rank."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from tessera.core.axes import AXES
from tessera.monitor.idle import SETS, mask_of
from tessera.monitor.memory import KINDS
from tessera.monitor.slowest import Slowest, slowest_of
from tessera.monitor.timeline import BESIDE, IN_STEP

TERMS = (*IN_STEP, "idle", *BESIDE)
GIB = 2**30


@dataclass
class Row:
    """What one rank has of the steps since the last report: seconds by term and by axes, bytes.

    `kinds` are bytes by kind of memory at the peak of a step that was counted so, if one was. `leaks` says that the
    rank has found what grows.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    communication: dict[tuple[str, ...], float] = field(default_factory=dict)
    held: int = 0
    peak: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    leaks: bool = False

    def numbers(self) -> list[float]:
        """As many numbers for every rank."""
        along = sorted((mask_of(axes), seconds) for axes, seconds in self.communication.items())[:SETS]
        along += [(0, 0.0)] * (SETS - len(along))
        return [
            *(self.seconds.get(term, 0.0) for term in TERMS),
            *(number for pair in along for number in pair),
            *(self.kinds.get(kind, 0) for kind in KINDS),
            *(self.held, self.peak, self.leaks),
        ]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Row":
        """The row with these numbers."""
        left = iter(numbers)
        seconds = {term: next(left) for term in TERMS}
        pairs = [(int(next(left)), next(left)) for _ in range(SETS)]
        communication = {
            tuple(axis for i, axis in enumerate(AXES) if mask >> i & 1): spent for mask, spent in pairs if mask
        }
        kinds = {kind: int(next(left)) for kind in KINDS}
        held, peak, leaks = left
        return cls(seconds, communication, int(held), int(peak), kinds if any(kinds.values()) else {}, bool(leaks))


@dataclass(frozen=True)
class Report:
    """`record` is for the line of metrics.jsonl; `ranks`, with a number of each rank, for monitor.jsonl."""

    record: dict[str, Any]
    ranks: dict[str, Any]
    slowest: Slowest | None


def report_of(rows: Sequence[Row], machines: Sequence[str], step: int, timed: int, steps: int) -> Report:
    """The report after `step`, of the `steps` since the last one, of which `timed` have times.

    `rows` and `machines` have one for each rank.
    """
    each: dict[str, Any] = {
        term: [row.seconds[term] / max(1, steps if term in BESIDE else timed) for row in rows] for term in TERMS
    }
    sets = sorted({axes for row in rows for axes in row.communication}, key=mask_of)
    along = {"·".join(axes): [row.communication.get(axes, 0.0) / max(1, timed) for row in rows] for axes in sets}
    slowest = slowest_of([sum(each[t][r] for t in IN_STEP) for r in range(len(rows))], machines) if timed else None
    now, peak = [row.held / GIB for row in rows], [row.peak / GIB for row in rows]
    memory: dict[str, Any] = {"now_gib": max(now), "peak_gib": max(peak)}
    ranks: dict[str, Any] = {"step": step}
    fullest = max(rows, key=lambda row: sum(row.kinds.values()))
    if fullest.kinds:
        memory["kinds_gib"] = {kind: size / GIB for kind, size in fullest.kinds.items()}
        ranks["memory_kinds_gib"] = {kind: [row.kinds.get(kind, 0) / GIB for row in rows] for kind in KINDS}
    record: dict[str, Any] = {"memory": memory}
    if timed:
        means = {term: fmean(of_ranks) for term, of_ranks in each.items()}
        means_along = {axes: fmean(of_ranks) for axes, of_ranks in along.items()}
        record |= {"seconds": means | {"communication": means_along}}
        record |= {"slowest": slowest.record() if slowest else None}
        ranks["seconds"] = each | {"communication": along}
    ranks |= {"memory_now_gib": now, "memory_peak_gib": peak}
    return Report(record, _short(ranks), slowest)


def _short(value: Any) -> Any:
    """The same with numbers of four digits: a line has many, and a run many lines."""
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [float(f"{number:.4g}") for number in value]
    return value
