"""What `.metadata` says, which DCP writes as a pickle: read as data, so that nothing a pickle names is ever called.

`pickletools` cuts the bytes into opcodes. The few that DCP's metadata needs build lists, dicts and tuples here, and of
its data classes a record of fields; every other opcode, name, call or field is refused. Then each field is checked,
and torch's own classes are made of them. All of it takes time and memory in proportion to the file.
"""

import math
import pickletools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

LONGEST_NAME = 1000
DEPTH = 100
"""Of open lists, dicts and tuples; DCP's metadata has seven."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = {str(dtype).partition(".")[2]: dtype for dtype in _FLOATS}
"""What weights and moments are kept in."""

_RECORDS = (
    Metadata,
    TensorStorageMetadata,
    TensorProperties,
    ChunkStorageMetadata,
    MetadataIndex,
    _StorageInfo,
    StorageMeta,
)
_FIELDS = {(kind.__module__, kind.__name__): {field.name for field in fields(kind)} for kind in _RECORDS}
_CALLS = {
    ("torch", "Size"): tuple,  # of the tuple that it is called with
    ("torch.serialization", "_get_layout"): str,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): int,
    **dict.fromkeys([("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath")], None),
}
"""What a metadata's pickle calls: instead, the argument of that type is taken (None: nothing, a path is not needed)."""


# ------------------------------------------------------------------------------------------- the pickle


@dataclass(frozen=True)
class _Name:
    module: str
    name: str


@dataclass(eq=False, slots=True)
class _Record:
    """An instance of one of `_RECORDS`: its fields, or for TensorProperties the tuple of them."""

    kind: _Name
    state: Any = None


