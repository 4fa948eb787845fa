"""Torch's profiler for a few steps of a run: a trace of each, and a table of where their time went.

    output_dir/profile/rank-0-step-4.json.gz    a trace of one step, which https://ui.perfetto.dev opens
    output_dir/profile/summary.txt, .json       seconds by kind of work, the mean of the steps (rank 0)
    output_dir/profile/summary-rank-1.txt …     of another rank

Each step has a profiler of its own, so that a trace holds one step and memory is let go after it. One step before them
runs under a profiler whose trace is dropped: the first is slow to start. Traces of all steps of a rank together take
at most LARGEST bytes before they are compressed.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.profiler import profile, record_function

from tessera.core import device as devices
from tessera.core import terminal
from tessera.core.errors import cut_short
from tessera.core.mesh import Mesh
from tessera.core.recorder import Recorder
from tessera.core.text import human
from tessera.core.writing import replace_file
from tessera.monitor.profiled import STEP, Spent, spent
from tessera.monitor.summary import as_json, as_text

FOLDER = "profile"
LARGEST = 256 * 2**20


class Profiler:
    """Profiles the steps `numbers` of a run on this rank; none of the others. What fails here ends no run.

    `check` raises when output_dir is another run's by now; `say` shows lines to the user, those of the first rank.
    """

    def __init__(
        self,
        output: Path,
        numbers: range,
        mesh: Mesh,
        *,
        check: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = terminal.say,
    ) -> None:
        self.folder, self.numbers, self.rank, self.device = output / FOLDER, numbers, mesh.rank, mesh.device
        self.check, self.say = check, say
        self.taken: dict[int, Spent] = {}
        self.bytes = 0

    @contextmanager
    def step(self, number: int) -> Iterator[bool]:
        """One step of the run, by its number: profiled if it is one of those to profile; whether a profiler runs."""
        warms = number + 1 == self.numbers.start and len(self.numbers) > 0
        running = self._begun(number) if warms or number in self.numbers else None
        if running is None:
            yield False
            return
        watch, within = running
        try:
            with within:
                yield True
                devices.synchronize(self.device)
        except BaseException:
            with suppress(Exception):
                watch.stop()
            raise
        self.check()
        with self._failing_alone():
            watch.stop()
            if not warms:
                self._keep(number, watch)

    def _begun(self, number: int) -> tuple[Any, ExitStack] | None:
        """A profiler that runs and what labels the step in it; None where it cannot be started."""
        running = None
        with self._failing_alone():
            devices.synchronize(self.device)
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it writes to the terminal when it begins and ends
            watch = profile(activities=devices.profiled_activities(self.device))
            watch.start()
            with ExitStack() as within:
                within.enter_context(Recorder(label=record_function))
                within.enter_context(record_function(f"{STEP} {number}"))
                running = watch, within.pop_all()
        return running

    def _keep(self, number: int, watch: Any) -> None:
        """Write the trace of a step, and the table of all so far."""
        self.folder.mkdir(exist_ok=True)
        if not self.taken:
            for old in self.folder.glob(f"rank-{self.rank}-step-*.json.gz"):
                old.unlink()
        part = self.folder / f".rank-{self.rank}.json"
        try:
            watch.export_chrome_trace(str(part))
            size = part.stat().st_size
            if self.bytes + size > LARGEST:
                self.numbers = range(0)
                told = f"the trace of step {number} has {human(size)}, all may have {human(LARGEST)}"
                self._tell(f"profile: {told} (rank {self.rank}): it is not kept, and no further step is profiled")
                self._show()
                return
            self.bytes += size
            trace = json.loads(part.read_bytes())
        finally:
            part.unlink(missing_ok=True)
        trace.pop("traceName", None)  # the name that the file had until now
        content = json.dumps(trace, separators=(",", ":")).encode()
        replace_file(self.folder / f"rank-{self.rank}-step-{number}.json.gz", gzip.compress(content, 6))
        self.taken[number] = spent(trace)
        self._write_summary()
        if number == self.numbers[-1]:
            self._show()

    def _write_summary(self) -> None:
        name = "summary" if self.rank == 0 else f"summary-rank-{self.rank}"
        content = json.dumps(as_json(self.rank, self.taken), indent=1) + "\n"
        replace_file(self.folder / f"{name}.json", content.encode())
        replace_file(self.folder / f"{name}.txt", as_text(self.rank, self.taken).encode())

    def _show(self) -> None:
        """Show the first rank's table, after the last step."""
        if self.taken and self.rank == 0:
            for line in as_text(self.rank, self.taken).splitlines():
                self.say(line)
            self.say(f"profile: {self.folder} has the traces, for https://ui.perfetto.dev, and this table")

    @contextmanager
    def _failing_alone(self) -> Iterator[None]:
        """What is raised here is told once, and the run goes on without a profiler."""
        try:
            yield
        except Exception as error:  # of any kind: a profile is worth less than the run
            self.numbers = range(0)
            self._tell(f"the profiler failed on rank {self.rank}, the run goes on without it: {cut_short(error, 300)}")

    def _tell(self, trouble: str) -> None:
        """A line for the user from any rank; of all but the first, stderr alone is shown."""
        terminal.say(trouble, error=True) if self.rank else self.say(trouble)
