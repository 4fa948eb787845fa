"""A run on the ranks of a pool in which, at given steps, something takes longer by `DELAY` seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from monitor.virtual import virtual_time
from tessera.checkpoint.saver import Saver
from tessera.core.collectives import Recorder
from tessera.core.recorder import Record
from tessera.data.loader import Loader
from tessera.engine.step import Step
from tessera.models.decoder import Decoder
from tessera.monitor.timeline import Timeline
from tessera.train.records import Records
from train.on_rank import own_rank, train_on_rank

DELAY = 0.3
"""Seconds, real or virtual; virtual ones are more than three steps of these runs."""
Delays = dict[int, tuple[str, int | None]]
"""For each step that is delayed in what: along an axis, in the forward, the loader, the optimizer or the save; and on
which rank alone, or None for every one."""


@contextmanager
def delaying(delays: Delays, sleep: Callable[[float], None]) -> Iterator[None]:
    """Within, the steps of a run are delayed, each once."""
    now: list[Any] = [0, ""]  # the step that goes on, and what is still to be delayed in it

    def due(what: str) -> float:
        if now[1] != what:
            return 0.0
        now[1] = ""
        return DELAY

    def begin(index: int) -> None:
        what, rank = delays.get(index + 1, ("", None))
        now[:] = [index + 1, what if rank in (None, own_rank()) else ""]

    def around(kind: type, name: str, what: str) -> Any:
        real: Callable[..., Any] = getattr(kind, name)

        def slow(self: Any, *args: Any, **how: Any) -> Any:
            if what == "loader":
                begin(args[0])
            sleep(due(what))
            return real(self, *args, **how)

        return patch.object(kind, name, slow)

    def along(record: Record) -> float:
        return due(record.axes[0]) if len(record.axes) == 1 else 0.0

    hook = register_optimizer_step_pre_hook(lambda *_: sleep(due("optimizer")))
    try:
        with ExitStack() as stack:
            stack.enter_context(Recorder(delay=along))
            for kind, name, what in (
                (Loader, "step_batches", "loader"),
                (Decoder, "forward", "forward"),
                (Saver, "save", "save"),
            ):
                stack.enter_context(around(kind, name, what))
            yield
    finally:
        hook.remove()


def delayed_on_rank(settings: dict[str, Any], delays: Delays) -> None:
    """Train with delays in real time."""
    with delaying(delays, time.sleep):
        train_on_rank(settings)


def virtually_delayed_on_rank(settings: dict[str, Any], delays: Delays, folder: Path) -> list[float]:
    """Train with delays in virtual time; the seconds of each step on this rank. `folder` is for messages."""
    taken = []
    real = Records.step

    def step(self: Records, result: Any, rate: float, seconds: float, *args: Any) -> Any:
        taken.append(seconds)
        return real(self, result, rate, seconds, *args)

    with patch.object(Records, "step", step), virtual_time(folder) as virtual, delaying(delays, virtual.sleep):
        train_on_rank(settings)
    return taken


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
