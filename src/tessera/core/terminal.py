"""The one writer for the terminal, which may die while a run goes on: no write here fails, or ends what runs.

A reader that has gone (`| head`), a closed or full standard output and an encoding without "×" are all no reason to
stop training. A command whose output is its result still ends with code 1 where the disk took none of it.
"""

import codecs
import errno
import io
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from tessera.core.files import in_words

if TYPE_CHECKING:
    from rich.console import Console

_READER_LEFT = (errno.EPIPE, errno.EBADF, errno.EIO)  # closed: by `head`, by the shell, with its window
_PLAIN = {"×": "x", "·": "-", "–": "-", "—": "-", "−": "-", "→": "->", "…": "...", "≤": "<=", "≥": ">=", "≈": "~"}


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    """For `codecs`: another text for what an encoding cannot show: e for é, a question mark where nothing is alike."""
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    plain = (_PLAIN.get(c) or unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() for c in characters)
    return "".join(text or "?" for text in plain), error.end


codecs.register_error("tessera.plain", _in_plain_characters)


class Lasting(io.TextIOBase):
    """`stream` (None: closed) for writers that must not fail; `lost` says why something could not be written."""

    def __init__(self, stream: TextIO | None, beside: "Lasting | None" = None) -> None:
        self.stream, self.beside = stream, beside
        self.lost = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            text = text.encode(self.encoding, "tessera.plain").decode(self.encoding)
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> None:
        try:
            if self.stream is not None:
                getattr(self.stream, method)(*arguments)
        except (OSError, ValueError) as error:  # the latter: closed in this process
            if getattr(error, "errno", None) in _READER_LEFT or not isinstance(error, OSError) or self.lost:
                return
            self.lost = in_words(error)
            if self.beside is not None:
                self.beside.write(f"standard output takes nothing more: {self.lost}\n")
                self.beside.flush()

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self.stream is None:
            raise io.UnsupportedOperation("closed")
        return self.stream.fileno()

    def let_go(self) -> None:
        """At the end: what cannot be written is forgotten, or Python would try again, complain and exit with 120."""
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError):
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())


@contextmanager
def outlived() -> Iterator[Lasting]:
    """While a command runs, all that is written to stdout (which is yielded) and stderr may get lost."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed (`>&-`): the next file opened would get its number, and what C libraries print
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    before = sys.stdout, sys.stderr
    error = Lasting(sys.stderr)
    out = Lasting(sys.stdout, beside=error)
    sys.stdout, sys.stderr = out, error
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
        out.let_go()
        error.let_go()


def stream(error: bool = False) -> Any:
    """sys.stdout (or stderr) of this moment, so that writing to it does not fail."""
    current = sys.stderr if error else sys.stdout
    return current if isinstance(current, Lasting) else Lasting(current)


def say(*lines: str, error: bool = False) -> None:
    """Lines for the user, now: on stdout, or on stderr."""
    out = stream(error)
    out.write("".join(f"{line}\n" for line in lines))
    out.flush()


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of `total` units while something long goes on, on a terminal alone; what is yielded is told how many are
    done."""
    shown = console()
    if not shown.is_terminal:
        yield lambda done: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=shown, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=min(done, total))


def console(error: bool = False, **how: Any) -> "Console":
    """A console of rich on stdout (or stderr) that outlives it; `how` is for rich."""
    from rich.console import Console  # `--help` and most errors do without it

    return Console(file=stream(error), **{"highlight": False, **how})
