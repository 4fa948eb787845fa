"""The file that locks an output_dir: who it names, what the kernel and its age tell of that. Imports no torch."""

import errno
import os
import socket
import stat
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from tessera.core.files import parse_json

WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""How a file system says that it has no locks."""
_LIMIT = 2**20


@dataclass(frozen=True)
class Owner:
    """Who holds a lock: a run, and the process that holds it for the run.

    `boot` names the machine and its last start, `space` what `pid` counts in (a container has its own numbers).
    `released`: it has ended. `run`: what its ranks were handed, for a launcher that starts them again from nothing.
    """

    id: str
    host: str = "?"
    boot: str = "?"
    space: str = "?"
    pid: int = 0
    since: str = "?"
    released: bool = False
    run: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def read_owner(path: Path) -> Owner | None:
    """Whom a lock file names; None when there is none or it is empty, an unknown owner when it cannot be read."""
    try:
        descriptor = open_lock(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        content = os.pread(descriptor, _LIMIT, 0)
        told = parse_json(content) if content else None
    except (OSError, ValueError):
        return Owner("?")
    finally:
        os.close(descriptor)
    if told is None:
        return None
    types = {name: type(value) for name, value in asdict(Owner("")).items()}
    if not isinstance(told, dict) or {name: type(value) for name, value in told.items()} != types:
        return Owner("?")
    return Owner(**told)


def other_owner(path: Path, id: str) -> Owner | None:
    """Whom the file names, if not the run `id`; a file that is gone names nobody."""
    owner = read_owner(path)
    return None if owner is None or owner.id == id else owner


def open_lock(path: Path, flags: int) -> int:
    """A descriptor of a regular file; raises OSError. A link is not followed, a pipe does not make us wait."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} in it is no file")
    return descriptor


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this name by now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def silence(path: Path) -> float:
    """Seconds since the last beat."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0


def beats(path: Path, beat: float) -> bool:
    """Whether the file is touched while we watch for three beats: clocks of machines differ, and jump."""
    before, until = _mark(path), time.monotonic() + 3 * beat
    while time.monotonic() < until:
        time.sleep(beat / 4)
        if _mark(path) != before:
            return True
    return False


def _mark(path: Path) -> int:
    try:
        descriptor = open_lock(path, os.O_RDONLY)  # opening it makes a network file system look anew
    except OSError:
        return 0
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def flock(descriptor: int, *, exclusive: bool) -> None:
    """Lock without waiting. Raises BlockingIOError when others have it, another OSError where there are no locks."""
    try:
        import fcntl  # Unix alone has it
    except ImportError:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)) from None
    fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)


def is_locked(descriptor: int) -> bool:
    """Whether another has it. If not, it is ours afterwards. Raises OSError where there are no locks."""
    try:
        flock(descriptor, exclusive=True)
    except BlockingIOError:
        return True
    return False


def lives(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def pid_space() -> str:
    """What process ids are counted in: containers have numbers of their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "?"


def boot_id() -> str:
    """The same in every process that runs on this kernel, in containers too; another after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()}-{uuid.getnode()}"
