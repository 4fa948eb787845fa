"""`.metadata` as somebody may have written it on purpose: every opcode, bombs, and tensors whose parts do not fit."""

import pickle
import pickletools
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from tessera.checkpoint.metadata import load_data, metadata_of

NAME = "model/layers.0.weight"
FLOAT = TensorProperties(torch.float32)
ADMITTED = {
    "PROTO", "FRAME", "STOP", "MEMOIZE", "BINGET", "LONG_BINGET", "MARK", "STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD",
    "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "NONE", "NEWTRUE", "NEWFALSE",
    "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM",
    "SETITEMS",
}  # fmt: skip


def metadata(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], size=(4, 6), **changes: Any) -> Metadata:
    """That of one tensor in these parts, each with its bytes in a file of its own, as torch makes it."""
    chunks = [ChunkStorageMetadata(torch.Size(start), torch.Size(extent)) for start, extent in boxes]
    entry = TensorStorageMetadata(FLOAT, torch.Size(size), chunks)
    places = {MetadataIndex(NAME, c.offsets, i): _StorageInfo(f"__{i}_0.distcp", 0, 500) for i, c in enumerate(chunks)}
    whole = Metadata(
        {NAME: entry}, {NAME: (NAME,)}, places, StorageMeta("run/.checkpoint-3.part", "1"), version="1.0.0"
    )
    vars(whole).update(changes)
    return whole


HALVES = [((0, 0), (2, 6)), ((2, 0), (2, 6))]
GRID = [((r, c), (2, n)) for r in (0, 2) for c, n in ((0, 4), (4, 1), (5, 1))]


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize(
    ("boxes", "size"),
    [(HALVES, (4, 6)), (GRID, (4, 6)), (GRID[::-1], (4, 6)), ([((), ())], ()), ([((0,), (3,)), ((3,), (0,))], (3,))],
)
def test_what_torch_writes_is_read_as_torch_reads_it(boxes, size, protocol):
    whole = metadata(boxes, size)
    found = metadata_of(pickle.dumps(whole, protocol))
    assert found.state_dict_metadata == whole.state_dict_metadata
    assert found.storage_data == whole.storage_data
    assert found.planner_data is None


def test_bricks_in_rows_of_their_own_are_apart():
    """Rows cut in different places, as tensors of slices are: no cut goes through from top to bottom."""
    metadata_of(pickle.dumps(metadata([((0, 0), (2, 5)), ((0, 5), (2, 1)), ((2, 0), (2, 1)), ((2, 1), (2, 5))])))


# ---- Tensors whose parts do not fit


def changed(change: Callable[[Metadata], Any]) -> bytes:
    whole = metadata(HALVES)
    change(whole)
    return pickle.dumps(whole, 4)


def entry_of(whole: Metadata) -> Any:
    return whole.state_dict_metadata[NAME]


def place_of(whole: Metadata, number: int) -> _StorageInfo:
    return list(whole.storage_data.values())[number]


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        (HALVES[:1], "its parts leave out 12 of 24 elements"),
        ([], "its parts leave out 24 of 24 elements"),
        ([*HALVES, ((1, 3), (1, 1))], "its parts overlap"),
        ([((0, 0), (4, 6)), ((4, 0), (0, 6)), ((3, 5), (1, 1))], "its parts overlap"),
        ([((0, 0), (3, 6)), ((2, 0), (1, 6))], "its parts overlap"),  # as many elements as there are
        ([((0, 0), (4, 7))], r"of size \[4, 6\], has a part at \[0, 0\] of size \[4, 7\]"),
        ([((0, 0), (4, 6)), ((9, 0), (1, 1))], r"has a part at \[9, 0\]"),
        ([((0,), (24,))], r"has a part at \[0\] of size \[24\]"),
        ([((0, 0), (1, 4)), ((0, 4), (3, 2)), ((1, 0), (3, 2)), ((3, 2), (1, 4)), ((1, 2), (2, 2))], "overlap"),
    ],
)
def test_parts_must_cover_a_tensor_once(boxes, told):
    with pytest.raises(ValueError, match=f"^{NAME}: .*{told}"):
        metadata_of(pickle.dumps(metadata(boxes), 4))


