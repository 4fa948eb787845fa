"""Preparation that is bounded and shared: long texts, threads, memory, kills, several processes at once, warnings."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tests.data.chats import chat_tokenizer
from tests.data.helpers import TEXT, all_rows, entry
from tests.data.tokenizer_zoo import awkward, zoo

from tessera.core.errors import UserError
from tessera.data import encode
from tessera.data import prepare as module
from tessera.data.documents import Document, Segment
from tessera.data.encode import Encoder
from tessera.data.order import Permutation
from tessera.data.prepare import open_prepared, prepare
from tessera.data.samples import HELD_OUT, Origin
from tessera.data.tokenizer import TextTokenizer

ORIGIN = Origin(Path("somewhere"))
ROWS = [{"input_ids": [10 + i, 20 + i, 30 + i]} for i in range(10)]


def encoded(backend, documents, threads=2) -> list[list[int]]:
    """The ids of each document, as an Encoder has them."""
    rows: list[list[int]] = [[]]
    for part in Encoder(TextTokenizer(backend, 10**6), threads).encode((document, None) for document in documents):
        rows[-1] += part.ids.tolist()
        if part.last:
            rows.append([])
    return rows[:-1]


# ---- Tokenizing


@pytest.mark.parametrize("name", ["roberta", "llama3", "llama2", "t5", "bert"])
def test_long_and_short_documents_come_in_their_order_opened_and_closed(name, monkeypatch):
    """Against the library's own call for the whole text, with what its template puts around."""
    monkeypatch.setattr(encode, "SIZE", 64)
    monkeypatch.setattr(encode, "BATCH", 300)
    backend = zoo(name)
    texts = [awkward(seed, fragments) for seed, fragments in enumerate((3, 400, 1, 50, 0, 300, 7))]
    documents = [Document(ORIGIN, (Segment(text),)) for text in texts]
    whole = [backend.encode(text).ids for text in texts]
    assert encoded(backend, documents) == whole == encoded(backend, documents, threads=1)


def test_segments_are_tokenized_apart_and_spans_are_told_token_by_token():
    backend = zoo("gpt2")
    one, two = "def f(a):\n    return a\n", "the word"
    spans = ((0, 3), (14, 20))  # def, return
    document = Document(ORIGIN, (Segment(one, spans), Segment(two, False)), opened=False, ended=False)
    parts = list(Encoder(TextTokenizer(backend, 10**6), 1).encode([(document, None)]))
    found = backend.encode(one)
    learnt = [any(a < end and start < b for start, end in spans) for a, b in found.offsets]
    assert [part.ids.tolist() for part in parts] == [found.ids, backend.encode(two).ids]
    assert parts[0].learnt.tolist() == learnt and True in learnt and False in learnt
    assert parts[1].learnt is None and [part.last for part in parts] == [False, True]


@pytest.mark.parametrize("threads", [1, 3])
def test_dataset_processes_are_the_threads_that_tokenize(write, settings, monkeypatch, threads):
    """And the library has none of its own meanwhile, whatever the environment says before and after."""
    seen, together = set(), threading.Barrier(threads)
    found = Encoder._encode

    def watched(self, parts):
        if len(seen) < threads:
            seen.add(threading.get_ident())
            together.wait(30)  # all of them are there, or this fails
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        return found(self, parts)

    monkeypatch.setattr(Encoder, "_encode", watched)
    monkeypatch.setattr(encode, "BATCH", 10)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "maybe")
    path = write("a.jsonl", [{"text": "a b c d e f"}] * 40)
    prepare(settings(path, dataset_processes=threads), None)
    assert len(seen) == threads and os.environ["TOKENIZERS_PARALLELISM"] == "maybe"


def test_a_text_that_cannot_be_cut_is_tokenized_whole_and_its_size_is_told(monkeypatch):
    monkeypatch.setattr(encode, "SIZE", 64)
    monkeypatch.setattr(encode, "LONG", 500)
    told: list[str] = []
    text = "-=" * 400
    encoder = Encoder(TextTokenizer(zoo("gpt2"), 10**6), 1, told)
    (part,) = encoder.encode([(Document(ORIGIN, (Segment(text),)), None)])
    assert part.ids.tolist() == zoo("gpt2").encode(text).ids
    assert told == ["somewhere: 800 characters are tokenized at once, for the tokenizer cuts them nowhere"]


def test_text_files_are_read_in_blocks_and_give_the_windows_of_the_whole(write, settings, tokenizer, monkeypatch):
    from tessera.data import sources

    texts = [TEXT * 30, "naïve 日本 🙂\n" * 40, "x = 1\n"]
    folder = [write(f"d/{n}.txt", text) for n, text in enumerate(texts)][0].parent
    whole = all_rows(prepare(settings(folder), None, folder.parent / "whole").folder)
    monkeypatch.setattr(sources, "BLOCK", 7)
    monkeypatch.setattr(encode, "SIZE", 16)
    monkeypatch.setattr(encode, "BATCH", 100)
    assert all_rows(prepare(settings(folder), None, folder.parent / "blocks").folder) == whole
    end = tokenizer.eos_id
    stream = [token for one in tokenizer.backend.encode_batch(texts) for token in [*one.ids, end]][:-1]
    assert [token for row, _ in whole for token in row] == stream


