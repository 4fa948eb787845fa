"""Workers are started once a session; one thread a process keeps two cores from being oversubscribed."""

import os
from typing import TYPE_CHECKING

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
