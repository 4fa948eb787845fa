"""Time of a run that passes when the test says so: each rank has a clock, and a message brings its sender's along.

    what happens                          this rank's clock
    a module is called                    + MODULE
    data, a backward, an update, a save   + LOADER, BACKWARD, OPTIMIZER, SAVE
    a delay                               + its seconds
    a message comes                       the later of its own and of when it was sent, + MOVE

So a run takes the same seconds on every machine, however busy that is. They are sums of powers of two, thus exact.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from support.mailbox import Exchange, Mailbox
from tessera.checkpoint.saver import Saver
from tessera.core import clock, collectives
from tessera.data.loader import Loader
from tessera.train import progress

MODULE, BACKWARD, MOVE = 2**-11, 2**-7, 2**-13
LOADER, OPTIMIZER, SAVE = 2**-8, 2**-9, 2**-6


class VirtualTime:
    """Stands in for the module `time`, whose other functions are as they were."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def perf_counter(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class TimedMailbox(Mailbox):
    """Messages each of which has another beside it: when it was sent."""

    def __init__(self, folder: Path, virtual: VirtualTime) -> None:
        super().__init__(folder)
        self.virtual = virtual

    def send(self, name: str, content: Tensor, receivers: Sequence[int]) -> None:
        super().send(f"{name}-sent", torch.tensor(self.virtual.seconds, dtype=torch.float64), receivers)
        super().send(name, content, receivers)

    def receive(self, name: str, sender: int, into: Tensor) -> None:
        super().receive(name, sender, into)
        sent = torch.empty((), dtype=torch.float64)
        super().receive(f"{name}-sent", sender, sent)
        self.virtual.seconds = max(self.virtual.seconds, sent.item()) + MOVE


@contextmanager
def virtual_time(folder: Path) -> Iterator[VirtualTime]:
    """Within, this rank's runs take virtual time; messages between ranks are in `folder`, a new one of their own."""
    virtual = VirtualTime()
    with ExitStack() as stack:
        for module in (clock, collectives, progress):
            stack.enter_context(patch.object(module, "time", virtual))
        if dist.is_initialized():
            exchange = Exchange(folder)
            exchange.box = TimedMailbox(folder, virtual)
            stack.enter_context(patch.object(collectives, "dist", exchange))
            stack.enter_context(patch.object(collectives, "_all_gather", exchange.all_gather))
            stack.enter_context(patch.object(collectives, "_reduce_scatter", exchange.reduce_scatter))
        for owner, name, seconds in (
            (Loader, "step_batches", LOADER),
            (Tensor, "backward", BACKWARD),
            (Saver, "save", SAVE),
        ):
            stack.enter_context(_taking(virtual, owner, name, seconds))
        for hook in (
            register_module_forward_pre_hook(lambda *_: virtual.sleep(MODULE)),
            register_optimizer_step_pre_hook(lambda *_: virtual.sleep(OPTIMIZER)),
        ):
            stack.callback(hook.remove)
        yield virtual


def _taking(virtual: VirtualTime, owner: type, name: str, seconds: float) -> Any:
    real = getattr(owner, name)

    def call(*args: Any, **how: Any) -> Any:
        virtual.sleep(seconds)
        return real(*args, **how)

    return patch.object(owner, name, call)
