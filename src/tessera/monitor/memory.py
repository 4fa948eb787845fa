"""Memory of a rank: by kind at the peak of a step that is counted whole, and a leak, by what there is more of.

states       parameters, gradients and the optimizer's state
activations  what the forward makes and keeps for the backward
gathered     what collectives bring: weights, operands, keys and values of other ranks
other        what the backward and the optimizer make: gradients of activations, recomputed layers, scratch
"""

import gc
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

from tessera.core.live_memory import LoggedMemory
from tessera.core.recorder import Record
from tessera.core.text import human
from tessera.nn.parameter import to_local

KINDS = ("states", "activations", "gathered", "other")
_KIND_IN = {"data": "activations", "forward": "activations"}
BRINGING = ("all_gather", "all_to_all", "broadcast", "shift", "receive")


class MemoryByKind(LoggedMemory):
    """Counts every storage of a step with its kind, and what there was of each when most was alive.

    The kind of a storage is that of the phase in which it was made (`phase`), until `label` gives it another.
    """

    def __init__(self, states: Iterable[Tensor]) -> None:
        super().__init__()
        self.phase = "data"
        self._kinds: list[str] = []
        self._filled: set[int] = set()  # storages from before that were empty and are not counted yet
        for tensor in states:
            self._count(to_local(tensor))
            self.label(tensor, "states")

    def label(self, tensor: Tensor, kind: str) -> None:
        """Say what kind of memory a tensor is that has been counted."""
        number = self.number(to_local(tensor))
        if number is not None:
            self._kinds[number] = kind

    def brought(self, record: Record, tensor: Tensor) -> None:
        """A collective fills this tensor."""
        if record.kind in BRINGING:
            self.label(tensor, "gathered")

    def peak_by_kind(self) -> dict[str, int]:
        """Bytes of each kind when most was alive; their sum is `peak`."""
        now, most = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        alive = highest = 0
        for number, grown in self.changes:
            now[self._kinds[number]] += grown
            alive += grown
            if alive > highest:
                highest, most = alive, dict(now)
        return most

    def _begins(self, key: int) -> None:
        self._kinds.append("gathered" if key in self._filled else _KIND_IN.get(self.phase, "other"))
        self._filled.discard(key)

    def _resized(self, storage: torch.UntypedStorage, size: int) -> object:
        if size and not storage.nbytes():  # FSDP2 keeps whole weights so, without memory while they are cut
            number = self._number.get(storage._cdata)
            if number is None:
                self._filled.add(storage._cdata)  # it counts once an operator has returned a view of it
            else:
                self._kinds[number] = "gathered"
        return super()._resized(storage, size)


BLOCKS, BLOCK = 4, 5
"""A leak is growth in this many blocks of steps one after another, of so many steps each."""
LEAST = 2**19
"""Bytes a step below which nothing is called a leak."""


class Leak:
    """Watches what a rank holds after each step; says once what there is more of while that grows and grows.

    First the objects that are there are counted, then, a block of steps later, those that have been added: within 50
    steps of a leak's begin it is named.
    """

    def __init__(self) -> None:
        self._held: deque[int] = deque(maxlen=BLOCKS * BLOCK)
        self._before: tuple[int, Counter[str], Counter[str]] | None = None
        self._told = False

    def step(self, held: int, step: int) -> str | None:
        """Take the bytes held after `step`; what grows, in one sentence, when that has become plain."""
        self._held.append(held)
        growth = self._growth()
        if self._told or not growth:
            self._before = None
            return None
        if self._before is None:
            self._before = (step, *_objects())
            return None
        since, *then = self._before
        if step - since < BLOCK:
            return None
        self._told = True
        tensors, others = (now - before for now, before in zip(_objects(), then, strict=True))
        least = BLOCK // 2  # added in these steps: what grows by less is not it
        kept = [f"{count} tensors {name}" for name, count in tensors.most_common(2) if count > least]
        kept = kept or [f"{count} objects {name}" for name, count in others.most_common(2) if count > least]
        what = f"more than at step {since}: {', '.join(kept)}" if kept else "in no tensor or object of Python"
        return f"memory grows by {human(growth)} a step ({what})"

    def _growth(self) -> float:
        """Bytes a step, where the least of each block is more than that of the block before by a leak; else 0."""
        if len(self._held) < BLOCKS * BLOCK:
            return 0.0
        held = list(self._held)
        least = [min(held[i : i + BLOCK]) for i in range(0, len(held), BLOCK)]
        steady = all(after - before >= BLOCK * LEAST for before, after in zip(least, least[1:], strict=False))
        return (least[-1] - least[0]) / ((BLOCKS - 1) * BLOCK) if steady else 0.0


def _objects() -> tuple[Counter[str], Counter[str]]:
    """How many tensors there are of each shape and dtype, and objects of each other type that Python can list."""
    tensors: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for one in gc.get_objects():
        kind = type(one)
        if not issubclass(kind, Tensor):
            others[kind.__qualname__] += 1
            continue
        with suppress(RuntimeError, ValueError):  # one without a shape, nested or not initialised
            shape = " × ".join(map(str, one.shape)) or "of one number"
            tensors[f"{shape} ({str(one.dtype).removeprefix('torch.')})"] += 1
    return tensors, others
