"""Once: results of a layer's forward that its recomputation in the backward takes instead of computing them again.

A layer that is recomputed runs twice; what goes through its `Once` runs in the first of the two alone: attention's
kernel, and its communication. All that is kept between the two runs are the results.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tessera.core.host_memory import HostMemory


class Once:
    """Of one layer and one forward. With `host` the results lie in host memory until they are asked for again."""

    def __init__(self, host: HostMemory | None = None) -> None:
        self._host = host
        self._results: deque[list[Any]] = deque()
        self._runs = 0

    def begin(self) -> None:
        """A run of the layer begins: the first, or one that computes it again."""
        self._runs += 1

    def __call__(self, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """What `compute` gives, which is not differentiable: of this run, or the same of the first one."""
        if self._runs > 1 and self._results:
            kept = self._results.popleft()
            return kept if self._host is None else [self._host.unpack(x) for x in kept]
        found = list(compute())
        if self._runs == 1:
            kept = [x.detach() for x in found]
            self._results.append(kept if self._host is None else [self._host.pack(x) for x in kept])
        return found


def run_once(once: Once | None, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """What `compute` gives; of a layer that runs again, from its first run."""
    return list(compute()) if once is None else once(compute)
