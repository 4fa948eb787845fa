"""What the launchers of a run on several machines know of one another.

    machine 0      hosts a store at the main address; every launcher is its client
    a line each    who I am, a beat, the attempt that I am in, how past attempts ended here, my last word
    every BEAT     each launcher writes its own line and reads those of the others, from a thread

A machine is lost when its beat stands still for LOST seconds, or, for machine 0, when the store is gone. An attempt
begins when every launcher has come to it: `meet`. It has ended when every launcher has said how: `settle`. All read the
same lines, so all come to the same verdict, and nobody has to announce it. On one machine nothing of this is needed.

Anybody who reaches the store can write there. A line counts only with the code of this run (token.py) and a beat that
is not older than the last one; others are ignored, and said to be.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessera.checkpoint.lock import make_folders, remove_empty
from tessera.core import terminal
from tessera.core.errors import RunFailed, UserError
from tessera.core.files import in_words
from tessera.launch.interface import LOOPBACK, listening, own_address
from tessera.launch.outcome import Outcome, cause
from tessera.launch.token import GIVEN, host_seal, joined_seal, own_seal

if TYPE_CHECKING:
    from torch.distributed import TCPStore

BEAT = 0.5
"""Seconds between two beats of a launcher."""
LOST = 10.0
"""Seconds without a beat after which a machine counts as lost."""
COMING = 600.0
"""Seconds that machines wait for one another to come, at first."""

_POLL = 0.05


@dataclass(frozen=True)
class Place:
    """Which of how many machines this is, and where machine 0 is found."""

    machines: int = 1
    rank: int = 0
    address: str = LOOPBACK
    port: int = 0


HANDED = "tessera/handed"
"""The key of a store under which ranks find what they are to do."""


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of an attempt find one another: a store of its own, and the checkpoint they go on from."""

    store: "TCPStore"
    address: str
    port: int
    resume: str | None


class Patience:
    """Tells when a sign has not changed for LOST seconds, not counting those in which this process slept itself."""

    def __init__(self) -> None:
        self.sign: object = None
        self.last, self.waited = time.monotonic(), 0.0

    def over(self, sign: object) -> bool:
        """Whether `sign`, asked for often, has been the same for too long."""
        now = time.monotonic()
        self.waited = self.waited + min(now - self.last, 2 * BEAT) if sign == self.sign else 0.0
        self.sign, self.last = sign, now
        return self.waited > LOST


