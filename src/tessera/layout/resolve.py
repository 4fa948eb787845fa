"""From a config to the layouts, shapes and dtypes that it asks for; UserError where they do not fit."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from tessera.core.axes import DATA_AXES
from tessera.core.device import has_bf16
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.shape import Fsdp, StepShape, padded_length
from tessera.layout.streams import attention_layout, residual_layout
from tessera.sizes.remedies import check_sizes
from tessera.sizes.schedule import Schedule

if TYPE_CHECKING:
    from tessera.config.schema import TrainConfig


def check_layout(config: "TrainConfig", dimensions: Mapping[str, int]) -> None:
    """Raise UserError, with the nearest sizes that fit, when the config's layout does not fit a model or FSDP2.

    `dimensions` are those of the model, see `sizes.remedies.check_sizes`.
    """
    beside_data = math.prod(config.data_sizes.values()) > 1
    if beside_data:
        _check_switches_beside_data_axes(config)
    check_sizes(config.tensor_parallel, dimensions, config.micro_batch_size)
    loop = config.tensor_parallel_schedule
    if loop in ("summa", "cannon") and config.axes["inner"] > 1 and beside_data:
        reason = "beside data axes FSDP2 takes weights cut over two other axes, here they are inner, row and col"
        raise UserError("tensor_parallel_schedule", loop, reason, "tensor_parallel_schedule: gather, or no data axes")


def _check_switches_beside_data_axes(config: "TrainConfig") -> None:
    """Raise UserError for switches of weights that FSDP2 moves; before check_sizes, which knows of no data axes."""
    switches = {
        "tensor_parallel_prefetch": "gathers the weights, and has fsdp_config.forward_prefetch for it",
        "tensor_parallel_defer": "sums the gradients of weights, once a step",
    }
    off = [key for key in switches if not getattr(config, key)]
    if not off:
        return
    data = ", ".join(f"{axis} {n}" for axis, n in config.data_sizes.items() if n > 1)
    reason, hint = f"beside data axes (here {data}) FSDP2 {switches[off[0]]}", ", ".join(f"{key}: true" for key in off)
    if config.tensor_parallel_schedule in ("summa", "cannon"):  # which moves weights along row itself
        reason = f"{config.tensor_parallel_schedule} overlaps its panels by itself"
    elif config.tensor_parallel_slices == 1:
        hint += ", or no data axes"
    raise UserError(off[0], "false", reason, hint)


def parallel_for(
    config: "TrainConfig",
    mesh: Mesh,
    schedule: Schedule | None = None,
    dtype: torch.dtype | None = None,
    compute: torch.dtype | None = None,
) -> Parallel:
    """The layouts that `config` asks for, on `mesh`; `schedule` where auto has chosen one; float32 unless given.

    Where the mesh has data axes, FSDP2 serves `row` (and depth, if weights are cut over it) beside `shard`: only loops
    move weights along row themselves.
    """
    schedule = schedule or config.schedule
    weights_over: tuple[str, ...] = ("depth", "row") if config.tensor_parallel_depth_weights == "shard" else ("row",)
    fsdp = None
    if mesh.size(DATA_AXES) > 1:
        loop = schedule.name in ("summa", "cannon")
        fsdp, weights_over = ("shard", *(() if loop else weights_over)), weights_over if loop else ()
    return Parallel(
        mesh,
        residual_layout(config.sequence_parallel, schedule.name),
        dtype or torch.float32,
        compute or dtype or torch.float32,
        schedule,
        attention_layout(mesh.sizes, config.micro_batch_size),
        weights_over,
        fsdp=fsdp,
    )


def fsdp_of(config: "TrainConfig") -> Fsdp:
    """What the config's fsdp_config asks of FSDP2."""
    keys = config.fsdp_config
    by_layer = keys.auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    return Fsdp(keys.reshard_after_forward, keys.forward_prefetch, keys.offload_params, by_layer)


def step_shape(
    config: "TrainConfig",
    parallel: Parallel,
    batch: int | None = None,
    length: int | None = None,
    micro_batches: int | None = None,
) -> StepShape:
    """What a step of `config` runs on a data rank; of full-length rows unless `batch` (of a data rank) is given too."""
    rows, fsdp = batch or config.micro_batch_size, fsdp_of(config)
    return StepShape(
        rows,
        padded_length(length or config.sequence_len, rows, parallel.residual, parallel.mesh),
        micro_batches or config.gradient_accumulation_steps,
        recompute=config.gradient_checkpointing,
        label_smoothing=config.label_smoothing_factor > 0,
        reshard=fsdp.reshard,
        by_layer=fsdp.by_layer,
    )


def compute_dtype(config: "TrainConfig", device: torch.device) -> torch.dtype:
    """What the config computes in, over parameters in float32."""
    policy = config.fsdp_config.mixed_precision_policy
    bf16 = config.bf16 if policy is None else policy == "bf16"
    return torch.bfloat16 if (has_bf16(device) if bf16 == "auto" else bf16) else torch.float32
