"""Runs on every rank of a pool whose profiler, or one collective, misbehaves."""

from typing import Any
from unittest.mock import patch

from tessera.core.recorder import Recorder
from train.on_rank import said_on_rank


def delayed(settings: dict[str, Any], axis: str, seconds: float) -> str:
    """What a run prints in which each collective along `axis` is late by so many seconds."""
    with Recorder(delay=lambda record: seconds * (record.axis == axis)):
        return said_on_rank(settings)


def failing(settings: dict[str, Any], where: str) -> str:
    """What a run prints whose profiler raises at `where`."""
    with patch(where, side_effect=RuntimeError("it is broken")):
        return said_on_rank(settings)


def limited(settings: dict[str, Any], size: int) -> str:
    """What a run prints whose traces may have `size` bytes."""
    with patch("tessera.monitor.profile.LARGEST", size):
        return said_on_rank(settings)
