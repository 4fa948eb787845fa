"""Temporary folders of launchers, which outlive none of them: what a killed one left goes with the next start.

Each holds a file that its launcher has locked as long as it lives; the kernel says so, whatever process has its number
by then. Folders are made by mkdtemp: of a name that nobody knows before, and open to their user alone.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "tessera-run-"
_OWNER = "owner"
_YOUNG = 60.0  # seconds in which a folder may not have its file yet


@contextmanager
def scratch() -> Iterator[str]:
    """A new folder for as long as the context lasts; removes those of launchers that are gone."""
    sweep_scratch()
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX)
        owner = os.open(Path(folder) / _OWNER, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with suppress(OSError):  # another start may have looked in between
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (Path(folder) / _OWNER).exists():
            break
        os.close(owner)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)


def sweep_scratch() -> None:
    """Remove the folders whose launcher is gone: our own user's, no links."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.geteuid():
                continue
            try:
                owner = os.open(folder / _OWNER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                if time.time() - status.st_mtime > _YOUNG:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error: it is alive, or locks are not to be had
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(owner)
