"""Models and rows for the runs of this folder, made once."""

from functools import cache
from typing import Any

import pytest

from train.runs import Plain, Workshop, plain_loop, save_rows


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    save_rows(made.rows)
    return made


@pytest.fixture(scope="session")
def plain(workshop, tmp_path_factory):
    """The plain loop's numbers for a model, computed when first asked for."""

    @cache
    def of(case: str, **changes: Any) -> Plain:
        return plain_loop(workshop.settings(case, tmp_path_factory.mktemp("nothing"), **changes))

    return of
