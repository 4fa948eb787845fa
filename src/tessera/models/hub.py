"""Hugging Face folders in and out.

In: config.json, and safetensors of which every rank reads only its slices. Out: what `AutoModelForCausalLM`
of transformers loads. What a tensor is called and how it is stored is in `families.py`.
"""

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tessera.errors import UserError
from tessera.layout import residual_layout
from tessera.mesh import Mesh
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.models.families import FAMILIES, HEAD, StoredTensor, model_config, stored_tensors
from tessera.models.tensor_files import INDEX, ITEM_BYTES, SINGLE, Entry, broken, find_tensors
from tessera.nn.parameter import Parallel, ParameterSpec, gather_parameter, named_specs, to_local

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
SHARD_BYTES = 5_000_000_000


def resolve_model_folder(base_model: str, *, weights: bool = True) -> Path:
    """The folder of `base_model`: a local one, or that of a hub name, downloaded where the cache lacks it.

    Only config, safetensors (if `weights`) and tokenizer files are fetched, never pickles or code. UserError: neither
    such a folder nor a hub name, or the hub does not give it and the cache has no copy.
    """
    folder = Path(base_model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base_model):
        reason = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(
            "base_model", base_model, reason, "a folder with config.json, or a hub name such as owner/model"
        )
    import huggingface_hub  # most runs name a folder and need none of it

    try:
        patterns = ["*.json", *TOKENIZER_FILES, *(["model*.safetensors"] if weights else [])]
        return Path(huggingface_hub.snapshot_download(base_model, allow_patterns=patterns))
    except Exception as error:  # the library and the network below it raise many kinds
        reason = f"no such folder, and the hub gives no model of this name: {str(error).partition(chr(10))[0]}"
        raise UserError(
            "base_model", base_model, reason, "check the name, the network, or give a local folder"
        ) from error


def read_model_config(folder: Path) -> ModelConfig:
    """What config.json in `folder` says. UserError: no such file, not JSON, or as `families.model_config`."""
    return model_config(read_config_json(folder), folder / "config.json")


def read_config_json(folder: Path) -> Any:
    """config.json as it is, parsed."""
    try:
        return json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError("base_model", folder, "no config.json there") from error
    except (OSError, ValueError) as error:
        raise UserError("base_model", folder / "config.json", f"cannot be read as JSON: {error}") from error


# ------------------------------------------------------------------------------------------- before a run


def check_weights(folder: Path, config: ModelConfig) -> None:
    """Raise UserError unless the safetensors of `folder` hold every tensor of the model, of its shape, whole.

    Headers are read, not tensors (but for a tied pair stored twice, which must be equal). Warns of tensors
    that the model has no use for.
    """
    entries = find_tensors(folder)
    meta = Parallel(Mesh(device="meta", rank=0), residual_layout(True))
    shapes = {name: spec.shape for name, _, spec in named_specs(Decoder(config, meta))}
    tensors = stored_tensors(config, shapes)
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


def _name_in(entries: dict[str, Entry], tensor: StoredTensor, folder: Path) -> str:
    """The name under which a checkpoint holds `tensor`."""
    for name in tensor.names:
        if name in entries:
            return name
    tying = "tie_word_embeddings: true in config.json, if its head is the embedding"
    reason = f"the weights lack the tensor {tensor.names[0]} ({', '.join(tensor.parts)})"
    raise broken(folder, reason, tying if tensor.names[0] == HEAD else "")


def _check_tied_pair(folder: Path, entries: dict[str, Entry], tensor: StoredTensor) -> None:
    """Raise UserError when head and embedding are both stored and differ: then transformers ties nothing."""
    name = _name_in(entries, tensor, folder)
    if name == HEAD or HEAD not in entries:
        return
    one, other = entries[name], entries[HEAD]
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    with safe_open(one.file, "pt") as a, safe_open(other.file, "pt") as b:
        rows = 4096  # a block of them at a time
        for i in range(0, tensor.shape[0] if same else 0, rows):
            same &= torch.equal(a.get_slice(name)[i : i + rows], b.get_slice(HEAD)[i : i + rows])
    if not same:
        reason = f"{HEAD} and {name} differ, though config.json ties them"
        raise broken(other.file, reason, "tie_word_embeddings: false in config.json keeps both")


def _warn_unused(folder: Path, config: ModelConfig, entries: dict[str, Entry], tensors: Sequence[StoredTensor]) -> None:
    known = {name for tensor in tensors for name in tensor.names}
    unused = sorted(n for n in entries if n not in known and not n.endswith(FAMILIES[config.family].buffers))
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        warnings.warn(f"{folder}: not used by the model of config.json: {', '.join(unused[:3])}{more}", stacklevel=3)


# ------------------------------------------------------------------------------------------- in each process


