"""What the planner says of a config: its memory and its time, before it runs."""

from dataclasses import replace
from math import prod

import torch

from tessera.config.schema import TrainConfig
from tessera.core.axes import DATA_AXES
from tessera.core.mesh import Mesh
from tessera.models.config import ModelConfig
from tessera.plan.choice import Training
from tessera.plan.fit import MemoryLayout
from tessera.plan.machine import Cluster
from tessera.plan.recommend import Judged, judge_step
from tessera.train.settings import compute_dtype, fitting_layout, parallel_for, row_shape, step_shape


def foresee(config: TrainConfig, model: ModelConfig, cluster: Cluster) -> Judged:
    """The peak and the step time of `config` on the machines of `cluster`, as many of them as it needs.

    Raises UserError where sizes do not fit the model.
    """
    config = fitting_layout(config, model, cluster.per_machine)
    mesh = Mesh(config.mesh_sizes, device="meta", rank=0)
    compute = _compute(config, cluster)
    parallel = parallel_for(config, model, mesh, compute=compute)
    shape = step_shape(config, parallel)
    rows = shape.batch * shape.micro_batches * prod(mesh.sizes[axis] for axis in DATA_AXES)
    training = Training(shape.sequence, rows, str(compute).removeprefix("torch."))
    offload = config.fsdp_config.offload_params
    judged = judge_step(model, shape, parallel, cluster.of(mesh.world), training, str(mesh), offload=offload)
    return replace(judged, name=f"{config.tensor_parallel_mode}: {mesh}")


def memory_of(config: TrainConfig, model: ModelConfig, cluster: Cluster) -> MemoryLayout:
    """The same config as what `plan.fit.memory_remedies` turns."""
    config = fitting_layout(config, model, cluster.per_machine)
    return MemoryLayout(
        model,
        row_shape(config),
        config.tensor_parallel,
        {axis: config.mesh_sizes[axis] for axis in DATA_AXES},
        config.context_parallel,
        torch.bfloat16 if config.full_bf16 else torch.float32,
        _compute(config, cluster),
        config.fsdp_config.offload_params,
        config.optimizer,
    )


def _compute(config: TrainConfig, cluster: Cluster) -> torch.dtype:
    """What products run in: a device that the planner knows by its profile has bf16 where that says so."""
    named = "bfloat16" in cluster.profile.peak_flops and config.bf16 == "auto"
    return torch.bfloat16 if named else compute_dtype(config, torch.device("cpu"))
