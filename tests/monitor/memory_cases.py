"""Runs on every rank of a pool: a step of the trainer whose memory is counted twice, by kind and in one number."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tessera.core.collectives import Recorder
from tessera.core.live_memory import PeakMemory
from tessera.monitor.memory import MemoryByKind
from tessera.monitor.monitor import COUNTED_STEP, Monitor
from tessera.nn.parameter import to_local
from train.on_rank import train_on_rank


def counted_on_rank(settings: dict[str, Any]) -> tuple[dict[str, int], int, int, int]:
    """Bytes by kind at the peak of the counted step; the peak of a count of its own in the step after it, which does
    the same; bytes of what was there before both, and of the rank's gradients."""
    kinds: dict[str, int] = {}
    peaks: list[int] = []
    held: list[int] = []
    real, count = Monitor.step, MemoryByKind.peak_by_kind

    @contextmanager
    def step(self: Monitor, **how: Any) -> Iterator[Recorder]:
        model = self._of.model
        if self._done == COUNTED_STEP:  # the step after
            tensors = list(model.parameters())
            state = [t for of in self._of.optimizer.state.values() for t in of.values()]
            held.append(sum(to_local(p.grad).untyped_storage().nbytes() for p in tensors if p.grad is not None))
            with PeakMemory() as alone, real(self, **how) as recorder:
                for tensor in [*tensors, *state]:
                    alone._count(to_local(tensor))
                held.append(alone.current)
                yield recorder
            peaks.append(alone.peak)
        else:
            with real(self, **how) as recorder:
                yield recorder

    def by_kind(self: MemoryByKind) -> dict[str, int]:
        kinds.update(count(self))
        assert sum(kinds.values()) == self.peak
        return kinds

    with patch.object(Monitor, "step", step), patch.object(MemoryByKind, "peak_by_kind", by_kind):
        train_on_rank(settings)
    return kinds, peaks[0], held[1], held[0]
