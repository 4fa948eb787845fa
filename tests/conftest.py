"""One thread a process, so that cores are not oversubscribed; what each folder took, beside its budget, at the end."""

import os
from typing import TYPE_CHECKING, Any

import pytest

from support.seconds import by_folder

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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("seconds by folder")
    for line in by_folder(report for reports in terminalreporter.stats.values() for report in reports):
        terminalreporter.line(line)
