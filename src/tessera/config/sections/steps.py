"""Numbers of optimizer steps that may be given as a share of all steps of the run, as in transformers."""

import math
from typing import Annotated

from pydantic import BeforeValidator


def _whole_or_share(value: object) -> object:
    """A float from 1 on is a number of steps, which is whole."""
    if isinstance(value, float) and value >= 1:
        if not value.is_integer():
            raise ValueError("is neither a whole number of steps nor a share of them below 1")
        return int(value)
    return value


StepsOrShare = Annotated[int | float, BeforeValidator(_whole_or_share)]


def in_steps(value: float, total: int) -> int:
    """The number of steps that `value` means in a run of `total`: itself, or below 1 that share, rounded up."""
    return int(value) if value >= 1 else math.ceil(total * value)
