"""What runs on the ranks of a pool for test_packing: a module of its own, so that no worker imports transformers."""

import os
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import torch

from tessera.data.batch import MicroBatch
from tessera.data.epochs import Packed
from tessera.data.loader import Loader
from tessera.data.stream_loader import StreamLoader
from tessera.train.build import build
from train.on_rank import _shared, handed_on_rank

Shapes = list[tuple[tuple[int, ...], bool]]


def shapes_on_rank(settings: dict[str, Any]) -> dict[str, Shapes]:
    """The shape of each micro-batch of the first step and of evaluation, and whether it has documents."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with patch("tessera.train.build.run_mesh", _shared):
        built = build(handed_on_rank(settings), torch.device("cpu"))

    def shapes(batches: Iterable[MicroBatch]) -> Shapes:
        return [(tuple(batch.input_ids.shape), batch.documents is not None) for batch in batches]

    held_out = built.held_out.eval_batches() if built.prepared.manifest.eval_rows else []
    return {"train": shapes(built.loader.step_batches(0)), "eval": shapes(held_out)}


class Small(Packed):
    """Windows of five samples; it remembers which of them were counted here."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, window=5)
        self.here: list[tuple[int, int]] = []

    def count_windows(self, epoch: int, share: int = 0, shares: int = 1) -> list[int]:
        self.here += [(epoch, window) for window in range(share, self._windows, shares)]
        return super().count_windows(epoch, share, shares)


def counted_on_rank(settings: dict[str, Any]) -> tuple[list[tuple[int, int]], list[int], int]:
    """The windows (epoch, window) that this rank counts to build a run; the rows up to each epoch, and the steps."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with patch("tessera.train.build.run_mesh", _shared), patch("tessera.train.build.Packed", Small):
        built = build(handed_on_rank(settings), torch.device("cpu"))
        assert isinstance(built.loader, Loader) and isinstance(built.loader.epochs, Small)
        here = [*built.loader.epochs.here]
        return here, [built.loader.epochs.rows_before(epoch) for epoch in range(4)], built.total_steps


def stream_loader_on_rank(settings: dict[str, Any]) -> tuple[int, int, bool]:
    """What the loader of a stream was told: its workers, the steps kept ready, and whether documents are isolated.

    transformers loads no tokenizer for it, but for whoever makes the run.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    run = handed_on_rank(settings)
    with (
        patch("tessera.train.build.run_mesh", _shared),
        patch("tessera.data.tokenizer.read_auto", side_effect=AssertionError),
    ):
        loader = build(run, torch.device("cpu")).loader
    assert isinstance(loader, StreamLoader)
    return loader._count, loader._ready.maxsize, loader.shape.isolated
