"""One rank of a run, built: mesh, model, optimizer, data, and where it goes on from. Every rank calls it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tessera.checkpoint import tensors as checkpoint
from tessera.checkpoint.resumed import differences
from tessera.checkpoint.state import Best, RunState
from tessera.config.schema import TrainConfig
from tessera.config.sections.steps import in_steps
from tessera.core import device as devices
from tessera.core import terminal
from tessera.core.axes import DATA_AXES
from tessera.core.collectives import gathered
from tessera.core.errors import UserError, as_yaml
from tessera.core.mesh import Mesh
from tessera.data.epochs import ORDER, Epochs, Packed, Singles
from tessera.data.loader import Loader
from tessera.data.manifest import STREAM_TOKENIZER
from tessera.data.place import Place
from tessera.data.prepare import Prepared, open_prepared
from tessera.data.samples import Samples, Split, open_samples
from tessera.data.stream import Stream, find_stream
from tessera.data.stream_loader import StreamLoader, StreamShape
from tessera.data.tokenizer import read_loaded
from tessera.engine.fsdp import build_decoder
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.shape import length_multiple
from tessera.models.decoder import Decoder
from tessera.models.hub import load_weights
from tessera.models.trained import trained_parameters
from tessera.plan.tune import tune
from tessera.train.links import run_mesh
from tessera.train.run import Run
from tessera.train.settings import compute_dtype, fsdp_of, parallel_for, rates, row_shape, savers_of


@dataclass
class Progress:
    """What a checkpoint remembers beside tensors: optimizer steps done, targets trained on, and steps without update.

    `skipped` steps had a loss or gradient that was not finite, the last `in_a_row` of them one after another. `best`
    is the best evaluation, where evaluations are compared.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    in_a_row: int = 0
    best: Best | None = None


@dataclass
class Built:
    """What the steps of a run need on this rank; `said` is what a person should know before the first one."""

    run: Run
    prepared: Prepared
    step: Step
    loader: Loader | StreamLoader
    progress: Progress = field(default_factory=Progress)
    total_steps: int = 0
    warmup: int = 0
    said: list[str] = field(default_factory=list)

    @property
    def model(self) -> Decoder:
        return self.step.model

    @property
    def mesh(self) -> Mesh:
        return self.step.mesh

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.mesh.rank == 0

    @cached_property
    def held_out(self) -> Loader:
        """The rows that are evaluated on; open from the start, for the prepared data may be removed meanwhile."""
        return loader_of(self.run, self.prepared, self.model, "eval", shuffle=False)

    def close(self) -> None:
        """End what reads data beside the steps."""
        if isinstance(self.loader, StreamLoader):
            self.loader.close()

    @property
    def output(self) -> Path:
        return Path(self.run.config.output_dir)

    def course(self) -> dict[str, Any]:
        """What follows from the settings, and the order of samples and the learning rate from it."""
        return {
            "samples_per_step": self.loader.samples_per_step,
            "data": self.prepared.manifest.key,
            "steps": self.total_steps,
            "warmup_steps": self.warmup,
            "computing_in": devices.dtype_name(self.model.parallel.compute),
            **({"vocab_size": self.run.model.vocab_size} if self.run.model.new_tokens else {}),
        }


def build(run: Run, device: torch.device) -> Built:
    """The run on this rank, its weights filled. Raises UserError on every rank alike."""
    config, own = run.config, compute_dtype(run.config, device)
    # where one device lacks bfloat16, all do without
    compute = torch.float32 if torch.float32 in gathered(own, config.world_size) else own
    mesh = run_mesh(config, run.model, device, compute)
    prepared = _seen_by_all(run, mesh)
    stream = _stream_seen_by_all(run, mesh) if config.streaming else None
    tuning = None
    if config.tensor_parallel_schedule == "auto":
        tuning = tune(
            config.tensor_parallel,
            row_shape(config),
            run.model,
            mesh,
            compute,
            config.tensor_parallel_scratch_gib,
            tf32=config.tf32,
            context=config.context_parallel,
        )
    parallel = parallel_for(config, run.model, mesh, tuning.schedule if tuning else None, compute=compute)
    chosen = config.unfrozen_parameters
    trained = trained_parameters(run.model, chosen) if chosen else None
    model = build_decoder(
        run.model,
        parallel,
        fsdp_of(config),
        gradient_checkpointing=config.recompute,
        savers=savers_of(config),
        trained=trained,
    )
    betas = (config.adam_beta1, config.adam_beta2)
    step = Step(
        model,
        build_optimizer(model, config.optimizer, betas, config.adam_epsilon, config.weight_decay, config.optim_args),
        max_grad_norm=config.max_grad_norm,
        label_smoothing=config.label_smoothing_factor,
        seed=config.seed,
    )
    if stream is not None:
        loader: Loader | StreamLoader = stream_loader_of(run, stream, model)
    else:
        loader = loader_of(run, prepared, model, "train", shuffle=config.shuffle)
    built = Built(run, prepared, step, loader)
    built.said = tuning.lines() if tuning else []
    state = _fill(built)
    _set_course(built)
    if state is not None:
        _check_resumed(built, state)
    return built


