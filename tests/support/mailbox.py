"""Collectives between the ranks of a pool through files in memory, for what `core/collectives.py` hands over.

A collective of gloo makes many system calls on each rank and wakes threads, which is most of the CPU time of a step of
a tiny model (docs/decisions/0018-pools-without-gloo.md). These compute the same, sums in rank order; what is left out,
or comes in another order, fails as with gloo. Tests of the collectives themselves, of memory and of real runs use gloo,
and with `TESSERA_TEST_GLOO=1`, as in `make test-all`, all do.

A message is a file that its receiver removes: `group-number-sender-receiver`, linked to that name once it is written.
"""

import ctypes
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.core import collectives

PATIENCE = 60.0
"""Seconds that a rank waits for another's message."""


class Mailbox:
    """Messages between ranks, in order of their numbers: of a group, or of a sender and a receiver in it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.own = str(folder), dist.get_rank()
        self.numbers: Counter[object] = Counter()

    def next(self, key: object) -> int:
        self.numbers[key] += 1
        return self.numbers[key]

    def send(self, name: str, content: Tensor, receivers: Sequence[int]) -> None:
        """Leave the bytes of `content` for each of these (global) ranks."""
        written = f"{self.folder}/{name}-{self.own}"
        descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            content = content.detach().contiguous()  # held until it is written
            left = _bytes(content)
            while left:
                left = left[os.write(descriptor, left) :]
        finally:
            os.close(descriptor)
        for receiver in receivers[1:]:
            os.link(written, f"{written}-{receiver}")
        os.rename(written, f"{written}-{receivers[0]}")

    def receive(self, name: str, sender: int, into: Tensor) -> None:
        """Fill contiguous `into` with what `sender` has left. RuntimeError: it does not come, or has another size."""
        path = f"{self.folder}/{name}-{sender}-{self.own}"
        descriptor = _opened(path)
        try:
            content, size = _bytes(into), os.fstat(descriptor).st_size
            if size != into.nbytes:
                raise RuntimeError(f"a message of {size} bytes from rank {sender}, but {into.nbytes} are expected")
            read = 0
            while read < size:
                read += os.readv(descriptor, [content[read:]])
        finally:
            os.close(descriptor)
        os.unlink(path)


def _opened(path: str) -> int:
    began = time.monotonic()
    for tries in itertools.count():
        try:
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            if tries < 20:
                os.sched_yield()  # the sender may need this core
            else:
                time.sleep(min(1e-3, 1e-5 * tries))
                if time.monotonic() - began > PATIENCE:
                    raise RuntimeError(f"Timed out waiting for {path}") from None
    raise AssertionError


def _bytes(tensor: Tensor) -> memoryview:
    """Its memory; `numpy()` would forbid that FSDP2 frees it."""
    assert tensor.is_contiguous()
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class _Work:
    """What is left to do of a collective: receive."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self.finish: Callable[[], None] | None = finish

    def wait(self) -> None:
        if self.finish is not None:
            self.finish()
            self.finish = None


def _reduced(parts: list[Tensor], op: Any) -> Tensor:
    whole = parts[0].clone()
    for part in parts[1:]:
        whole = torch.maximum(whole, part) if op == dist.ReduceOp.MAX else whole.add_(part)
    return whole


