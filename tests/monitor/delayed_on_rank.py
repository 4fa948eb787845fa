"""A run on the ranks of a pool in which, at given steps, something takes longer by `DELAY` seconds."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tessera.checkpoint.saver import Saver
from tessera.core.collectives import Recorder
from tessera.core.recorder import Record
from tessera.data.loader import Loader
from tessera.engine.step import Step
from tessera.models.decoder import Decoder
from tessera.monitor.timeline import Timeline
from train.on_rank import own_rank, train_on_rank

DELAY = 0.7
"""Seconds: at least five times what a step of these runs takes."""


def delayed_on_rank(settings: dict[str, Any], steps: dict[int, str], axis: str, rank: int) -> None:
    """Train with a delay in each of `steps`: in a collective along `axis`, in the forward of `rank` alone, in the
    loader, the optimizer or the save."""
    now = [0, ""]  # the step that goes on, and what is still to be delayed in it

    def delays(what: str) -> float:
        if now[1] != what or what == "rank" and own_rank() != rank:
            return 0.0
        now[1] = ""
        return DELAY

    def begin(index: int) -> None:
        now[:] = [index + 1, steps.get(index + 1, "")]

    def around(kind: type, name: str, what: str) -> Any:
        real: Callable[..., Any] = getattr(kind, name)

        def slow(self: Any, *args: Any, **how: Any) -> Any:
            if what == "loader":
                begin(args[0])
            time.sleep(delays(what))
            return real(self, *args, **how)

        return patch.object(kind, name, slow)

    def along(record: Record) -> float:
        return delays("axis") if record.axes == (axis,) else 0.0

    hook = register_optimizer_step_pre_hook(lambda *_: time.sleep(delays("optimizer")))
    try:
        with ExitStack() as stack:
            stack.enter_context(Recorder(delay=along))
            for kind, name, what in (
                (Loader, "step_batches", "loader"),
                (Decoder, "forward", "rank"),
                (Saver, "save", "save"),
            ):
                stack.enter_context(around(kind, name, what))
            train_on_rank(settings)
    finally:
        hook.remove()


def leaking_on_rank(settings: dict[str, Any], rank: int) -> None:
    """Train while one rank keeps a tensor of 1 MiB more after each step."""
    kept = []
    real = Step.__call__

    def call(self: Step, *args: Any, **how: Any) -> Any:
        result = real(self, *args, **how)
        if own_rank() == rank:
            kept.append(torch.ones(512, 512))
        return result

    with patch.object(Step, "__call__", call):
        train_on_rank(settings)


def failing_on_rank(settings: dict[str, Any], step: int, rank: int) -> None:
    """Train while on one rank what turns marks into seconds fails from `step` on."""
    real = Timeline.settle
    calls = [0]

    def settle(self: Timeline) -> None:
        calls[0] += 1
        if calls[0] > 2 * (step - 1) and own_rank() == rank:  # twice a report
            raise RuntimeError("no clock")
        real(self)

    with patch.object(Timeline, "settle", settle):
        train_on_rank(settings)
