"""Runs on every rank of a pool: what a step hands to torch.distributed under FSDP2, and the closed form of it."""

from dataclasses import replace
from typing import Any

import torch

from distributed.model_cases import MODELS, batch_of, share
from support.mesh import shared_mesh
from tessera.core.axes import DATA_AXES
from tessera.core.collectives import Recorder
from tessera.core.collectives import totals as counted
from tessera.engine.fsdp import build_decoder
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.shape import Fsdp, StepShape
from tessera.layout.streams import residual_layout
from tessera.plan.traffic import step_transfers, totals
from tessera.sizes.schedule import Schedule

ROWS, LENGTH = 8, 6  # of a micro-batch, over all data ranks


def data_traffic(
    name: str, sizes: dict[str, int], asked: Fsdp, micro_batches: int, compute: torch.dtype, **options: Any
) -> tuple[Any, Any]:
    """(axis, kind) → calls and bytes received, counted in one step and by formula."""
    mesh, recompute = shared_mesh(sizes), options.pop("recompute", False)
    settings = {"fsdp": ("shard", "row"), "weights_over": ()} | options
    schedule = settings.setdefault("schedule", Schedule())
    parallel = Parallel(mesh, residual_layout(True, schedule.name), compute=compute, **settings)
    model = build_decoder(MODELS[name], parallel, asked, gradient_checkpointing=recompute)
    model.initialize(seed=5)
    step = Step(model, build_optimizer(model, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.0), max_grad_norm=1.0)
    ids = torch.randint(0, 509, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    batches = [share(batch_of(ids, ids, place * ROWS), mesh) for place in range(micro_batches)]
    with Recorder() as recorder:
        step(batches, 0, 1e-3)
    shape = StepShape(ROWS // mesh.size(DATA_AXES), LENGTH, micro_batches, recompute)
    shape = replace(shape, reshard=asked.reshard, by_layer=asked.by_layer, sync_each_batch=asked.sync_each_batch)
    return counted(recorder.records), totals(step_transfers(model.config, shape, parallel))