class Exchange:
    """Stands in for torch.distributed in `core/collectives.py`: these functions as there, all others are torch's."""

    def __init__(self, folder: Path) -> None:
        self.box = Mailbox(folder)
        self.members: dict[Any, tuple[str, list[int], int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def _group(self, group: Any) -> tuple[str, list[int], int]:
        """Its name, the global ranks of its members, and the place of this one."""
        if group not in self.members:
            ranks = dist.get_process_group_ranks(group)
            self.members[group] = (f"{group.group_name}+{ranks[0]}", ranks, ranks.index(self.box.own))
        return self.members[group]

    def _begin(self, group: Any) -> tuple[str, list[int], int, list[int]]:
        name, ranks, place = self._group(group)
        return f"{name}-{self.box.next(group)}", ranks, place, [rank for rank in ranks if rank != self.box.own]

    def _done(self, finish: Callable[[], None], async_op: bool) -> Any:
        work = _Work(finish)
        return work if async_op else work.wait()

    def all_gather(self, whole: Tensor, shard: Tensor, group: Any = None, async_op: bool = False) -> Any:
        name, ranks, place, others = self._begin(group)
        self.box.send(name, shard, others)
        parts = whole.view(len(ranks), -1)
        parts[place].copy_(shard.reshape(-1))

        def finish() -> None:
            for part, rank in zip(parts, ranks, strict=True):
                if rank != self.box.own:
                    self.box.receive(name, rank, part)

        return self._done(finish, async_op)

    def reduce_scatter(self, shard: Tensor, whole: Tensor, group: Any = None, async_op: bool = False) -> Any:
        name, ranks, place, others = self._begin(group)
        parts = whole.view(len(ranks), -1)
        for part, rank in zip(parts, ranks, strict=True):
            if rank != self.box.own:
                self.box.send(name, part, [rank])

        def finish() -> None:
            received = [self._part(name, rank, parts[place]) for rank in ranks]
            shard.copy_(_reduced(received, dist.ReduceOp.SUM).view_as(shard))

        return self._done(finish, async_op)

    def _part(self, name: str, rank: int, own: Tensor) -> Tensor:
        """What `rank` has sent; this rank's `own`, which gives the shape."""
        if rank == self.box.own:
            return own
        received = torch.empty_like(own)
        self.box.receive(name, rank, received)
        return received

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        name, ranks, _, others = self._begin(group)
        self.box.send(name, x, others)
        return self._done(lambda: x.copy_(_reduced([self._part(name, rank, x) for rank in ranks], op)), async_op)  # type: ignore[arg-type,return-value]

    def broadcast(self, x: Tensor, group: Any = None, group_src: int = 0, async_op: bool = False) -> Any:
        name, ranks, place, others = self._begin(group)
        if place == group_src:
            self.box.send(name, x, others)
            return self._done(lambda: None, async_op)
        return self._done(lambda: self.box.receive(name, ranks[group_src], x), async_op)

    def reduce(self, x: Tensor, group: Any = None, group_dst: int = 0, async_op: bool = False) -> Any:
        name, ranks, place, _ = self._begin(group)
        if place != group_dst:
            self.box.send(name, x, [ranks[group_dst]])
            return self._done(lambda: None, async_op)
        own = x.clone()
        parts = lambda: [self._part(name, rank, own) for rank in ranks]  # noqa: E731
        return self._done(lambda: x.copy_(_reduced(parts(), dist.ReduceOp.SUM)), async_op)  # type: ignore[arg-type,return-value]

    def all_to_all_single(
        self, result: Tensor, sent: Tensor, back: list[int], out: list[int], group: Any = None, async_op: bool = False
    ) -> Any:
        name, ranks, place, _ = self._begin(group)
        leaving, coming = sent.split(out), result.split(back)
        coming[place].copy_(leaving[place])
        for rank, part in zip(ranks, leaving, strict=True):
            if rank != self.box.own:
                self.box.send(name, part, [rank])

        def finish() -> None:
            for rank, part in zip(ranks, coming, strict=True):
                if rank != self.box.own:
                    self.box.receive(name, rank, part)

        return self._done(finish, async_op)

    def batch_isend_irecv(self, batch: Sequence[Any]) -> list[Any]:
        works = []
        for message in batch:
            name, ranks, _ = self._group(message.group)
            peer = ranks[message.group_peer]
            sends = message.op is dist.isend
            ends = (self.box.own, peer) if sends else (peer, self.box.own)
            each = f"{name}-between-{self.box.next((message.group, *ends))}"
            if sends:
                self.box.send(each, message.tensor, [peer])
                works.append(_Work(lambda: None))
            else:
                works.append(_Work(lambda each=each, peer=peer, x=message.tensor: self.box.receive(each, peer, x)))  # type: ignore[misc]
        return works


def use_mailbox(folder: Path) -> None:
    """From now on this rank's collectives go through files in `folder`."""
    exchange = Exchange(folder)
    collectives.dist = exchange  # type: ignore[assignment]
    collectives._all_gather, collectives._reduce_scatter = exchange.all_gather, exchange.reduce_scatter
