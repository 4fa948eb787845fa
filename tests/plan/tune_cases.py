"""Runs on every rank of a pool: the tuner on small layers, and the peak of one product."""

import contextlib
import io
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from support.mesh import shared_mesh
from tessera.config.schema import TrainConfig
from tessera.core.collectives import Recorder, totals
from tessera.core.live_memory import PeakMemory
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.streams import residual_layout
from tessera.models.config import ModelConfig
from tessera.nn.linear import ColumnParallelLinear, ParallelLinear, RowParallelLinear, parallel_linear
from tessera.nn.parameter import to_local
from tessera.plan import traffic
from tessera.plan.scratch import Operands, product_scratch
from tessera.plan.tune import Tuning, _Trial, candidates, tune
from tessera.sizes.rules import TensorParallel
from tessera.sizes.schedule import Schedule
from tessera.train.settings import row_shape, step_shape
from train.on_rank import train_on_rank

MODEL = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=48,
    max_positions=64,
)
UNSLICED = ModelConfig(**(vars(MODEL) | {"hidden_size": 30}))
"""15 features of it lie on a rank of two rows: no slice factor divides them."""

FEW_ROUNDS = mock.patch("tessera.plan.tune.ROUNDS", 3)

SETTINGS = {
    "base_model": "none",
    "datasets": [{"path": "none"}],
    "tensor_parallel_mode": "2d",
    "tensor_parallel_size": 4,
    "tensor_parallel_schedule": "auto",
    "micro_batch_size": 4,
    "sequence_len": 8,
}


def config_of(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(SETTINGS | changes)


def asked(config: TrainConfig) -> tuple[TensorParallel, StepShape]:
    """What `tune` takes of a config."""
    return config.tensor_parallel, row_shape(config)


@contextlib.contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def tuned(
    folder: Path,
    model: ModelConfig,
    changes: dict[str, Any],
    bf16: bool = False,
    slow: tuple[str, ...] = (),
    seconds: float = 0.0,
) -> tuple[Tuning, int]:
    """The choice on this rank and how many collectives it took; those of the kinds `slow` take so much longer."""
    config = config_of(**changes)
    mesh = shared_mesh({axis: n for axis, n in config.axes.items() if n > 1})
    delay = (lambda record: seconds if record.kind in slow else 0.0) if slow else None
    with cache_at(folder), FEW_ROUNDS, Recorder(delay=delay) as recorder:
        compute = torch.bfloat16 if bf16 else torch.float32
        limit, context = config.tensor_parallel_scratch_gib, config.context_parallel
        tuning = tune(*asked(config), model, mesh, compute, limit, context=context)
    return tuning, len(recorder.records)


def trial_traffic() -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """Of each candidate the (axis, kind) → (calls, bytes) of a trial, and by formula; sums of all ranks left out."""
    config = config_of()
    mesh, found = shared_mesh({axis: n for axis, n in config.axes.items() if n > 1}), []
    for candidate in candidates(*asked(config), MODEL, mesh, torch.float32):
        trial, parallel = _Trial(candidate), candidate.parallel
        trial.run()  # the order of weights is learnt
        with Recorder() as recorder:
            trial.run()
        model = replace(MODEL, num_layers=2, vocab_size=16)
        form = traffic.totals(traffic.step_transfers(model, step_shape(config, parallel), parallel))
        both = totals(recorder.records), form
        found.append(tuple({key: n for key, n in each.items() if key[1] != "all_reduce"} for each in both))
    return found


def told(folder: Path, *arguments: Any, **options: Any) -> tuple[str, dict[str, float], list[str], int]:
    """The same as what can be sent: the schedule, its times, the lines and the collectives."""
    tuning, collectives = tuned(folder, *arguments, **options)
    return str(tuning.schedule), tuning.milliseconds, tuning.lines(), collectives


def told_apart(folder: Path, *arguments: Any) -> tuple[str, dict[str, float], list[str], int]:
    """The same where each rank has a cache folder of its own."""
    return told(folder / str(torch.distributed.get_rank()), *arguments)


def trained(folder: Path, settings: dict[str, Any]) -> str:
    """What a run says on this rank."""
    said = io.StringIO()
    with cache_at(folder), FEW_ROUNDS, contextlib.redirect_stdout(said):
        train_on_rank(settings)
    return said.getvalue()


def peaks(
    sizes: dict[str, int], schedule: Schedule, column: bool, tokens: int, residual: int, hidden: int
) -> tuple[int, int, int, int]:
    """Bytes of one product, as held and by the closed form: (scratch, form) of the backward, (kept, form) before it."""
    mesh = shared_mesh(sizes)
    parallel = Parallel(mesh, residual_layout(True, schedule.name), schedule=schedule)
    kind, features = (ColumnParallelLinear, (residual, hidden)) if column else (RowParallelLinear, (hidden, residual))
    layer = kind(*features, parallel)
    here = tokens // mesh.size(("depth", "row")) * 4
    r, h = here * residual // mesh.sizes["inner"], here * hidden // mesh.sizes["col"]
    w = 4 * residual * hidden // mesh.sizes["inner"] // mesh.sizes["col"]
    moves = {axis: n > 1 for axis, n in mesh.sizes.items()}
    product = Operands(column, moves["col"] * r, moves["row"] * w, moves["inner"] * h)
    copies = ((product.r if column else product.h) + product.w) if schedule.keep else 0
    shape = tokens // mesh.size(layer.input.tokens), features[0] // mesh.size(layer.input.features)
    # a thread of the backend may let go of a buffer late: the least of several tries
    held, kept = (min(tries) for tries in zip(*(_held(layer, shape, copies) for _ in range(3)), strict=True))
    return held, product_scratch(product, schedule, mesh.sizes["col"]), kept, copies


def _held(layer: ParallelLinear, shape: tuple[int, int], copies: int) -> tuple[int, int]:
    """Bytes held at once in a backward beside what it is given and gives, and bytes kept for it."""
    weight = to_local(layer.weight)
    layer.weight.grad = None
    with PeakMemory() as memory:
        weight.zero_().view(-1)  # seen: it is not scratch
        x = torch.zeros(shape, requires_grad=True)
        before = memory.current
        (y,) = parallel_linear([layer], x)
        before += y.numel() * y.itemsize
        patience = time.monotonic() + 5
        while memory.current > before + copies and time.monotonic() < patience:
            time.sleep(0.001)
        kept = memory.current - before
        dy = torch.zeros_like(y)
        memory.peak = before = memory.current
        y.backward(dy)
        return memory.peak - before - (x.numel() + weight.numel()) * 4, kept
