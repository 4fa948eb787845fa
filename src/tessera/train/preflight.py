"""Every check that needs no rank: before any process starts, and before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.core.errors import UserError
from tessera.layout.resolve import check_layout

if TYPE_CHECKING:
    from tessera.config.schema import TrainConfig
    from tessera.data.prepare import Prepared
    from tessera.models.config import ModelConfig


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

    check_layout(config, model.dimensions)
    return model


def model_of(config: "TrainConfig", folder: Path | None = None) -> "ModelConfig":
    """The same, whatever the layout; UserError when its positions are fewer than `sequence_len`."""
    from tessera.models.hub import read_model_config, resolve_model_folder

    model = read_model_config(folder or resolve_model_folder(config.base_model, weights=False))
    if model.rope is None and config.sequence_len > model.max_positions:
        reason = f"the model has {model.max_positions} positions"
        raise UserError("sequence_len", config.sequence_len, reason, f"at most {model.max_positions}")
    return model


def checkpoint_to_resume(config: "TrainConfig") -> Path | None:
    """The checkpoint that the config's resume keys mean, None to begin anew. Raises UserError when it is not whole."""
    from tessera.checkpoint.folder import latest, read_state

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
    from tessera.core.device import gpus_missing
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
