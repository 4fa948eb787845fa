"""The files in output_dir that grow while a run goes, a JSON object a line: metrics, events, what ranks measured."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.train.events import Event, Sink
from tessera.train.notes import EVENTS, METRICS, MONITOR, Notes

TAIL = 2**16
"""Bytes at the end of a file that are looked at first."""


class Files(Sink):
    """Written by the first rank. With `first_step` above 0 they go on, with what was written up to that step.

    Raises OSError when a file of the run that it goes on from cannot be read.
    """

    def __init__(self, notes: Notes, first_step: int) -> None:
        self.notes = notes
        for name in (METRICS, MONITOR, EVENTS):
            path = notes.folder / name
            notes.check()
            if first_step and name != EVENTS and _cut(path, first_step):
                continue
            if name == METRICS or path.exists():
                # in one move: a run killed at this moment still has the lines of its steps
                notes.write(name, _lines_before(path.read_bytes() if first_step and path.exists() else b"", first_step))

    def step(self, record: Mapping[str, Any], shown: bool) -> None:
        self.notes.append(METRICS, json.dumps(record))

    def event(self, event: Event) -> None:
        line: dict[str, Any] = {"time": time.time(), "step": event.step, "kind": event.kind, "text": event.text}
        line |= {"path": str(event.path)} if event.path else {}
        line |= {"predicted": event.numbers} if event.numbers else {}
        self.notes.append(EVENTS, json.dumps(line))

    def measured(self, ranks: Mapping[str, Any]) -> None:
        self.notes.append(MONITOR, json.dumps(ranks))


def _cut(path: Path, step: int) -> bool:
    """Cut the file after its last line of 1 to `step`, reading no more of its end than that takes.

    Its lines are in the order of steps. False, and nothing is done, where no such line is found, or the file cannot or
    must not be changed in place: another name of it may be somebody's copy.
    """
    try:
        if path.is_symlink() or path.stat().st_nlink > 1:
            return False
        with path.open("r+b") as file:
            end, size, start = file.seek(0, os.SEEK_END), TAIL, 1
            while start:
                start = max(0, end - size)
                file.seek(start)
                lines = file.read(end - start).splitlines(True)
                keep = end
                for line in reversed(lines[1:] if start else lines):  # the first one may be half a line
                    if 1 <= _step_of(line) <= step:
                        file.truncate(keep)
                        if not line.endswith(b"\n"):
                            file.seek(keep)
                            file.write(b"\n")
                        return True
                    keep -= len(line)
                size *= 4
    except OSError:
        return False
    return False


def _lines_before(content: bytes, step: int) -> bytes:
    """The lines of an earlier part of this run: steps after its checkpoint will be done again."""
    return b"".join(line for line in content.splitlines(True) if _step_of(line) <= step)


def _step_of(line: bytes) -> float:
    """The step that a line is about, 0 for one about the whole run; none for what was left unfinished or spoilt."""
    try:
        return float(json.loads(line).get("step", 0))
    except (ValueError, AttributeError, TypeError):
        return math.inf
