"""The files in output_dir that grow while a run goes, a JSON object a line: metrics, events, what ranks measured."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from tessera.train.events import Event, Sink
from tessera.train.notes import EVENTS, METRICS, MONITOR, Notes


class Files(Sink):
    """Written by the first rank. With `first_step` above 0 they go on, with what was written up to that step.

    Raises OSError when a file of the run that it goes on from cannot be read.
    """

    def __init__(self, notes: Notes, first_step: int) -> None:
        self.notes = notes
        for name in (METRICS, MONITOR, EVENTS):
            path = notes.folder / name
            if name == METRICS or path.exists():
                # in one move: a run killed at this moment still has the lines of its steps
                notes.write(name, _lines_before(path.read_bytes() if first_step and path.exists() else b"", first_step))

    def step(self, record: Mapping[str, Any], shown: bool) -> None:
        self.notes.append(METRICS, json.dumps(record))

    def event(self, event: Event) -> None:
        line = {"time": time.time(), "step": event.step, "kind": event.kind, "text": event.text}
        self.notes.append(EVENTS, json.dumps(line | ({"path": str(event.path)} if event.path else {})))

    def measured(self, ranks: Mapping[str, Any]) -> None:
        self.notes.append(MONITOR, json.dumps(ranks))


def _lines_before(content: bytes, step: int) -> bytes:
    """The lines of an earlier part of this run: steps after its checkpoint will be done again."""
    return b"".join(line for line in content.splitlines(True) if _step_of(line) <= step)


def _step_of(line: bytes) -> float:
    """The step that a line is about, 0 for one about the whole run; none for what was left unfinished or spoilt."""
    try:
        return float(json.loads(line).get("step", 0))
    except (ValueError, AttributeError, TypeError):
        return math.inf
