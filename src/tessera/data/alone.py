"""A folder that several processes may make at the same time: one does, the others wait for it and take what it made.

The lock is the kernel's, on a file beside the folder: it ends with its process, however that ends. Where the disk has
no locks each makes the folder by itself, and the first to rename its own into place wins.
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tessera.core.files import remove


@contextmanager
def alone(folder: Path, waiting: Callable[[], None]) -> Iterator[Path]:
    """A name beside `folder` to make it under, while nobody else does; folders that are made for it go again if empty.

    `waiting` is called where another process is at work. What is left under the name is removed at the end, and what
    killed processes have left at the beginning. OSError: nothing can be written there.
    """
    above = [place for place in (folder.parent, *folder.parent.parents) if not place.exists()]
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock")
        descriptor = _locked(lock, waiting)
        try:
            try:
                _sweep(folder, everything=descriptor is not None)
                yield beside
            finally:
                _sweep(folder, everything=False)
        finally:
            if descriptor is not None:
                with suppress(OSError):
                    lock.unlink()
                os.close(descriptor)
    finally:
        for place in above:
            with suppress(OSError):  # not empty
                place.rmdir()


def _locked(path: Path, waiting: Callable[[], None]) -> int | None:
    """The descriptor of the lock file, locked; None where there are no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:  # the one before has removed it, at its end
            pass
        except OSError:
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _sweep(folder: Path, everything: bool) -> None:
    """Remove what processes have made beside `folder`: this one, or, with `everything`, all that are gone."""
    number = r"\d+" if everything else str(os.getpid())
    with suppress(OSError):
        for entry in list(os.scandir(folder.parent)):
            if re.fullmatch(rf"\.{re.escape(folder.name)}\.{number}(\.old)?", entry.name):
                remove(Path(entry.path))


def put_in_place(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`; what was there makes room at once, and goes when the caller sweeps. OSError."""
    old = made.with_name(f"{made.name}.old")
    if os.path.lexists(folder):
        folder.rename(old)  # removed in place and killed meanwhile, it would be neither ours nor empty
    try:
        made.rename(folder)
    except OSError:
        if os.path.lexists(old) and not os.path.lexists(folder):
            old.rename(folder)
        raise
