"""Phases and collectives as marks of a clock, turned into seconds by term; a clock is handed in."""

import pytest

from tessera.core.recorder import GATHER_WAIT, Span
from tessera.monitor.timeline import NOT_COUNTED, Timeline


class Hand:
    """A clock that shows what it is set to."""

    def __init__(self, blocks: bool = True) -> None:
        self.blocks, self.time, self.zero = blocks, 0.0, 0.0

    def mark(self) -> float:
        return self.time

    def start(self) -> None:
        self.zero = self.time

    def now(self) -> float:
        return self.time

    def seconds(self, mark: float) -> float:
        assert mark >= self.zero, "a mark from before the device was idle last"
        return mark


def step(clock: Hand, timeline: Timeline) -> Span:
    """data 1 s, forward 2 s, backward 4 s with a collective issued for 0.25 s and waited for 1 s, optimizer 0.5 s."""
    for phase, seconds in (("data", 1.0), ("forward", 2.0)):
        timeline.enter(phase)
        clock.time += seconds
    timeline.enter("backward")
    span = Span("all_gather", ("col",), clock)  # type: ignore[arg-type]
    for seconds in (0.25, 1.75, 1.0):
        span.mark()
        clock.time += seconds
    span.mark()
    clock.time += 1.0
    timeline.enter("optimizer")
    clock.time += 0.5
    timeline.enter(NOT_COUNTED)
    clock.time += 9.0
    timeline.enter("save")
    clock.time += 0.125
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


def test_a_device_that_is_drained_goes_on_with_another_phase():
    clock = Hand(blocks=False)
    timeline = Timeline(clock)  # type: ignore[arg-type]
    timeline.enter("forward")
    clock.time = 1.0
    timeline.enter("backward")
    clock.time = 2.5
    timeline.drained("optimizer")
    assert timeline.seconds == {"compute": 2.5} and clock.zero == 2.5
    clock.time = 3.0
    timeline.enter(NOT_COUNTED)
    timeline.settle()
    assert timeline.seconds == {"compute": 2.5, "optimizer": 0.5}


def test_a_step_that_is_dropped_takes_nothing_of_those_before_with_it():
    clock = Hand()
    timeline = Timeline(clock)  # type: ignore[arg-type]
    step(clock, timeline)
    timeline.enter("data")
    timeline.begin_step()
    clock.time += 5.0
    step(clock, timeline)
    timeline.drop_step()
    timeline.settle()
    assert timeline.seconds == {"data": 1.0, "compute": 4.75, "optimizer": 0.5, "save": 0.125}
    assert len(timeline.waits) == 1


def test_a_wait_for_a_gather_came_when_the_gather_was_issued():
    """As FSDP2 waits on a GPU: gathers are issued ahead, waits come in their order."""
    clock = Hand(blocks=False)
    timeline = Timeline(clock)  # type: ignore[arg-type]
    timeline.enter("forward")
    spans = [Span(kind, ("shard",), clock) for kind in ("all_gather", "all_gather", GATHER_WAIT, GATHER_WAIT)]  # type: ignore[arg-type]
    for span in spans:
        span.mark()
        span.mark()
        if span.kind == GATHER_WAIT:
            span.waited_for = False
            with span.within():
                clock.time += 1.0
        clock.time += 1.0
    timeline.add(spans)
    timeline.settle()
    waits = [one for one in timeline.waits if one.times]
    assert [(one.arrival, one.waited_for, one.times) for one in waits] == [
        (0.0, True, [(2.0, 3.0)]),
        (1.0, True, [(4.0, 5.0)]),
    ]
