"""Faults on purpose: which collectives of a step there are to leave out, one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tessera.core.collectives import Recorder


class Omission(NamedTuple):
    """The collective to leave out: its number (from 0) in the step, its axis and kind."""

    number: int
    axis: str
    kind: str

    def __str__(self) -> str:
        return f"collective {self.number + 1} of the step, {self.kind} over {self.axis}"


@dataclass(frozen=True)
class Program:
    """The collectives of a step as one rank meets them, (axis, kind) each; None where others shift and it does not.

    It is as long on every rank: Cannon's skew moves nothing on some.
    """

    collectives: tuple[tuple[str, str] | None, ...]

    @classmethod
    def of(cls, recorder: Recorder) -> "Program":
        met: list[tuple[str, str] | None] = []
        for place, record in enumerate(recorder.records):
            met += [None] * recorder.idle.count(place)
            met.append((record.axis, record.kind))
        return cls((*met, *[None] * recorder.idle.count(len(recorder.records))))

    def place(self, omission: Omission) -> int | None:
        """Where it stands in this rank's own list of records; None when it takes no part."""
        if self.collectives[omission.number] is None:
            return None
        return sum(met is not None for met in self.collectives[: omission.number])


def omissions(everyone: Sequence[Program]) -> list[Omission]:
    """Every collective of a step, given what each rank meets."""
    columns = zip(*(program.collectives for program in everyone), strict=True)
    return [Omission(n, *next(met for met in column if met)) for n, column in enumerate(columns)]