def set_to(of: Callable[[Metadata], Any], **fields: Any) -> Callable[[Metadata], None]:
    return lambda whole: vars(of(whole)).update(fields)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (set_to(entry_of, properties=TensorProperties(torch.int64)), "torch.int64, which no checkpoint needs"),
        (set_to(entry_of, properties=None), f"{NAME}: is no TensorProperties"),
        (set_to(entry_of, size=torch.Size((4, 5))), f"{NAME}: of size"),
        (set_to(entry_of, size=(4, -6)), f"{NAME}: its size is no list"),
        (set_to(entry_of, size=[4, 6]), f"{NAME}: its size is no list"),
        (set_to(entry_of, size=(4, 6.0)), "BINFLOAT"),
        (set_to(entry_of, size=(2**64, 6)), "63 bits"),
        (set_to(entry_of, size=(4, True)), f"{NAME}: its size is no list"),
        (set_to(entry_of, chunks={}), f"{NAME}: "),
        (set_to(entry_of, chunks=[3]), f"{NAME}: "),
        (set_to(lambda m: entry_of(m).chunks[1], sizes=None), f"{NAME}: the sizes of a part"),
        (lambda m: m.state_dict_metadata.update({NAME: None}), f"{NAME}: is no TensorStorageMetadata"),
        (lambda m: m.state_dict_metadata.update({NAME: BytesStorageMetadata()}), "BytesStorageMetadata, which no"),
        (lambda m: m.state_dict_metadata.update({"a\x1b[2J": entry_of(m)}), r"a name that is none: 'a\\x1b\[2J'"),
        (lambda m: m.state_dict_metadata.update({"a" * 2000: entry_of(m)}), "a name that is none: 'aaa"),
        (lambda m: m.state_dict_metadata.update({7: entry_of(m)}), "a key that is int"),
        (lambda m: m.state_dict_metadata.update({"other": entry_of(m)}), "other: has 2 parts, of which 0"),
        (lambda m: m.state_dict_metadata.clear(), f"{NAME}: has bytes of no part"),
        (lambda m: m.storage_data.popitem(), f"{NAME}: has 2 parts, of which 1"),
        (set_to(lambda m: m, storage_data=None), "holds no tensors"),
        (set_to(lambda m: m, state_dict_metadata=[]), "holds no tensors"),
        (set_to(lambda m: m, extra=3), "sets fields that Metadata does not have"),
        (set_to(lambda m: place_of(m, 0), offset=-1), f"{NAME}: its bytes in __0_0.distcp are none"),
        (set_to(lambda m: place_of(m, 0), length="9"), f"{NAME}: its bytes in __0_0.distcp are none"),
        (set_to(lambda m: place_of(m, 0), length=47), f"{NAME}: .* has 47 of 48 bytes"),
        (set_to(lambda m: place_of(m, 0), relative_path="../x"), "is in another folder"),
        (set_to(lambda m: place_of(m, 0), relative_path="/etc/passwd"), "is in another folder"),
        (set_to(lambda m: place_of(m, 0), relative_path=".."), "is in another folder"),
        (set_to(lambda m: place_of(m, 0), relative_path="a\0b"), "a name that is none"),
        (set_to(lambda m: place_of(m, 0), relative_path=None), "a name that is none: NoneType"),
        (set_to(lambda m: place_of(m, 1), relative_path="__0_0.distcp", offset=499), "those of another, too"),
        (set_to(lambda m: place_of(m, 1), transform_descriptors=["zstd"]), "encoded"),
        (set_to(lambda m: list(m.storage_data)[0], offset=torch.Size((1, 0))), "part at .* lies in no file"),
        (set_to(lambda m: list(m.storage_data)[0], fqn=None), "a name that is none: NoneType"),
    ],
)  # fmt: skip
def test_fields_must_be_those_of_tensors(change, told):
    with pytest.raises(ValueError, match=told):
        metadata_of(changed(change))


# ---- The pickle


