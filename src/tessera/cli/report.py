"""`tessera report OUTPUT_DIR [OUTPUT_DIR]`: a run, or two side by side, as one page of HTML."""

from collections.abc import Sequence
from pathlib import Path

from tessera.core import terminal
from tessera.core.text import human
from tessera.report.folder import RunFolder
from tessera.report.watch import Page, check_page, watch

ONE, TWO = "report.html", "compared.html"
"""The page's name in the first folder, of one run and of two."""


def report(folders: Sequence[Path], output: Path | None, watching: bool) -> None:
    """Write the page. Raises UserError before anything is written: no folder of a run, no file that can be written."""
    runs = [RunFolder(folder) for folder in folders]
    file = output or folders[0] / (ONE if len(runs) == 1 else TWO)
    check_page(file)
    made = Page(runs, file)
    if watching:
        terminal.say(f"{file} is written again while the run goes on; Ctrl-C ends it")
        try:
            watch(made)
        except KeyboardInterrupt:
            made.write()
    else:
        for run in runs:
            run.look()
        made.write()
    terminal.say(f"{file}: {human(file.stat().st_size)}, one page that needs nothing beside it")
