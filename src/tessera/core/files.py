"""Files from outside, opened and parsed in one place: whatever is wrong with one becomes one `UserError`.

Only regular files are opened (a FIFO would wait for ever, a device has no end), up to a size, and JSON up to a depth.
"""

import errno
import itertools
import json
import os
import re
import select
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tessera.core.errors import UserError
from tessera.core.text import human

SMALL = 100 * 2**20
"""Bytes of the largest file that is read whole."""
DEPTH = 100
"""The deepest nesting of a JSON file; those of models and tokenizers have at most ten levels."""
PATIENCE = 10
"""Seconds that a pipe's writer may be silent."""

_WORDS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "does not exist",
    errno.ENOTDIR: "a part of the path is no folder",
    errno.EISDIR: "is a folder",
    errno.ELOOP: "links lead in a circle",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the quota of disk space is used up",
    errno.EFBIG: "the file would be larger than allowed",
    errno.EMFILE: "too many files are open in this process: raise ulimit -n",
    errno.ENFILE: "too many files are open on this machine",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system has lost it",
}
SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half of a character: JSON and YAML can write it, no file and no tokenizer takes it."""


def in_words(error: OSError | ValueError) -> str:
    """Why the system refused a file, without numbers: "permission denied"."""
    number = getattr(error, "errno", None)
    if number in _WORDS:
        return _WORDS[number]
    if "null" in str(error):
        return "the name holds a NUL character"
    return str(getattr(error, "strerror", None) or error)


def usable_path(text: str) -> str:
    """A path as a user writes it, with a leading ~ filled in. Raises ValueError with why no file can be called so."""
    try:
        path = os.path.expanduser(text)
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError("the name holds what the file system cannot write") from None
    if b"\0" in encoded:
        raise ValueError("the name holds a NUL character")
    if len(encoded) > 4095 or any(len(part) > 255 for part in encoded.split(b"/")):
        raise ValueError("the name is too long")
    if path.startswith("~"):
        raise ValueError(f"there is no user {path[1:].partition('/')[0]}, whose home it names")
    return path


@contextmanager
def writing_target(path: Path, key: str) -> Iterator[None]:
    """Turn the system's refusal to write `path`, which the option `key` named, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(key, path, in_words(error)) from error


def check_target(path: Path, key: str) -> None:
    """Raise UserError unless a file can be written to `path`: in a folder that exists and admits it, over no folder."""
    try:
        usable_path(str(path))
        if path.is_dir():
            raise UserError(key, path, "is a folder", "give the name of a file in it")
        if not path.absolute().parent.is_dir():
            raise UserError(key, path, f"its folder {path.parent} does not exist", "make it first, or write elsewhere")
        if path.exists() and not path.is_file() and not path.is_char_device():
            raise UserError(key, path, "is no regular file")
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(key, path, in_words(error)) from error
    place = path if path.exists() else path.absolute().parent
    if not os.access(place, os.W_OK):
        raise UserError(key, path, f"{place} cannot be written: permission denied")


def check_target_folder(path: Path, key: str) -> None:
    """Raise UserError unless `path` is a folder that can be written, or can be made."""
    try:
        place = Path(usable_path(str(path))).absolute()
        while not place.exists() and not place.is_symlink():
            place = place.parent
        if not place.is_dir():
            raise UserError(key, path, f"{place} is no folder", "give a folder")
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(key, path, in_words(error)) from error
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(key, path, f"{place} cannot be written: permission denied")


def open_file(path: str | Path, key: str, *, limit: int | None = None, pipes: bool = False, hint: str = "") -> BinaryIO:
    """Open a file for reading bytes; `key` is what errors call it, `pipes` lets a pipe or terminal through.

    A pipe does not wait for its writer: `read_bytes` does, for a while.

    UserError: it is missing, no regular file, larger than `limit` bytes, or the system refuses it.
    """
    try:
        # without O_NONBLOCK, opening a FIFO waits for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UserError(key, path, in_words(error), hint) from error
    status = os.fstat(descriptor)
    problem = ""
    if stat.S_ISDIR(status.st_mode):
        problem = "is a folder"
    elif not (stat.S_ISREG(status.st_mode) or pipes):
        problem = "is no regular file (a pipe, a socket or a device)"
    elif limit is not None and status.st_size > limit:
        problem = f"is too large: {human(status.st_size)}, at most {human(limit)} are read"
    if problem:
        os.close(descriptor)
        raise UserError(key, path, problem, hint)
    return open(descriptor, "rb")  # noqa: SIM115 - the caller closes it


