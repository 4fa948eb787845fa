"""A checkpoint's folder and what lies beside it: links, leftovers that cannot be removed, files that are none."""

import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from tessera.checkpoint import folder as folders
from tessera.checkpoint.folder import discard_parts, latest, read_state, read_sums, rotate, set_aside, verify
from tessera.checkpoint.reader import Reader, read_into
from tessera.checkpoint.saver import Saver, Writer
from tessera.checkpoint.state import RunState, Source
from tessera.checkpoint.tensors import alone_is_fine
from tessera.core.errors import UserError

WEIGHT = torch.arange(24.0).reshape(4, 6)


def save(output: Path, step: int, keep: int | None = None, tensors: dict[str, Tensor] | None = None) -> list[str]:
    """Save a checkpoint of one tensor; what the run would say."""
    state = RunState(step, 10 * step, step, 0, Source("/nowhere"), config={"of": step})
    writer = Writer(output / f"checkpoint-{step}", state, keep)
    with alone_is_fine():
        dcp.save(tensors or {"model/w": WEIGHT + step}, storage_writer=writer, no_dist=True)
    return writer.problems


def read(folder: Path) -> Tensor:
    found = torch.empty(4, 6)
    read_state(folder)
    verify(folder)
    with alone_is_fine():
        read_into(Reader(folder), {"model/w": found})
    return found


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with checkpoints 2, 4 and 6."""
    output = tmp_path_factory.mktemp("saved") / "run"
    for step in (2, 4, 6):
        assert save(output, step) == []
    return output


@pytest.fixture
def output(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def linked(checkpoint: Path, elsewhere: Path) -> Path:
    """Move a checkpoint to another place and link it back; where it then is."""
    elsewhere.mkdir()
    moved = Path(shutil.move(checkpoint, elsewhere))
    checkpoint.symlink_to(moved)
    return moved


# ---- Links


def test_a_linked_checkpoint_is_unlinked_by_the_rotation_and_stays_where_it_is(output, tmp_path):
    moved = linked(output / "checkpoint-2", tmp_path / "disk2")
    assert save(output, 8, keep=2) == []
    assert names(output) == ["LATEST", "checkpoint-6", "checkpoint-8"]
    assert torch.equal(read(moved), WEIGHT + 2)


def test_a_linked_checkpoint_is_replaced_by_a_save_of_its_step_and_not_written_through(output, tmp_path):
    moved = linked(output / "checkpoint-6", tmp_path / "disk2")
    assert save(output, 6, tensors={"model/w": WEIGHT}) == []
    assert not (output / "checkpoint-6").is_symlink() and torch.equal(read(output / "checkpoint-6"), WEIGHT)
    assert torch.equal(read(moved), WEIGHT + 6)


@pytest.mark.parametrize("given", ["its name", "where it lies", "a copy"])
def test_a_run_goes_on_from_a_linked_checkpoint_by_whatever_name(output, tmp_path, given):
    moved = linked(output / "checkpoint-4", tmp_path / "disk2")
    copy = shutil.copytree(moved, tmp_path / "copied")
    resume = {"its name": output / "checkpoint-4", "where it lies": moved, "a copy": copy}[given]
    lines = set_aside(output, resume, 4)
    assert lines == [f"a checkpoint that this run does not continue is now {output}/abandoned-checkpoint-6"]
    assert names(output) == ["abandoned-checkpoint-6", "checkpoint-2", "checkpoint-4"]
    assert latest(output) == output / "checkpoint-4"


def test_a_checkpoint_of_another_run_is_not_gone_on_from(output, tmp_path):
    save(tmp_path / "other", 4)
    state = tmp_path / "other/checkpoint-4/state.json"
    state.write_text(state.read_text().replace('"of": 4', '"of": 5'))
    reseal(state.parent)
    set_aside(output, state.parent, 4)
    assert names(output) == [f"abandoned-checkpoint-{step}" for step in (2, 4, 6)]


def test_a_checkpoint_that_cannot_be_renamed_is_said(output, monkeypatch):
    refuse(monkeypatch, "rename", output / "checkpoint-4")
    lines = set_aside(output, None, 0)
    assert lines[1] == f"{output}/checkpoint-4, which this run does not continue, cannot be renamed: permission denied"
    assert names(output) == ["abandoned-checkpoint-2", "abandoned-checkpoint-6", "checkpoint-4"]


# ---- What cannot be removed


def refuse(monkeypatch: pytest.MonkeyPatch, kind: str, path: Path) -> None:
    """Let the system refuse to unlink or rename this path, as one that is immutable."""
    owner, name = {"unlink": (Path, "unlink"), "rename": (Path, "rename"), "rmtree": (shutil, "rmtree")}[kind]
    real: Callable[..., Any] = getattr(owner, name)

    def call(target: Path, *arguments: Any, **options: Any) -> Any:
        if Path(target).name == path.name:
            raise PermissionError(1, "Operation not permitted", str(target))
        return real(target, *arguments, **options)

    monkeypatch.setattr(owner, name, call)


LEFT = {
    "file": lambda path, other: path.write_text("x"),
    "folder": lambda path, other: (path / "in").mkdir(parents=True),
    "link to a folder": lambda path, other: path.symlink_to(other),
    "link to nowhere": lambda path, other: path.symlink_to("/no/such/place"),
    "pipe": lambda path, other: os.mkfifo(path),
}


@pytest.mark.parametrize("kind", LEFT)
@pytest.mark.parametrize("name", [".checkpoint-8.part", ".checkpoint-2.removed.part", ".LATEST.part"])
def test_whatever_lies_where_a_save_writes_goes(output, tmp_path, kind, name):
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("mine")
    LEFT[kind](output / name, other)
    assert save(output, 8, keep=1) == []
    assert names(output) == ["LATEST", "checkpoint-8"] and latest(output) == output / "checkpoint-8"
    assert torch.equal(read(output / "checkpoint-8"), WEIGHT + 8)
    assert (other / "kept").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder", "link to a folder"])
@pytest.mark.parametrize("name", [".checkpoint-8.part", ".checkpoint-8.replaced.part", ".LATEST.part"])
def test_what_cannot_be_removed_is_told_and_written_beside(output, tmp_path, monkeypatch, kind, name):
    LEFT[kind](output / name, tmp_path)
    refuse(monkeypatch, "rmtree" if kind == "folder" else "unlink", output / name)
    for _ in range(2):
        told = [f"{output}/{name} is left over from an earlier save and cannot be removed: permission denied"]
        assert save(output, 8) == told
    assert names(output) == [name, "LATEST", *(f"checkpoint-{step}" for step in (2, 4, 6, 8))]
    assert torch.equal(read(output / "checkpoint-8"), WEIGHT + 8)


def test_what_stays_in_the_way_is_said_once_in_a_run(output):
    said: list[str] = []
    saver = Saver(output, None, asynchronous=False, timeout=timedelta(minutes=1), say=said.append)
    for step, problems in ((8, ["a"]), (10, ["a", "b"]), (12, ["b"])):
        writer = Writer(output / f"checkpoint-{step}", RunState(1, 1, 1, 0, Source("/x")), None)
        writer.problems += problems
        saver._settle(writer, None)
    assert said == ["a", "b"] and saver.failure is None


@pytest.mark.parametrize("how", ["rename", "rmtree"])
def test_an_old_checkpoint_that_cannot_be_removed_stays_and_the_others_go(output, monkeypatch, how):
    refused = output / ("checkpoint-2" if how == "rename" else ".checkpoint-2.removed.part")
    refuse(monkeypatch, how, refused)
    told = [f"{output}/checkpoint-2 could not be removed: permission denied"]
    assert save(output, 8, keep=2) == told
    assert names(output) == ["LATEST", "checkpoint-2", "checkpoint-6", "checkpoint-8"]
    assert rotate(output, output / "checkpoint-8", 1) == told
    assert names(output) == ["LATEST", "checkpoint-2", "checkpoint-8"]
    read(output / "checkpoint-2")


def test_a_folder_called_latest_is_moved_away(output):
    (output / "LATEST").unlink()
    (output / "LATEST/mine").mkdir(parents=True)
    assert latest(output) == output / "checkpoint-6"
    assert save(output, 8) == []
    assert (output / "LATEST").read_text() == "checkpoint-8\n" and (output / "abandoned-LATEST/mine").is_dir()


def test_a_latest_that_cannot_be_replaced_is_told_and_the_checkpoint_is_whole(output, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    told = f"{output}/LATEST could not be replaced: permission denied; it does not name checkpoint-8"
    assert save(output, 8) == [told]
    assert discard_parts(output) == [] and torch.equal(read(output / "checkpoint-8"), WEIGHT + 8)


# ---- Files that are none, or say what cannot be


def reseal(folder: Path) -> None:
    """As somebody would who changes a checkpoint on purpose: sums that fit what lies there."""
    files = [path.name for path in folder.iterdir() if path.name != "SHA256SUMS" and path.is_file()]
    folders.write_sums(folder, folders.sums_of(folder, files))


@pytest.mark.parametrize("content", [b"a\0b", b"/etc", b"../run/checkpoint-2", b"checkpoint-2/..", b"x" * 10**6, None])
def test_a_latest_that_names_no_checkpoint_counts_for_nothing(output, content):
    (output / "LATEST").unlink()
    if content is None:
        os.mkfifo(output / "LATEST")  # would wait for ever
    else:
        (output / "LATEST").write_bytes(content)
    assert latest(output) == output / "checkpoint-6"


@pytest.mark.parametrize("name", [".metadata", "state.json", "SHA256SUMS", "__0_0.distcp"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a folder", "link to nowhere"])
def test_a_file_that_is_none_is_refused_and_named(output, tmp_path, name, kind):
    file = output / "checkpoint-6" / name
    file.unlink()
    LEFT[kind](file, tmp_path)
    with pytest.raises(UserError, match=f"is not a whole checkpoint: {name}: ") as refused:
        read(file.parent)
    assert refused.value.hint == "others there: checkpoint-2, checkpoint-4"
    assert latest(output) == output / ("checkpoint-6" if name in ("SHA256SUMS", "__0_0.distcp") else "checkpoint-4")


@pytest.mark.parametrize(
    "line", ["00  state.json", f"{'0' * 64}  ../state.json", f"{'0' * 64}  a\0", f"{'0' * 64} b", f"{'0' * 64}  ..", ""]
)
def test_sums_of_odd_names_are_refused(output, line):
    import hashlib

    lines = line + "\n"
    head = f"# {hashlib.sha256(lines.encode()).hexdigest()}  the lines below\n"
    (output / "checkpoint-6/SHA256SUMS").write_text(head + lines)
    with pytest.raises(UserError, match="SHA256SUMS has a line that is no sum of a file beside it"):
        read_sums(output / "checkpoint-6")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"step": -1}, "step: "),
        ({"step": 2**60}, "step: "),
        ({"step": 6.0}, "step: "),
        ({"step": "6"}, "step: "),
        ({"step": True}, "step: "),
        ({"samples": -6}, "samples: "),
        ({"samples": 0}, "0 samples and 60 tokens after 6 steps"),
        ({"step": 0}, "6 samples and 60 tokens after 0 steps"),
        ({"samples": 2**40}, "1099511627776 samples and 60 tokens after 6 steps"),
        ({"skipped": 7}, "7 steps skipped, of 6"),
        ({"seed": -1}, "seed: "),
        ({"course": []}, "course: "),
        ({"config": None}, "config: "),
        ({"optimizer": "yes"}, "optimizer: "),
        ({"source": {"folder": "a\0b"}}, "source.folder: "),
        ({"source": {"folder": "x" * 5000}}, "source.folder: "),
        ({"source": {"folder": ""}}, "source.folder: "),
        ({"source": {"folder": 3}}, "source.folder: "),
        ({"source": {"folder": "/x", "tokenizer": "a\0b"}}, "source.tokenizer: "),
        ({"source": {"folder": "/x", "config_changes": {"auto_map": "evil"}}}, "source.config_changes: .*auto_map"),
        ({"source": {"folder": "/x", "config_changes": {"eos_token_id": -5}}}, "source.config_changes: "),
        ({"source": {"folder": "/x", "config_changes": {"eos_token_id": [1, "2"]}}}, "source.config_changes: "),
        ({"format": None}, ""),
        ({"format": {"a": "b" * 1000}}, ""),
        ({"unknown": 1}, "unknown: "),
        ({"order": 3}, "order: "),
        ({"order": True}, "order: "),
        ({"unit": "token"}, "unit: "),
        ({"unit": "row", "order": 1}, "rows of packed samples in order 1"),
    ],
)
def test_a_state_that_no_run_leaves_is_refused(output, change, told):
    file = output / "checkpoint-6/state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    reseal(file.parent)
    with pytest.raises(
        UserError, match=f"state.json: {told}" if told else "has format .*, this version reads 2 and 3"
    ) as error:
        read_state(file.parent)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "content", ["[" * 200_000, "", "{", "3", "[]", "\xff", '{"format": 2, "step": ' + "9" * 5000 + "}", '"\\ud800"']
)
def test_a_state_that_is_no_json_is_refused(output, content):
    file = output / "checkpoint-6/state.json"
    file.write_bytes(content.encode("latin1"))
    reseal(file.parent)
    with pytest.raises(UserError, match="is not a whole checkpoint: state.json: "):
        read_state(file.parent)


# ---- Tensors that are not what .metadata says


def with_metadata(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change torch's own metadata, and make the sums fit."""
    whole = pickle.loads((folder / ".metadata").read_bytes())
    change(whole)
    (folder / ".metadata").write_bytes(pickle.dumps(whole, 4))
    reseal(folder)


