"""What the runs of this folder are compared with."""

from functools import cache
from typing import Any

import pytest

from train.runs import Plain, plain_loop


@pytest.fixture(scope="session")
def plain(workshop, tmp_path_factory):
    """The plain loop's numbers for a model, computed when first asked for."""

    @cache
    def of(case: str, **changes: Any) -> Plain:
        return plain_loop(workshop.settings(case, tmp_path_factory.mktemp("nothing"), **changes))

    return of