class Machines:
    """The machines of a run, seen from the launcher on one of them; used as a context. Starts no process.

    `folder`, which all see, is where machine 0 leaves the run's token for the others; without one it must be given.
    """

    def __init__(self, place: Place, processes: int, folder: Path | None = None) -> None:
        self.place, self.processes, self.folder = place, processes, folder or Path()
        self.address, self.seal = place.address, own_seal()
        self.token_file: Path | None = None
        self.made: list[Path] = []
        self.refused: set[int] = set()
        self.others = [rank for rank in range(place.machines) if rank != place.rank]
        self.own: dict[str, Any] = {"beat": 0, "attempt": -1, "meeting": None, "outcomes": [], "left": None}
        self.lines: dict[int, dict[str, Any]] = {}
        self.ticks = 0
        self.broken: Outcome | None = None
        self.lock, self.wake, self.ended = threading.Lock(), threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._beat, name="tessera-machines", daemon=True)
        self._own_ticks, self._patience = Patience(), {rank: Patience() for rank in self.others}

    # ---- Coming and leaving

    def __enter__(self) -> "Machines":
        if self.others:
            self.own |= {"host": self._host(), "machines": self.place.machines, "processes": self.processes}
            self.store = self._connect()
            self._agree_on_seal()
            if self.place.rank and self.store.add(f"claimed/{self.place.rank}", 1) > 1:
                reason = "another launcher has come as this machine"
                raise UserError("--machine-rank", self.place.rank, reason, "give each machine a rank of its own")
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if not self.others:
            return
        if self.thread.is_alive():
            told = "" if error is None else str(error) or kind.__name__ if kind else ""
            self._say(left={"text": told, "exit_code": getattr(error, "exit_code", 1 if error else 0)})
            self._let_the_others_read()
        if self.token_file is not None:
            self.token_file.unlink(missing_ok=True)
            remove_empty(self.made)
        self.ended.set()
        self.wake.set()
        self.thread.join(2 * BEAT)  # not for ever: the store may not answer any more

    def _agree_on_seal(self) -> None:
        if self.place.rank:
            self.store.set_timeout(timedelta(seconds=COMING))
            try:
                self.seal = joined_seal(self.store, self.folder)
            except RuntimeError:  # as torch's store calls every error
                raise self._lost_machine(0).error() from None
        else:
            try:
                if not os.environ.get(GIVEN):
                    self.made = make_folders(self.folder)
                self.seal, self.token_file = host_seal(self.store, self.folder)
            except OSError as error:
                remove_empty(self.made)
                reason = f"the run's token cannot be left there: {in_words(error)}"
                raise UserError("output_dir", self.folder, reason, f"or set {GIVEN} on every machine") from error
        self.store.set_timeout(timedelta(seconds=LOST))

    def _host(self) -> str:
        try:
            return f"{socket.gethostname()}, {own_address(self.place.address)}"
        except OSError as error:
            reason = f"no way leads there from this machine: {error.strerror or error}"
            raise UserError("--main-process-ip", self.place.address, reason) from None

    def _connect(self) -> "TCPStore":
        from torch.distributed import DistError  # torch: on one machine a launcher does without

        place = self.place
        if place.rank == 0:
            self.address = own_address(place.address)  # machine 0's own name may lead to itself alone
            try:
                return _hosted(self.address, place.port, COMING)
            except OSError as error:
                reason = f"cannot be listened at on {self.address}: {error.strerror or error}"
                raise UserError("--main-process-port", place.port, reason, "give another port to all") from None
        try:
            return _joined(place.address, place.port, COMING)
        except DistError:
            where = f"{place.address} port {place.port}"
            raise RunFailed(f"machine 0 did not answer at {where} for {COMING:.0f} s: was it started?") from None

    def _let_the_others_read(self) -> None:
        """Stay until the last word is in the store, and on machine 0, which hosts it, until the others have left or are
        lost."""
        until, ticks = time.monotonic() + 2 * LOST, self.ticks
        while time.monotonic() < until and self.broken is None and self.thread.is_alive():
            present = [rank for rank, line in list(self.lines.items()) if line["left"] is None and not self._lost(rank)]
            if self.place.rank == 0 and self.ticks >= ticks + 2 and not present:
                return
            time.sleep(_POLL)

    # ---- The lines

    def _say(self, **changes: Any) -> None:
        with self.lock:
            self.own |= changes
        self.wake.set()

    def _beat(self) -> None:
        try:
            while not self.ended.is_set():
                self.wake.clear()
                with self.lock:
                    self.own["beat"] += 1
                    line, leaving = json.dumps(self.own), self.own["left"] is not None and self.place.rank != 0
                name = f"line/{self.place.rank}"
                self.store.set(name, self.seal.sealed(name, line))
                if leaving:  # machine 0 may be gone as soon as it has read that: torch would print a stack trace
                    return
                for rank in self.others:
                    if rank in self.lines or self.store.check([f"line/{rank}"]):
                        self._read(rank)
                self.ticks += 1
                self.wake.wait(BEAT)
        except RuntimeError:  # as torch's store calls every error
            self.broken = self._lost_machine(0)

    def _read(self, rank: int) -> None:
        text = self.seal.opened(f"line/{rank}", self.store.get(f"line/{rank}"))
        line = None if text is None else json.loads(text)
        if line is not None and line["beat"] >= self.lines.get(rank, line)["beat"]:
            self.lines[rank] = line
        elif rank not in self.refused:
            self.refused.add(rank)
            why = "that was said before" if line else "without the token of this run"
            if line is None and rank not in self.lines and os.environ.get(GIVEN):
                why += f": is {GIVEN} the same there?"
            terminal.say(f"ignored a message in the name of {self._name(rank)}, {why}", error=True)

    def _lost(self, rank: int) -> bool:
        return rank in self.lines and self._patience[rank].over(self.lines[rank]["beat"])

    def _name(self, rank: int) -> str:
        host = self.lines.get(rank, {}).get("host")
        if host is None and rank == 0:
            host = self.place.address
        return f"machine {rank} ({host})" if host else f"machine {rank}"

    def _lost_machine(self, rank: int) -> Outcome:
        how = "its store is gone" if rank == 0 else f"no sign of its launcher for {LOST:.0f} s"
        return Outcome("lost", f"{self._name(rank)} is lost: {how}; the ranks here were ended", 1, again=False)

    def _outcome(self, rank: int, attempt: int) -> Outcome | None:
        """How `attempt` ended on another machine: as it said itself, or because it left or is lost."""
        line = self.lines.get(rank)
        if line is None:
            return None
        if len(line["outcomes"]) > attempt:
            return Outcome(**line["outcomes"][attempt])
        if line["left"] is not None:
            word = line["left"]["text"] or "its launcher has left"
            return Outcome("own", f"{self._name(rank)}: {word}", line["left"]["exit_code"] or 1, again=False)
        return self._lost_machine(rank) if self._lost(rank) else None

    def _disagreement(self) -> UserError | None:
        for rank, line in list(self.lines.items()):
            for key, name in (("machines", "--num-machines"), ("processes", "processes on a machine")):
                if line[key] != self.own[key]:
                    reason = f"{self._name(rank)} was started with {line[key]}"
                    return UserError(name, self.own[key], reason, "start every machine with the same options")
        return None

    # ---- Attempts

    @property
    def where(self) -> str:
        """What to add to the name of a rank."""
        return f" on machine {self.place.rank}, {self.own['host']}" if self.others else ""

    def trouble(self, attempt: int) -> Outcome | None:
        """Why the ranks of `attempt` cannot go on here: it failed on another machine, or that is lost."""
        if not self.others:
            return None
        if self.broken is None and self._own_ticks.over(self.ticks):  # the store takes nothing any more
            self.broken = self._lost_machine(0)
        ended = [outcome for rank in self.others if (outcome := self._outcome(rank, attempt))]
        return cause([*ended, self.broken] if self.broken else ended)

    def meet(
        self,
        attempt: int,
        resume: Callable[[], str | None],
        handed: Callable[[str | None], str],
        check: Callable[[], None],
    ) -> Meeting:
        """Come to `attempt` and wait for the others. Raises RunFailed or UserError when they cannot all come.

        Machine 0 asks `resume` for the checkpoint to go on from, and leaves for the ranks what `handed` makes of it;
        `check` is called often and may raise.
        """
        if self.place.rank == 0:
            goes_on = resume()
            try:
                store = _hosted(self.address, 0, 3 * LOST)
            except OSError as error:
                raise RunFailed(f"cannot listen at {self.address}: {error.strerror or error}") from error
            store.set(HANDED, self.seal.sealed(HANDED, handed(goes_on)))
            self._say(attempt=attempt, meeting=[attempt, store.port, goes_on])
            self._wait(attempt, lambda: all(self._came(rank, attempt) for rank in self.others), check)
            return Meeting(store, self.address, store.port, goes_on)
        self._say(attempt=attempt)
        self._wait(attempt, lambda: all(self._came(rank, attempt) for rank in self.others), check)
        _, port, goes_on = self.lines[0]["meeting"]
        return Meeting(_joined(self.address, port, 3 * LOST), self.address, port, goes_on)

    def _came(self, rank: int, attempt: int) -> bool:
        return rank in self.lines and bool(self.lines[rank]["attempt"] >= attempt)

    def _wait(self, attempt: int, done: Callable[[], bool], check: Callable[[], None]) -> None:
        until = time.monotonic() + COMING
        while not done():
            check()
            if trouble := self.trouble(attempt):
                raise trouble.error()
            if wrong := self._disagreement():
                raise wrong
            if time.monotonic() > until and any(rank not in self.lines for rank in self.others):  # others are at work
                missing = ", ".join(self._name(rank) for rank in self.others if rank not in self.lines)
                raise RunFailed(f"waited {COMING:.0f} s in vain for {missing}: was it started?")
            time.sleep(_POLL)

    def settle(self, attempt: int, outcome: Outcome, check: Callable[[], None]) -> list[Outcome]:
        """Say how `attempt` ended here, and wait until it is known how it ended everywhere."""
        if not self.others:
            return [outcome]
        self._say(outcomes=[*self.own["outcomes"], outcome.as_dict()])
        while self.broken is None:
            self.trouble(attempt)  # notices when the store takes nothing any more
            ended = [self._outcome(rank, attempt) for rank in self.others]
            if all(ended):
                return [outcome, *(other for other in ended if other)]
            check()
            time.sleep(_POLL)
        return [outcome, *filter(None, (self._outcome(rank, attempt) for rank in self.others)), self.broken]


def _hosted(address: str, port: int, seconds: float) -> "TCPStore":
    """A store that listens at `address` alone: one that binds by itself listens at every address. Raises OSError."""
    from torch.distributed import TCPStore  # as above

    made, patience = listening(address, port), timedelta(seconds=seconds)
    port = made.getsockname()[1]
    return TCPStore(address, port, None, True, patience, wait_for_workers=False, master_listen_fd=made.detach())


def _joined(address: str, port: int, seconds: float) -> "TCPStore":
    from torch.distributed import TCPStore  # as above

    return TCPStore(address, port, None, False, timedelta(seconds=seconds), wait_for_workers=False)
