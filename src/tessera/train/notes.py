"""What a run notes in small files beside its weights: none of it is worth more than the training.

A write that fails is told once, kept in memory and tried again; what is still missing at the end makes the exit code 1.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tessera.core import terminal
from tessera.core.writing import replace_file, why

METRICS, RESOLVED, SUMMARY = "metrics.jsonl", "resolved_config.yaml", "summary.json"
MONITOR, EVENTS = "monitor.jsonl", "events.jsonl"
PLOT, CARD = "loss.png", "README.md"


def _on_stderr(text: str) -> None:
    terminal.say(text, error=True)


class Notes:
    """The notes of one run in `folder`, which must exist. Threads may write them side by side.

    `check` raises when the folder is another run's by now: it is asked right before each write, so that a process that
    was stopped since its last step writes nothing when it wakes.
    """

    def __init__(
        self, folder: Path, say: Callable[[str], None] = _on_stderr, check: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.say, self.check = folder, say, check
        self._identity = _identity(folder)
        self._whole: dict[str, bytes] = {}  # by file name, what is yet to be written as a whole, or
        self._lines: dict[str, list[bytes]] = {}  # at its end
        self._reason = ""
        self._lock = threading.RLock()

    def write(self, name: str, content: str | bytes) -> None:
        """Write a whole file, now or later."""
        with self._lock:
            self._whole[name] = content.encode() if isinstance(content, str) else content
            self.again()

    def append(self, name: str, line: str) -> None:
        """Add a line at a file's end, now or later."""
        with self._lock:
            self._lines.setdefault(name, []).append(line.encode() + b"\n")
            self.again()

    def again(self) -> None:
        """Try what could not be written so far, each file by itself."""
        failed: OSError | None = None
        for name in list(dict.fromkeys([*self._whole, *self._lines])):
            self.check()
            try:
                if name in self._whole:
                    replace_file(self.folder / name, self._whole[name])
                    del self._whole[name]
                if name in self._lines:
                    _append(self.folder / name, b"".join(self._lines[name]))
                    del self._lines[name]
            except OSError as error:
                failed = error
        before, self._reason = self._reason, "" if failed is None else why(failed, self.folder)
        if self._reason and not before:
            self.say(f"cannot be written: {self._reason}; training goes on, and this is tried again")
        elif before and not self._reason:
            self.say("all that could not be written before is written now")

    @property
    def lost_folder(self) -> bool:
        """Whether the folder has been removed or renamed since the run began, or another is in its place."""
        try:
            return _identity(self.folder) != self._identity
        except OSError:  # it cannot be seen at this moment: no permission, or the network is away
            return False

    def make_folder(self) -> None:
        """Make the folder again, which from now on is the run's. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._identity = _identity(self.folder)

    def missing(self) -> str:
        """What could not be written in the end and why; empty when all was."""
        with self._lock:
            self.again()
            files = sorted(self._whole.keys() | self._lines.keys())
            return f"{' and '.join(files)} could not be written: {self._reason}" if files else ""


def _identity(folder: Path) -> tuple[int, int] | None:
    """Which folder this is, whatever its name; None when there is none."""
    try:
        status = os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def _append(path: Path, content: bytes) -> None:
    """Add `content` at the file's end, whole or not at all."""
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise
