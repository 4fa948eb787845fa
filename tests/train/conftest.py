"""Models and rows for the runs of this folder, made once."""

import pytest

from train.runs import Workshop, save_rows


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    save_rows(made.rows)
    return made
