"""Hugging Face folders in and out.

In: config.json, and safetensors of which every rank reads only its slices. Out: what `AutoModelForCausalLM`
of transformers loads. What a tensor is called and how it is stored is in families/.
"""

import errno
import math
import os
import re
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tessera.core.collectives import gathered, start_broadcast
from tessera.core.device import dtype_name
from tessera.core.errors import UserError
from tessera.core.files import in_words, read_json, remove, usable_path
from tessera.core.mesh import Mesh
from tessera.core.writing import NotWritten, writing
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.beside import write_beside, write_json
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.models.download import download
from tessera.models.families.family import HEAD
from tessera.models.families.stored import StoredTensor, stored_tensors
from tessera.models.families.table import FAMILIES, model_config
from tessera.models.new_rows import mean_of_rows
from tessera.models.tensor_files import (
    DTYPES,
    INDEX,
    ITEM_BYTES,
    SINGLE,
    TensorEntry,
    broken,
    find_tensors,
    write_tensors,
)
from tessera.nn.parameter import gather_parameter, named_specs, to_local

SHARD_BYTES = 5_000_000_000


def resolve_model_folder(base_model: str, *, weights: bool = True) -> Path:
    """The folder of `base_model`: a local one, or that of a hub name, downloaded where the cache lacks it.

    Only config, safetensors (if `weights`) and tokenizer files are fetched, never pickles or code. UserError: neither
    such a folder nor a hub name, or the hub does not give it and the cache has no copy.
    """
    hint = "a folder with config.json, or a hub name such as owner/model"
    try:
        folder = Path(usable_path(base_model))
        there, is_folder = os.path.lexists(folder), folder.is_dir()
    except (OSError, ValueError) as error:
        raise UserError("base_model", base_model, in_words(error), hint) from error
    if is_folder:
        return folder
    if there or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base_model, re.ASCII):
        raise UserError("base_model", base_model, "is a file, not a folder" if there else "no such folder", hint)
    return download(base_model, weights)


def read_model_config(folder: Path) -> ModelConfig:
    """What config.json in `folder` says. UserError: no such file, not JSON, or as `model_config`."""
    return model_config(read_config_json(folder), folder / "config.json")


def read_config_json(folder: Path) -> Any:
    """config.json as it is, parsed."""
    if not os.path.lexists(folder / "config.json"):
        raise UserError("base_model", folder, "no config.json there")
    return read_json(folder / "config.json", "base_model")


