"""What the planner says of a config: its memory and its time, before it runs."""

import os
from dataclasses import replace
from math import prod

import torch

from tessera.config.schema import TrainConfig
from tessera.core import device as devices
from tessera.core.axes import DATA_AXES
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.models.config import ModelConfig
from tessera.monitor.predicted import Prediction
from tessera.plan.calibrate import Run
from tessera.plan.choice import Beside, Layout, Training
from tessera.plan.cluster import cluster_of, kept_profiles, profile_for
from tessera.plan.machine import Cluster
from tessera.plan.recommend import Judged, judge_step
from tessera.train.settings import (
    check_optim_args,
    compute_dtype,
    fitting_layout,
    fsdp_of,
    parallel_for,
    savers_of,
    step_shape,
    update_of,
)


def foresee(config: TrainConfig, model: ModelConfig, cluster: Cluster) -> Judged:
    """The peak and the step time of `config` on the machines of `cluster`, as many of them as it needs.

    Raises UserError where sizes do not fit the model.
    """
    config, parallel = _laid_out(config, model, cluster)
    return _judged(config, model, parallel, cluster.of(parallel.mesh.world))


def run_of(config: TrainConfig, model: ModelConfig, cluster: Cluster, seconds: float) -> Run:
    """A step of a run with `config` on machines of `cluster` that took so many seconds: what a profile is brought to.

    Raises UserError where sizes do not fit the model, or where products ran in another dtype than the profile has the
    rates of.
    """
    config, parallel = _laid_out(config, model, cluster)
    profile, dtype = cluster.profile, devices.dtype_name(parallel.compute)
    if profile.in_dtype(dtype) is not profile:
        reason = f"computed in {dtype}, and the rates of {profile.name} are those of a faster dtype"
        raise UserError("bf16", config.bf16, reason, "a run with bf16: true")
    shape, offload = step_shape(config, parallel), config.fsdp_config.offload_params
    per_machine = cluster.of(parallel.mesh.world).per_machine
    return Run.of(model, shape, parallel, per_machine, seconds, offload=offload, update=update_of(config))


def _laid_out(config: TrainConfig, model: ModelConfig, cluster: Cluster) -> tuple[TrainConfig, Parallel]:
    """The config with every size, and the layouts of its ranks on machines of `cluster`."""
    check_optim_args(config)
    config = fitting_layout(config, model, cluster.per_machine)
    mesh = Mesh(config.mesh_sizes, device="meta", rank=0)
    return config, parallel_for(config, model, mesh, compute=_compute(config, cluster))


def foresee_run(config: TrainConfig, model: ModelConfig, parallel: Parallel) -> Prediction:
    """The same of a run that is about to start here, in the layouts that its ranks have built.

    The profile is the newest that was measured on this machine with so many ranks, else one with fewer, else the one
    that is shipped for its device. Raises UserError where there is none.
    """
    mesh = parallel.mesh
    here = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world))
    own = profile_for(devices.hardware(mesh.device), kept_profiles(), ranks=here)
    cluster = replace(cluster_of("this", own), per_machine=here)
    judged = _judged(config, model, parallel, cluster.of(mesh.world))
    return Prediction.of(judged, measured_here=own is not None and own.measured)


def _judged(config: TrainConfig, model: ModelConfig, parallel: Parallel, cluster: Cluster) -> Judged:
    mesh, shape = parallel.mesh, step_shape(config, parallel)
    rows = shape.batch * shape.micro_batches * prod(mesh.sizes[axis] for axis in DATA_AXES)
    training = _training(config, shape.sequence, rows, parallel.compute)
    offload = config.fsdp_config.offload_params
    judged = judge_step(model, shape, parallel, cluster, training, str(mesh), offload=offload)
    return replace(judged, name=f"{config.tensor_parallel_mode}: {mesh}")


def layout_of(config: TrainConfig, model: ModelConfig, cluster: Cluster) -> tuple[Layout, Training]:
    """The same config as what `plan.fit.memory_remedies` turns."""
    asked = config.context_parallel
    config = fitting_layout(config, model, cluster.per_machine)
    tensor, fsdp, savers = config.tensor_parallel, fsdp_of(config), savers_of(config)
    again = "selective" if savers.attention_once else "true" if config.recompute else "false"
    layout = Layout(
        {axis: size for axis, size in config.mesh_sizes.items() if size > 1},
        config.micro_batch_size,
        config.gradient_accumulation_steps,
        again,
        fsdp.reshard,
        tensor.schedule,
        tensor.slices,
        savers.offload,
        savers.mlp_tiles,
        fsdp.offload,
        fsdp.sync_each_batch,
        Beside(tensor, asked, fsdp.by_layer, config.label_smoothing_factor > 0),
    )
    rows = layout.micro_batch * layout.micro_batches * layout.size(*DATA_AXES)
    return layout, _training(config, config.sequence_len, rows, _compute(config, cluster))


def _training(config: TrainConfig, sequence: int, rows: int, compute: torch.dtype) -> Training:
    stored = "bfloat16" if config.full_bf16 else "float32"
    dtype = devices.dtype_name(compute)
    return Training(sequence, rows, dtype, stored, config.optimizer, config.optim_args or {})


def _compute(config: TrainConfig, cluster: Cluster) -> torch.dtype:
    """What products run in: a device that the planner knows by its profile has bf16 where that says so."""
    named = "bfloat16" in cluster.profile.peak_flops and config.bf16 == "auto"
    return torch.bfloat16 if named else compute_dtype(config, torch.device("cpu"))
