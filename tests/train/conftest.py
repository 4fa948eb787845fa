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


@pytest.fixture(scope="session")
def plain_packed(workshop, tmp_path_factory):
    """The plain loop over the samples of each step of packed rows, a sample at a time."""
    from train.test_packing import PACKED, steps_of  # which pytest rewrites first

    @cache
    def of(case: str) -> Plain:
        settings = workshop.settings(case, tmp_path_factory.mktemp("nothing"), **PACKED)
        return plain_loop(settings, steps=steps_of(workshop, 5))

    return of