def dtype_of_folder(folder: Path) -> str:
    """The dtype of a model folder: what its config.json says, else that of its first tensor, else float32."""
    config, written = read_config_json(folder), ("float32", "bfloat16", "float16")
    for key in ("dtype", "torch_dtype"):
        if isinstance(config, dict) and config.get(key) in written:
            return config[key]
    try:
        entry = next(iter(find_tensors(folder).values()), None)
    except UserError:  # the weights come from a checkpoint, and these are not there any more
        entry = None
    stored = dtype_name(DTYPES[entry.dtype]) if entry and entry.dtype in DTYPES else ""
    return stored if stored in written else "float32"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The global shape of every parameter, by our names, in the order of declaration."""
    meta = Parallel(Mesh(device="meta", rank=0), residual_layout(True))
    return {name: spec.shape for name, _, spec in named_specs(Decoder(config, meta))}


# ------------------------------------------------------------------------------------------- before a run


def check_weights(folder: Path, config: ModelConfig) -> None:
    """Raise UserError unless the safetensors of `folder` hold every tensor of the model, of its shape, whole.

    Headers are read, not tensors (but for a tied pair stored twice, which must be equal). Warns of tensors
    that the model has no use for. Of a vocabulary that grows only the rows of the base model are there.
    """
    config = config.base
    entries = find_tensors(folder)
    tensors = stored_tensors(config, parameter_shapes(config))
    for tensor in tensors:
        name = _name_in(entries, tensor, folder)
        entry = entries[name]
        ours = ", ".join(tensor.parts)
        if entry.dtype not in ITEM_BYTES:
            hint = f"dtypes that are: {', '.join(ITEM_BYTES)}"
            raise broken(entry.file, f"tensor {name} ({ours}) is stored as {entry.dtype}, which is not read", hint)
        if entry.shape != tensor.shape:
            found, expected = list(entry.shape), list(tensor.shape)
            reason = f"tensor {name} ({ours}) has shape {found}, but config.json makes it {expected}"
            raise broken(entry.file, reason)
    if config.tied:
        _check_tied_pair(folder, entries, next(t for t in tensors if t.parts == ("embedding.weight",)))
    _warn_unused(folder, config, entries, tensors)


def _name_in(entries: dict[str, TensorEntry], tensor: StoredTensor, folder: Path) -> str:
    """The name under which a checkpoint holds `tensor`."""
    for name in tensor.names:
        if name in entries:
            return name
    tying = "tie_word_embeddings: true in config.json, if its head is the embedding"
    reason = f"the weights lack the tensor {tensor.names[0]} ({', '.join(tensor.parts)})"
    raise broken(folder, reason, tying if tensor.names[0] == HEAD else "")


def _check_tied_pair(folder: Path, entries: dict[str, TensorEntry], tensor: StoredTensor) -> None:
    """Raise UserError when head and embedding are both stored and differ: then transformers ties nothing."""
    name = _name_in(entries, tensor, folder)
    if name == HEAD or HEAD not in entries:
        return
    one, other = entries[name], entries[HEAD]
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    with _opened(one.file) as a, _opened(other.file) as b:
        rows = 4096  # a block of them at a time
        for i in range(0, tensor.shape[0] if same else 0, rows):
            same &= torch.equal(a.get_slice(name)[i : i + rows], b.get_slice(HEAD)[i : i + rows])
    if not same:
        reason = f"{HEAD} and {name} differ, though config.json ties them"
        raise broken(other.file, reason, "tie_word_embeddings: false in config.json keeps both")


def _warn_unused(
    folder: Path, config: ModelConfig, entries: dict[str, TensorEntry], tensors: Sequence[StoredTensor]
) -> None:
    known = {name for tensor in tensors for name in tensor.names}
    unused = sorted(n for n in entries if n not in known and not n.endswith(FAMILIES[config.family].buffers))
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        warnings.warn(f"{folder}: not used by the model of config.json: {', '.join(unused[:3])}{more}", stacklevel=3)


def _opened(file: Path) -> Any:
    """A safetensors file, open. Raises UserError for what the library does not take."""
    try:
        return safe_open(file, "pt")
    except Exception as error:  # SafetensorError, or what its reader of files raises
        raise broken(file, f"cannot be read by safetensors: {error}") from error


# ------------------------------------------------------------------------------------------- in each process


class StoredParameters:
    """Our parameters as the safetensors of a folder hold them, read slice by slice while the context is open.

    `folder` has been checked by `check_weights`; `shapes` are global, by our names.
    """

    def __init__(self, folder: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._entries = find_tensors(folder)
        self._places: dict[str, tuple[StoredTensor, str, int]] = {}
        for tensor in stored_tensors(config, shapes):
            name = _name_in(self._entries, tensor, folder)
            first = 0  # output of the part within the stored tensor
            for part in tensor.parts:
                self._places[part] = (tensor, name, first)
                first += shapes[part][0]

    def __enter__(self) -> "StoredParameters":
        with ExitStack() as stack:
            paths = {entry.file for entry in self._entries.values()}
            self._files = {path: stack.enter_context(_opened(path)) for path in paths}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def dtype(self, part: str) -> torch.dtype:
        return DTYPES[self._entries[self._places[part][1]].dtype]

    def read(self, part: str, slices: tuple[slice, ...]) -> Tensor:
        """These slices of a parameter, in the dtype that it is stored in."""
        tensor, name, first = self._places[part]
        piece = self._files[self._entries[name].file].get_slice(name)[slices_in(tensor, slices, first)]
        return piece.T if tensor.transposed else piece


@torch.no_grad()
def load_weights(model: Decoder, folder: Path) -> int:
    """Fill this rank's shard of every parameter from the safetensors of `folder`, checked by `check_weights`.

    Reads the rank's slices and no more, casting to the parameters' dtype; a replicated parameter is read
    whole. Rows of new tokens are the mean of the rows that are there. Returns the bytes of tensors read.
    """
    parameters = list(named_specs(model))
    shapes = {name: spec.shape for name, _, spec in parameters}
    there = parameter_shapes(model.config.base) if model.config.new_tokens else shapes
    bytes_read = 0
    with StoredParameters(folder, model.config.base, shapes) as stored:
        for name, parameter, spec in parameters:
            rows, *others = spec.stored_slices(model.parallel.mesh)
            shard, last = to_local(parameter), there[name][0]
            if rows.start < last:
                piece = stored.read(name, (slice(rows.start, min(rows.stop, last)), *others))
                bytes_read += piece.nbytes
                shard[: len(piece)].copy_(piece)
            if rows.stop > max(last, rows.start):
                new = shard[max(0, last - rows.start) :]
                new.copy_(mean_of_rows(partial(stored.read, name), last, tuple(others)).expand_as(new))
    return bytes_read


def slices_in(tensor: StoredTensor, local: tuple[slice, ...], first: int) -> tuple[slice, ...]:
    """Where `local`, slices of the part of `tensor` that begins at output `first`, lie in it as stored."""
    moved = (slice(local[0].start + first, local[0].stop + first), *local[1:])
    return moved[::-1] if tensor.transposed else moved


# ------------------------------------------------------------------------------------------- out


@torch.no_grad()
def export(
    model: Decoder,
    folder: Path,
    source: Path,
    dtype: torch.dtype | None = None,
    *,
    tokenizer: Path | None = None,
    config_changes: Mapping[str, Any] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` into `folder` as a Hugging Face model, with the config of folder `source`.

    Tokenizer files come from folder `tokenizer`, or from `source` too; `config_changes` go into its config.json.

    Collective: every rank of the model calls it, rank 0 writes, and the folder is whole when rank 0 returns.
    Weights are written in `dtype` (the parameters' own unless given). One parameter at a time is gathered, and
    one tensor of the files held on rank 0.
    """
    mesh = model.parallel.mesh
    writes, dtype = mesh.rank == 0, dtype or model.parallel.dtype
    own, places = {name: (parameter, spec) for name, parameter, spec in named_specs(model)}, _stage_of_each(model)

    def whole(name: str) -> Tensor:
        """Gathered on every rank; on the CPU of rank 0, and of the others nothing."""
        stage, shape = places[name]
        if mesh.coordinates["pp"] == stage:
            tensor = gather_parameter(*own[name], mesh)
        else:
            tensor = torch.empty(shape, dtype=model.parallel.dtype, device=mesh.device)
        tensor = start_broadcast(tensor, stage, mesh.group(("pp",))).wait()
        return tensor.to("cpu", dtype) if writes else tensor.new_empty(0)

    write_model(
        model.config,
        {name: shape for name, (_, shape) in places.items()},
        whole,
        folder,
        source,
        dtype,
        tokenizer=tokenizer,
        config_changes=config_changes,
        max_shard_bytes=max_shard_bytes,
        writes=writes,
    )


