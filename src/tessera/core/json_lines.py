"""The lines of a growing file of JSON objects: those that are new since the last look, in blocks of bounded size.

Such files come from outside, and a run may be writing them: a last line without its end is left for the next look, a
line that is no JSON object is counted, and a file that was replaced or cut is read from its beginning.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tessera.core.errors import UserError
from tessera.core.files import open_file

LONGEST = 16 * 2**20
"""Bytes of the longest line that is read: one of monitor.jsonl has some dozen numbers of each rank."""
_BLOCK = 4096


class Lines:
    """The objects in `path`, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""
        """Why the file cannot be read at all, or ""; a file that is not there is no problem."""
        self.there = False
        self._begin()

    def _begin(self) -> None:
        self._identity: tuple[int, int] | None = None
        self._read = 0
        self.count = 0
        """Lines read so far."""
        self.broken = 0
        """Lines among them that are no JSON objects."""
        self.first_broken = 0
        """The number of the first such line, from 1."""
        self.unfinished = False
        """Whether the last line has no end yet."""

    def began_anew(self) -> bool:
        """Whether the file is another than at the last look, or shorter: what was made of it is out of date."""
        try:
            status = os.stat(self.path)
        except (OSError, ValueError):
            self.there = False
            return False
        self.there = True
        identity = (status.st_dev, status.st_ino)
        anew = self._identity is not None and (identity != self._identity or status.st_size < self._read)
        if anew:
            self._begin()
        self._identity = identity
        return anew

    def new(self) -> Iterator[list[dict[str, Any]]]:
        """The objects of the lines that have come since the last look, in blocks."""
        if not self.there:
            return
        self.problem = ""
        try:
            with open_file(self.path, self.path.name) as file:
                file.seek(self._read)
                yield from self._blocks(file)
        except (UserError, OSError) as error:
            self.problem = error.reason if isinstance(error, UserError) else str(error.strerror)

    def _blocks(self, file: Any) -> Iterator[list[dict[str, Any]]]:
        block: list[dict[str, Any]] = []
        size = 0
        while line := file.readline(LONGEST):
            self.unfinished = not line.endswith(b"\n")
            if self.unfinished and len(line) < LONGEST:
                break
            self._read += len(line)
            self.count += 1
            size += len(line)
            found = _object(line)
            if found is not None:
                block.append(found)
            else:
                self.broken += 1
                self.first_broken = self.first_broken or self.count
            if len(block) == _BLOCK or size > LONGEST:
                yield block
                block, size = [], 0
        yield block

    @property
    def complaint(self) -> str:
        """What could not be read, in words; "" where all was."""
        if self.problem:
            return f"{self.path.name}: {self.problem}"
        if self.broken:
            rest = "" if self.broken == 1 else f" and {self.broken - 1:,} more"
            return f"{self.path.name}: line {self.first_broken:,}{rest} cannot be read, as no JSON object is there"
        return ""


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object in `line`, or None."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def number(value: object) -> float | None:
    """`value` where it is a number that charts can be drawn of, else None; what is as good as 0 is 0."""
    if type(value) is float:
        size = abs(value)
        return (value if size > 1e-100 else 0.0) if size < 1e100 else None
    if type(value) is int:
        return float(value) if -(2**53) <= value <= 2**53 else None
    return None


def whole(value: object) -> int | None:
    """`value` where it is a count, of steps for example, else None."""
    return value if type(value) is int and 0 <= value < 2**53 else None


def nested(value: object) -> dict[str, Any]:
    """`value` where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}
