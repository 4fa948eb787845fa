"""Looks after the ranks on this machine while the agent waits for them; see the table in workers.py."""

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tessera.core import terminal
from tessera.core.errors import RunFailed
from tessera.core.exhausted import kernel_kills
from tessera.core.pages import RANKS_DISAGREE
from tessera.launch.machines import Machines
from tessera.launch.outcome import EndKind, Outcome, describe, error_text, follows_from_another, timed_out
from tessera.launch.rank import STACK
from tessera.train.stop import stop_signals
from tessera.train.where import where_was

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

GRACE = 2.0
"""Seconds that the other ranks get to end by themselves after one has failed."""
STACK_SECONDS = 1.0
"""Seconds that a rank which hangs gets to write its stack."""

Processes = dict[int, "subprocess.Popen[bytes]"]


class StopSignals:
    """The signals to stop that this launcher got; while in this context they do nothing else.

    `newest` gives the newest whole checkpoint that the run has made, for the message where the ranks could save none.
    """

    def __init__(self, newest: Callable[[], str | None] = lambda: None) -> None:
        self.newest = newest
        self.seen: list[int] = []
        self.last = -math.inf
        self.handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._note) for s in stop_signals()}
            self.handlers[signal.SIGQUIT] = signal.getsignal(signal.SIGQUIT)  # the agent takes it
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # make and schedulers pass one Ctrl+C on, so that it arrives twice: that is still the first signal
        if time.monotonic() > self.last + 1:
            self.last = time.monotonic()
            self.seen.append(number)

    def error(self) -> RunFailed:
        """The end of ranks that did not get to save."""
        newest = self.newest()
        before = "" if newest else " before training had begun"
        when = " at the second signal" if len(self.seen) > 1 else before
        kept = f"; the newest whole checkpoint is {newest}" if newest else ""
        return RunFailed(f"stopped{when}: no checkpoint was saved{kept}", 128 + self.seen[0])

    def check(self, most: int = 0) -> None:
        """Raise RunFailed once there were more than `most` of them."""
        if len(self.seen) > most:
            raise self.error()


def exit_status(worker: "subprocess.Popen[bytes]") -> int | None:
    """How a process ended (not 0: with this code or signal), None while it runs; its status is left for the agent.

    Between the agent's look at a process and its signal the process must not be gone: the signal would raise.
    """
    if worker.returncode is not None or not hasattr(os, "waitid"):  # macOS before Python 3.13 has none
        return worker.poll()
    try:
        ended = os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # the agent has just taken it
        return worker.poll()
    return ended.si_status if ended else None


def is_held(process: int) -> bool:
    """Whether SIGSTOP, or Ctrl+Z, holds a process (Linux)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


class Watch:
    """The watch over one attempt."""

    def __init__(
        self,
        agent: "LocalElasticAgent",
        machines: Machines,
        attempt: int,
        signals: StopSignals,
        less_memory: Callable[[], list[str]] = lambda: [],
    ) -> None:
        self.agent, self.machines, self.attempt, self.signals = agent, machines, attempt, signals
        self.less_memory, self.kills = less_memory, kernel_kills()
        self.fallen: dict[int, float] = {}  # rank -> when it was first seen failed
        self.elsewhere: Outcome | None = None
        self.elsewhere_since = math.inf
        self.asked: set[int] = set()
        self.killed: set[int] = set()
        self.held: set[int] = set()  # by SIGSTOP, when they were killed
        self.asked_for_stacks = False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="tessera-launcher", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(0.05):
            running: Processes = {}
            for rank, worker in self._workers().items():
                status = exit_status(worker)
                if status is None:
                    running[rank] = worker
                elif status != 0:
                    self.fallen.setdefault(rank, time.monotonic())
            if self.elsewhere is None and (trouble := self.machines.trouble(self.attempt)):
                self.elsewhere, self.elsewhere_since = trouble, time.monotonic()
            if self.signals.seen:
                self._ask_to_stop(running)
            since = min([*self.fallen.values(), self.elsewhere_since])
            if running and (time.monotonic() > since + GRACE or len(self.signals.seen) > 1):
                self._ask_for_stacks(running)
                self._kill(running)

    def _workers(self) -> Processes:
        """The process of each rank here, none before they are started."""
        # The agent's public face has their pids, but polling a pid would take its status from the agent.
        context: Any = self.agent._pcontext
        if not context:
            return {}
        first = self.machines.place.rank * self.machines.processes
        return {first + local: handler.proc for local, handler in list(context.subprocess_handlers.items())}

    def _error_file(self, rank: int) -> Path:
        context: Any = self.agent._pcontext
        return Path(context.error_files[rank - self.machines.place.rank * self.machines.processes])

    def _ask_to_stop(self, running: Processes) -> None:
        if not self.asked and running:
            terminal.say("stopping: the ranks save and exit; a second signal kills them", error=True)
        for rank in running.keys() - self.asked:
            running[rank].send_signal(signal.SIGTERM)
            running[rank].send_signal(signal.SIGCONT)  # one that SIGSTOP holds would hear of it when it goes on
            self.asked.add(rank)

    def _ask_for_stacks(self, running: Processes) -> None:
        """The ranks that still run while others waited for them until the group's timeout are those that hang."""
        waited = any(timed_out(error_text(self._error_file(rank))) for rank in self.fallen)
        if self.asked_for_stacks or not (waited or self.elsewhere and self.elsewhere.timed_out):
            return
        self.asked_for_stacks = True
        files = {rank: self._error_file(rank).with_name(STACK) for rank in running}
        for rank, worker in running.items():
            if files[rank].exists():  # else it has no handler, and the signal would kill it
                worker.send_signal(signal.SIGUSR1)
        until = time.monotonic() + STACK_SECONDS
        while time.monotonic() < until and not all(f.exists() and f.stat().st_size for f in files.values()):
            time.sleep(0.05)
        time.sleep(0.05)  # so that what is being written is whole

    def _kill(self, running: Processes) -> None:
        for rank in running.keys() - self.killed:
            if is_held(running[rank].pid):
                self.held.add(rank)
            with suppress(ProcessLookupError):  # it may have ended by now
                os.killpg(running[rank].pid, signal.SIGKILL)  # each worker leads a group of its own
            self.killed.add(rank)

    # ---- Afterwards

    def outcome(self, failures: Mapping[int, "ProcessFailure"]) -> Outcome:
        """What to tell of the ranks: the one that hung, or else fell first and not because of another."""
        stopped = bool(self.signals.seen)
        if not failures:
            return Outcome(stopped=stopped)
        texts = {rank: error_text(failure.error_file) for rank, failure in failures.items()}
        waited = any(timed_out(text) for text in texts.values())

        def follows(rank: int) -> bool:
            return rank in self.killed or follows_from_another(texts[rank], failures[rank].exitcode)

        fallen = [*self.fallen, *sorted(failures.keys() - self.fallen.keys())]
        rank = min((r for r in fallen if r in failures), key=follows)
        hung = waited or self.elsewhere and self.elsewhere.timed_out
        if stopped and follows(rank) and not (hung and len(self.signals.seen) == 1):
            error = self.signals.error()
            return Outcome("own", str(error), error.exit_code, again=False, stopped=True)
        if follows(rank) and hung:
            # The agent asks the others to end with SIGTERM; who hangs before it handles that dies of it.
            ended = {r: f for r, f in failures.items() if r in self.killed or f.exitcode == -signal.SIGTERM}
            if ended:
                return Outcome("hung", self._hung_text(ended), 1, stopped=stopped, timed_out=True)
        text, code, again = describe(
            rank, failures[rank], self.machines.where, where_was(self._error_file(rank)), self._of_memory
        )
        kind: EndKind = "follows" if follows(rank) else "own"
        return Outcome(kind, text, code, again or kind == "follows", stopped, waited)

    def _of_memory(self) -> list[str]:
        """What to tell of a rank that SIGKILL has ended."""
        by_kernel = kernel_kills() > self.kills
        told = "memory ran out: the kernel killed it" if by_kernel else "the kernel does that when memory runs out"
        newest = self.signals.newest()
        kept = [f"  the newest whole checkpoint is {newest}"] if newest else []
        return [f"  {told}", *kept, *self.less_memory()]

    def _hung_text(self, failures: Mapping[int, "ProcessFailure"]) -> str:
        lines = []
        for rank, failure in sorted(failures.items()):
            who = f"rank {rank} (process {failure.pid}{self.machines.where})"
            lines.append(f"{who} hung: the others waited for it until group_timeout_minutes had passed")
            stack = self._error_file(rank).with_name(STACK)  # a rank that wrote no error has no file in its failure
            words = stack.read_text().splitlines() if stack.exists() else []
            held = "it was held by SIGSTOP, which kill -CONT ends" if rank in self.held else "it gave no stack"
            lines += [f"  {line}" for line in words] or [f"  {held}"]
        if newest := self.signals.newest():
            lines.append(f"the newest whole checkpoint is {newest}")
        return "\n".join([*lines, f"what to do: {RANKS_DISAGREE}"])
