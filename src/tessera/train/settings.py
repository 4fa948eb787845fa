"""What a config asks of the rooms below `train`, in their own values: none of them sees the config."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from tessera.config.schema import TrainConfig
from tessera.core.device import has_bf16
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.engine.optimizer import missing_package, refuse_options
from tessera.engine.rates import learning_rates, options_of
from tessera.layout import resolve
from tessera.layout.parallel import Parallel
from tessera.layout.shape import Fsdp, Savers, StepShape, padded_length
from tessera.layout.streams import attention_layout, joins_rows
from tessera.models.config import ModelConfig
from tessera.models.sharing import surroundings
from tessera.plan.update import Update
from tessera.sizes.context import Surroundings, fitted, in_words
from tessera.sizes.numbers import nearest
from tessera.sizes.schedule import Schedule


def fitting_layout(config: TrainConfig, model: ModelConfig, inside: int | None = None) -> TrainConfig:
    """The config with ulysses_size filled in, once the layout is seen to fit `model` and FSDP2.

    `inside`: the ranks of a machine, where it is known; ulysses stays in one. Raises UserError, with the nearest sizes
    that fit.
    """
    tensor, batch = config.tensor_parallel, config.micro_batch_size
    context = config.context_parallel
    sizes = config.data_sizes | context.sizes
    resolve.check_layout(tensor, sizes, model.dimensions, batch)
    axes = tensor.axes
    if context.size > 1 or joins_rows(axes, batch, model.dimensions):
        _check_shared_sequences(config, model)
    fitting = fitted(context, _around(config, model, inside))
    return config.model_copy(update={"ulysses_size": fitting.ulysses}) if context.size > 1 else config


def context_line(config: TrainConfig, model: ModelConfig, inside: int | None = None) -> str | None:
    """How ranks share sequences and why, of a config that `fitting_layout` gives; None where none do."""
    axes, context = config.axes, config.context_parallel
    said = [in_words(context, _around(config, model, inside))] if context.size > 1 else []
    if joins_rows(axes, config.micro_batch_size, model.dimensions):
        cutting = attention_layout(axes, config.micro_batch_size, model.dimensions).tokens
        named = " · ".join(f"{axis} {axes[axis]}" for axis in cutting if axes[axis] > 1)
        why = f"micro_batch_size {config.micro_batch_size} does not divide by them"
        why += ", nor do heads by col × inner" if axes["inner"] > 1 and "inner" in cutting else ""
        said.append(f"the ranks along {named} share sequences too, by {context.transport}: {why}")
    return f"context: {'; '.join(said)}" if said else None


def _around(config: TrainConfig, model: ModelConfig, inside: int | None) -> Surroundings:
    """What the sequence axes meet on machines of so many ranks."""
    return surroundings(model, config.axes, config.micro_batch_size, inside)


def _check_shared_sequences(config: TrainConfig, model: ModelConfig) -> None:
    """Raise UserError where the model's attention does not go where several ranks share a sequence."""
    key, value = "context_parallel_size", config.context_parallel_size
    why, remedy = "shares each sequence between ranks", "1"
    if config.context_parallel_size == 1:
        key, value = "micro_batch_size", config.micro_batch_size
        cutting = attention_layout(config.axes, value, model.dimensions).tokens
        parts = math.prod(config.axes[axis] for axis in cutting)
        why = f"does not divide over {' × '.join(cutting)} = {parts}, so that ranks share sequences"
        remedy = nearest(value, parts)
    if model.attention_dropout:
        reason = f"{why}, and the model drops attention probabilities ({model.attention_dropout:g})"
        hint = f"set attn_pdrop or attention_dropout to 0 in config.json, or {key}: {remedy}"
        raise UserError(key, value, reason, hint)
    if config.eager:
        reason = f"{why}, which the step-by-step kernel of attn_implementation: eager does not do"
        raise UserError(key, value, reason, f"attn_implementation: sdpa, or {key}: {remedy}")


