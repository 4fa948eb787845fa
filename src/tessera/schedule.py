"""Schedules: how the operands of a product move, and when their collectives are issued.

    gather   one collective for each operand; with S slices, S panels, each gathered while the last one multiplies
    summa    panels broadcast along rows and columns of the grid (van de Geijn & Watts 1997)
    cannon   operands skewed, then shifted to the neighbour (Cannon 1969)

`Overlap` moves the weights of a gathered product early and their gradients late.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

SCHEDULES = ("gather", "summa", "cannon")


@dataclass(frozen=True)
class Schedule:
    """How operands move. All schedules give the same numbers.

    `slices` cuts a gathered product into so many panels. The switches are those of the gathered product: `keep` saves
    gathered X and W for the backward instead of gathering them again; `prefetch` gathers the weights of the next
    product before this one multiplies; `defer` waits for the sum of a weight's gradient after the next one is issued;
    `overlap` lets the sum of the input's gradient travel during the product of the weight's.
    """

    name: str = "gather"
    slices: int = 1
    keep: bool = False
    prefetch: bool = False
    defer: bool = False
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.name!r}; there are {', '.join(SCHEDULES)}")
        if self.slices < 1 or self.name != "gather" and (self.slices > 1 or self.keep):
            raise ValueError(f"{self}: the loops move one panel at a time; slices and keep are for gather")

    @property
    def in_panels(self) -> bool:
        """Whether products run panel by panel (panels.py) instead of as one (product.py)."""
        return self.name != "gather" or self.slices > 1

    def __str__(self) -> str:
        return f"slices {self.slices}" if self.slices > 1 else self.name


GATHER = Schedule()


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