def test_a_part_of_another_dtype_or_size_than_said_is_refused_by_name(output):
    where = "model/w: its part at [0, 0] in __0_0.distcp is"
    half = lambda whole: vars(whole.state_dict_metadata["model/w"].properties).update(dtype=torch.bfloat16)  # noqa: E731
    with_metadata(output / "checkpoint-6", half)
    with pytest.raises(UserError) as error:
        read(output / "checkpoint-6")
    assert f"{where} torch.float32 of size [4, 6], not torch.bfloat16 of size [4, 6]" in str(error.value)

    def turn(whole: Any) -> None:
        entry = whole.state_dict_metadata["model/w"]
        entry.size = entry.chunks[0].sizes = torch.Size((6, 4))

    with_metadata(output / "checkpoint-4", turn)
    with pytest.raises(UserError) as error, alone_is_fine():
        read_into(Reader(output / "checkpoint-4"), {"model/w": torch.empty(6, 4)})
    assert f"{where} torch.float32 of size [4, 6], not torch.float32 of size [6, 4]" in str(error.value)


@pytest.mark.parametrize("position", [0, 300])
def test_bytes_that_are_no_tensor_are_refused_by_name(output, position):
    file = output / "checkpoint-6/__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[position : position + 200] = b"\xff" * 200
    file.write_bytes(content)
    reseal(file.parent)
    with pytest.raises(
        UserError, match=r"cannot be read: model/w: its part at \[0, 0\] in __0_0.distcp cannot be read"
    ):
        read(file.parent)


def test_bytes_beyond_the_end_of_a_file_are_refused_before_it_is_read(output):
    with_metadata(output / "checkpoint-6", lambda m: vars(list(m.storage_data.values())[0]).update(offset=10**6))
    with pytest.raises(UserError, match="__0_0.distcp is truncated, it has .* of 100"):
        read_state(output / "checkpoint-6")


def test_parts_that_leave_a_hole_are_refused_with_checkpoint_and_tensor(output):
    with_metadata(
        output / "checkpoint-6", lambda m: vars(m.state_dict_metadata["model/w"]).update(size=torch.Size((5, 6)))
    )
    with pytest.raises(UserError) as error:
        read_state(output / "checkpoint-6")
    told = "is not a whole checkpoint: .metadata: model/w: its parts leave out 6 of 30 elements"
    assert str(error.value).splitlines()[:2] == [f"resume_from_checkpoint: {output}/checkpoint-6", f"  {told}"]


def test_checkpoints_of_every_layout_written_before_have_whole_tensors(tmp_path):
    with tarfile.open(Path(__file__).with_name("written_before") / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for layout in ("1d", "2d", "fsdp"):
        assert read_state(tmp_path / layout / "checkpoint-3").step == 3