def test_memory_does_not_grow_with_the_text(write, settings, monkeypatch):
    """At its peak, of a file eight times as large: the rows are on disk, the text is read in blocks."""
    from tessera.data import sources

    monkeypatch.setattr(sources, "BLOCK", 1 << 12)
    monkeypatch.setattr(encode, "BATCH", 1 << 13)
    monkeypatch.setattr("tessera.data.columns.BLOCK", 1 << 12)
    peaks, make = [], module.make

    def watched(*arguments):
        tracemalloc.start()
        made = make(*arguments)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        return made

    monkeypatch.setattr(module, "make", watched)
    for times in (1, 8):
        path = write(f"{times}.txt", TEXT * 400 * times)
        prepare(settings(path, dataset_processes=1), None, path.with_suffix(""))
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < 4 * len(TEXT) * 400 * 8


@pytest.mark.parametrize("block", [256, 1 << 17])
def test_labels_and_positions_that_begin_late_are_filled_in(write, settings, monkeypatch, block):
    monkeypatch.setattr("tessera.data.columns.BLOCK", block)
    rows = [{"input_ids": [n, n + 1, n + 2]} for n in range(1, 30)]
    rows[20]["labels"] = [-100, 22, 23]
    rows[25]["position_ids"] = [0, 1, 0]
    prepared = prepare(settings(write("a.jsonl", rows)), None)
    found = all_rows(prepared.folder)
    assert [tokens for tokens, _ in found] == [row["input_ids"] for row in rows]
    assert [labels for _, labels in found] == [row.get("labels", row["input_ids"]) for row in rows]
    positions = np.load(prepared.folder / "train/positions.npy").reshape(-1, 3).tolist()
    assert positions == [row.get("position_ids", [0, 1, 2]) for row in rows]


# ---- The split, and rows to evaluate on


def test_the_held_out_rows_are_those_of_the_permutation(write, settings):
    rows = [{"input_ids": [n, n, n]} for n in range(1, 41)]
    prepared = prepare(settings(write("a.jsonl", rows), val_set_size=0.25, seed=3), None)
    chosen = {Permutation(40, HELD_OUT, 3)[place] for place in range(10)}
    assert {row[0] - 1 for row, _ in all_rows(prepared.folder, "eval")} == chosen
    assert len(all_rows(prepared.folder)) == 30


def test_test_datasets_are_the_rows_to_evaluate_on(write, settings, tokenizer):
    train, held_out = write("a.jsonl", ROWS), write("b.jsonl", [{"input_ids": [5, 6]}])
    config = settings(train, test_datasets=[entry(held_out)])
    prepared = prepare(config, 40)
    assert all_rows(prepared.folder, "eval") == [([5, 6], [5, 6])]
    assert (prepared.manifest.train_rows, prepared.manifest.eval_rows) == (10, 1)
    write("b.jsonl", [{"input_ids": [5, 7]}])
    assert not prepare(config, 40).reused
    with pytest.raises(UserError, match="b.jsonl"):
        prepare(config, 7) if write("a.jsonl", [{"input_ids": [1, 2]}]) else None
    text = settings(train, test_datasets=[entry(write("c.txt", TEXT))])
    assert prepare(text, None).tokenizer_folder == tokenizer.folder


# ---- Many left out


@pytest.mark.parametrize(("kept", "warned"), [(19, False), (18, True)])
def test_many_dropped_samples_are_a_block_of_their_own(write, settings, kept, warned):
    rows = [{"input_ids": [1, 2, 3]}] * kept + [{"input_ids": list(range(20))}]
    prepared = prepare(settings(write("a.jsonl", rows)), None)
    for found in (prepared, prepare(settings(write("a.jsonl", rows)), None)):
        lines = found.summary().splitlines()
        assert ("! WARNING: 1 of 19 samples (5%) are not trained on." in found.summary()) is warned
        assert any(line == "!" * len(line) and len(line) > 20 for line in lines) is warned
        assert ("excess_length_strategy: truncate" in found.summary()) is warned


# ---- Shared by runs


def test_runs_share_what_is_prepared_under_a_key(tmp_path, write, settings):
    path, shared = write("a.jsonl", ROWS), tmp_path / "shared"
    first = prepare(settings(path, dataset_prepared_path=str(shared)), None)
    assert first.folder == shared / first.manifest.key and not (tmp_path / "out").exists()
    other = prepare(settings(path, dataset_prepared_path=str(shared), output_dir=str(tmp_path / "other")), None)
    assert other.reused and other.folder == first.folder
    split = prepare(settings(path, dataset_prepared_path=str(shared), val_set_size=2), None)
    assert split.folder != first.folder and prepare(settings(path, dataset_prepared_path=str(shared)), None).reused
    assert sorted(entry.name for entry in shared.iterdir()) == sorted([first.folder.name, split.folder.name])


