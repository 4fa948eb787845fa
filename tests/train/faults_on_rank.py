"""Runs with a fault on one rank, and runs that tell what they did: for the ranks of a pool, as on_rank.py."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tessera.checkpoint import tensors as checkpoint
from tessera.core.collectives import Recorder
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.data.loader import Loader
from tessera.engine.replicas import drifted
from tessera.engine.step import Step, StepResult
from tessera.nn.parameter import to_local
from tessera.train.trainer import train
from train.on_rank import handed_on_rank, own_rank, said_on_rank, stopping


def altered_on_rank(settings: dict[str, Any], step: int, ranks: set[int], name: str) -> str:
    """What a run prints in which, after a step, one element of a parameter changes on `ranks` alone."""
    real = Step.__call__

    def call(self: Step, batches: Sequence[MicroBatch], index: int, *args: Any, **how: Any) -> StepResult:
        result = real(self, batches, index, *args, **how)
        if index + 1 == step and own_rank() in ranks:
            with torch.no_grad():
                shard = to_local(self.model.get_parameter(name))
                shard[(0,) * shard.ndim] += 1e-3
        return result

    with patch.object(Step, "__call__", call):
        return said_on_rank(settings)


def compared_on_rank(settings: dict[str, Any]) -> tuple[str, list[tuple[int, list[tuple[str, int, int]]]]]:
    """What a run prints; of each comparison of copies the parameters, and kind, ranks and bytes of its collectives."""
    comparisons = []

    def watched(model: nn.Module, mesh: Mesh) -> list[str]:
        with Recorder() as recorder:
            lines = drifted(model, mesh)
        moved = [(record.kind, record.ranks, record.bytes) for record in recorder.records]
        comparisons.append((len(list(model.parameters())), moved))
        return lines

    with patch("tessera.train.health.drifted", watched):
        return said_on_rank(settings), comparisons


def spoilt_on_rank(settings: dict[str, Any], steps: set[int], rank: int, factor: float = math.nan) -> str:
    """What a run prints in which, at these steps, the loss of `rank` is multiplied by `factor` before its backward."""
    real = Step.gradients

    def gradients(self: Step, batches: Sequence[MicroBatch], step: int, valid: int | None = None) -> Tensor:
        if step + 1 not in steps or own_rank() != rank:
            return real(self, batches, step, valid)
        hook = self.model.register_forward_hook(lambda module, inputs, loss: loss * factor)
        try:
            return real(self, batches, step, valid)
        finally:
            hook.remove()

    with patch.object(Step, "gradients", gradients):
        return said_on_rank(settings)


@contextmanager
def _logged(seen: list[tuple[int, int, int]]) -> Iterator[None]:
    real = Loader.step_batches

    def step_batches(self: Loader, step: int) -> list[MicroBatch]:
        batches = real(self, step)
        for batch in batches:
            firsts = batch.input_ids[:, 0].tolist()
            seen.extend((step + 1, batch.first_document + place, token) for place, token in enumerate(firsts))
        return batches

    with patch.object(Loader, "step_batches", step_batches):
        yield


def samples_on_rank(settings: dict[str, Any], stop_at: int | None) -> list[tuple[int, int, int]]:
    """The rows that this rank trains on, until asked to stop at a step: (step, place in the step, first token)."""
    seen: list[tuple[int, int, int]] = []
    with _logged(seen), stopping(stop_at):
        told = said_on_rank(settings)
    if "Error: " in told or "Failed: " in told:
        raise AssertionError(told)
    return seen


def train_with_fresh_moments(settings: dict[str, Any]) -> None:
    """Go on with the weights of a checkpoint and an optimizer that has never stepped."""

    def load_and_forget(folder: Any, model: Any, optimizer: Any) -> Any:
        state = real(folder, model, optimizer)
        optimizer.state.clear()
        return state

    real, checkpoint.load = checkpoint.load, load_and_forget
    try:
        train(handed_on_rank(settings))
    finally:
        checkpoint.load = real


class Calls(TorchDispatchMode):
    """Counts every call of torch.distributed, whether through our door or not."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def train_and_count(settings: dict[str, Any]) -> Counter[str]:
    with Calls() as calls:
        train(handed_on_rank(settings))
    return calls.counts
