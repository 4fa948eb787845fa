"""Overlap: the weights of gathered products moved early, and the sums of their gradients late."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Moving(Protocol):
    """Collectives on their way; `wait` gives what arrived."""

    def wait(self) -> list[Tensor]: ...


class Pass(NamedTuple):
    """A forward or a backward of one chunk of a model; `chunk` is 0 unless a pipeline gives a rank several."""

    backward: bool
    chunk: int = 0


FORWARD, BACKWARD = Pass(False), Pass(True)


class _Request(NamedTuple):
    site: Hashable
    start: Callable[[], Moving]


class Overlap:
    """The weights of one model on their way: gathered one product early, gradients waited for one product late.

    Each pass asks for weights in the order of the last time, a backward with its recomputed forwards included: the
    order is learnt in the first micro-batch. Whoever runs the model begins each pass and says which one comes next,
    whose first weights the last product of this one then gathers. So nothing is gathered that is not used.
    E.g. F0 F1 B0: begin(FORWARD, FORWARD), begin(FORWARD, BACKWARD), begin(BACKWARD).
    """

    def __init__(self) -> None:
        self._orders: dict[Pass | None, list[_Request]] = {}
        self._order: list[_Request] = []  # of the pass that runs
        self._asked = self._known = 0  # of them: asked for by now, and known from the last time
        self._then: Pass | None = None
        self._ahead: tuple[Hashable, Moving] | None = None
        self._late: list[tuple[Moving, Callable[[list[Tensor]], None]]] = []

    def begin(self, this: Pass, then: Pass | None = None) -> None:
        """The pass `this` begins; `then` is the one after it, None where that is not known or weights change first."""
        del self._order[self._asked :]  # what the pass before has not asked for this time
        if this != self._then:
            self._ahead = None
        self._order = self._orders.setdefault(this, [])
        self._asked, self._known, self._then = 0, len(self._order), then
        self._late.clear()  # of a backward that failed

    def gather(self, site: Hashable, start: Callable[[], Moving]) -> Moving:
        """The weights of `site`, whose gather `start` issues, on their way; the next site's are issued too."""
        if self._asked >= self._known or self._order[self._asked].site != site:
            self._known = 0  # another order than the last time: learnt anew
            self._order[self._asked :] = [_Request(site, start)]
        ahead, self._ahead = self._ahead, None
        arriving = ahead[1] if ahead is not None and ahead[0] == site else start()
        self._asked += 1
        following = self._order[self._asked : self._known]
        if self._asked == self._known:
            following = self._orders.get(self._then, [])
        if following:
            self._ahead = following[0].site, following[0].start()
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
