"""Runs on every rank of a pool: what a model with memory savers calls."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.model_cases import LLAMA, batches, build
from nn.shards import mesh_of
from tessera.core.collectives import Recorder
from tessera.engine.step import Step


class Operators(TorchDispatchMode):
    """Counts the operators whose names hold `part`."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.calls = part, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if self.part in name:
            self.calls[name.rpartition("_")[2]] += 1
        return function(*args, **(kwargs or {}))


def attention_calls(sizes: dict[str, int], options: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Of one step: what travels along the sequence axes, by kind; and attention's kernels, forward and backward."""
    model = build(LLAMA, mesh_of(sizes), **options)
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    with Recorder() as recorder, Operators("flash_attention") as operators:
        step.gradients(batches(LLAMA, 1, size=1, length=24), 0)
    moved = Counter(r.kind for r in recorder.records if r.kind in ("all_to_all", "send", "receive"))
    return dict(moved), dict(operators.calls)