@pytest.mark.parametrize("type_", ["completion", "chat_template"])
def test_copies_of_a_tokenizer_share_prepared_rows_and_each_run_hands_out_its_own(write, settings, tmp_path, type_):
    one, two = (chat_tokenizer(tmp_path / name) for name in ("one", "two"))
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    path = write("a.jsonl", [{"text": "hello there", "messages": talk}])
    keys = {"dataset_prepared_path": str(tmp_path / "shared"), "sequence_len": 400}
    first, second = (prepare(settings(entry(path, type_), **keys, tokenizer=str(each)), None) for each in (one, two))
    assert second.reused and second.folder == first.folder
    assert (first.tokenizer_folder, second.tokenizer_folder) == (one, two)
    on_rank = open_prepared(first.folder, settings(entry(path), tokenizer=None, base_model=str(two)))
    assert on_rank.tokenizer_folder == two
    other = chat_tokenizer(tmp_path / "other", eos="<|im_end|>")
    assert not prepare(settings(entry(path, type_), **keys, tokenizer=str(other)), None).reused


def test_a_shared_folder_that_holds_something_else_is_refused_under_its_key(tmp_path, write, settings):
    config = settings(write("a.jsonl", ROWS), dataset_prepared_path=str(tmp_path / "shared"))
    folder = prepare(config, None).folder
    for file in (folder / "train").iterdir():
        file.unlink()
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"dataset_prepared_path: .*\n  .*something else\n.*another dataset_prepared_path"
    ):
        prepare(config, None)


def test_a_shared_folder_within_the_data_is_refused(write, settings):
    folder = write("d/a.jsonl", ROWS).parent
    for shared in (folder, folder / "prepared"):
        with pytest.raises(UserError, match="^dataset_prepared_path: .*\n  lies in the data folder"):
            prepare(settings(folder, dataset_prepared_path=str(shared)), None)
    assert [path.name for path in folder.iterdir()] == ["a.jsonl"]


PREPARE = """
import sys
from types import SimpleNamespace
from tessera.data import make, prepare
assembled = make.assemble_samples
def watched(*arguments):
    for number, row in enumerate(assembled(*arguments)):
        if number == 0:
            print("begun", flush=True)
            sys.stdin.readline()
        yield row
make.assemble_samples = watched
config = SimpleNamespace(base_model="", datasets=[SimpleNamespace(path=sys.argv[1], type=None)], tokenizer=None,
    sequence_len=16, excess_length_strategy="drop", min_sample_len=None, train_on_inputs=False, val_set_size=0, seed=1,
    output_dir="/nowhere", dataset_prepared_path=sys.argv[2], dataset_processes=1, test_datasets=None, tokens=(),
    special_tokens=SimpleNamespace(additional_special_tokens=(), **dict.fromkeys(
        ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"))))
found = prepare.prepare(config, None)
print("reused" if found.reused else "made", found.folder)
"""


def start(path: Path, shared: Path) -> "subprocess.Popen[str]":
    """Another process, which stops at its first row until it is written to."""
    env = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(PREPARE), str(path), str(shared)]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_prepares_and_the_other_waits_and_takes_it(tmp_path, write):
    path = write("a.jsonl", ROWS)
    one = start(path, tmp_path / "shared")
    assert one.stdout.readline() == "begun\n"
    two = start(path, tmp_path / "shared")
    assert "another process is preparing" in two.stdout.readline()
    (told, _), (waited, _) = one.communicate("go on\n", timeout=100), two.communicate(timeout=100)
    assert told.split()[0] == "made" and waited.split()[0] == "reused" and told.split()[1] == waited.split()[1]
    assert len(list((tmp_path / "shared").iterdir())) == 1


def test_what_a_killed_process_has_left_is_in_nobodys_way(tmp_path, write):
    path, shared = write("a.jsonl", ROWS), tmp_path / "shared"
    killed = start(path, shared)
    assert killed.stdout.readline() == "begun\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert [place for place in shared.iterdir() if place.is_dir()]  # it leaves its rows
    told, _ = start(path, shared).communicate("go on\n", timeout=100)
    assert "made" in told and [place.name for place in shared.iterdir()] == [Path(told.split()[-1]).name]


def test_without_locks_the_first_to_rename_wins(tmp_path, write, settings, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(95, "no locks here")

    monkeypatch.setattr(fcntl, "flock", none)
    config = settings(write("a.jsonl", ROWS), dataset_prepared_path=str(tmp_path / "shared"))
    make, inside = module.make, []

    def making(*arguments):
        if not inside:  # another process makes it meanwhile
            inside.append(True)
            monkeypatch.setattr(os, "getpid", lambda: 1)
            inside.append(prepare(config, None))
            monkeypatch.undo()
        return make(*arguments)

    monkeypatch.setattr(module, "make", making)
    found = prepare(config, None)
    assert found.reused and found.folder == inside[1].folder
    assert [place.name for place in (tmp_path / "shared").iterdir()] == [found.folder.name]
