"""Which rank the others wait for, and whether a whole machine is slow."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

MACHINE_SLOWER = 1.1
"""A machine is slow when each of its ranks takes so many times what any rank elsewhere takes."""


@dataclass(frozen=True)
class Slowest:
    """The rank with the most work of its own; `excess` is its seconds a step above the median of the others.

    `whole_machine`: all ranks of its machine are slower than all others; `excess` is then between the medians of both.
    """

    rank: int
    machine: str
    excess: float
    whole_machine: bool = False

    def record(self) -> dict[str, object]:
        """As it stands in metrics.jsonl."""
        return {
            "rank": self.rank,
            "machine": self.machine,
            "excess_seconds": self.excess,
            "whole_machine": self.whole_machine,
        }


def slowest_of(own_work: Sequence[float], machines: Sequence[str]) -> Slowest | None:
    """The slowest rank, of the seconds that each spends on work of its own; None for one rank.

    `machines` names each rank's. E.g. `slowest_of([1.0, 1.5, 1.1], ["a", "a", "a"])` is rank 1 with 0.45 s.
    """
    if len(own_work) < 2:
        return None
    rank = max(range(len(own_work)), key=own_work.__getitem__)
    machine = machines[rank]
    here = [w for w, at in zip(own_work, machines, strict=True) if at == machine]
    elsewhere = [w for w, at in zip(own_work, machines, strict=True) if at != machine]
    if elsewhere and min(here) > MACHINE_SLOWER * max(elsewhere):
        return Slowest(rank, machine, median(here) - median(elsewhere), whole_machine=True)
    others = [w for other, w in enumerate(own_work) if other != rank]
    return Slowest(rank, machine, own_work[rank] - median(others))
