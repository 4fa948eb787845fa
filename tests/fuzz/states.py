"""Cases of what a run has left: prepared data, checkpoints with and without sums made anew, names, links."""

import io
import json
import pickle
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fuzz import hostile
from fuzz.case import Case, group
from fuzz.folders import change_json, put_odd_file
from fuzz.world import SETTINGS, write_yaml

LAST = "out/checkpoint-2"


def reseal(folder: Path) -> None:
    """Make the sums of a checkpoint anew, as somebody does who knows how."""
    from tessera.checkpoint.folder import SUMS, read_sums, sums_of, write_sums

    names = [name for name in read_sums(folder) if (folder / name).is_file() and name != SUMS]
    write_sums(folder, sums_of(folder, names))


def refused_or_the_same(case: Case, **how: Any) -> None:
    """Continue out/: refused, or it ends as an uninterrupted run does."""
    if case.tessera("train", "more.yaml", **how).code == 0:
        case.is_the_run("out")


@group(3)
def prepared(case: Case) -> None:
    """prepared/ cut, flipped, emptied, of another run, with another manifest."""
    case.kind, folder = 5, case.here / "out/prepared"
    file, form = case.pick(*sorted((folder / "train").iterdir())), case.cycle(*range(8))
    content = file.read_bytes()
    if form == 0:
        at = case.dice.randrange(min(130, len(content) - 1), len(content))  # beyond the header of an array
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << case.dice.randrange(8)]) + content[at + 1 :])
    elif form == 1:
        file.write_bytes(content[: case.dice.randrange(len(content))])
    elif form == 2:
        put_odd_file(case, case.pick(file, folder / "manifest.json"))
    elif form == 3:
        file = case.pick(*sorted((folder / "train").glob("*.npy")))
        array = np.load(file)
        odd = case.pick(
            array.astype(np.float32),
            array[:3],
            array[::-1],
            array * 0,
            array * 0 + 10**6,
            array.reshape(-1, 1),
            np.array([None] * 3),
            -array,
        )
        np.save(file, odd, allow_pickle=True)
    elif form == 4:
        keys = list(json.loads((folder / "manifest.json").read_text()))
        key, odd = case.pick(*keys), hostile.value(case.dice)
        case.what = f"manifest {key}: {odd!r:.30} "
        if key != "key":
            change_json(folder / "manifest.json", lambda manifest: manifest.update({key: odd}))
    elif form == 5:
        (folder / "manifest.json").write_bytes(hostile.json_text(case.dice))
    elif form == 6:
        shutil.rmtree(folder / "train")
    else:
        file.write_bytes(hostile.garbled(content, case.dice))
    case.what += f"{file.name}, form {form}"
    if case.dice.random() < 0.6:
        refused_or_the_same(case)
    else:
        write_yaml(case.here / "more.yaml", SETTINGS | {"output_dir": "./out", "auto_resume_from_checkpoints": False})
        refused_or_the_same(case)


@group(2)
def damaged(case: Case) -> None:
    """A file of a checkpoint altered, its sums left as they are."""
    case.kind, form = 7, case.dice.randrange(3)
    file = case.pick(*sorted((case.here / LAST).iterdir()))
    case.what = f"{file.name}, form {form}: "
    if form == 0:
        file.write_bytes(hostile.garbled(file.read_bytes(), case.dice))
    elif form == 1:
        put_odd_file(case, file)
    else:
        shutil.copyfile(case.here / "out/checkpoint-1" / file.name, file)
    write_yaml(
        case.here / "more.yaml",
        SETTINGS | {"output_dir": "./out", **case.pick({}, {"resume_from_checkpoint": f"./{LAST}"})},
    )
    if case.dice.random() < 0.7:
        refused_or_the_same(case)
    else:
        case.outputs.add("target")
        case.tessera("convert", LAST, "target")


@group(4)
def sealed_state(case: Case) -> None:
    """state.json with other values, the sums made anew."""
    case.kind, file = 7, case.here / LAST / "state.json"
    content = json.loads(file.read_text())
    place = case.pick(content, content, content["source"], content["course"], content["config"])
    key, form = case.pick(*place, "new"), case.cycle(*range(5))
    if form == 0:
        place.pop(key, None)
    elif form == 1:
        place[key] = hostile.value(case.dice)
    elif form == 2:
        key, number = (
            case.pick("step", "tokens", "samples", "skipped", "seed", "format"),
            case.dice.choice(hostile.SIZES),
        )
        content[key] = number
    elif form == 3:
        content["source"]["config_changes"] = case.pick(
            {"vocab_size": 10**9}, {"": hostile.value(case.dice)}, {"hidden_size": "x"}
        )
    case.what = f"{key}, form {form}"
    text = json.dumps(content).encode() if form != 4 else hostile.json_text(case.dice)
    file.write_bytes(text)
    reseal(case.here / LAST)
    case.outputs.add("target")
    write_yaml(case.here / "more.yaml", SETTINGS | {"output_dir": "./out", "max_steps": 4})
    case.tessera(*case.pick(["train", "more.yaml"], ["train", "more.yaml"], ["convert", LAST, "target"]))


