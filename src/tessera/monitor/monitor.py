"""Monitor: what a rank measures of each step, and what all ranks make of it on logging steps.

    a step                this rank                                    all ranks
    begin                 marks where data begin
    phases, collectives   mark when they begin and end
    end                   bytes held
    on logging steps      terms of the steps since the last one        idle time told from communication; a table of all

Some steps are counted whole by kind of memory (counted.py), which makes them slower: they have no terms of time.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from tessera.core import device as devices
from tessera.core.axes import AXES
from tessera.core.clock import Clock, clock_for
from tessera.core.collectives import Recorder, all_gather, gathered
from tessera.core.errors import cut_short
from tessera.core.pages import OUT_OF_MEMORY
from tessera.engine.step import Step
from tessera.monitor.counted import CountedSteps
from tessera.monitor.idle import Together
from tessera.monitor.memory import Leak, MemoryByKind
from tessera.monitor.report import Report, Row, report_of
from tessera.monitor.timeline import BESIDE, NOT_COUNTED, Timeline
from tessera.nn.parameter import to_local


class Monitor:
    """Measures the steps that `step` does on this rank. Every rank makes the same calls.

    What fails in it ends no run: the rank measures nothing more, takes part in reports, and says so there.
    """

    def __init__(self, step: Step, clock: Clock | None = None) -> None:
        self.mesh, self._of = step.mesh, step
        self.clock = clock or clock_for(self.mesh.device)
        self.timeline = Timeline(self.clock)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.mesh.world))
        first_here = self.mesh.rank - int(os.environ.get("LOCAL_RANK", self.mesh.rank % here))
        places = gathered((socket.gethostname(), first_here), self.mesh.world)
        self.machines = _names(places)
        self._together = Together(self.mesh, places)
        self._done = 0  # steps of this process
        self._since = self._timed = 0  # since the last report: all steps, and those whose time counts
        self._times = False  # whether the time of this step counts
        self._recorder: Recorder | None = None
        self._counted = CountedSteps()
        self._counting: MemoryByKind | None = None
        self._kinds: dict[str, int] = {}
        self._leak = Leak()
        self._found: str | None = None
        self._broken = False

    def enter(self, phase: str) -> None:
        """This rank goes on to another phase of its step, or to what lies between steps."""
        with self._failing_alone():
            if self._counting is not None:
                self._counting.phase = phase
            if phase == "optimizer" and self._times and not self.clock.blocks:
                self._drained(phase)  # the norm has just been read
            elif not self._broken and (phase in (*BESIDE, NOT_COUNTED, "data") or self._times):
                self.timeline.enter(phase)

    @contextmanager
    def step(self, timed: bool = True) -> Iterator[Recorder]:
        """Around data, forward, backward and update of one step, whose collectives are in the recorder given.

        Its time counts if `timed`, and if its memory is not counted.
        """
        counted, model = self._counted.next_is(self._done + 1), self._of.model
        self._times = timed and not counted and not self._broken
        if counted:
            state = [t for of in self._of.optimizer.state.values() for t in of.values() if torch.is_tensor(t)]
            self._counting = MemoryByKind([*model.parameters(), *state])
        self._recorder = Recorder(
            clock=self.clock if self._times else None, made=self._counting.brought if self._counting else None
        )
        self.timeline.begin_step()
        with self._counting or nullcontext(), self._recorder:
            yield self._recorder
        with self._failing_alone():
            if self._times and not self.clock.blocks and self._recorder.spans:
                self._drained("other")  # a step without an update: its norm was read last
            elif self._times:
                self.timeline.add(self._recorder.spans)
                self.timeline.enter("other")
            if self._counting is not None:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        self._counting.label(to_local(parameter.grad), "states")
                self._kinds = self._counting.peak_by_kind()
        self._recorder = self._counting = None

    def end(self, step: int) -> None:
        """The time of optimizer step `step` is over; what follows lies between steps."""
        self.enter(NOT_COUNTED)
        self._done += 1
        self._since += 1
        self._timed += self._times
        with self._failing_alone():
            if not self._times:
                self.timeline.drop_step()
            if leak := self._leak.step(devices.held_memory_bytes(self.mesh.device), step):
                self._found = f"{leak}; see {OUT_OF_MEMORY}"
        self._times = False

    def report(self, step: int) -> tuple[Report, list[str]]:
        """What the steps since the last report took, and lines that warn of leaks. Every rank calls it."""
        timeline, everyone, device = self.timeline, self.mesh.group(AXES), self.mesh.device
        if self.clock.blocks:
            self._settle()
        idle, communication = self._together.split([] if self._broken else timeline.waits)
        self._settle()  # on a GPU too all is passed, now that ranks have met
        held, peak = devices.held_memory_bytes(device), devices.peak_memory_bytes(device)
        own = Row(timeline.seconds | {"idle": idle}, communication, held, peak, self._kinds, bool(self._found))
        numbers = torch.tensor([own.numbers()], dtype=torch.float64, device=device)
        rows = [Row.of(row) for row in all_gather(numbers, 0, everyone).tolist()]
        self._counted.reported(self._done, [row.peak for row in rows])
        report = report_of(rows, self.machines, step, self._timed, self._since)
        warnings = []
        if any(row.leaks for row in rows):
            found = gathered(self._found, self.mesh.world)
            warnings = [f"rank {rank}: {what}" for rank, what in enumerate(found) if what]
        timeline.clear()
        self._since, self._timed, self._kinds, self._found = 0, 0, {}, None
        return report, warnings

    def _drained(self, phase: str) -> None:
        """The device has passed every mark and has nothing left to do."""
        assert self._recorder is not None
        self.timeline.add(self._recorder.spans)
        self._recorder.spans = []
        self.timeline.drained(phase)

    def _settle(self) -> None:
        with self._failing_alone():
            if not self._broken:
                self.timeline.settle()

    @contextmanager
    def _failing_alone(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: what is measured is worth less than the run
            self._broken, self.timeline = True, Timeline(self.clock)
            self._found = f"the monitor failed, this rank is measured no more: {cut_short(error, 300)}"


def _names(places: Sequence[tuple[str, int]]) -> list[str]:
    """A name of each rank's machine, given its host and its first rank; hosts of one name are told apart by that."""
    hosts = {first: host for host, first in places}
    twice = [host for host in hosts.values() if list(hosts.values()).count(host) > 1]
    return [f"{host} from rank {first}" if host in twice else host for host, first in places]
