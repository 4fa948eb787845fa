"""Checkpoints to Hugging Face folders and back, in one process without torch.distributed, a tensor at a time."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from tessera.checkpoint.folder import METADATA, STATE, verify
from tessera.checkpoint.reader import Reader, read_into, reason_of
from tessera.checkpoint.saver import Writer
from tessera.checkpoint.state import RunState, Source
from tessera.checkpoint.tensors import MODEL, alone_is_fine, check_model
from tessera.core.device import dtype_name
from tessera.core.errors import RunFailed, UserError
from tessera.core.files import in_words, remove
from tessera.core.writing import NotWritten
from tessera.data.auto_tokenizer import has_tokenizer
from tessera.models.hub import (
    SHARD_BYTES,
    StoredParameters,
    check_weights,
    parameter_shapes,
    read_model_config,
    write_model,
)
from tessera.sizes.bounds import VOCABULARY


def convert(
    source: Path,
    target: Path,
    *,
    config: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
) -> str:
    """Write the model of folder `source` into `target` as the other kind of folder; what was done, in one line.

    checkpoint → Hugging Face: in `dtype` (that of the checkpoint unless given), in files of `max_shard_bytes` (as a
    run's own); config.json and tokenizer come from `config`, or from where the run that saved the checkpoint had them.
    Hugging Face → checkpoint: model tensors only, in the dtype they have, at step 0.

    UserError: `source` is neither or not whole, `target` is not empty, or an option belongs to the other direction.
    """
    _check_target(target)
    there = os.path.lexists(target)
    try:
        if any(os.path.lexists(source / name) for name in (STATE, METADATA)):
            return _to_hugging_face(source, target, config, dtype, max_shard_bytes or SHARD_BYTES)
        if os.path.lexists(source / "config.json"):
            for key, value in (("--config", config), ("--dtype", dtype), ("--max-shard-size", max_shard_bytes)):
                if value is not None:
                    raise UserError(key, value, "is for checkpoints, and FROM is a Hugging Face folder", "leave it out")
            return _to_checkpoint(source, target)
    except (UserError, CheckpointException, NotWritten, OSError) as error:
        for unfinished in (target / ".export", target.with_name(f".{target.name}.part")):
            remove(unfinished)
        if not there:
            with suppress(OSError):
                target.rmdir()
        if not isinstance(error, UserError):
            raise RunFailed(f"{target} was not written: {reason_of(error)}") from error
        if error.key in ("resume_from_checkpoint", "base_model"):  # what the parts used here speak of
            raise UserError("FROM", error.value, error.reason, error.hint) from error
        raise
    reason = f"is neither a checkpoint ({STATE}) nor a Hugging Face folder (config.json)"
    raise UserError("FROM", source, reason, "a checkpoint-N folder of a run, or one with config.json and safetensors")


def _check_target(target: Path) -> None:
    """Raise UserError unless a folder can be made there, or an empty one is."""
    try:
        with os.scandir(target) as inside:
            reason = "is there already, and not an empty folder" if any(inside) else ""
    except FileNotFoundError:
        reason = "is a link to nowhere" if os.path.lexists(target) else ""
    except NotADirectoryError:
        reason = "is there already, and not an empty folder"
    except (OSError, ValueError) as error:
        reason = in_words(error)
    if reason:
        raise UserError("TO", target, reason, "give a folder that is not there yet")


def _to_hugging_face(
    source: Path, target: Path, config: Path | None, dtype: torch.dtype | None, max_shard_bytes: int
) -> str:
    reader = Reader(source)
    state = reader.state
    beside = state.source
    folder = config or Path(beside.folder)
    if not os.path.isfile(folder / "config.json"):
        made = "" if config else ", where the run that saved this checkpoint had it"
        hint = "give a folder with config.json (and the tokenizer's files)"
        raise UserError("--config", folder, f"no config.json there{made}", hint)
    tokenizer = Path(beside.tokenizer) if beside.tokenizer and not config else None
    if tokenizer and not has_tokenizer(tokenizer):
        reason = "no tokenizer there, where the run that saved this checkpoint had it"
        raise UserError("--config", tokenizer, reason, "give a folder with config.json and the tokenizer's files")
    model = read_model_config(folder)
    size = state.course.get("vocab_size")  # of a run whose vocabulary grew
    if type(size) is int and size <= VOCABULARY:
        model = model.grown_to(size)
    shapes = parameter_shapes(model)
    check_model(reader, {MODEL + name: shape for name, shape in shapes.items()}, MODEL)
    verify(source)
    dtype = dtype or _stored_dtype(reader)

    def whole(name: str) -> Tensor:
        tensor = torch.empty(shapes[name], dtype=dtype)
        with alone_is_fine():
            read_into(reader, {MODEL + name: tensor})
        return tensor

    write_model(
        model,
        shapes,
        whole,
        target,
        folder,
        dtype,
        tokenizer=tokenizer,
        config_changes=beside.config_changes,
        max_shard_bytes=max_shard_bytes,
    )
    return f"the model of step {state.step}, in {dtype_name(dtype)}, written to {target}"


def _stored_dtype(reader: Reader) -> torch.dtype:
    """The narrowest dtype that holds every parameter of a checkpoint exactly."""
    entries = reader.metadata.state_dict_metadata.items()
    dtypes = {getattr(entry, "properties").dtype for name, entry in entries if name.startswith(MODEL)}  # noqa: B009
    widest: torch.dtype = dtypes.pop()
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _to_checkpoint(source: Path, target: Path) -> str:
    config = read_model_config(source)
    check_weights(source, config)
    shapes = parameter_shapes(config)
    target = target.resolve()
    state = RunState(0, 0, 0, 0, Source(str(source.resolve())), optimizer=False)
    with StoredParameters(source, config, shapes) as stored, alone_is_fine():
        # DCP plans from tensors without data, and asks the planner for each when its turn has come
        plan = {
            MODEL + name: torch.empty(shape, dtype=stored.dtype(name), device="meta") for name, shape in shapes.items()
        }
        dcp.save(plan, storage_writer=_Import(target, state), planner=_Streamed(stored, shapes), no_dist=True)
    return f"a checkpoint of the model of {source}, without optimizer state, written to {target}"


class _Streamed(dcp.DefaultSavePlanner):
    """Gives the tensors of a Hugging Face folder when they are to be written."""

    def __init__(self, stored: StoredParameters, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._stored, self._shapes = stored, shapes

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        name = index.fqn.removeprefix(MODEL)
        return self._stored.read(name, tuple(slice(0, n) for n in self._shapes[name])).contiguous()


class _Import(Writer):
    """Writes a checkpoint that no run has made: a file for each tensor, for DCP keeps those of a file in memory."""

    def __init__(self, final: Path, state: RunState) -> None:
        super().__init__(final, state, keep=None)
        self.single_file_per_rank = False

    def make_room(self) -> None:
        remove(self.part)

    def put_in_place(self) -> None:
        if self.final.exists():
            self.final.rmdir()  # it is empty
        self.part.rename(self.final)
