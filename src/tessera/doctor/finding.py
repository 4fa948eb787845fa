"""A finding: one thing that was looked at, how it is, and what to change."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

State = Literal["ok", "slow", "wrong", "unknown", "on", "off", "not possible"]
"""`wrong`: a run fails, or its results are spoiled. `slow`: it runs, and could be faster. `unknown`: it cannot be told.
The last three are of the tuning checklist."""
IN_WORDS = {"unknown": "cannot be told"}


@dataclass(frozen=True)
class Finding:
    """What was found of one `subject`, in one line; `mend` says what to change, where something is to be changed."""

    subject: str
    state: State
    text: str
    mend: str = ""

    def __str__(self) -> str:
        mend = f" → {self.mend}" if self.mend else ""
        return f"{IN_WORDS.get(self.state, self.state):<14} {self.subject}: {self.text}{mend}"


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading row, with a line that says what they are."""

    title: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """Findings that belong together, and tables below them."""

    title: str
    findings: list[Finding] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def read(path: str | Path) -> str | None:
    """The text of a file of the kernel; None where there is none, or this user may not read it."""
    with suppress(OSError, ValueError):
        return Path(path).read_text()
    return None
