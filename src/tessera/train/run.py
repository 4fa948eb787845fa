"""Run: what a config resolves to, once, before any rank exists; then every rank is handed it as JSON.

Made by the launcher, or by rank 0 where another launcher has started the ranks. What depends on the device stays open
in it (`bf16: auto`, schedule auto): the ranks agree on that. Nothing here touches a GPU.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from tessera.checkpoint.folder import latest, latest_name, read_state
from tessera.checkpoint.lock import RunLock
from tessera.checkpoint.sweep import sweep
from tessera.config.schema import TrainConfig
from tessera.core import terminal
from tessera.core.device import gpus_missing
from tessera.core.errors import UserError
from tessera.data.added_tokens import AddedTokens
from tessera.data.prepare import Prepared, prepare
from tessera.data.stream import check_beginning, find_stream
from tessera.data.tokenizer import tokens_needed
from tessera.models.beside import read_generation_config
from tessera.models.config import LayerKind, ModelConfig
from tessera.models.hub import check_weights, dtype_of_folder, read_model_config, resolve_model_folder
from tessera.models.shapes import known_shape
from tessera.models.trained import trained_parameters
from tessera.sizes.bounds import RANKS_HERE, VOCABULARY, at_most
from tessera.train.output import check_output
from tessera.train.settings import check_optimizer, fitting_layout, rates
from tessera.train.trackers.all import check_trackers


@dataclass(frozen=True)
class Run:
    """A run that has been checked, its data prepared.

    `config` has every size filled in; `folder` is that of the base model and `model` what its config.json says;
    `prepared` holds the rows; `resume` is the checkpoint to go on from, or None to begin anew; `save_dtype` is that of
    the final model; `lock` is the id under which the run has locked output_dir (checkpoint/lock.py), empty where it has
    not.
    """

    config: TrainConfig
    folder: Path
    model: ModelConfig
    prepared: Path
    resume: Path | None
    save_dtype: str = "float32"
    lock: str = ""

    def to_json(self) -> str:
        """For `from_json` in another process; keys that the user did not give stay not given."""
        return _JSON.dump_json(self, exclude_unset=True).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> "Run":
        return _JSON.validate_json(text)

    def going_on_from(self, checkpoint: str | Path | None) -> "Run":
        """The same run, started again: from `checkpoint`, or as at first where that is None."""
        return self if checkpoint is None else replace(self, resume=Path(checkpoint))

    @property
    def model_folder(self) -> Path:
        """Where this machine has the base model: in another place than the machine that made the run, if from a hub."""
        return self.folder if self.folder.is_dir() else resolve_model_folder(self.config.base_model)

    @property
    def longer_than_known(self) -> bool:
        """Whether rows have more positions than the base model was made for, which rotary ones have no end of."""
        return self.model.rope is not None and self.config.sequence_len > self.model.max_positions

    def check_weights(self) -> None:
        """Raise UserError unless this machine has the weights that the run begins with, whole."""
        if not self.config.random_init and self.resume is None:
            check_weights(self.model_folder, self.model)


_JSON = TypeAdapter(Run)


def resolve(config: TrainConfig, processes: int | None = None) -> Run:
    """Read what the config names and check that the sizes fit; writes nothing, starts nothing. Raises UserError.

    `processes`: how many a machine has, where it is known.
    """
    output = Path(config.output_dir)
    check_output(output)
    check_trackers(config)
    folder = resolve_model_folder(config.base_model)
    if folder.resolve() == output.resolve():
        reason = "is base_model too, whose weights would be overwritten"
        raise UserError("output_dir", config.output_dir, reason, "give the run a folder of its own")
    check_optimizer(config)
    rates(config, 1, config.max_steps or 10_000)  # refuses options that the schedule does not take
    read_generation_config(folder)  # it goes beside the trained weights: what is wrong with it is said before
    prepared = Path(config.dataset_prepared_path or output / "prepared")  # a folder in it, once the data are read
    model = model_of(config, folder)
    config = fitting_layout(config, model, processes)
    if config.unfrozen_parameters:
        trained_parameters(model, config.unfrozen_parameters)  # refuses names that there are not
    own = "float32" if config.random_init else dtype_of_folder(folder)
    return Run(config, folder, model, prepared, checkpoint_to_resume(config), config.save_dtype or own)


def model_of(config: TrainConfig, folder: Path | None = None) -> ModelConfig:
    """The model of base_model (of config.json in `folder`, where known), whatever the layout.

    Without a folder a model of the table of public ones needs no files. UserError when its positions, or those in its
    window, are below `sequence_len`.
    """
    public = known_shape(config.base_model) if folder is None else None
    if public is not None:
        model = _with_room(config, public.config, None)
    else:
        folder = folder or resolve_model_folder(config.base_model, weights=False)
        model = _with_room(config, read_model_config(folder), folder)
    if model.rope is None and config.sequence_len > model.max_positions:
        reason = f"the model has {model.max_positions} positions"
        raise UserError("sequence_len", config.sequence_len, reason, f"at most {model.max_positions}")
    model = replace(model, eager_attention=config.eager)
    window = min((kind.window for kind in model.layer_kinds if kind.window is not None), default=None)
    if window is None:
        return model
    if config.sequence_len > window:
        reason = f"the model's queries see {window} tokens (sliding_window in its config.json); windows are not built"
        raise UserError("sequence_len", config.sequence_len, reason, f"at most {window}")
    return replace(model, layer_kinds=(LayerKind(),))  # a window as long as the row hides nothing


def _with_room(config: TrainConfig, model: ModelConfig, folder: Path | None) -> ModelConfig:
    """With a vocabulary for every id of the run's tokenizer, and never a smaller one than that of the base model.

    Without the folder of the base model its tokenizer is not known: each token that is added may need a row.
    """
    if folder is None and config.tokenizer is None:
        needed = model.vocab_size + len(AddedTokens.of(config).texts)
    else:
        needed = tokens_needed(config.model_copy(update={"base_model": str(folder or config.base_model)}))
    if config.resize_token_embeddings_to_32x:
        needed = -(-needed // 32) * 32
    at_most("tokenizer", needed, VOCABULARY, "is the number of its tokens")
    return model.grown_to(needed)


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """The checkpoint that the config's resume keys mean, None to begin anew. Raises UserError when it is not whole."""
    wanted, output = config.resume_from_checkpoint, Path(config.output_dir)
    last = latest(output)
    named = output / latest_name(output)
    if (wanted is True or config.auto_resume_from_checkpoints) and named.is_symlink() and not named.exists():
        reason = f"the newest checkpoint, {named}, is a link to {os.readlink(named)}, which is not there"
        hint = "mount that disk, or name the checkpoint to go on from"
        raise UserError("resume_from_checkpoint", wanted, reason, hint)
    if isinstance(wanted, str):
        resume = Path(wanted)
    elif last and (wanted or config.auto_resume_from_checkpoints):
        resume = last
    elif wanted:
        raise UserError("resume_from_checkpoint", wanted, f"{output} holds no whole checkpoint")
    else:
        return None
    step = read_state(resume).step
    if config.max_steps is not None and step > config.max_steps:
        raise UserError("max_steps", config.max_steps, f"{resume} was made after step {step}", "raise max_steps")
    return resume


