"""Every check that needs no rank: before any process starts, and before anything is written."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.errors import UserError

if TYPE_CHECKING:
    import torch

    from tessera.config.schema import TrainConfig
    from tessera.data.prepare import Prepared
    from tessera.mesh import Mesh
    from tessera.models.config import ModelConfig
    from tessera.nn.parameter import Parallel
    from tessera.parallel.data import Fsdp
    from tessera.plan.words import StepShape
    from tessera.schedule import Schedule


@dataclass(frozen=True)
class Run:
    """What a config resolves to: the model's folder and configuration, and the checkpoint to go on from (or None)."""

    folder: Path
    model: "ModelConfig"
    resume: Path | None


def resolve(config: "TrainConfig") -> Run:
    """Read what the config names and check that the sizes fit; writes nothing, starts nothing. Raises UserError."""
    from tessera.models.hub import resolve_model_folder

    folder = resolve_model_folder(config.base_model)
    if folder.resolve() == Path(config.output_dir).resolve():
        reason = "is base_model too, whose weights would be overwritten"
        raise UserError("output_dir", config.output_dir, reason, "give the run a folder of its own")
    return Run(folder, fitting_model(config, folder), checkpoint_to_resume(config))


def fitting_model(config: "TrainConfig", folder: Path | None = None) -> "ModelConfig":
    """The model of base_model (of config.json in `folder`, where known); UserError when it does not fit `config`."""
    model = model_of(config, folder)
    check_layout(config, model)
    return model


def check_layout(config: "TrainConfig", model: "ModelConfig") -> None:
    """Raise UserError, with the nearest sizes that fit, when the config's layout does not fit `model` or FSDP2."""
    from tessera.fitting import check_sizes

    beside_data = math.prod(config.data_sizes.values()) > 1
    if beside_data:
        _check_switches_beside_data_axes(config)
    check_sizes(config.tensor_parallel, model.dimensions, config.micro_batch_size)
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


def model_of(config: "TrainConfig", folder: Path | None = None) -> "ModelConfig":
    """The same, whatever the layout; UserError when its positions are fewer than `sequence_len`."""
    from tessera.models.hub import read_model_config, resolve_model_folder

    model = read_model_config(folder or resolve_model_folder(config.base_model, weights=False))
    if model.rope is None and config.sequence_len > model.max_positions:
        reason = f"the model has {model.max_positions} positions"
        raise UserError("sequence_len", config.sequence_len, reason, f"at most {model.max_positions}")
    return model


def parallel_for(
    config: "TrainConfig",
    mesh: "Mesh",
    schedule: "Schedule | None" = None,
    dtype: "torch.dtype | None" = None,
    compute: "torch.dtype | None" = None,
) -> "Parallel":
    """The layouts that `config` asks for, on `mesh`; `schedule` where auto has chosen one; float32 unless given.

    Where the mesh has data axes, FSDP2 serves `row` (and depth, if weights are cut over it) beside `shard`: only loops
    move weights along row themselves.
    """
    import torch

    from tessera.layout import attention_layout, residual_layout
    from tessera.mesh import DATA_AXES
    from tessera.nn.parameter import Parallel

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


def fsdp_of(config: "TrainConfig") -> "Fsdp":
    """What the config's fsdp_config asks of FSDP2."""
    from tessera.parallel.data import Fsdp

    keys = config.fsdp_config
    by_layer = keys.auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    return Fsdp(keys.reshard_after_forward, keys.forward_prefetch, keys.offload_params, by_layer)


def step_shape(
    config: "TrainConfig",
    parallel: "Parallel",
    batch: int | None = None,
    length: int | None = None,
    micro_batches: int | None = None,
) -> "StepShape":
    """What a step of `config` runs on a data rank; of full-length rows unless `batch` (of a data rank) is given too."""
    from tessera.nn.tokens import padded_length
    from tessera.plan.words import StepShape

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


def compute_dtype(config: "TrainConfig", device: "torch.device") -> "torch.dtype":
    """What the config computes in, over parameters in float32."""
    import torch

    from tessera.device import has_bf16

    policy = config.fsdp_config.mixed_precision_policy
    bf16 = config.bf16 if policy is None else policy == "bf16"
    return torch.bfloat16 if (has_bf16(device) if bf16 == "auto" else bf16) else torch.float32


def checkpoint_to_resume(config: "TrainConfig") -> Path | None:
    """The checkpoint that the config's resume keys mean, None to begin anew. Raises UserError when it is not whole."""
    from tessera.train.checkpoint_folder import latest, read_state

    wanted, output = config.resume_from_checkpoint, Path(config.output_dir)
    last = latest(output)
    if isinstance(wanted, str):
        resume = Path(wanted)
    elif last and (wanted or config.auto_resume_from_checkpoints):
        resume = last
    elif wanted:
        raise UserError("resume_from_checkpoint", wanted, f"{output} holds no whole checkpoint")
    else:
        return None
    step = read_state(resume)["step"]
    if config.max_steps is not None and step > config.max_steps:
        raise UserError("max_steps", config.max_steps, f"{resume} was made after step {step}", "raise max_steps")
    return resume


def prepare_data(config: "TrainConfig", run: Run) -> "Prepared":
    """Tokenize the data into output_dir/prepared, or reuse it."""
    from tessera.data.prepare import prepare

    return prepare(config.model_copy(update={"base_model": str(run.folder)}), run.model.vocab_size)


def check(config: "TrainConfig", processes: int) -> Run:
    """Check everything for a machine with so many `processes`; writes nothing. Raises UserError."""
    from tessera.device import gpus_missing
    from tessera.models.hub import check_weights

    if missing := gpus_missing(processes):
        hint = "give one process each a GPU, or set CUDA_VISIBLE_DEVICES= (nothing) to train on CPU"
        raise UserError("processes", processes, f"this machine is {missing} GPUs short", hint)
    run = resolve(config)
    if not config.random_init and run.resume is None:
        check_weights(run.folder, run.model)
    return run


def preflight(config: "TrainConfig", processes: int) -> None:
    """The same, then prepare the data: what is left for the ranks is to train. Raises UserError."""
    print(prepare_data(config, check(config, processes)).summary(), flush=True)