@torch.no_grad()
def load_weights(model: Decoder, folder: Path) -> int:
    """Fill this rank's shard of every parameter from the safetensors of `folder`, checked by `check_weights`.

    Reads the rank's slices and no more, casting to the parameters' dtype; a replicated parameter is read
    whole. Returns the bytes of tensors read.
    """
    entries = find_tensors(folder)
    mesh = model.parallel.mesh
    parameters = {name: (parameter, spec) for name, parameter, spec in named_specs(model)}
    tensors = stored_tensors(model.config, {name: spec.shape for name, (_, spec) in parameters.items()})
    bytes_read = 0
    paths = {entry.file for entry in entries.values()}
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in paths}
        for tensor in tensors:
            name = _name_in(entries, tensor, folder)
            stored = files[entries[name].file].get_slice(name)
            first = 0  # output of the part within the stored tensor
            for part in tensor.parts:
                parameter, spec = parameters[part]
                piece = stored[slices_in(tensor, spec.stored_slices(mesh), first)]
                bytes_read += piece.nbytes
                to_local(parameter).copy_(piece.T if tensor.transposed else piece)
                first += spec.shape[0]
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
    Weights are written in `dtype` (the parameters' own unless given). One parameter at a time is gathered;
    rank 0 also keeps the file of at most `max_shard_bytes` that it is filling. All is written aside, then
    renamed, and an older export in `folder` goes.
    """
    parameters = {name: (parameter, spec) for name, parameter, spec in named_specs(model)}
    tensors = stored_tensors(model.config, {name: spec.shape for name, (_, spec) in parameters.items()})
    dtype = dtype or model.parallel.dtype
    files = _plan_files(tensors, dtype, max_shard_bytes)
    writer, aside = model.parallel.mesh.rank == 0, folder / ".export"
    if writer:
        shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
        aside.mkdir(parents=True)
    for name, content in files.items():
        filled = {}
        for tensor in content:
            parts = [_whole(*parameters[part], model.parallel.mesh, dtype, keep=writer) for part in tensor.parts]
            if writer:
                filled[tensor.names[0]] = _joined(parts, tensor.transposed)
        if writer:
            save_file(filled, aside / name, {"format": "pt"})
            (aside / name).chmod((aside / ".").stat().st_mode & 0o666)  # safetensors makes it readable by us alone
    if writer:
        _write_index(aside, files, dtype)
        _write_rest(aside, source, tokenizer or source, model, dtype, config_changes or {})
        _publish(aside, folder)


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


def _whole(parameter: nn.Parameter, spec: ParameterSpec, mesh: Mesh, dtype: torch.dtype, *, keep: bool) -> Tensor:
    """The full tensor, gathered on every rank; on the CPU of one that is to `keep` it, else nothing of it."""
    whole = gather_parameter(parameter, spec, mesh)
    return whole.to("cpu", dtype) if keep else whole.new_empty(0)


def _joined(parts: Sequence[Tensor], transposed: bool) -> Tensor:
    whole = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return (whole.T if transposed else whole).contiguous()


def _write_index(aside: Path, files: Mapping[str, Sequence[StoredTensor]], dtype: torch.dtype) -> None:
    if SINGLE in files:
        return
    weight_map = {tensor.names[0]: name for name, content in files.items() for tensor in content}
    elements = sum(math.prod(tensor.shape) for content in files.values() for tensor in content)
    metadata = {"total_parameters": elements, "total_size": elements * dtype.itemsize}
    _write_json(aside / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _write_rest(
    aside: Path, source: Path, tokenizer: Path, model: Decoder, dtype: torch.dtype, changes: Mapping[str, Any]
) -> None:
    """config.json, true of what was written, and the files that go beside it."""
    config = read_config_json(source)
    name = str(dtype).removeprefix("torch.")
    config |= {key: name for key in ("dtype", "torch_dtype") if key in config} or {"dtype": name}
    config |= dict(changes)
    config |= {
        "architectures": [FAMILIES[model.config.family].architecture],
        "vocab_size": model.config.vocab_size,
    }
    _write_json(aside / "config.json", config)
    for home, file in [(source, "generation_config.json"), *((tokenizer, file) for file in TOKENIZER_FILES)]:
        if (home / file).is_file():
            shutil.copyfile(home / file, aside / file)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _publish(aside: Path, folder: Path) -> None:
    """Move what was written to its place, last what weights are found by: never a mixture that loads."""
    entrances = (SINGLE, INDEX)
    for name in entrances:
        (folder / name).unlink(missing_ok=True)
    written = [path.name for path in aside.iterdir()]
    for name in sorted(written, key=lambda name: name in entrances):
        os.replace(aside / name, folder / name)
    for old in folder.glob("model-*-of-*.safetensors"):
        if old.name not in written:
            old.unlink()
    aside.rmdir()
