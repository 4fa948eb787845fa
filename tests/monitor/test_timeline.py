"""Phases and collectives as marks of a clock, turned into seconds by term; a clock is handed in."""

import pytest

from tessera.core.recorder import Span
from tessera.monitor.timeline import NOT_COUNTED, Timeline


class Hand:
    """A clock that shows what it is set to."""

    def __init__(self, blocks: bool = True) -> None:
        self.blocks, self.now, self.zero = blocks, 0.0, 0.0

    def mark(self) -> float:
        return self.now

    def start(self) -> None:
        self.zero = self.now

    def seconds(self, mark: float) -> float:
        assert mark >= self.zero, "a mark from before the device was idle last"
        return mark


def step(clock: Hand, timeline: Timeline) -> Span:
    """data 1 s, forward 2 s, backward 4 s with a collective issued for 0.25 s and waited for 1 s, optimizer 0.5 s."""
    for phase, seconds in (("data", 1.0), ("forward", 2.0)):
        timeline.enter(phase)
        clock.now += seconds
    timeline.enter("backward")
    span = Span("all_gather", ("col",), clock)  # type: ignore[arg-type]
    for seconds in (0.25, 1.75, 1.0):
        span.mark()
        clock.now += seconds
    span.mark()
    clock.now += 1.0
    timeline.enter("optimizer")
    clock.now += 0.5
    timeline.enter(NOT_COUNTED)
    clock.now += 9.0
    timeline.enter("save")
    clock.now += 0.125
    timeline.enter(NOT_COUNTED)
    timeline.add([span])
    return span


@pytest.mark.parametrize("blocks", [True, False])
def test_terms_are_phases_less_collectives(blocks):
    """Where the host does not block, it is busy while it issues: only the wait is taken out of the phase."""
    clock = Hand(blocks)
    timeline = Timeline(clock)  # type: ignore[arg-type]
    step(clock, timeline)
    timeline.settle()
    exposed = 1.25 if blocks else 1.0
    assert timeline.seconds == {"data": 1.0, "compute": 6.0 - exposed, "optimizer": 0.5, "save": 0.125}
    (waits,) = timeline.waits
    assert waits.arrival == 3.0 and waits.times == [(3.0, 3.25), (5.0, 6.0)][0 if blocks else 1 :]


def test_what_is_settled_stays_and_what_goes_on_is_counted_later():
    clock = Hand(blocks=False)
    timeline = Timeline(clock)  # type: ignore[arg-type]
    timeline.enter("backward")
    clock.now = 2.0
    timeline.enter("optimizer")
    timeline.settle()
    timeline.restart()
    assert timeline.seconds == {"compute": 2.0} and clock.zero == 2.0
    clock.now = 3.0
    timeline.enter(NOT_COUNTED)
    timeline.settle()
    assert timeline.seconds == {"compute": 2.0, "optimizer": 1.0}


def test_a_step_that_is_dropped_counts_nothing():
    clock = Hand()
    timeline = Timeline(clock)  # type: ignore[arg-type]
    step(clock, timeline)
    timeline.drop()
    timeline.settle()
    assert timeline.seconds == {} and timeline.waits == []
