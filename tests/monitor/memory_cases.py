"""Runs on every rank of a pool: a step of the trainer whose memory is counted twice, by kind and in one number."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from tessera.core.collectives import Recorder
from tessera.core.live_memory import PeakMemory
from tessera.monitor import counted
from tessera.monitor.counted import MOST_APART
from tessera.monitor.memory import MemoryByKind
from tessera.monitor.monitor import Monitor
from tessera.nn.parameter import to_local
from train.on_rank import train_on_rank


@dataclass(frozen=True)
class CountedTwice:
    """Bytes by kind at the peak of a counted step; the peak of a count of its own in the step after it, which does the
    same; bytes of what was there before both, and of the rank's gradients."""

    step: int
    kinds: dict[str, int]
    peak: int
    before: int
    gradients: int


def counted_on_rank(settings: dict[str, Any], most_apart: int = MOST_APART) -> list[CountedTwice]:
    """Train; each step that is counted by kind, at most so many apart, beside the step after it."""
    kinds: list[dict[str, int]] = []
    found: list[CountedTwice] = []
    real, count = Monitor.step, MemoryByKind.peak_by_kind

    @contextmanager
    def step(self: Monitor, **how: Any) -> Iterator[Recorder]:
        if self._counted._last == self._done > 0:  # the step after
            tensors = list(self._of.model.parameters())
            state = [t for of in self._of.optimizer.state.values() for t in of.values()]
            gradients = sum(to_local(p.grad).untyped_storage().nbytes() for p in tensors if p.grad is not None)
            with PeakMemory() as alone, real(self, **how) as recorder:
                for tensor in [*tensors, *state]:
                    alone._count(to_local(tensor))
                before = alone.current
                yield recorder
            found.append(CountedTwice(self._done, kinds[-1], alone.peak, before, gradients))
        else:
            with real(self, **how) as recorder:
                yield recorder

    def by_kind(self: MemoryByKind) -> dict[str, int]:
        kinds.append(count(self))
        assert sum(kinds[-1].values()) == self.peak
        return kinds[-1]

    with (
        patch.object(Monitor, "step", step),
        patch.object(MemoryByKind, "peak_by_kind", by_kind),
        patch.object(counted, "MOST_APART", most_apart),
    ):
        train_on_rank(settings)
    return found
