"""What newcomers brought and how it failed (S1, S3-S7): it works now, or one message names the way out."""

import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tests.data.chats import chat_tokenizer
from tests.data.helpers import all_rows, entry

from tessera.core.errors import UserError
from tessera.data import hub
from tessera.data.prepare import prepare

ALPACA = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(5)]
SHORT, LONG = "def add(a, b):\n", "    return a + b\n" * 40


def test_s1_a_text_longer_than_a_row_is_cut_and_never_dropped(write, settings, tokenizer):
    path = write("pretrain.jsonl", [{"text": SHORT}, {"text": LONG}, {"text": SHORT}])
    prepared = prepare(settings(path), None)
    found = [tokens for tokens, _ in all_rows(prepared.folder)]
    whole = [[*one.ids, tokenizer.eos_id] for one in tokenizer.backend.encode_batch([SHORT, LONG, SHORT])]
    cut = [ids[start : start + 16] for ids in whole for start in range(0, len(ids), 16)]
    assert found == [row for row in cut if len(row) > 1]  # a last token alone teaches nothing
    assert prepared.manifest.dropped_rows == 0 and len(cut) > 10


@pytest.mark.parametrize("name", ["d.csv", "data.tsv", "alpaca.json"])
def test_s3_tables_are_never_trained_on_as_raw_text(write, settings, name):
    content = (
        json.dumps(ALPACA) if name.endswith("json") else "id,body\n1,x\n".replace(",", "\t" * (name[-3] == "t") or ",")
    )
    path = write(f"one/{name}", content)
    write("one/README.md", "# About these data")
    if name.endswith("json"):
        assert prepare(settings(path.parent, sequence_len=500), None).manifest.train_rows == 5
    else:
        with pytest.raises(UserError, match="no known kind of row: the keys of the first are id, body"):
            prepare(settings(path.parent), None)


def test_s3_a_picture_in_a_folder_of_text_stops_nothing(write, settings):
    write("texts/logo.png", b"\x89PNG\r\n\x1a\n\0\0")
    folder = write("texts/book.txt", SHORT).parent
    prepared = prepare(settings(folder), None)
    assert f"data: 1 other file of {folder} passed over: logo.png\n" in prepared.summary()
    assert prepare(settings(folder), None).summary().startswith("data: 1 other file")


def test_s4_alpaca_as_it_was_published(write, settings):
    path = write("alpaca.json", json.dumps(ALPACA, indent=4))
    lines = write("alpaca.jsonl", ALPACA)
    published, as_lines = (
        all_rows(prepare(settings(entry(each, "alpaca"), sequence_len=500), None).folder) for each in (path, lines)
    )
    assert published == as_lines and len(published) == 5


def test_s5_parquet_and_compressed_lines(write, settings):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ALPACA), sink)
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in ALPACA).encode())
    for path in (write("data.parquet", sink.getvalue()), write("lines.jsonl.gz", packed)):
        assert prepare(settings(path, sequence_len=500), None).manifest.train_rows == 5


def test_s6_a_data_set_of_the_hub_is_known_as_such(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "reachable", lambda _: False)
    with pytest.raises(
        UserError, match="Hugging Face hub gives no data set .*\n  where there is a network: hf download"
    ):
        prepare(settings(Path("tatsu-lab/no-such-set")), None)


def test_s7_chats_have_a_way_in(write, settings, tmp_path):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    shared = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "there"}]
    rows = [[{"messages": turns}], [{"conversations": shared}], [{"prompt": turns[:1], "completion": turns[1:]}]]
    folder = chat_tokenizer(tmp_path / "model")
    found = [
        all_rows(prepare(settings(write(f"{n}.jsonl", each), tokenizer=str(folder), sequence_len=99), None).folder)
        for n, each in enumerate(rows)
    ]
    assert found[0] == found[1] == found[2] and found[0][0][1].count(-100) > 5
