"""Faults on purpose: which collectives of a step there are to leave out, one at a time."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tessera.core.collectives import Recorder

APART = ("all_to_all", "send", "receive")
"""Kinds that some groups of ranks meet less often than others, as their documents ask less of each other."""


class Omission(NamedTuple):
    """The collective to leave out: its number (from 0) in the step, its axis and kind.

    `occurrence`: of a kind in APART, which of this axis and kind it is.
    """

    number: int
    axis: str
    kind: str
    occurrence: int = 0

    def __str__(self) -> str:
        return f"collective {self.number + 1} of the step, {self.kind} over {self.axis}"


@dataclass(frozen=True)
class Program:
    """The collectives of a step as one rank meets them: (axis, kind) and its place in the rank's own list of records.

    `together` is as long on every rank; it has None where others shift and this one does not, as Cannon's skew moves
    nothing on some. `apart` has the others, along each axis in their order.
    """

    together: tuple[tuple[str, str, int] | None, ...]
    apart: tuple[tuple[str, str, int], ...]

    @classmethod
    def of(cls, recorder: Recorder) -> "Program":
        together: list[tuple[str, str, int] | None] = []
        apart: list[tuple[str, str, int]] = []
        for place, record in enumerate(recorder.records):
            together += [None] * recorder.idle.count(place)
            met = (record.axis, record.kind, place)
            (apart if record.kind in APART else together).append(met)
        return cls((*together, *[None] * recorder.idle.count(len(recorder.records))), tuple(apart))

    def place(self, omission: Omission) -> int | None:
        """Where it stands in this rank's own list of records; None when it takes no part."""
        if omission.kind in APART:
            of_kind = [place for *which, place in self.apart if which == [omission.axis, omission.kind]]
            return of_kind[omission.occurrence] if omission.occurrence < len(of_kind) else None
        met = self.together[omission.number]
        return None if met is None else met[2]


def omissions(everyone: Sequence[Program]) -> list[Omission]:
    """Every collective of a step, given what each rank meets: those of all ranks in their order, then those apart."""
    columns = zip(*(program.together for program in everyone), strict=True)
    found = [Omission(n, *next(met for met in column if met)[:2]) for n, column in enumerate(columns)]
    most: Counter[tuple[str, str]] = Counter()
    for program in everyone:
        most |= Counter((axis, kind) for axis, kind, _ in program.apart)
    for (axis, kind), times in most.items():
        found += [Omission(len(found) + n, axis, kind, n) for n in range(times)]
    return found
