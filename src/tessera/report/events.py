"""What events.jsonl holds: what a run said, warned of, saved and evaluated; of many the first and the last are kept."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessera.core.errors import cut_short
from tessera.core.json_lines import number, whole
from tessera.report.predicted import Predicted, predicted

FIRST, LAST = 100, 200
WARNING, PREDICTED, SAVED, ENDED = "warning", "predicted", "saved", "ended"


@dataclass(frozen=True)
class Event:
    """`time` in seconds since 1970; `step` None where it is none's."""

    time: float | None
    step: int | None
    kind: str
    text: str


class Events:
    """The events of one run, in their order."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[Event] = []
        self.later: deque[Event] = deque(maxlen=LAST)
        self.warning_count = 0
        self.warnings: list[Event] = []
        self.end: Event | None = None
        """The end of the run, where nothing came after it."""
        self.predicted = Predicted()
        """The last prediction: a run that goes on makes one again."""

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Take the objects of some lines, in their order."""
        for record in records:
            kind = cut_short(record.get("kind") or "said", 40)
            text = cut_short(record.get("text") or "").removeprefix("warning: ")
            event = Event(number(record.get("time")), whole(record.get("step")), kind, text)
            self.count += 1
            if len(self.first) < FIRST:
                self.first.append(event)
            else:
                self.later.append(event)
            if kind != SAVED:  # a save beside training may be told of late
                self.end = event if kind == ENDED else None
            if kind == PREDICTED:
                self.predicted = predicted(record.get("predicted"))
            if kind == WARNING:
                self.warning_count += 1
                if len(self.warnings) < FIRST:
                    self.warnings.append(event)

    @property
    def left_out(self) -> int:
        """How many between the first and the last are not kept."""
        return self.count - len(self.first) - len(self.later)
