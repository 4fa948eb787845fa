"""One run at a time in an output_dir: a lock that lives as long as the run does.

    output_dir/.lock    who holds it, as JSON (Owner); the time of its last change is the holder's last beat
    on one machine      every process of the run holds a shared flock on that file, and a start needs it alone: the
                        kernel drops it with the last of them, however they end
    between machines    one may not see the other's flock: the holder touches the file every BEAT seconds, and the lock
                        is stale after STALE seconds without
    taken over          another file takes the place of the old one; whoever held that finds another owner there, and
                        stops without writing

The launcher of machine 0 holds the lock (`RunLock`), or rank 0 under another launcher; every rank joins it (`Share`).
Imports no torch: launchers do without.
"""

import errno
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from json import dumps
from pathlib import Path

from tessera.checkpoint.lock_file import (
    WITHOUT_LOCKS,
    Owner,
    beats,
    boot_id,
    flock,
    is_at,
    is_locked,
    lives,
    open_lock,
    other_owner,
    pid_space,
    read_owner,
    silence,
)
from tessera.core import terminal
from tessera.core.errors import RunFailed, UserError
from tessera.core.files import in_words

LOCK = ".lock"
BEAT = 2.0
"""Seconds between two beats of a holder."""
STALE = 300.0
"""Seconds without a beat after which the lock of another machine is nobody's."""
PATIENCE = 3.0
"""Seconds that a start waits for the ranks of a run that was killed to be gone."""
LETTING_GO = 10.0
"""Seconds that a holder gets to notice that another has taken over."""


class InUse(UserError):
    """The refusal of a second run, in one line."""

    def __init__(self, output: Path, reason: str, hint: str) -> None:
        super().__init__("output_dir", output, reason, hint)
        self.args = (f"output_dir: {output} {reason}; {hint}",)


class Share:
    """A process of the run `id` that writes into `output`; an empty `id` means that nobody has locked it.

    Used as a context. Raises RunFailed when another run has taken over, `check` too.
    """

    def __init__(self, output: Path, id: str) -> None:
        self.path, self.id = output / LOCK, id
        self._descriptor: int | None = None
        self._looked, self._lost = 0.0, False

    def __enter__(self) -> "Share":
        if self.id:
            with suppress(OSError):  # without it the holder's beat still serves
                self._descriptor = open_lock(self.path, os.O_RDONLY)
                flock(self._descriptor, exclusive=False)
            self._look()
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def check(self) -> None:
        """Before something is written. Looks at the file twice a second at most; what was lost once stays lost."""
        if self.id and (self._lost or time.monotonic() > self._looked + 0.5):
            self._look()

    def _look(self) -> None:
        self._looked = time.monotonic()
        if other := other_owner(self.path, self.id):
            self._lost = True
            raise taken(self.path.parent, other)


