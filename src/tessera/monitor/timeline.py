"""The time of a rank's steps, cut into terms: phases of the step, less what the rank spent in collectives.

    phase of the step        term
    data                     data: until this rank has its micro-batches
    forward, backward        compute
    optimizer                optimizer
    other                    other: checks at the end of a step
    evaluation, save         the same; between steps, so beside the step's time

Every moment of a step belongs to one phase. Time inside a collective (issuing it, where that blocks, and waiting for
it) is taken out of its phase: it is communication, or idle where a slower rank had not come yet (idle.py).
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tessera.core.clock import Clock, Mark
from tessera.core.recorder import GATHER_WAIT, Span

TERM = {"forward": "compute", "backward": "compute", "data": "data", "optimizer": "optimizer"}
IN_STEP = ("compute", "data", "optimizer", "other")
"""The terms of a step that are a rank's own work; with communication and idle they are the step's time."""
BESIDE = ("evaluation", "save")
NOT_COUNTED = "between"
"""The phase of what is done after a step's time was taken: its line is written, the next step begins."""


@dataclass(slots=True)
class Waits:
    """One collective of this rank, in seconds: when it came, and each time it stood in it.

    `peer` and `waited_for` are those of the span.
    """

    kind: str
    axes: tuple[str, ...]
    peer: int | None
    waited_for: bool
    arrival: float | None
    times: list[tuple[float, float]]


@dataclass
class Timeline:
    """Seconds by term, and the collectives, since the last `clear`.

    `enter` marks where a phase begins; `settle` turns marks into seconds, and is called when the device has passed
    them. E.g. after `enter("data")` at 1.0 and `enter("forward")` at 1.5, "data" has 0.5 s.
    """

    clock: Clock
    seconds: dict[str, float] = field(default_factory=dict)
    waits: list[Waits] = field(default_factory=list)
    _phases: list[tuple[str, Mark]] = field(default_factory=list)
    _spans: list[Span] = field(default_factory=list)
    _begun: tuple[int, int] = (0, 0)  # of the phases and spans, how many are from before this step

    def enter(self, phase: str) -> None:
        self._phases.append((phase, self.clock.mark()))

    def begin_step(self) -> None:
        """What comes now, from the phase that has just begun, is a step."""
        self._begun = (max(0, len(self._phases) - 1), len(self._spans))

    def add(self, spans: Iterable[Span]) -> None:
        """Take the collectives of a step."""
        self._spans += spans

    def settle(self) -> None:
        """Count all phases but the last, which goes on. Every mark so far has been passed."""
        self._settle([])
        self._phases = self._phases[-1:]

    def drained(self, phase: str) -> None:
        """Count all phases, and go on to another: the device has nothing left to do."""
        self._settle([self.clock.now()])
        self.clock.start()
        self._phases = [(phase, self.clock.mark())]

    def drop_step(self) -> None:
        """Forget this step, of which nothing was settled, but for the phase that goes on."""
        phases, spans = self._begun
        self._phases, self._spans = [*self._phases[:phases], *self._phases[-1:]], self._spans[:spans]

    def clear(self) -> None:
        """Begin to count anew; marks that are not settled stay."""
        self.seconds.clear()
        self.waits.clear()

    def _settle(self, end: list[float]) -> None:
        phases = [(phase, self.clock.seconds(mark)) for phase, mark in self._phases]
        starts = [start for _, start in phases]
        for (phase, start), following in zip(phases, [*starts[1:], *end], strict=False):
            self._count(phase, following - start)
        gathers: dict[tuple[str, ...], deque[float | None]] = {}
        for span in self._spans:
            waits = self._settled(span)
            if span.kind == "all_gather":
                gathers.setdefault(span.axes, deque()).append(waits.arrival)
            elif span.kind == GATHER_WAIT and gathers.get(span.axes):  # it came when it issued what it waits for
                waits.arrival, waits.waited_for = gathers[span.axes].popleft(), True
            self.waits.append(waits)
            for begin, until in waits.times:
                phase = phases[max(0, bisect_right(starts, begin) - 1)][0] if phases else NOT_COUNTED
                self._count(phase, begin - until)
        self._spans, self._begun = [], (0, 0)

    def _count(self, phase: str, seconds: float) -> None:
        if phase != NOT_COUNTED:
            term = TERM.get(phase, phase if phase in BESIDE else "other")
            self.seconds[term] = self.seconds.get(term, 0.0) + seconds

    def _settled(self, span: Span) -> Waits:
        moments = [self.clock.seconds(mark) for mark in span.marks]
        pairs = list(zip(moments[::2], moments[1::2], strict=False))
        arrival = moments[0] if moments else None
        # a GPU goes on while the host issues: what it may wait for comes at the wait
        times = pairs if self.clock.blocks else pairs[1:]
        return Waits(span.kind, span.axes, span.peer, span.waited_for, arrival, times)
