"""Overlap: the weights of gathered products moved early, and the sums of their gradients late."""

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor


class Moving(Protocol):
    """Collectives on their way; `wait` gives what arrived."""

    def wait(self) -> list[Tensor]: ...


class Overlap:
    """The weights of one model on their way: gathered one product early, gradients waited for one product late.

    The order in which products ask for weights is learnt in the first micro-batch and is the same in all others, the
    backward and its recomputed forwards included; so nothing is gathered that is not used.
    """

    def __init__(self) -> None:
        self._orders: dict[Hashable, list[tuple[Hashable, Callable[[], Moving]]]] = {}
        self._expected: list[tuple[Hashable, Callable[[], Moving]]] = []
        self._asked: list[tuple[Hashable, Callable[[], Moving]]] = []
        self._ahead: Moving | None = None
        self._late: list[tuple[Moving, Callable[[list[Tensor]], None]]] = []

    def begin(self, key: Hashable) -> None:
        """A forward begins; those with the same `key` ask for the same weights in the same order."""
        self._expected, self._asked, self._ahead = self._orders.get(key, []), [], None
        self._late.clear()  # of a backward that failed
        self._orders[key] = self._asked

    def gather(self, site: Hashable, start: Callable[[], Moving]) -> Moving:
        """The weights of `site`, whose gather `start` issues, on their way; the next site's are issued too."""
        place = len(self._asked)
        self._asked.append((site, start))
        if place < len(self._expected) and self._expected[place][0] != site:
            self._expected, self._ahead = [], None  # another order than the last time: learnt anew
        arriving, self._ahead = self._ahead or start(), None
        if place + 1 < len(self._expected):
            self._ahead = self._expected[place + 1][1]()
        return arriving

    def finish_later(self, reducing: Moving, give: Callable[[list[Tensor]], None]) -> None:
        """In a backward: `give` what `reducing` sums, after the next call of this or at the end of the backward."""
        if not self._late:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._finish)
        self._late.append((reducing, give))
        if len(self._late) > 1:
            self._give(self._late.pop(0))

    def _finish(self) -> None:
        while self._late:
            self._give(self._late.pop(0))

    @staticmethod
    def _give(late: tuple[Moving, Callable[[list[Tensor]], None]]) -> None:
        reducing, give = late
        give(reducing.wait())