def write_model(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    whole: Callable[[str], Tensor],
    folder: Path,
    source: Path,
    dtype: torch.dtype,
    *,
    tokenizer: Path | None = None,
    config_changes: Mapping[str, Any] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    writes: bool = True,
) -> None:
    """As `export`, of parameters that `whole` gives by name: of their global `shapes`, in `dtype`, on the CPU.

    With `writes` false it only asks for them, in the same order. All is written aside, then renamed, and an
    older export in `folder` goes. Raises NotWritten, once it has asked for all: other ranks give them.
    """
    files = _plan_files(stored_tensors(config, shapes), dtype, max_shard_bytes)
    aside = folder / ".export"
    needs = sum(math.prod(tensor.shape) for content in files.values() for tensor in content) * dtype.itemsize
    failures: list[NotWritten] = []
    if writes:
        with writing(aside, needs, failures=failures):
            remove(aside)  # what a killed run left
            aside.mkdir(parents=True)
    for name, content in files.items():
        parts = ([whole(part) for part in tensor.parts] for tensor in content)
        if writes and not failures:
            joined = (_joined(own, tensor.transposed) for own, tensor in zip(parts, content, strict=True))
            with writing(aside / name, needs, partial=aside, failures=failures):
                write_tensors(aside / name, {tensor.names[0]: tensor.shape for tensor in content}, joined, dtype)
        deque(parts, maxlen=0)
    if writes and not failures:
        with writing(aside, needs, partial=aside, failures=failures):
            _write_index(aside, files, dtype)
            write_beside(aside, source, tokenizer or source, config, dtype, config_changes or {})
            _publish(aside, folder)
    if failures:
        raise failures[0]


def _plan_files(tensors: Sequence[StoredTensor], dtype: torch.dtype, limit: int) -> dict[str, list[StoredTensor]]:
    """The tensors of each file, in order, filled up to `limit` bytes (one tensor may be larger alone)."""
    contents: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        if contents[-1] and filled + size > limit:
            contents.append([])
            filled = 0
        contents[-1].append(tensor)
        filled += size
    if len(contents) == 1:
        return {SINGLE: contents[0]}
    return {f"model-{i:05d}-of-{len(contents):05d}.safetensors": c for i, c in enumerate(contents, 1)}


def _stage_of_each(model: Decoder) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Of each parameter of the whole model a pipeline stage that holds it, and its shape: no rank needs to have all."""
    mesh = model.parallel.mesh
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    own = {name: spec.shape for name, _, spec in named_specs(model)}
    for rank, shapes in enumerate(gathered(own, mesh.world)):
        found |= {name: (mesh.at(rank).coordinates["pp"], shape) for name, shape in shapes.items() if name not in found}
    return found


def _joined(parts: Sequence[Tensor], transposed: bool) -> Tensor:
    whole = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return (whole.T if transposed else whole).contiguous()


def _write_index(aside: Path, files: Mapping[str, Sequence[StoredTensor]], dtype: torch.dtype) -> None:
    if SINGLE in files:
        return
    weight_map = {tensor.names[0]: name for name, content in files.items() for tensor in content}
    elements = sum(math.prod(tensor.shape) for content in files.values() for tensor in content)
    metadata = {"total_parameters": elements, "total_size": elements * dtype.itemsize}
    write_json(aside / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _publish(aside: Path, folder: Path) -> None:
    """Move what was written to its place, last what weights are found by: never a mixture that loads."""
    entrances = (SINGLE, INDEX)
    for path in (folder / name for name in (*entrances, *os.listdir(aside))):
        if path.is_dir() and not (aside / path.name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for name in entrances:
        (folder / name).unlink(missing_ok=True)
    written = [path.name for path in aside.iterdir()]
    for name in sorted(written, key=lambda name: name in entrances):
        if (folder / name).is_dir():  # of an older export; a folder is replaced only when it is empty
            shutil.rmtree(folder / name)
        os.replace(aside / name, folder / name)
    for old in folder.glob("model-*-of-*.safetensors"):
        if old.name not in written:
            old.unlink()
    aside.rmdir()
