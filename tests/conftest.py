"""One thread a process, so that cores are not oversubscribed; what each folder took, beside its budget, at the end."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from train.runs import Workshop

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> "Workshop":
    """Models and rows for runs of the trainer, made once."""
    from train.runs import Workshop, save_rows  # imports transformers, which most tests do without

    made = Workshop(tmp_path_factory.mktemp("workshop"))
    save_rows(made.rows)
    return made


BUDGETS = Path(__file__).parents[1] / "CONTRIBUTING.md"


def budgets() -> dict[str, int]:
    """Seconds by folder, from the table of CONTRIBUTING.md."""
    rows = re.findall(r"^\| `tests/(\w+)` \| (\d+) \|", BUDGETS.read_text(), re.MULTILINE)
    return {folder: int(seconds) for folder, seconds in rows}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Seconds by folder; time is not judged, since machines differ and are shared."""
    seconds, counts = Counter[str](), Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folder = Path(report.nodeid.partition("::")[0]).parent.name
                seconds[folder] += report.duration  # type: ignore[assignment]
                counts[folder] += report.when == "call"
    if not seconds:
        return
    allowed = budgets()
    terminalreporter.section("seconds by folder")
    for folder, spent in seconds.most_common():
        budget = allowed.get(folder)
        above = f"   above its budget of {budget}" if budget is not None and spent > budget else ""
        terminalreporter.line(f"{spent:7.1f} s  {counts[folder]:5d} tests  {folder}{above}")
    terminalreporter.line(f"{sum(seconds.values()):7.1f} s  {sum(counts.values()):5d} tests")