def check_gpus(processes: int) -> None:
    """Raise UserError on a machine with GPUs, but fewer than `processes`; and for more than any machine takes."""
    at_most("processes", processes, RANKS_HERE, "is the number of processes on this machine")
    if missing := gpus_missing(processes):
        hint = "give one process each a GPU, or set CUDA_VISIBLE_DEVICES= (nothing) to train on CPU"
        raise UserError("processes", processes, f"this machine is {missing} GPUs short", hint)


def check(config: TrainConfig, processes: int) -> Run:
    """Check everything for a machine with so many `processes`; writes nothing. Raises UserError."""
    check_gpus(processes)
    run = resolve(config, processes)
    run.check_weights()
    return run


def prepared_run(config: TrainConfig, processes: int, lock: RunLock | None = None) -> Run:
    """The same, then take the `lock` of output_dir, read the data and prepare it: what is left for the ranks is to
    train. Raises UserError."""
    run = check(config, processes)
    if lock is not None:
        lock.take(Path(config.output_dir))
        terminal.say(*sweep(Path(config.output_dir)))
        run = replace(run, resume=checkpoint_to_resume(config), lock=lock.id)  # of a run that has ended since, maybe
    return replace(run, prepared=prepared(run.config, run.folder, run.model).folder)


def prepared(config: TrainConfig, folder: Path, model: ModelConfig) -> Prepared:
    """The rows of `config`, for `model` in `folder`; prepared where they are not, and told of. Raises UserError.

    Of a stream, which is tokenized later, the first row is made, so that mistakes are found now.
    """
    if model.new_tokens:
        before, now = model.base.vocab_size, model.vocab_size
        terminal.say(f"vocabulary: grows from {before:,} to {now:,} tokens, as the tokenizer's ids need")
    config = config.model_copy(update={"base_model": str(folder)})
    stream, notes = None, list[str]()
    if config.streaming:
        stream = find_stream(config, notes)
        check_beginning(stream, config.sequence_len, model.vocab_size)
        terminal.say(*(f"data: {note}" for note in notes), stream.summary())
    found = prepare(config, model.vocab_size, stream=stream)
    if told := found.summary():
        terminal.say(told)
    return found
