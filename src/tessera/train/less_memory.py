"""Which keys of the YAML lower the memory that a rank holds most, and by how much, from the formulas of plan/."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.core.pages import OUT_OF_MEMORY
from tessera.core.text import human, table_lines
from tessera.layout.parallel import Parallel
from tessera.models.config import ModelConfig
from tessera.plan.peak import peak_bytes
from tessera.plan.update import shard_elements
from tessera.train.settings import fitting_layout, parallel_for, step_shape, update_of

MOST = 3
"""So many keys are named."""


def held_bytes(config: TrainConfig, model: ModelConfig, compute: torch.dtype, copies: bool) -> int:
    """What rank 0 holds at the peak of a step by formula; `copies`: with those of a save beside training."""
    parallel = parallel_for(config, model, Mesh(config.mesh_sizes, "meta", rank=0), compute=compute)
    shape, offload = step_shape(config, parallel), config.fsdp_config.offload_params
    if not _on_gpu():  # host memory is what ran out
        shape, offload = replace(shape, savers=replace(shape.savers, offload=False)), False
    peak = peak_bytes(model, shape, parallel, offload=offload, update=update_of(config)).total
    beside = _saved(config, model, parallel) if copies and config.save_async else 0
    return int(peak + beside)


def _saved(config: TrainConfig, model: ModelConfig, parallel: Parallel) -> int:
    """Bytes of this rank's parameters and moments."""
    parameters = shard_elements(model, parallel) * parallel.dtype.itemsize
    return int(parameters + update_of(config).moment_bytes(model, parallel))


def _on_gpu() -> bool:
    return torch.cuda.device_count() > 0  # asks no GPU for a context


def _changes(config: TrainConfig, compute: torch.dtype, copies: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """Keys that may help, with their other values, and what else they mean."""
    times, rows, tensor = config.gradient_accumulation_steps, config.micro_batch_size, config.tensor_parallel_size or 1
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, "the numbers stay"
    elif _on_gpu():
        yield {"gradient_checkpointing": "offload"}, "the numbers stay"
    elif config.gradient_checkpointing == "selective":
        yield {"gradient_checkpointing": True}, "attention runs again; the numbers stay"
    if not config.tiled_mlp:
        yield {"tiled_mlp": True}, "the numbers stay"
    if config.context_parallel.sizes["ulysses"] > 1:
        yield {"ulysses_chunks": 2 * config.ulysses_chunks}, "the numbers stay"
    if rows > 1 and rows % 2 == 0:
        more = {"micro_batch_size": rows // 2, "gradient_accumulation_steps": times * 2}
        yield more, "the numbers stay"
    elif rows > 1:
        yield {"micro_batch_size": 1, "gradient_accumulation_steps": times * rows}, "the numbers stay"
    if compute == torch.float32 and config.fsdp_config.mixed_precision_policy is None:
        yield {"bf16": True}, "computes in bfloat16"
    if copies and config.save_async:
        yield {"save_async": False}, "training waits for each save"
    if config.tensor_parallel_mesh is None:
        yield {"tensor_parallel_size": tensor * 2}, "on twice as many processes"
    yield {"dp_shard_size": 2 * (config.dp_shard_size or 1)}, "on twice as many processes"
    if config.sequence_len > 1:
        yield {"sequence_len": config.sequence_len // 2}, "prepares other rows"


def less_memory(config: TrainConfig, model: ModelConfig, compute: torch.dtype, *, copies: bool = False) -> list[str]:
    """Lines for the user: the keys that lower a rank's peak most, each with its effect. Empty where none is known.

    `compute` is what the run computes in; `copies` is whether copies that a save makes lie in the memory that ran out.
    """
    try:
        now = held_bytes(config, model, compute, copies)
    except (UserError, ValueError, ArithmeticError):
        return []
    found = []
    for change, meaning in _changes(config, compute, copies):
        other = config.model_copy(update=change)
        try:
            fitting_layout(other, model)
            then = held_bytes(other, model, torch.bfloat16 if change.get("bf16") else compute, copies)
        except (UserError, ValueError, ArithmeticError):  # a size that does not fit
            continue
        if then < now:
            written = ", ".join(f"{key}: {str(value).lower()}" for key, value in change.items())
            found.append((now - then, written, meaning))
    best = sorted(found, key=lambda one: -one[0])[:MOST]
    rows = [(f"  {written}", f"{human(less)} less", meaning) for less, written, meaning in best]
    heading = f"  what lowers the peak of a rank most (by formula it holds {human(now)}; more: {OUT_OF_MEMORY}):"
    return [heading, *table_lines(rows)] if rows else []
