"""Where a rank is in its run: told to its launcher and, with `monitor`, timed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tessera.config.schema import TrainConfig
from tessera.core import device as devices
from tessera.core.collectives import Recorder
from tessera.core.errors import UserError, cut_short
from tessera.core.pages import SLOW
from tessera.engine.step import Step
from tessera.models.config import ModelConfig
from tessera.monitor.beside import Beside
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
        self._slow, self._of = Slow(), step
        self._profiled = False  # whether the step that goes on is
        self.beside: Beside | None = None
        """On the first rank, once `predict` has said what to expect: what was measured beside it."""
        step.entered = self.enter
        if self.monitor is not None:
            mesh = step.mesh
            sizes = {axis: size for axis, size in mesh.sizes.items() if size > 1}
            about = {"ranks": mesh.world, "mesh": sizes, "machines": self.monitor.machines}
            events.measured(about | {"device": devices.describe(mesh.device)})

    def predict(self, config: TrainConfig, model: ModelConfig) -> None:
        """Say what a step should take, and compare from now on; nothing where nothing is measured. Fails no run."""
        if self.monitor is None or self._of.mesh.rank > 0:
            return
        try:
            from tessera.train.foresee import foresee_run  # the planner: no other rank needs it

            prediction = foresee_run(config, model, self._of.model.parallel)
        except Exception as error:  # of any kind: what is predicted is worth less than the run
            why = f"{error.reason}: {error.hint}" if isinstance(error, UserError) else cut_short(error, 300)
            self.events.say(f"no prediction: {why}")
            return
        self.beside = Beside(prediction)
        self.events.predicted(str(prediction), prediction.record())

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
        self._profiled = profiled
        if self.monitor is None:
            return Recorder()
        return self.monitor.step(timed=not profiled and -number % self.events.every < TIMED)

    def end(self, step: int) -> None:
        """The time of optimizer step `step` ends here."""
        if self.monitor is not None:
            self.monitor.end(step)

    def report(self, record: dict[str, Any]) -> None:
        """On steps that are shown: put what was measured since the last one into the record. Every rank calls it."""
        self._measured(record)
        if self.beside is not None:
            self.beside.step(record, self._profiled)

    def _measured(self, record: dict[str, Any]) -> None:
        if self.monitor is None or not self.events.shows(record["step"]):
            return
        report, warnings = self.monitor.report(record["step"])
        record |= report.record
        self.events.measured(report.ranks)
        for warning in warnings:
            self.events.warn(warning)
        for warning in self._slow.step(record):
            self.events.warn(f"{warning}; see {SLOW}")
