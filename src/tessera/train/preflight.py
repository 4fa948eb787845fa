"""Every check that needs no rank: before any process starts, and before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.errors import UserError

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
    """Read what the config names and check that it fits together; writes nothing, starts nothing. Raises UserError."""
    from tessera.layout import check_sizes
    from tessera.models.hub import check_weights, read_model_config, resolve_model_folder

    folder = resolve_model_folder(config.base_model)
    model = read_model_config(folder)
    check_sizes(config.tensor_parallel_mode, config.tensor_parallel_size, model.dimensions)
    if model.rope is None and config.sequence_len > model.max_positions:
        raise UserError(
            "sequence_len",
            config.sequence_len,
            f"the model has {model.max_positions} positions",
            f"at most {model.max_positions}",
        )
    resume = checkpoint_to_resume(config)
    if not config.random_init and resume is None:
        check_weights(folder, model)
    return Run(folder, model, resume)


def checkpoint_to_resume(config: "TrainConfig") -> Path | None:
    """The checkpoint that the config's resume keys mean. A run with checkpoints is never silently begun again."""
    from tessera.train.checkpoint import read_state, whole_checkpoints

    wanted, output = config.resume_from_checkpoint, Path(config.output_dir)
    if isinstance(wanted, str):
        read_state(Path(wanted))
        return Path(wanted)
    there = whole_checkpoints(output)
    if wanted or (config.auto_resume_from_checkpoints and there):
        if not there:
            raise UserError("resume_from_checkpoint", wanted, f"{output} holds no whole checkpoint")
        read_state(there[-1])
        return there[-1]
    if there:
        raise UserError(
            "output_dir",
            config.output_dir,
            f"holds checkpoints of an earlier run, the newest {there[-1].name}",
            "set resume_from_checkpoint: true to go on from it, or another output_dir",
        )
    return None


def prepare_data(config: "TrainConfig", run: Run) -> "Prepared":
    """Tokenize the data into output_dir/prepared, or reuse it."""
    from tessera.data.prepare import prepare

    return prepare(config.model_copy(update={"base_model": str(run.folder)}), run.model.vocab_size)


def preflight(config: "TrainConfig", world_size: int) -> None:
    """Check everything, then prepare the data: what is left for the ranks is to train. Raises UserError."""
    if world_size != config.world_size:
        raise UserError("world size", world_size, f"the sizes given make {config.world_size} processes")
    run = resolve(config)
    print(prepare_data(config, run).summary(), flush=True)
