"""Prepared data that are not as they were: found, named, and prepared again."""

import json
import os
import re
import shutil
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from tests.data.helpers import all_rows

from tessera.core.errors import RunFailed, UserError
from tessera.data import columns
from tessera.data import prepare as module
from tessera.data.columns import BLOCK, SUM, sums_of
from tessera.data.epochs import Singles
from tessera.data.loader import Loader
from tessera.data.prepare import open_prepared, prepare
from tessera.data.samples import open_samples

TOKENS = [{"input_ids": [10 + i, 20 + i, 30 + i]} for i in range(10)]


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def change(folder: Path, **changes) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def swap(folder: Path, name: str, array: np.ndarray) -> None:
    """Put an array of others there, with sums that fit it."""
    np.save(folder / name, array)
    content = (folder / name).read_bytes()
    blocks = [content[start : start + BLOCK] for start in range(0, len(content), BLOCK)]
    sums_of(folder / name).write_bytes(b"".join(blake2b(block, digest_size=SUM).digest() for block in blocks))


OTHERS = np.arange(30, dtype=np.int32)
DAMAGES = {
    "a bit of a token": (lambda f: flip(f / "train/tokens.npy", -3), "train/tokens.npy is not as it was prepared"),
    "a bit of an offset": (lambda f: flip(f / "train/offsets.npy", -9), "train/offsets.npy is not as it was prepared"),
    "a bit of a label": (lambda f: flip(f / "eval/labels.npy", -2), "eval/labels.npy is not as it was prepared"),
    "a bit of a header": (lambda f: flip(f / "train/tokens.npy", 9), "train/tokens.npy is not as it was prepared"),
    "a bit of a sum": (lambda f: flip(f / "train/tokens.npy.sums", 0), "train/tokens.npy is not as it was prepared"),
    "cut": (lambda f: os.truncate(f / "train/tokens.npy", 140), "train/tokens.npy is not as it was prepared"),
    "emptied": (lambda f: os.truncate(f / "train/tokens.npy", 0), "train/tokens.npy has 0 bytes"),
    "cut sums": (lambda f: os.truncate(f / "train/tokens.npy.sums", 3), "train/tokens.npy has 224 bytes"),
    "missing": (lambda f: (f / "train/offsets.npy").unlink(), "train/offsets.npy does not exist"),
    "missing labels": (lambda f: (f / "train/labels.npy").unlink(), "train/labels.npy does not exist"),
    "missing split": (lambda f: shutil.rmtree(f / "eval"), "eval/tokens.npy does not exist"),
    "tokens of others": (lambda f: swap(f, "train/tokens.npy", OTHERS), "has 30 tokens, offsets.npy is of"),
    "labels of others": (lambda f: swap(f, "train/labels.npy", OTHERS[:24]), "train/labels.npy"),
    "numbers of others": (lambda f: swap(f, "train/tokens.npy", OTHERS.astype("f8")), "holds float64 in 1 dimensions"),
    "no array": (lambda f: swap(f, "train/tokens.npy", OTHERS.reshape(2, 15)), "holds int32 in 2 dimensions"),
    "a pipe": (lambda f: ((f / "train/tokens.npy").unlink(), os.mkfifo(f / "train/tokens.npy")), "no regular file"),
    "a folder": (lambda f: ((f / "train/tokens.npy").unlink(), (f / "train/tokens.npy").mkdir()), "is a folder"),
    "manifest: a count": (lambda f: change(f, train_rows=7), "manifest.json is not as it was written"),
    "manifest: a type": (lambda f: change(f, train_rows="8"), "manifest.json: train_rows: "),
    "manifest: below 0": (lambda f: change(f, eval_tokens=-8), "manifest.json: eval_tokens: "),
    "manifest: files": (lambda f: change(f, files=[]), "manifest.json: files: "),
    "manifest: a key": (lambda f: change(f, key=3), "manifest.json: key: "),
    "manifest cut": (lambda f: os.truncate(f / "manifest.json", 99), "manifest.json cannot be read as JSON"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json holds something else"),
    "manifest deep": (lambda f: (f / "manifest.json").write_text("[" * 200_000), "nested deeper than"),
    "manifest gone": (lambda f: (f / "manifest.json").unlink(), "manifest.json does not exist"),
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Rows of which one label is ignored in each."""
    path = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    rows = [row | {"labels": [-100, *row["input_ids"][1:]]} for row in TOKENS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_data_prepared_again(labelled, settings, damage):
    config = settings(labelled, val_set_size=2)
    first = prepare(config, 40)
    rows = [all_rows(first.folder, split) for split in ("train", "eval")]
    make, told = DAMAGES[damage]
    make(first.folder)
    with pytest.raises(UserError, match=re.escape(told)):  # a rank that finds it
        opened = open_prepared(first.folder)
        for split in ("train", "eval"):
            all_rows(opened.folder, split)
    again = prepare(config, 40)
    assert not again.reused and again.manifest == first.manifest
    assert told in again.summary() and "prepared again: " in again.summary() and len(again.summary()) < 500
    assert [all_rows(again.folder, split) for split in ("train", "eval")] == rows
    assert prepare(config, 40).reused and open_prepared(again.folder).manifest == first.manifest


def test_data_prepared_before_there_were_sums_are_prepared_again_without_complaint(labelled, settings):
    config = settings(labelled)
    first = prepare(config, 40)
    for sums in first.folder.rglob("*.sums"):
        sums.unlink()
    entries = json.loads((first.folder / "manifest.json").read_text())
    del entries["files"], entries["sum"]
    (first.folder / "manifest.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="it has no manifest.json of this version"):
        open_prepared(first.folder)
    again = prepare(config, 40)
    assert not again.reused and again.manifest == first.manifest and "again" not in again.summary()
    (first.folder / "manifest.json").write_text("{}")  # no longer known as ours by its keys, but by all that is there
    assert prepare(config, 40).manifest == first.manifest


def test_a_flipped_bit_of_large_data_is_found_by_the_rank_that_reads_it(write, settings, monkeypatch):
    """What is too large to be read before a run starts is checked block by block: no row trains unseen."""
    monkeypatch.setattr(module, "WHOLE", 0)
    monkeypatch.setattr(columns, "BLOCK", 256)
    config = settings(write("a.jsonl", [{"input_ids": [n, n + 1, n + 2]} for n in range(200)]))
    folder = prepare(config, 300).folder
    flip(folder / "train/tokens.npy", 1300)
    assert prepare(config, 300).reused
    rows = open_samples(open_prepared(folder).folder, "train")
    assert rows[0][0].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="tokens.npy\n  is not as it was prepared: see its bytes from 1,280") as refused:
        rows[100]
    assert refused.value.hint == f"remove {folder}, and the next start prepares the data again"
    assert rows[199][0].tolist() == [199, 200, 201]
    samples = open_samples(folder, "train")
    loader = Loader(samples, Singles(len(samples), 0, shuffle=False), 10, 1, 1)
    loader.step_batches(0)
    with pytest.raises(RunFailed, match="tokens.npy is not as it was prepared: see its bytes from 1,280"):
        loader.step_batches(10)


@pytest.mark.parametrize("kind", ["link to a folder", "link to nowhere"])
def test_a_linked_prepared_folder_is_unlinked_and_what_it_points_to_stays(tmp_path, labelled, settings, kind):
    folder = prepare(settings(labelled), 40).folder
    moved = tmp_path / "disk2"
    shutil.move(folder, moved)
    folder.symlink_to(moved if kind == "link to a folder" else "/no/such/place")
    assert prepare(settings(labelled), 40).reused is (kind == "link to a folder")
    prepare(settings(labelled, sequence_len=8), 40)
    assert not folder.is_symlink() and len(all_rows(folder)) == len(all_rows(moved)) == 10
    assert [path.name for path in folder.parent.iterdir()] == ["prepared"]


@pytest.mark.parametrize("what", ["file", "pipe"])
def test_what_is_no_folder_is_never_replaced(tmp_path, labelled, settings, what):
    path = tmp_path / "out/prepared"
    path.parent.mkdir()
    path.write_text("mine") if what == "file" else os.mkfifo(path)
    with pytest.raises(UserError, match="is where prepared data go: a part of the path is no folder"):
        prepare(settings(labelled), 40)
    assert os.path.lexists(path)
