"""Where a rank is in its run: told to its launcher and, with `monitor`, timed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tessera.core import device as devices
from tessera.core.collectives import Recorder
from tessera.core.pages import SLOW
from tessera.engine.step import Step
from tessera.monitor.monitor import Monitor
from tessera.monitor.slow import Slow
from tessera.monitor.timeline import NOT_COUNTED
from tessera.train.events import Events
from tessera.train.where import Where

TIMED = 10
"""So many steps before a line are timed at most: marks are kept until then."""


class Measure:
    """Follows one rank through its steps; what was measured goes into the records of steps and to `events`.

    Without `monitored` it counts collectives and times nothing.
    """

    def __init__(self, where: Where, step: Step, events: Events, monitored: bool) -> None:
        self.where, self.events = where, events
        self.monitor = Monitor(step) if monitored else None
        self._slow = Slow()
        step.entered = self.enter
        if self.monitor is not None:
            mesh = step.mesh
            sizes = {axis: size for axis, size in mesh.sizes.items() if size > 1}
            about = {"ranks": mesh.world, "mesh": sizes, "machines": self.monitor.machines}
            events.measured(about | {"device": devices.describe(mesh.device)})

    def enter(self, phase: str, step: int | None = None) -> None:
        """Go on to another phase."""
        self.where.enter(phase, step)
        if self.monitor is not None:
            self.monitor.enter(phase)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Around something between two steps."""
        self.enter(phase)
        yield
        if self.monitor is not None:
            self.monitor.enter(NOT_COUNTED)

    def step(self, number: int, profiled: bool) -> AbstractContextManager[Recorder]:
        """Around one step: what it hands to torch.distributed. A `profiled` one takes longer, and is not timed."""
        if self.monitor is None:
            return Recorder()
        return self.monitor.step(timed=not profiled and -number % self.events.every < TIMED)

    def end(self, step: int) -> None:
        """The time of optimizer step `step` ends here."""
        if self.monitor is not None:
            self.monitor.end(step)

    def report(self, record: dict[str, Any]) -> None:
        """On steps that are shown: put what was measured since the last one into the record. Every rank calls it."""
        if self.monitor is None or not self.events.shows(record["step"]):
            return
        report, warnings = self.monitor.report(record["step"])
        record |= report.record
        self.events.measured(report.ranks)
        for warning in warnings:
            self.events.warn(warning)
        for warning in self._slow.step(record):
            self.events.warn(f"{warning}; see {SLOW}")