def parallel_for(
    config: TrainConfig,
    model: ModelConfig,
    mesh: Mesh,
    schedule: Schedule | None = None,
    dtype: torch.dtype | None = None,
    compute: torch.dtype | None = None,
) -> Parallel:
    """The layouts that `config` asks for of `model`, on `mesh`; the rest as `layout.resolve.parallel_of`.

    Parameters are held in `dtype`, unless given as the config says.
    """
    dtype = dtype or (torch.bfloat16 if config.full_bf16 else torch.float32)
    tensor, batch, context = config.tensor_parallel, config.micro_batch_size, config.context_parallel
    return resolve.parallel_of(tensor, mesh, batch, model.dimensions, schedule, dtype, compute, context=context)


def fsdp_of(config: TrainConfig) -> Fsdp:
    """What the config's fsdp_config asks of FSDP2."""
    keys = config.fsdp_config
    by_layer = keys.auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    return Fsdp(keys.reshard_after_forward, keys.forward_prefetch, keys.offload_params, by_layer, keys.sync_each_batch)


def savers_of(config: TrainConfig) -> Savers:
    """How the config's layers get by with less memory, beside whether they run again."""
    tiles = config.tiled_mlp_num_shards if config.tiled_mlp else 1
    return Savers(config.gradient_checkpointing == "selective", config.offloads, tiles)


def row_shape(config: TrainConfig) -> StepShape:
    """What a step of `config` runs on a data rank: full-length rows, not padded."""
    fsdp = fsdp_of(config)
    return StepShape(
        config.micro_batch_size,
        config.sequence_len,
        config.gradient_accumulation_steps,
        recompute=config.recompute,
        label_smoothing=config.label_smoothing_factor > 0,
        reshard=fsdp.reshard,
        by_layer=fsdp.by_layer,
        sync_each_batch=fsdp.sync_each_batch,
        savers=savers_of(config),
    )


def step_shape(
    config: TrainConfig,
    parallel: Parallel,
    batch: int | None = None,
    length: int | None = None,
    micro_batches: int | None = None,
) -> StepShape:
    """The same padded for `parallel`; `batch` (of a data rank), `length`, `micro_batches` are others where given."""
    asked = row_shape(config)
    rows = batch or asked.batch
    padded = padded_length(length or asked.sequence, rows, parallel.residual, parallel.mesh)
    return replace(asked, batch=rows, sequence=padded, micro_batches=micro_batches or asked.micro_batches)


def rates(config: TrainConfig, warmup: int, total: int) -> Callable[[int], float]:
    """The learning rate of each step of a run of `total` steps. UserError: the schedule does not take its options."""
    options = config.lr_scheduler_kwargs or {}
    lowest, constant = config.cosine_min_lr_ratio or 0.0, config.cosine_constant_lr_ratio or 1.0
    try:
        return learning_rates(
            config.learning_rate, config.lr_scheduler, warmup, total, options, lowest=lowest, constant=constant
        )
    except ValueError as error:
        names = options_of(config.lr_scheduler)
        hint = f"options of {config.lr_scheduler}: {', '.join(names)}" if names else "leave lr_scheduler_kwargs out"
        raise UserError("lr_scheduler_kwargs", options or None, str(error), hint) from error


def update_of(config: TrainConfig) -> Update:
    """What an update by the config's optimizer costs."""
    return Update(config.optimizer, config.optim_args or {})


def check_optimizer(config: TrainConfig) -> None:
    """Raise UserError where the optimizer needs a package that is not there, or does not take its options."""
    name = config.optimizer
    if package := missing_package(name):
        hint = f"pip install {package}, or write optimizer: adamw_torch_fused"
        raise UserError("optimizer", name, f"needs the package {package}, which is not installed", hint)
    check_optim_args(config)


def check_optim_args(config: TrainConfig) -> None:
    """Raise UserError where the optimizer does not take its options, whether or not its package is there."""
    refuse_options(config.optimizer, config.optim_args or {})


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """What the config computes in on `device`; parameters are float32, or bfloat16 where all is."""
    if config.full_bf16:
        return torch.bfloat16
    policy = config.fsdp_config.mixed_precision_policy
    bf16 = config.bf16 if policy is None else policy == "bf16"
    return torch.bfloat16 if (has_bf16(device) if bf16 == "auto" else bf16) else torch.float32