@group(4)
def sealed_metadata(case: Case) -> None:
    """.metadata that leaves parts of a tensor out, says them twice, elsewhere or of another type; sums made anew."""
    case.kind, file = 7, case.here / LAST / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    names, form = (
        [n for n, entry in metadata.state_dict_metadata.items() if len(getattr(entry, "chunks", [])) > 0],
        case.cycle(*range(12)),
    )
    name = case.pick(*names)
    entry = metadata.state_dict_metadata[name]
    index = next(i for i in metadata.storage_data if i.fqn == name)
    stored = metadata.storage_data[index]
    chunk = entry.chunks[0]
    import torch

    if form == 0:
        entry.chunks = []
    elif form == 1 and chunk.sizes:
        chunk.sizes = torch.Size([max(0, chunk.sizes[0] - 1), *chunk.sizes[1:]])
    elif form == 2:
        entry.chunks = entry.chunks * 2
    elif form == 3 and chunk.sizes:
        chunk.offsets = torch.Size([case.pick(1, 10**9, 2**62), *chunk.offsets[1:]])
    elif form == 4:
        del metadata.storage_data[index]
    elif form == 5:
        object.__setattr__(stored, case.pick("offset", "length"), case.pick(-1, 0, 1, 10**6, 10**18, 10**40, None, "x"))
    elif form == 6:
        object.__setattr__(
            stored,
            "relative_path",
            case.pick("", "..", "../checkpoint-1/__0_0.distcp", "/dev/zero", "state.json", "\0", None, 3),
        )
    elif form == 7:
        entry.size = case.pick(torch.Size([]), torch.Size([10**9, 10**9]), torch.Size([1]), [1, 2], None, "x")
    elif form == 8:
        other = case.pick(*names)
        states = metadata.state_dict_metadata
        states[name], states[other] = states[other], states[name]
    elif form == 9:
        entry.properties.dtype = case.pick(torch.int8, torch.bfloat16, torch.float64, None, "float32")
    elif form == 10:
        setattr(
            metadata,
            case.pick("state_dict_metadata", "storage_data", "planner_data", "storage_meta"),
            case.pick(None, {}, [], 3, {1: 2}, {"x": None}),
        )
    else:
        del metadata.state_dict_metadata[case.pick(*metadata.state_dict_metadata)]
    case.what = f"{name}, form {form}"
    file.write_bytes(pickle.dumps(metadata))
    reseal(case.here / LAST)
    if case.dice.random() < 0.75:
        refused_or_the_same(case)
        return
    case.outputs.add("target")
    case.tessera("convert", LAST, "target", "--config", "model")


PLANT = "planted_by_a_checkpoint"


def _build(module: str, name: str, state: object) -> bytes:
    """A pickle that sets `state` on something it names, as a class's own or as its slots."""
    text = io.BytesIO()
    text.write(b"\x80\x02c" + f"{module}\n{name}\n".encode())
    text.write(pickle.dumps(state, protocol=2)[2:-1] + b"b.")
    return text.getvalue()


