"""What the tests of each folder took, beside the folder's budget in CONTRIBUTING.md: told, not judged.

Machines differ and are shared, so that no test fails for its time.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from pytest import TestReport

TABLE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def budgets() -> dict[str, int]:
    """Seconds by folder, from the rows of the table: | `tests/core` | 20 | …"""
    rows = re.findall(r"^\| `tests/(\w+)` \| (\d+) \|", TABLE.read_text(), re.MULTILINE)
    return {folder: int(seconds) for folder, seconds in rows}


def by_folder(reports: Iterable[object]) -> Iterator[str]:
    """A line for each folder, the slowest first, and one for several together: set-up, call and tear-down together."""
    seconds: dict[str, float] = {}
    tests: Counter[str] = Counter()
    for report in reports:
        if isinstance(report, TestReport):
            folder = Path(report.nodeid.partition("::")[0]).parent.name
            seconds[folder] = seconds.get(folder, 0.0) + report.duration
            tests[folder] += report.when == "call"
    budget = budgets()
    for folder in sorted(seconds, key=seconds.__getitem__, reverse=True):
        above = f", above its budget of {budget[folder]}" if seconds[folder] > budget.get(folder, 1e9) else ""
        yield f"{seconds[folder]:7.1f} s  {tests[folder]:4} tests  {folder}{above}"
    if len(seconds) > 1:
        yield f"{sum(seconds.values()):7.1f} s  {tests.total():4} tests"
