"""Files of a run, written: what stopped one is told in words, with the bytes needed and free, and nothing half stays.

Libraries hide the system's error: torch says "unexpected pos 704 vs 598" where the disk is full, numpy that it wrote 0
of 400 items, safetensors and tokenizers put it into a text, and DCP gathers it from ranks without what caused it.
"""

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tessera.core.errors import RunFailed, UserError
from tessera.core.files import in_words, remove
from tessera.core.text import human

_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OS_ERROR = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)|\[Errno (\d+)\]")  # of Rust and of Python
_HIDDEN = re.compile(r"unexpected pos \d+|PytorchStreamWriter failed|\d+ requested and \d+ written")


class NotWritten(RunFailed):
    """A file that could not be written while a run was going; the message is one line: which, why, bytes."""


@contextmanager
def writing(
    path: Path, needs: int | None = None, partial: Path | None = None, failures: list[NotWritten] | None = None
) -> Iterator[None]:
    """What keeps `path` from being written here becomes `NotWritten`; other errors pass.

    `needs` are the bytes that are written, where that is known; `partial` is what is removed after a failure. The error
    goes into `failures`, where given, instead of being raised: others wait for this rank.
    """
    try:
        yield
    except (RunFailed, UserError):
        raise
    except Exception as error:
        found = system_error(error, path)
        if found is None:
            raise
        if partial is not None:
            remove(partial)
        failure = NotWritten(why(found, path, needs))
        if failures is None:
            raise failure from error
        failures.append(failure)


def replace_file(path: Path, content: bytes) -> None:
    """Write `path` so that at each moment it has its old content or this one. Raises OSError; nothing else is left."""
    part = path.with_name(f".{path.name}.part")
    try:
        remove(part)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        remove(part)
        raise


def system_error(error: BaseException, path: Path) -> OSError | None:
    """The system's error behind what a library raised while it wrote `path`; None where it was none of a file."""
    seen: list[BaseException] = []
    following: list[BaseException | None] = [error]
    while following:
        one = following.pop(0)
        if one is None or one in seen:
            continue
        if isinstance(one, OSError) and one.errno is not None:
            return one
        seen.append(one)
        failures = getattr(one, "failures", None)  # of DCP: (error, traceback) of each rank
        inner = list(failures.values()) if isinstance(failures, dict) else []
        following += [i[0] if isinstance(i, tuple) else i for i in inner] + [one.__cause__, one.__context__]
    texts = [str(one) for one in seen]
    for text in texts:
        if match := _OS_ERROR.search(text):
            return OSError(int(match[match.lastindex or 1]), text)
    if any(_HIDDEN.search(text) for text in texts) or isinstance(error, OSError):
        return OSError(errno.ENOSPC if _is_full(path) else errno.EIO, texts[0])
    return None


def why(error: OSError, path: Path, needs: int | None = None) -> str:
    """One line: the file, what keeps it from being written and, where space is the matter, bytes needed and free."""
    told = [in_words(error)]
    file = error.filename if isinstance(error.filename, str) else path
    if error.errno == errno.ENOENT and not os.path.exists(Path(file).parent):
        told = [f"the folder {Path(file).parent} is not there (any more)"]
    if error.errno in _SPACE:
        with suppress(OSError):
            status = os.statvfs(_existing(path))
            if error.errno == errno.ENOSPC and status.f_files and not status.f_favail:
                told = ["no inode is left on the disk: it has too many files"]
            free = f"{human(status.f_bavail * status.f_frsize)} are free"
            told.append(free if needs is None else f"{human(needs)} are needed, {free}")
    elif error.errno == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        told += [] if limit == resource.RLIM_INFINITY else [f"ulimit -f allows {human(limit)}"]
        told += [] if needs is None else [f"{human(needs)} are needed"]
    return f"{file}: {', '.join(told)}"


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(above for above in (path, *path.absolute().parents) if os.path.exists(above))


def _is_full(path: Path) -> bool:
    """Whether hardly a block is left; an error that does not say what it was is then that one."""
    status = os.statvfs(_existing(path))
    return status.f_bavail * status.f_frsize < 2**20 or bool(status.f_files and not status.f_favail)