def _seen_by_all(run: Run, mesh: Mesh) -> Prepared:
    """The prepared data. Raises UserError on every rank when some see no such data or checkpoint, or other ones."""
    missing = [str(path) for path in (run.resume, run.prepared) if path is not None and not path.is_dir()]
    prepared, damage = None, None
    if not missing:
        try:
            prepared = open_prepared(run.prepared, run.config.model_copy(update={"base_model": str(run.model_folder)}))
        except UserError as error:
            damage = error.parts
    everyone = gathered((missing, damage, prepared and prepared.manifest.key), mesh.world)
    for rank, (lacking, refusal, key) in enumerate(everyone):
        if refusal:
            raise UserError(*refusal)
        if lacking or key != everyone[0][2]:
            reason = f"rank {rank} does not see {lacking[0] if lacking else f'the same {run.prepared}'}"
            raise UserError("output_dir", run.config.output_dir, reason, "a disk that every machine sees")
    assert prepared is not None
    return prepared


def _stream_seen_by_all(run: Run, mesh: Mesh) -> Stream:
    """The stream, found by the first rank, with the tokenizer that whoever made the run has loaded. Raises UserError on
    every rank when that cannot be read, or some do not see its files."""
    found, refusal = None, None
    if mesh.rank == 0:
        try:
            config = run.config.model_copy(update={"base_model": str(run.model_folder)})
            found = find_stream(config, [], read_loaded(run.prepared / STREAM_TOKENIZER))
        except UserError as error:
            refusal = error.parts
    stream, refused = gathered((found, refusal), mesh.world)[0]
    if refused:
        raise UserError(*refused)
    assert stream is not None
    for rank, path in enumerate(gathered(stream.unseen(), mesh.world)):
        if path:
            raise UserError(
                "datasets", path, f"rank {rank} does not see the same file", "a disk that every machine sees"
            )
    return stream


def stream_loader_of(run: Run, stream: Stream, model: Decoder) -> StreamLoader:
    """This data rank's micro-batches of a stream, padded as the mesh of `model` needs them."""
    config, mesh = run.config, model.parallel.mesh
    multiple = length_multiple(config.micro_batch_size, model.residual, mesh)
    return StreamLoader(
        stream,
        StreamShape(config.sequence_len, run.model.vocab_size, config.sample_packing, multiple),
        config.micro_batch_size,
        config.gradient_accumulation_steps,
        data_rank=mesh.index(DATA_AXES),
        data_ranks=mesh.size(DATA_AXES),
        workers=config.dataloader_num_workers,
        prefetch=config.dataloader_prefetch_factor,
    )


def loader_of(run: Run, prepared: Prepared, model: Decoder, split: Split, *, shuffle: bool) -> Loader:
    """This data rank's micro-batches of a split, padded as the mesh of `model` needs them."""
    config, mesh = run.config, model.parallel.mesh
    samples, packing = open_samples(prepared.folder, split), _packs(config, split)
    return Loader(
        samples,
        epochs_of(samples, config, packing=packing, shuffle=shuffle),
        config.micro_batch_size,
        config.gradient_accumulation_steps,
        length_multiple(config.micro_batch_size, model.residual, mesh),
        row_length=config.sequence_len if packing or config.pad_to_sequence_len else None,
        data_rank=mesh.index(DATA_AXES),
        data_ranks=mesh.size(DATA_AXES),
    )


def _packs(config: TrainConfig, split: Split) -> bool:
    return config.sample_packing if split == "train" else config.packs_held_out


def epochs_of(samples: Samples, config: TrainConfig, *, packing: bool, shuffle: bool, version: int = ORDER) -> Epochs:
    """The rows that these samples make, epoch after epoch; packed ones are in the newest version of the order."""
    if packing:
        return Packed(samples, config.sequence_len, config.seed, shuffle)
    return Singles(len(samples), config.seed, shuffle, version)