def load_data(content: bytes) -> Any:
    """The value that a pickle of DCP's metadata holds: plain values and records. ValueError: anything else is in it."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each mark
    memo: list[Any] = []
    argument: Any
    position: Any  # None for streams that cannot tell it
    for opcode, argument, position in pickletools.genops(content):
        match opcode.name:
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(argument)
            case "LONG1":
                if not 0 <= argument < 2**63:
                    raise ValueError("holds a number below 0 or of more than 63 bits")
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                if len(stack) < count:
                    raise ValueError("takes more than there is")
                stack[-count:] = [tuple(stack[-count:])]
            case "MARK":
                if len(below) >= DEPTH:
                    raise ValueError(f"is nested deeper than {DEPTH} levels")
                below.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND":
                item = stack.pop()
                _append(stack[-1], [item])
            case "APPENDS":
                items, stack = stack, below.pop()
                _append(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, below.pop()
                _set(stack[-1], items)
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_named(module, name))
            case "NEWOBJ":
                arguments, kind = stack.pop(), stack.pop()
                if not isinstance(kind, _Name) or (kind.module, kind.name) not in _FIELDS or arguments != ():
                    raise ValueError("makes an object that no checkpoint needs")
                stack.append(_Record(kind))
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(_called(called, arguments))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "PROTO":
                if position or argument not in (4, 5):
                    raise ValueError(f"is a pickle of protocol {argument}")
            case "FRAME":
                if argument > len(content) - position:
                    raise ValueError("has a frame that goes beyond its end")
            case "STOP":
                if position + 1 != len(content) or len(stack) != 1 or below:
                    raise ValueError("does not end with its one value")
                return stack[0]
            case other:
                raise ValueError(f"has the opcode {other}, which no checkpoint needs")
    raise ValueError("has no end")


def _append(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise ValueError("appends to what is no list")
    target += items


def _set(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise ValueError("sets items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, _Record):  # the hash of nested tuples may take for ever
            raise ValueError(f"has a key that is {type(key).__name__}")
        if key in target:
            raise ValueError("has a key twice")
        target[key] = value


def _named(module: Any, name: Any) -> Any:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("names something without a name")
    module = module.replace("pathlib._local", "pathlib")  # as Python 3.13 calls it
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    if (module, name) in _FIELDS or (module, name) in _CALLS:
        return _Name(module, name)
    shown = f"{module}.{name}"
    raise ValueError(f"names {shown[:100] if shown.isprintable() else ascii(shown)[:100]}, which no checkpoint needs")


def _called(called: Any, arguments: Any) -> Any:
    if not isinstance(called, _Name) or (name := (called.module, called.name)) not in _CALLS:
        raise ValueError("calls what no checkpoint needs")
    kind = _CALLS[name]
    if kind is None:
        return None
    if type(arguments) is not tuple or len(arguments) != 1 or type(arguments[0]) is not kind:
        raise ValueError(f"calls {name[1]} with something else than a {kind.__name__}")
    return arguments[0]


def _build(target: Any, state: Any) -> None:
    if type(target) is not _Record or target.state is not None:
        raise ValueError("sets fields of what has none to be set")
    known, as_tuple = _FIELDS[target.kind.module, target.kind.name], target.kind.name == TensorProperties.__name__
    fits = len(state) == len(known) if as_tuple and type(state) is tuple else not as_tuple and type(state) is dict
    if not fits or type(state) is dict and not state.keys() <= known:
        raise ValueError(f"sets fields that {target.kind.name} does not have")
    target.state = state


# ------------------------------------------------------------------------------------------- its fields


def metadata_of(content: bytes) -> Metadata:
    """DCP's metadata of a checkpoint of tensors alone. ValueError, naming the tensor, for anything that is none.

    Each tensor's parts lie within it, overlap nowhere, leave nothing out, and have their bytes in a file of their own
    name beside `.metadata`. `planner_data`, which no load needs, is left out.
    """
    top = _fields(load_data(content), Metadata, "it")
    tensors, places = top.get("state_dict_metadata"), top.get("storage_data")
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise ValueError("holds no tensors")
    parts: dict[str, list[Any]] = {}
    for name, entry in tensors.items():
        shown = _text(name, "a tensor")
        parts[shown] = _fields(entry, TensorStorageMetadata, shown).get("chunks") or []
        if type(parts[shown]) is not list:
            raise ValueError(f"{shown}: its parts are no list")
    storage = dict(_place(index, place) for index, place in places.items())
    written = Counter(index.fqn for index in storage)
    # before any is read: a pickle may give a million tensors one list of a million parts
    for name, chunks in parts.items():
        if len(chunks) > written[name]:
            raise ValueError(f"{name}: has {len(chunks)} parts, of which {written[name]} lie in a file")
    found: dict[str, Any] = {name: _tensor(name, entry, parts[name]) for name, entry in tensors.items()}
    _check_places(found, storage)
    return Metadata(found, None, storage, StorageMeta())


def _fields(value: Any, kind: type, owner: str) -> Any:
    """The fields of a record of that kind: a dict, or the tuple of TensorProperties."""
    if type(value) is not _Record or value.kind != _Name(kind.__module__, kind.__name__) or value.state is None:
        raise ValueError(f"{owner}: is no {kind.__name__}")
    return value.state


def _text(value: Any, owner: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME or not value.isprintable():
        shown = ascii(value[:100]) if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{owner} has a name that is none: {shown}")
    return value


def _numbers(value: Any, what: str) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 8 or any(type(n) is not int or not 0 <= n < 2**63 for n in value):
        raise ValueError(f"{what} is no list of at most 8 numbers")
    return value


def _tensor(name: str, entry: Any, parts: Sequence[Any]) -> TensorStorageMetadata:
    state = _fields(entry, TensorStorageMetadata, name)
    dtype = _fields(state.get("properties"), TensorProperties, name)[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name}: has no dtype out of {', '.join(DTYPES)}")
    size = _numbers(state.get("size"), f"{name}: its size")
    chunks = []
    for part in parts:
        box = _fields(part, ChunkStorageMetadata, name)
        start, extent = (_numbers(box.get(key), f"{name}: the {key} of a part") for key in ("offsets", "sizes"))
        fits = len(start) == len(extent) == len(size)
        if not fits or any(s + n > whole for s, n, whole in zip(start, extent, size, strict=True)):
            raise ValueError(f"{name}: of size {list(size)}, has a part at {list(start)} of size {list(extent)}")
        chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(extent)))
    _check_cover(name, size, chunks)
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(size), chunks)


def _check_cover(name: str, size: Sequence[int], chunks: Iterable[ChunkStorageMetadata]) -> None:
    """Raise ValueError unless every element lies in just one of the parts, which all lie within `size`."""
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks if math.prod(chunk.sizes)]
    if not _apart(boxes, len(size)):
        raise ValueError(f"{name}: its parts overlap")
    lacking = math.prod(size) - sum(math.prod(extent) for _, extent in boxes)
    if lacking:
        raise ValueError(f"{name}: its parts leave out {lacking} of {math.prod(size)} elements")


Box = tuple[tuple[int, ...], tuple[int, ...]]


def _apart(boxes: list[Box], dims: int) -> bool:
    """Whether no two of the boxes share an element, told by cuts right through, along one dim after the other.

    Boxes that no few such cuts part, like bricks around a hole, are taken to overlap: no layout makes them.
    """
    groups = [boxes]
    for turn in range(2 * dims):
        dim, parted = turn % dims, []
        for group in groups:
            end = 0
            for box in sorted(group, key=lambda box: box[0][dim]):
                start, extent = box[0][dim], box[1][dim]
                if start >= end:
                    parted.append([box])
                else:
                    parted[-1].append(box)
                end = max(end, start + extent)
        groups = parted
    return all(len(group) < 2 for group in groups)


def _place(index: Any, place: Any) -> tuple[MetadataIndex, _StorageInfo]:
    """A part of a tensor, and its bytes in a file."""
    at = _fields(index, MetadataIndex, "a part")
    name = _text(at.get("fqn"), "a part")
    start = _numbers(at.get("offset"), f"{name}: the offset of a part")
    where = _fields(place, _StorageInfo, name)
    file = _text(where.get("relative_path"), f"{name}: its file")
    if file in (".", "..") or "/" in file or "\\" in file:
        raise ValueError(f"{name}: its file {file} is in another folder")
    first, length = (where.get(key) for key in ("offset", "length"))
    if type(first) is not int or type(length) is not int or not 0 <= first < 2**63 or not 0 < length < 2**63:
        raise ValueError(f"{name}: its bytes in {file} are none")
    if where.get("transform_descriptors"):
        raise ValueError(f"{name}: its bytes are encoded, which no checkpoint needs")
    return MetadataIndex(name, start), _StorageInfo(file, first, length)


def _check_places(tensors: Mapping[str, TensorStorageMetadata], storage: Mapping[MetadataIndex, _StorageInfo]) -> None:
    """Raise ValueError unless each part has enough bytes, which are no other's, and there are no others."""
    left = dict(storage)
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            place = left.pop(MetadataIndex(name, chunk.offsets), None)
            if place is None:
                raise ValueError(f"{name}: its part at {list(chunk.offsets)} lies in no file")
            least = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
            if place.length < least:
                raise ValueError(f"{name}: its part at {list(chunk.offsets)} has {place.length} of {least} bytes")
    if left:
        raise ValueError(f"{next(iter(left)).fqn}: has bytes of no part")
    last: dict[str, int] = {}
    for index, place in sorted(storage.items(), key=lambda item: item[1].offset):
        if place.offset < last.get(place.relative_path, 0):
            raise ValueError(f"{index.fqn}: its bytes in {place.relative_path} are those of another, too")
        last[place.relative_path] = place.offset + place.length