class RunLock:
    """The lock of one run, used as a context: taken within, let go at its end.

    A run that ends well, or is refused, leaves neither the file nor folders that were made for it; a run that fails
    leaves the file and says there that it has ended. `id` is the run's own unless given: a launcher that starts all
    anew gives the same one again.
    """

    def __init__(self, take_over: bool = False, id: str | None = None) -> None:
        self.take_over, self.id = take_over, id or uuid.uuid4().hex
        self.before: Owner | None = None  # whose lock it was: for a restart, which goes on with the same run
        self._descriptor: int | None = None
        self._made: list[Path] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="tessera-lock", daemon=True)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._descriptor is None:
            return
        self._ended.set()
        if self._thread.is_alive():  # not where an error came between
            self._thread.join()
        if other_owner(self.path, self.id) is None:
            if kind is None or issubclass(kind, UserError):
                self.path.unlink(missing_ok=True)
            else:
                self._write(replace(self.owner, released=True))
        self._let_go()

    def take(self, output: Path) -> None:
        """Lock `output`, which is made if need be. Raises UserError when it is in use, or cannot be locked."""
        if self._descriptor is not None:
            return
        self.path = output / LOCK
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        self.owner = Owner(self.id, socket.gethostname(), boot_id(), pid_space(), os.getpid(), now)
        try:
            self._made = make_folders(output)
            settles = self._take(output)
            if settles:  # without a kernel's word two may have come at once: the last one has it
                time.sleep(1.0)
            if (other := other_owner(self.path, self.id)) is not None:
                raise _in_use(output, other, "")
        except OSError as error:
            self._let_go()
            reason = f"{LOCK} in it is a link" if error.errno == errno.ELOOP else f"cannot be locked: {in_words(error)}"
            raise UserError("output_dir", output, reason) from error
        except UserError:
            self._let_go()
            raise
        self._thread.start()

    def glance(self, output: Path) -> None:
        """Raise UserError when `output` is in use by what this machine sees; changes nothing."""
        until = time.monotonic() + PATIENCE
        while not self.take_over:
            try:
                descriptor = open_lock(output / LOCK, os.O_RDWR)
            except OSError:  # there is none; else `take` tells what is wrong
                return
            try:
                with suppress(OSError):
                    if not is_locked(descriptor):
                        return
            finally:
                os.close(descriptor)
            if time.monotonic() > until:
                raise _in_use(output, read_owner(output / LOCK), "")
            time.sleep(0.1)

    def check(self) -> None:
        """Raise RunFailed when another run has taken over."""
        if self._descriptor is not None and (other := other_owner(self.path, self.id)):
            raise taken(self.path.parent, other)

    def remember(self, run: str) -> None:
        """Keep what the ranks were handed, where the folder is locked."""
        if self._descriptor is None:
            return
        self.owner = replace(self.owner, run=run)
        self._write(self.owner)

    # ---- Taking it

    def _take(self, output: Path) -> bool:
        """Become the owner; whether that must settle, as no kernel has decided it."""
        until = time.monotonic() + PATIENCE
        while True:
            descriptor = self._descriptor = open_lock(self.path, os.O_RDWR | os.O_CREAT)
            try:
                flock(descriptor, exclusive=True)
                if is_at(descriptor, self.path):  # else its last holder has removed it meanwhile
                    wait = self._judge(output, locked=True)
                    self._write(self.owner)
                    flock(descriptor, exclusive=False)  # its ranks will share it
                    time.sleep(wait)
                    return False
            except BlockingIOError:
                if self.take_over:
                    self._take_over(output, descriptor)
                    return True
                if time.monotonic() > until:
                    raise _in_use(output, read_owner(self.path), "") from None
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                what = f"its file system has no locks ({in_words(error)})"
                terminal.say(f"output_dir: {output}: {what}; a run there is known by its beat alone")
                wait = self._judge(output, locked=False)
                self._replace()
                os.close(descriptor)
                time.sleep(wait)
                return True
            os.close(descriptor)
            self._descriptor = None
            time.sleep(0.1)

    def _judge(self, output: Path, locked: bool) -> float:
        """Raise UserError unless the owner that the file names is gone, where this kernel does not tell.

        Returns the seconds that an owner who may live gets to notice us.
        """
        owner = self.before = read_owner(self.path)
        if owner is None or owner.released or owner.id == self.id or (locked and owner.boot == boot_id()):
            return 0
        if owner.boot == boot_id() and owner.space == pid_space() and not lives(owner.pid):
            return 0
        silent = silence(self.path)
        if not self.take_over and (silent < STALE or beats(self.path, BEAT)):
            hint = f"its lock is nobody's after {STALE:.0f} s without a sign, or at once with --take-over"
            raise _in_use(output, owner, f"last sign {silent:.0f} s ago; {hint}")
        terminal.say(f"{output} is taken over from {owner}: no sign of it for {silent:.0f} s")
        return LETTING_GO if silent < STALE else 0

    def _take_over(self, output: Path, old: int) -> None:
        """Put our file in the place of the one open as `old`, and wait for its holders to notice."""
        self.before = read_owner(self.path)
        terminal.say(f"{output} is taken over from {self.before or 'a run that begins'}")
        self._replace()
        until = time.monotonic() + LETTING_GO
        while time.monotonic() < until and is_locked(old):
            time.sleep(0.1)
        os.close(old)

    def _replace(self) -> None:
        own = self.path.with_name(f"{LOCK}.{self.id}")
        self._descriptor = open_lock(own, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            self._write(self.owner)
            with suppress(OSError):
                flock(self._descriptor, exclusive=False)
            os.replace(own, self.path)
        except BaseException:
            own.unlink(missing_ok=True)
            raise

    def _let_go(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        remove_empty(self._made)

    def _write(self, owner: Owner) -> None:
        assert self._descriptor is not None
        content = dumps(asdict(owner)).encode()
        os.pwrite(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))

    # ---- Holding it

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # a disk that fails for a while
                os.utime(self._descriptor if self._descriptor is not None else self.path)
            # Whoever writes finds that out itself; this ends what does not come to it.
            if (other := other_owner(self.path, self.id)) and not self._ended.wait(LETTING_GO / 2):
                terminal.say(f"\n{taken(self.path.parent, other)}", error=True)
                os._exit(1)


def holder(output: Path) -> Owner | None:
    """Whose run goes on in `output`, None where none does: what a look tells that takes no lock and changes nothing."""
    owner = read_owner(output / LOCK)
    if owner is None or owner.released:
        return None
    if owner.boot == boot_id() and owner.space == pid_space():
        return owner if lives(owner.pid) else None
    return owner if silence(output / LOCK) < STALE else None


def make_folders(folder: Path) -> list[Path]:
    """Make a folder with its parents; those that were not there before, outermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(made: list[Path]) -> None:
    """Remove what `make_folders` made, as far as nothing lies in it."""
    for path in reversed(made):
        with suppress(OSError):
            path.rmdir()


def taken(output: Path, other: Owner) -> RunFailed:
    """The end of a run whose output_dir is another's now."""
    return RunFailed(f"stopped without writing: {output} was taken over by {other}")


def _in_use(output: Path, owner: Owner | None, hint: str) -> InUse:
    hint = hint or "wait for it or stop it, or use another folder"
    return InUse(output, f"is in use by {owner or 'a run that begins'}", hint)