def _fill(built: Built) -> RunState | None:
    """Weights from the checkpoint to resume, whose state is returned, from the model's safetensors, or random."""
    run, model = built.run, built.model
    if run.resume is None:
        if run.config.random_init:
            model.initialize(run.config.seed)
        else:
            load_weights(model, run.model_folder)
        return None
    state = checkpoint.load(run.resume, model, built.step.optimizer)
    if not state.optimizer and built.first:
        terminal.say(f"{run.resume} has no optimizer state, which starts from zero")
    _go_on(built, state)
    built.progress = Progress(state.step, state.tokens, state.skipped, best=state.best)
    return state


def _go_on(built: Built, state: RunState) -> None:
    """Begin with the rows after those of the checkpoint, in its order.

    Where samples are packed now and were not, or the other way round, no row of one is a row of the other: then the
    next epoch begins.
    """
    config, loader = built.run.config, built.loader
    if config.streaming != (state.stream is not None) and state.samples:
        place = "from" if state.stream else "without"
        reason = f"goes on {place} a place in a stream, streaming is {as_yaml(config.streaming)}"
        hint = "leave streaming as it was, or convert the checkpoint and begin anew from its weights"
        raise UserError("resume_from_checkpoint", built.run.resume, reason, hint)
    if isinstance(loader, StreamLoader):
        loader.start_at(state.step, state.samples, state.stream or Place())
        return
    options: dict[str, Any] = {"shuffle": config.shuffle, "version": state.order}
    if state.unit == loader.epochs.unit or not state.samples:
        if state.samples and not loader.packed:
            loader.epochs = epochs_of(loader.samples, config, packing=False, **options)
        loader.start_at(state.step, state.samples)
        return
    before = epochs_of(loader.samples, config, packing=state.unit == "row", **options)
    _count(before, built.mesh, lambda known: known.counts_row(state.samples - 1))
    epoch, last = before.place(state.samples - 1)
    _count(loader.epochs, built.mesh, lambda known: known.counts_epoch(epoch))
    left = before.rows_in(epoch) - last - 1
    if left and config.max_steps is None and epoch + 1 >= config.num_epochs:
        reason = "is not what the checkpoint was made with, and changes with the next epoch; this is the last one"
        raise UserError("sample_packing", config.sample_packing, reason, "raise num_epochs, or leave it as it was")
    loader.start_at(state.step, loader.epochs.rows_before(epoch + 1))
    what = f"{left:,} {'rows of packed samples' if state.unit == 'row' else 'samples'}"
    built.said.append(f"sample_packing has changed: the run goes on with epoch {epoch + 2}, {what} are left out")


def _count(epochs: Epochs, mesh: Mesh, enough: Callable[[Packed], bool]) -> None:
    """Count the rows of packed epochs until that is `enough`: of each every rank some windows. Every rank calls it."""
    while isinstance(epochs, Packed) and not enough(epochs):
        own = epochs.count_windows(epochs.counted, mesh.rank, mesh.world)
        epochs.take_counts(gathered(own, mesh.world))


def _set_course(built: Built) -> None:
    """How long the run is, and its warm-up."""
    config, loader = built.run.config, built.loader
    if not isinstance(loader, StreamLoader):
        last = math.ceil(config.num_epochs) - 1
        _count(
            loader.epochs,
            built.mesh,
            lambda known: known.counts_row(loader.first_sample) if config.max_steps else known.counts_epoch(last),
        )
    if isinstance(loader, StreamLoader) or config.max_steps is not None:
        assert config.max_steps is not None
        built.total_steps = config.max_steps
    else:
        built.total_steps = loader.steps_for(config.num_epochs)
        loader.last_sample = loader.samples_for(config.num_epochs)
    ratio = 0.0 if config.lr_scheduler == "constant" else config.warmup_ratio
    own = config.warmup_steps
    built.warmup = math.ceil(ratio * built.total_steps) if own is None else in_steps(own, built.total_steps)


def rates_of(built: Built) -> Callable[[int], float]:
    """The learning rate of each step of the run."""
    return rates(built.run.config, built.warmup, built.total_steps)


def _check_resumed(built: Built, state: RunState) -> None:
    """Say, by key, what changes the course of a resumed run or its numbers; UserError when it is past its end."""
    config, last, total = built.run.config, built.loader.last_sample, built.total_steps
    if state.step > total or last is not None and built.loader.first_sample > last:
        whole = f"{total} steps" if last is None else f"{last} rows"
        reason = f"the run is {whole} long, the checkpoint was made after {state.step} steps, {state.samples} rows"
        raise UserError("resume_from_checkpoint", built.run.resume, reason, "raise max_steps or num_epochs")
    now = config.model_dump(mode="json") | built.course()
    defaults = {key: entry.get_default() for key, entry in type(config).model_fields.items()}
    if built.first:
        terminal.say(*differences(state.config | state.course, now, defaults))
