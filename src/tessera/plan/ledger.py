"""What is alive on a rank as a step goes on: bytes by kind now, and by kind when most was alive.

A formula walks through a step and says what comes and goes, in the order in which the code does it; the ledger keeps
the most. Sizes are whole numbers, or arrays of candidates, for each of which the most may be elsewhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tessera.core.arrays import where

KINDS = ("states", "activations", "gathered", "working")


class Ledger:
    """`now` and `most` have bytes of each of `KINDS`; `moment` says where in the step most is alive (of arrays: the
    place where it was last so for some candidate)."""

    def __init__(self) -> None:
        self.now: dict[str, Any] = dict.fromkeys(KINDS, 0)
        self.most: dict[str, Any] = dict.fromkeys(KINDS, 0)
        self.total: Any = 0
        self.most_total: Any = 0
        self.phase = self.moment = ""

    def begin(self, phase: str, **held: Any) -> None:
        """Go to another place of the step, where so much is alive of each kind."""
        self.phase, self.now = phase, dict.fromkeys(KINDS, 0) | held
        self.total = sum(self.now.values())
        self._compare()

    def hold(self, size: Any, kind: str = "working") -> Any:
        """So many bytes come; returns `size`, which is to be dropped."""
        self.now[kind] = self.now[kind] + size
        self.total = self.total + size
        self._compare()
        return size

    def drop(self, size: Any, kind: str = "working") -> None:
        """So many bytes go."""
        self.now[kind] = self.now[kind] - size
        self.total = self.total - size

    def touch(self, size: Any, kind: str = "working") -> None:
        """So many bytes come and go at once."""
        self.drop(self.hold(size, kind), kind)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """What comes and goes in here: at its end as much is alive as at its begin."""
        before, total = dict(self.now), self.total
        yield
        self.now, self.total = before, total

    def _compare(self) -> None:
        more = self.total > self.most_total
        if not (more.any() if isinstance(more, np.ndarray) else more):
            return
        self.moment = self.phase
        self.most = {kind: where(more, self.now[kind], self.most[kind]) for kind in KINDS}
        self.most_total = where(more, self.total, self.most_total)
