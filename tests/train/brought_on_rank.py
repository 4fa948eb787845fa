"""What runs on the ranks of a pool for test_brought: a module of its own, so that no worker imports transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tessera.data.batch import MicroBatch
from tessera.data.loader import Loader
from tessera.data.stream_loader import StreamLoader
from train.on_rank import own_rank, train_on_rank

NAMES = ("input_ids", "targets", "positions", "documents")


def train_recorded_on_rank(settings: dict[str, Any], folder: str) -> None:
    """A run whose first rank leaves the micro-batches of each step in `folder`."""

    def recording(real: Callable[..., list[MicroBatch]]) -> Callable[..., list[MicroBatch]]:
        def step_batches(self: Any, step: int) -> list[MicroBatch]:
            batches = real(self, step)
            if own_rank() == 0:
                torch.save([{name: getattr(one, name) for name in NAMES} for one in batches], Path(folder) / str(step))
            return batches

        return step_batches

    prepared = patch.object(Loader, "step_batches", recording(Loader.step_batches))
    streamed = patch.object(StreamLoader, "step_batches", recording(StreamLoader.step_batches))
    with prepared, streamed:
        train_on_rank(settings)
