"""The safetensors files of a folder: which tensors lie where, read from their headers alone and checked; and written.

A file is 8 bytes (the header's length, little-endian), the header (JSON: name → dtype, shape, data_offsets),
then the bytes of the tensors without gaps. A model is one file `model.safetensors`, or several that the
`weight_map` of `model.safetensors.index.json` names.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.core.errors import UserError, cut_short
from tessera.core.files import in_words, open_file, parse_json, read_json, usable_path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000
"""Bytes; the safetensors library reads no larger one either."""
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The dtypes that weights are read from, by safetensors' names."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: its file, safetensors dtype and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def find_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the model in `folder`, by its stored name.

    UserError, naming the file and the tensor: no weights there or only pickled ones, a shard is missing, a
    file is not safetensors, is truncated or corrupt, or lacks a tensor that the index places in it.
    """
    if os.path.lexists(folder / SINGLE):
        return _read_header(folder / SINGLE)
    if not os.path.lexists(folder / INDEX):
        raise _no_weights(folder)
    weight_map = _read_index(folder / INDEX)
    headers = {name: _read_header(folder / name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in headers[name]:
            raise broken(folder / name, f"lacks the tensor {tensor}, which {INDEX} places there")
    return {tensor: headers[name][tensor] for tensor, name in weight_map.items()}


def broken(file: Path, reason: str, hint: str = "") -> UserError:
    return UserError("base_model", file, reason, hint)


def _no_weights(folder: Path) -> UserError:
    pickled = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    hint = "random_init: true starts from config.json alone"
    if pickled:
        reason = f"has pickled weights only ({pickled[0]}), which can run code: safetensors are needed"
        return broken(folder, reason, f"save the model with safe_serialization=True of transformers, or {hint}")
    return broken(folder, f"has no weights: neither {SINGLE} nor {INDEX}", hint)


def _read_index(index: Path) -> dict[str, str]:
    content = read_json(index, "base_model")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise broken(index, "cannot be read as an index of safetensors: it has no weight_map with keys")
    for name in weight_map.values():
        if not (isinstance(name, str) and _is_plain_name(name)):
            raise broken(index, f"names files outside its own folder, or none: {cut_short(repr(name), 100)}")
    return weight_map


def _is_plain_name(name: str) -> bool:
    """Whether `name` can be a file beside the index."""
    try:
        return name not in ("", ".", "..") and "/" not in name and not name.startswith("~") and bool(usable_path(name))
    except ValueError:
        return False


def _read_header(file: Path) -> dict[str, TensorEntry]:
    if not os.path.lexists(file):
        raise broken(file, f"is missing, though {INDEX} names it")
    with open_file(file, "base_model") as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(length) if size >= 8 and length <= min(LARGEST_HEADER, size - 8) else None
        except OSError as error:
            raise broken(file, in_words(error)) from error
    if header is None:
        raise broken(
            file, f"is not a safetensors file, or is cut off in its header ({size} bytes)", _pointer_hint(file)
        )
    try:
        entries = dict(parse_json(header).items())
    except (ValueError, AttributeError) as error:
        raise broken(file, f"its header cannot be parsed: {error}") from error
    told = entries.pop("__metadata__", {})
    if not (isinstance(told, dict) and all(isinstance(text, str) for text in told.values())):
        raise broken(file, "its header cannot be parsed: __metadata__ is no object of texts")
    _check_offsets(file, entries, size - 8 - length)
    return {name: TensorEntry(file, entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}


def _pointer_hint(file: Path) -> str:
    with open_file(file, "base_model") as stream:
        is_pointer = stream.read(20).startswith(b"version https://git")
    return "it is a Git LFS pointer: `git lfs pull` fetches the file itself" if is_pointer else ""


def _check_offsets(file: Path, entries: dict[str, Any], available: int) -> None:
    """Raise UserError unless the tensors cover the file's `available` bytes exactly, one after the other."""
    for name, entry in entries.items():
        if not _well_formed(entry):
            raise broken(file, f"its header cannot be parsed: the entry of tensor {name} is {entry!r:.100}")
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if end > available:
            reason = f"is truncated: tensor {name} ends at byte {end} of the data, the file at byte {available}"
            raise broken(file, reason, "fetch or copy the file again")
        item = ITEM_BYTES.get(entry["dtype"])
        if begin != position or end < begin or (item and end - begin != item * math.prod(entry["shape"])):
            given = f"{entry['dtype']} {entry['shape']} at bytes {begin} to {end}"
            raise broken(file, f"is corrupt: tensor {name} ({given}) does not fit between its neighbours")
        position = end
    if position != available:
        raise broken(file, f"is corrupt: its tensors take {position} bytes, but {available} follow the header")


def _well_formed(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 8):
        return False
    return isinstance(entry.get("dtype"), str) and all(type(n) is int and 0 <= n < 2**63 for n in [*shape, *offsets])


# ------------------------------------------------------------------------------------------- written


def write_tensors(
    file: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[Tensor], dtype: torch.dtype
) -> None:
    """Write a safetensors file of `tensors`, on the CPU and in the order of `shapes`, of which one is held at a time.

    The library's own `save_file` wants all of them at once.
    """
    name_of = {ours: name for name, ours in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": name_of[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # so that the tensors are aligned
    with file.open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (shape, dtype), name
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
