"""Seconds of a call on several ranks: all begin together, and the slowest counts.

Every rank decides alike how often a call is repeated, from times that all of them know.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tessera.core import device as devices
from tessera.core.collectives import all_reduce, largest
from tessera.core.mesh import Mesh


@dataclass(frozen=True)
class Timed:
    """A call's seconds, and how far the middle half of its rounds lies apart, as a share of them.

    Of the rounds the lower quartile: what else the machine does makes some of them slow, and nothing makes one fast.
    """

    seconds: float
    spread: float


@dataclass(frozen=True)
class Effort:
    """How long one thing is measured: `seconds` of calls, in so many `rounds`."""

    seconds: float = 0.15
    rounds: int = 9


QUICK = Effort(0.02, 3)
MOST_CALLS = 2000


class Timer:
    """Times calls on the ranks of `mesh`. Every rank asks for the same things in the same order, and gets the same.

    A rank that gives None for a call waits for the others.
    """

    def __init__(self, mesh: Mesh, effort: Effort) -> None:
        self.mesh, self.effort = mesh, effort
        self.group = mesh.group(mesh.present(mesh.numbering))

    def time(self, call: Callable[[], object] | None) -> Timed:
        """Seconds of one `call`."""
        return self.each([call])[0]

    def each(self, calls: Sequence[Callable[[], object] | None]) -> list[Timed]:
        """Seconds of each of `calls`, whose rounds take turns: what else the machine does for a moment meets all."""
        work = [(call or _nothing) for call in calls]
        counts = [self._calls_of_a_round(call) for call in work]
        rounds = [list(map(self._round, work, counts)) for _ in range(self.effort.rounds)]
        return [self._timed(list(own)) for own in zip(*rounds, strict=True)]

    def _calls_of_a_round(self, call: Callable[[], object]) -> int:
        self._round(call, 1)  # what is made once is made here
        (first,) = self._slowest([self._round(call, 1)])
        return max(1, min(MOST_CALLS, int(self.effort.seconds / self.effort.rounds / max(first, 1e-7))))

    def _timed(self, rounds: list[float]) -> Timed:
        seconds = sorted(self._slowest(rounds))
        low, high = seconds[len(seconds) // 4], seconds[-1 - len(seconds) // 4]
        return Timed(low, (high - low) / low)

    def beside(self, start: Callable[[], Callable[[], object]], compute: Callable[[], object]) -> tuple[float, float]:
        """Seconds of `compute` while what `start` begins goes on, and those until that has ended.

        `start` returns what waits for the end. Both are the lower quartile of rounds.
        """
        took = []
        for _ in range(1 + self.effort.rounds):
            self._begin()
            begun = self._mark()
            wait = start()
            compute()
            computed = self._mark()
            wait()
            took.append(self._between(begun, computed, self._mark()))
        inside, after = (self._slowest([times[place] for times in took[1:]]) for place in (0, 1))
        return sorted(inside)[len(inside) // 4], sorted(after)[len(after) // 4]

    def _begin(self) -> None:
        """Wait until every rank is here and its device has nothing left to do."""
        all_reduce(torch.zeros((), device=self.mesh.device), self.group).item()
        devices.synchronize(self.mesh.device)

    def _round(self, call: Callable[[], object], calls: int) -> float:
        self._begin()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        devices.synchronize(self.mesh.device)
        return (time.perf_counter() - begun) / calls

    def _mark(self) -> float | torch.cuda.Event:
        if self.mesh.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, *marks: float | torch.cuda.Event) -> list[float]:
        devices.synchronize(self.mesh.device)
        pairs = zip(marks, marks[1:], strict=False)
        return [b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in pairs]  # type: ignore[operator, arg-type]

    def _slowest(self, seconds: list[float]) -> list[float]:
        own = torch.tensor(seconds, dtype=torch.float64, device=self.mesh.device)
        return [max(1e-9, value) for value in largest(own, self.group).tolist()]


def powers_to(ranks: int) -> list[int]:
    """1, 2, 4 … below `ranks`, and `ranks`: numbers of ranks that compute at once."""
    return sorted({2**power for power in range(ranks.bit_length()) if 2**power < ranks} | {ranks})


def _nothing() -> None:
    pass
