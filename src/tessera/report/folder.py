"""The files of one run, read from its output_dir: what is there, what is missing, what cannot be read.

Everything in it comes from outside. Nothing here writes, or fails for what a file holds.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from tessera.checkpoint.folder import STATE, latest_name, whole_checkpoints
from tessera.checkpoint.lock import holder
from tessera.core.errors import UserError, cut_short
from tessera.core.files import in_words, read_json, usable_path
from tessera.core.json_lines import Lines, nested, whole
from tessera.report.events import Events
from tessera.report.metrics import Metrics
from tessera.report.predicted import Predicted, predicted
from tessera.report.ranks import Ranks
from tessera.report.settings import Settings, read_settings
from tessera.train.notes import EVENTS, METRICS, MONITOR, RESOLVED, SUMMARY

MISSING = {
    METRICS: "no step was trained, or the file was removed: no curves",
    MONITOR: "the run was not monitored (key monitor): no times of single ranks",
    EVENTS: "the run was before events were kept: what it said is not known",
    RESOLVED: "the config is not known",
}
"""What a page lacks without each file."""
Made = TypeVar("Made", Metrics, Ranks, Events)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint; `time` in seconds since 1970, `best`: its evaluation was the best so far."""

    name: str
    step: int
    bytes: int
    time: float
    latest: bool
    best: bool


class _Following(Generic[Made]):
    """A file of lines, and what is made of it."""

    def __init__(self, path: Path, make: Callable[[], Made]) -> None:
        self.lines = Lines(path)
        self.make: Callable[[], Made] = make
        self.found: Made = make()

    def look(self) -> bool:
        """Read what is new; whether anything was."""
        anew, before = self.lines.began_anew(), self.lines.count
        if anew:
            self.found, before = self.make(), -1
        for block in self.lines.new():
            self.found.add(block)
        return self.lines.count != before


@dataclass
class Whole:
    """The files that are read as a whole."""

    settings: Settings = field(default_factory=Settings)
    collectives: list[dict[str, Any]] = field(default_factory=list)
    parameters: int | None = None
    predicted: Predicted = field(default_factory=Predicted)
    finished: bool = False
    problem: str = ""
    checkpoints: list[Checkpoint] = field(default_factory=list)


class RunFolder:
    """One run; `look` reads what its files have by now. UserError: `path` is no folder of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            usable_path(str(path))
            if not path.is_dir():
                reason = "is a file" if path.exists() else "does not exist"
                raise UserError("OUTPUT_DIR", path, reason, "give the output_dir of a run")
            names = os.listdir(path)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError("OUTPUT_DIR", path, in_words(error)) from error
        if not {METRICS, RESOLVED} & set(names):
            reason = f"is no folder of a run: it has neither {METRICS} nor {RESOLVED}"
            raise UserError("OUTPUT_DIR", path, reason, "give the output_dir of a run")
        self._metrics = _Following(path / METRICS, Metrics)
        self._ranks = _Following(path / MONITOR, Ranks)
        self._events = _Following(path / EVENTS, Events)
        self._signature: object = None
        self.whole = Whole()
        self.going_on = ""
        """Whose run is going on here, "" where none is."""

    @property
    def name(self) -> str:
        return self.path.absolute().name or str(self.path)

    @property
    def metrics(self) -> Metrics:
        return self._metrics.found

    @property
    def ranks(self) -> Ranks:
        return self._ranks.found

    @property
    def events(self) -> Events:
        return self._events.found

    def look(self) -> bool:
        """Read what is new in the files; whether anything was."""
        owner = holder(self.path)
        going_on = "" if owner is None else cut_short(owner, 200)
        new = [going_on != self.going_on, *(each.look() for each in (self._metrics, self._ranks, self._events))]
        self.going_on = going_on
        signature = self._sign()
        if signature != self._signature:
            self._signature, self.whole = signature, self._read_whole()
            new.append(True)
        return any(new)

    def _sign(self) -> object:
        """What changes with the files that are read as a whole, and with the checkpoints."""
        found: list[object] = [sorted(path.name for path in whole_checkpoints(self.path)), latest_name(self.path)]
        for name in (RESOLVED, SUMMARY):
            try:
                status = os.stat(self.path / name)
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except OSError:
                found.append(None)
        return found

    def _read_whole(self) -> Whole:
        made = Whole(read_settings(self.path), checkpoints=self._checkpoints())
        try:
            summary = nested(read_json(self.path / SUMMARY, SUMMARY))
        except UserError as error:
            made.problem = f"{SUMMARY}: {error.reason}" if os.path.lexists(self.path / SUMMARY) else ""
            return made
        made.finished = True
        collectives = summary.get("collectives")
        rows = collectives if isinstance(collectives, list) else []
        made.collectives = [row for row in rows[:200] if isinstance(row, dict)]
        made.parameters = whole(summary.get("parameters"))
        made.predicted = predicted(summary.get("predicted"))
        return made

    def _checkpoints(self) -> list[Checkpoint]:
        """The whole checkpoints, oldest first."""
        folders, latest = whole_checkpoints(self.path), latest_name(self.path)
        best = _best_of(folders)
        found = []
        for folder in folders:
            step = int(re.sub(r"\D", "", folder.name)[:15])
            try:
                size = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
                time = folder.stat().st_mtime
            except OSError:  # it is being removed
                continue
            found.append(Checkpoint(folder.name, step, size, time, folder.name == latest, step == best))
        return found

    @property
    def status(self) -> str:
        """Whether the run goes on, has finished or has stopped, as far as its files say."""
        if self.going_on:
            return f"running ({self.going_on})"
        if self.events.end is not None:
            return cut_short(self.events.end.text.partition("\n")[0] or "ended", 120)
        return "finished" if self.whole.finished else "not running, and not finished"

    @property
    def predicted(self) -> Predicted:
        """What the run expected of its steps; it counts as false where nothing was predicted."""
        return self.events.predicted or self.whole.predicted

    @property
    def complaints(self) -> list[str]:
        """What is missing or could not be read, a line each."""
        found = []
        for name, missing in MISSING.items():
            if not os.path.lexists(self.path / name):
                found.append(f"there is no {name}: {missing}")
        found += [each.lines.complaint for each in (self._metrics, self._ranks, self._events)]
        if self._metrics.lines.unfinished and not self.going_on:
            found.append(f"the last line of {METRICS} is not whole and is left out")
        if self.metrics.out_of_order:
            found.append(f"{METRICS}: {self.metrics.out_of_order:,} lines have no step, or one that was there before")
        if self.ranks.unusable:
            found.append(f"{MONITOR}: {self.ranks.unusable:,} lines do not have a number of each rank")
        if self.metrics.axes_left_out:
            found.append(f"{METRICS}: it names more axes than a mesh has, some are left out")
        if os.path.lexists(self.path / RESOLVED):
            found.append(self.whole.settings.problem)
        return [line for line in [*found, self.whole.problem] if line]


def _best_of(folders: Sequence[Path]) -> int | None:
    """The step of the best checkpoint, as the newest one that can be read remembers it."""
    for folder in reversed(folders):
        try:
            return whole(nested(nested(read_json(folder / STATE, STATE)).get("best")).get("checkpoint"))
        except UserError:
            continue
    return None