def remove(path: Path) -> str:
    """Remove a file, a folder or a link, never what that points to. Returns why it is still there, or ""."""
    try:
        if os.path.isdir(path) and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        return in_words(error)
    return ""


def free_name(path: Path) -> Path:
    """`path`, or where that is taken, and be it by a link to nowhere, the first of `path`.1, `path`.2, … that is not.

    A suffix .part stays the last one.
    """
    stem, end = (path.name.removesuffix(".part"), ".part") if path.name.endswith(".part") else (path.name, "")
    names = (path.with_name(f"{stem}{f'.{again}' if again else ''}{end}") for again in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def read_bytes(path: str | Path, key: str, *, limit: int = SMALL, pipes: bool = False, hint: str = "") -> bytes:
    """The whole content of a file of at most `limit` bytes. Raises as `open_file`."""
    with open_file(path, key, limit=limit, pipes=pipes, hint=hint) as file:
        try:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(limit + 1) if regular else _drain(file.fileno(), limit + 1)
        except OSError as error:
            raise UserError(key, path, in_words(error), hint) from error
    if len(content) > limit:
        raise UserError(key, path, f"is too large: at most {human(limit)} are read", hint)
    return content


def _drain(descriptor: int, limit: int) -> bytes:
    """What a pipe gives until its writer ends, at most `limit` bytes. TimeoutError when its writer is silent."""
    content, ready = bytearray(), select.poll()
    ready.register(descriptor, select.POLLIN)
    while len(content) < limit:
        if not os.isatty(descriptor) and not ready.poll(PATIENCE * 1000):
            raise TimeoutError(errno.ETIMEDOUT, f"is a pipe into which nothing was written for {PATIENCE} seconds")
        try:
            block = os.read(descriptor, limit - len(content))
        except BlockingIOError:  # somebody typing
            ready.poll()
            continue
        if not block:
            break
        content += block
    return bytes(content)


def read_text(path: str | Path, key: str, *, limit: int = SMALL, pipes: bool = False, hint: str = "") -> str:
    """The same as text. UserError too where it is not UTF-8."""
    content = read_bytes(path, key, limit=limit, pipes=pipes, hint=hint)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(key, path, f"is not UTF-8 text: {error.reason} at byte {error.start}", hint) from error


def read_json(path: str | Path, key: str, *, limit: int = SMALL, hint: str = "") -> Any:
    """The value in a JSON file. UserError too where it is not JSON, or nested too deeply."""
    try:
        return parse_json(read_text(path, key, limit=limit, hint=hint))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(key, path, f"cannot be read as JSON: {error}", hint) from error


def read_object(path: str | Path, key: str) -> dict[str, Any]:
    """The object in a JSON file; empty where the file holds another value. UserError as `read_json`."""
    content = read_json(path, key)
    return content if isinstance(content, dict) else {}


def parse_json(text: str | bytes) -> Any:
    """The value of JSON `text`. ValueError with the reason: not JSON, deeper than DEPTH, half of a surrogate pair."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH} levels") from None
    check_json(value, halves="\\u" in text or SURROGATE.search(text) is not None)
    return value


def check_json(value: Any, halves: bool) -> None:
    """Raise ValueError for what json admits and nothing after it can take: too many levels, halves of a character."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list | str)]:
        if halves and any(isinstance(item, str) and SURROGATE.search(item) for item in level):
            raise ValueError("a text holds half of a surrogate pair")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, list):
                inner += item
        level, depth = inner, depth + 1
        if depth > DEPTH and inner:
            raise ValueError(f"nested deeper than {DEPTH} levels")
