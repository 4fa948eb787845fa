"""Writing the page: once, or again and again while a run goes on."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tessera.core.errors import UserError
from tessera.core.files import check_target, writing_target
from tessera.core.writing import replace_file
from tessera.report.folder import RunFolder
from tessera.report.html import Html
from tessera.report.page import MARK, page, picture_of
from tessera.report.settings import Settings

EVERY = 5.0
"""Seconds between two pages, at least; making one takes at most a twentieth of the time."""


def check_page(file: Path) -> None:
    """Raise UserError unless a page can be written to `file`: nothing but an earlier page may be there."""
    check_target(file, "--output")
    if not file.exists():
        return
    begins = b""
    if file.is_file():
        with suppress(OSError), file.open("rb") as there:
            begins = there.read(1000)
    if MARK.encode() not in begins:
        raise UserError("--output", file, "is there already and is no report", "give the name of a new file")


class Page:
    """The page of `runs` in `file`. UserError: it cannot be written."""

    def __init__(self, runs: Sequence[RunFolder], file: Path) -> None:
        self.runs, self.file = runs, file
        self._drawn: dict[int, tuple[Settings, Html]] = {}

    def write(self, every: float | None = None) -> float:
        """Write the page of what the runs have by now; with `every` it reloads itself.

        Returns the seconds of CPU time that it took, without the pictures, which are drawn once.
        """
        pictures = [self._picture(at) for at in range(len(self.runs))]
        begun = time.process_time()
        text = page(self.runs, pictures, every=every)
        with writing_target(self.file, "--output"):
            replace_file(self.file, text.encode("utf-8", "replace"))
        return time.process_time() - begun

    def _picture(self, at: int) -> Html:
        """The picture of a run's layout, drawn again only when its config is another."""
        settings = self.runs[at].whole.settings
        if at not in self._drawn or self._drawn[at][0] != settings:
            self._drawn[at] = (settings, picture_of(self.runs[at], self.runs))
        return self._drawn[at][1]


def watch(made: Page, sleep: Callable[[float], None] = time.sleep) -> None:
    """Write the page whenever files of its runs have grown, until none of them goes on; then without reloading."""
    every = EVERY
    while True:
        grown = [run.look() for run in made.runs]
        if not any(run.going_on for run in made.runs):
            break
        if any(grown):
            every = max(EVERY, 20 * made.write(every))
        sleep(every)
    made.write()