def argument(opcode: pickletools.OpcodeInfo) -> bytes:
    """Some valid argument of an opcode."""
    if opcode.arg is None:
        return b""
    lines = {"stringnl": b"'1'\n", "stringnl_noescape_pair": b"os\nsystem\n"}
    lengths = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4}
    lengths |= {pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
    if opcode.arg.n == pickletools.UP_TO_NEWLINE:
        return lines.get(opcode.arg.name, b"1\n")
    return bytes(lengths.get(opcode.arg.n, opcode.arg.n))


@pytest.mark.parametrize("opcode", pickletools.opcodes, ids=lambda opcode: opcode.name)
def test_opcodes_that_no_checkpoint_needs_are_refused_by_name(opcode):
    content = b"\x80\x04N" + opcode.code.encode("latin1") + argument(opcode) + b"."
    if opcode.name in ADMITTED:  # known, whatever it then finds on the stack
        try:
            load_data(content)
        except (ValueError, LookupError) as error:
            assert "has the opcode" not in str(error)
    else:
        with pytest.raises(ValueError, match=f"^has the opcode {opcode.name}, which no checkpoint needs$"):
            load_data(content)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


STORAGE = named("torch.distributed.checkpoint.metadata", "StorageMeta")
PROPERTIES = named("torch.distributed.checkpoint.metadata", "TensorProperties")
SLOTS = b"N}" + text("load_id") + b"Ns\x86"  # (None, {"load_id": None}): what pickle sets by setattr


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (STORAGE + b")\x81" + SLOTS + b"b", "sets fields that StorageMeta does not have"),
        (STORAGE + SLOTS + b"b", "sets fields of what has none"),  # of the class itself
        (PROPERTIES + b")\x81" + SLOTS + b"b", "sets fields that TensorProperties does not have"),
        (STORAGE + b")\x81}" + text("__class__") + b"Nsb", "sets fields that StorageMeta does not have"),
        (STORAGE + b")\x81}b}b", "sets fields of what has none"),  # a second time
        (b"]}b", "sets fields of what has none"),
        (STORAGE + b")R", "calls what no checkpoint needs"),
        (STORAGE + b"N\x85\x81", "makes an object that no checkpoint needs"),
        (named("torch", "Size") + b")\x81", "makes an object that no checkpoint needs"),
        (named("torch", "Size") + b"]\x85R", "calls Size with something else than a tuple"),
        (named("torch", "Size") + b"))\x86R", "calls Size with something else than a tuple"),
        (named("torch.serialization", "_get_layout") + b")\x85R", "calls _get_layout with something else"),
        (named("os", "system") + text("true") + b"\x85R", "names os.system"),
        (named("builtins", "getattr"), "names builtins.getattr"),
        (named("torch", "load"), "names torch.load"),
        (named("torch.distributed.checkpoint.metadata", "torch.load"), "names torch.dist"),
        (named("antigravity", "x\x1b[2J"), r"names 'antigravity.x\\x1b"),
        (b"NN\x93", "names something without a name"),
        (b"}" + b"))s", "a key that is tuple"),
        (b"}K\x01a", "appends to what is no list"),
        (b"]K\x01K\x01s", "sets items of what is no dict"),
        (b"}(K\x01u", "sets items of what is no dict"),
        (b"}" + text("a") + b"Ns" + text("a") + b"Ns", "a key twice"),
        (b"\x80\x04N", "protocol 4"),  # in the middle
        (b"NN", "does not end with its one value"),
        (b"(N", "does not end with its one value"),
        (b"N.N", "does not end with its one value"),
        (b"", "does not end"),
        (b"\x95" + struct.pack("<Q", 2**62) + b"N", "a frame that goes beyond its end"),
        (b"X\xff\xff\xff\xffabc", "expected 4294967295 bytes"),
        (b"\x8a\xff" + b"\x7f" * 255, "more than 63 bits"),
        (b"h\x07", "out of range"),
        (b"j\xff\xff\xff\xff", "out of range"),
        (b"\x94", "out of range"),
        (b"\x93", "pop from empty list"),
        (b"u", "pop from empty list"),
        (b"\x86", "takes more than there is"),
    ],
)  # fmt: skip
def test_what_the_admitted_opcodes_may_not_do(body, told):
    with pytest.raises((ValueError, LookupError), match=told):
        load_data(b"\x80\x04" + body + b".")


DEEP = b")" + b"\x85" * 200_000
DOUBLED = b")" + b"\x94h\x00\x86"  # of what each further level holds twice
LAUGHS = b")" + b"".join(b"\x94" + b"j" + struct.pack("<I", n) + b"\x86" for n in range(300))
TOP = named("torch.distributed.checkpoint.metadata", "Metadata") + b")\x81}("


@pytest.mark.parametrize(
    "body",
    [
        DEEP,
        LAUGHS,
        b"}" + LAUGHS + b"Ns",  # as a key, whose hash would take for ever
        b"](" + b"]" * 200_000 + b"e",
        b"(" * 200_000,
        b"]\x94h\x00a",  # a list that holds itself
        TOP + text("version") + LAUGHS + text("state_dict_metadata") + b"}" + text("storage_data") + b"}ub",
        TOP + text("state_dict_metadata") + LAUGHS + text("storage_data") + LAUGHS + b"ub",
        TOP + text("state_dict_metadata") + b"}" + text("a") + LAUGHS + b"s" + text("storage_data") + b"}ub",
        named("torch", "Size") + LAUGHS + b"\x85R",
        text("a" * 5_000_000),
    ],
)
def test_bombs_are_refused_within_a_second(body):
    begun = time.process_time()
    try:
        found = metadata_of(b"\x80\x04" + body + b".")
        told = f"read: {found.state_dict_metadata}"
    except (ValueError, LookupError) as error:
        told = str(error)
    assert len(told) < 500 and time.process_time() - begun < 1


def test_one_list_of_many_parts_for_many_tensors_is_refused_before_it_is_read():
    whole = metadata([((row, 0), (1, 1)) for row in range(5_000)], (5_000, 1))
    tensors = {f"model/{n}": entry_of(whole) for n in range(5_000)}
    content = pickle.dumps(Metadata(tensors, None, whole.storage_data), 4)
    begun = time.process_time()
    with pytest.raises(ValueError, match="model/0: has 5000 parts, of which 0"):
        metadata_of(content)
    assert time.process_time() - begun < 2