@group(3)
def pickles(case: Case) -> None:
    """Pickles that set, call, repeat or name what no checkpoint needs; sums made anew."""
    case.kind, file = 10, case.here / LAST / ".metadata"
    meta = "torch.distributed.checkpoint.metadata"
    classes = [
        (meta, "Metadata"), (meta, "TensorProperties"), (meta, "MetadataIndex"), ("torch", "Size"),
        ("torch", "float32"), ("pathlib", "PosixPath"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"), (meta, "_MEM_FORMAT_ENCODING"),
    ]  # fmt: skip
    module, name = case.pick(*classes)
    whole = file.read_bytes()
    forms: dict[str, Callable[[], bytes]] = {
        "slots": lambda: _build(module, name, (None, {PLANT: 1})),
        "slots of a method": lambda: _build(module, name, (None, {"__init__": 1})),
        "state": lambda: _build(module, name, {PLANT: 1}),
        "slots, then the rest": lambda: _build(module, name, (None, {PLANT: 1}))[:-1] + b"0" + whole[2:],
        "a call": lambda: b"\x80\x02c" + f"{module}\n{name}\n(I1\nI2\nI3\ntR.".encode(),
        "a large call": lambda: b"\x80\x02ctorch\nSize\n((I9999999999999\ntltR.",
        "a foreign name": lambda: b"cos\nsystem\n(S'true'\ntR.",
        "a dotted name": lambda: b"\x80\x04\x8c\x05torch\x8c\x0bSize.__eq__\x93.",
        "long bytes": lambda: b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.",
        "a frame": lambda: b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
        "memo": lambda: b"\x80\x02r\xff\xff\xff\x7fN.",
        "nesting": lambda: b"(" * 100_000 + b"N" + b"t" * 100_000 + b".",
        "a number": lambda: b"I" + b"9" * 5000 + b"\n.",
        "persistent": lambda: b"\x80\x02Pabc\n.",
        "extension": lambda: b"\x80\x02\x82\x01.",
        "cut": lambda: whole[: case.dice.randrange(len(whole))],
        "garbled": lambda: hostile.garbled(whole, case.dice),
        "an opcode": lambda: _with_opcode(whole, case),
        "something else": lambda: pickle.dumps(hostile.value(case.dice)),
    }
    form = case.cycle(*forms)
    case.what = f"{form}, {module}.{name}"
    file.write_bytes(forms[form]())
    reseal(case.here / LAST)
    seen = case.call(lambda: _read_and_look(case.here / LAST, module, name), "read_state", codes=(0, 2, 3))
    if seen.code == 3:
        case.wrong(f"the pickle has set an attribute of {module}.{name}")
    if case.dice.random() < 0.3:
        case.tessera("train", "more.yaml")


def _with_opcode(whole: bytes, case: Case) -> bytes:
    places = [place for _, _, place in pickletools.genops(whole) if place is not None]
    at = case.pick(*places)
    return (
        whole[:at]
        + case.pick(b"0", b"1", b"2", b"N", b"}", b"b", b"R", b"\x81", b"s", b"u", b"e", b"a", b"Q", b"\x93")
        + whole[at:]
    )


def _read_and_look(folder: Path, module: str, name: str) -> None:
    import importlib
    import sys

    from tessera.checkpoint.folder import read_state
    from tessera.core.errors import UserError

    named = getattr(importlib.import_module(module), name)
    init, refusal = getattr(named, "__init__", None), None
    try:
        read_state(folder)
    except UserError as error:
        refusal = error
    if hasattr(named, PLANT) or (isinstance(named, type) and named.__init__ is not init):
        print("planted", file=sys.stderr)
        raise SystemExit(3)
    if refusal is not None:
        print(refusal, file=sys.stderr)
        raise SystemExit(2)


@group(2)
def around_checkpoints(case: Case) -> None:
    """LATEST, and names that look like checkpoints."""
    case.kind, out = 6, case.here / "out"
    form = case.pick("latest", "latest", "odd", "names", "resume")
    settings = SETTINGS | {"output_dir": "./out"}
    if form == "latest":
        said = case.pick(
            b"",
            b"checkpoint-9\n",
            b"\xff\xfe",
            b"..\n",
            b"/\n",
            b"checkpoint-1",
            b"\0",
            b"a" * 100_000,
            b"checkpoint-2\n" * 3,
        )
        (out / "LATEST").write_bytes(said)
        case.what = f"LATEST {said[:20]!r}"
    elif form == "odd":
        put_odd_file(case, out / "LATEST")
    elif form == "names":
        name = case.pick(
            "checkpoint-999999", "checkpoint-", "checkpoint--1", "checkpoint-²", "checkpoint-03", "checkpoint-3.part"
        )
        case.what = name
        if case.dice.random() < 0.5:
            shutil.copytree(out / "checkpoint-1", out / name)
        else:
            (out / name).mkdir()
    else:
        odd = case.pick(
            *hostile.TEXTS, "./out", "./model", "./out/prepared", "./out/checkpoint-7", "./out/checkpoint-1/state.json"
        )
        settings["resume_from_checkpoint"] = odd
        case.what = f"resume_from_checkpoint: {odd!r:.40}"
    write_yaml(case.here / "more.yaml", settings)
    refused_or_the_same(case) if form != "names" else case.tessera("train", "more.yaml")
