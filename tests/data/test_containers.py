"""Containers: the same rows come out of every one; what is no such file is refused by name."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from tests.data.helpers import entry

from tessera.core.errors import UserError
from tessera.data.formats import json_rows
from tessera.data.formats.container import Container, rows_of
from tessera.data.sources import read_documents, read_files, read_token_samples

ROWS = [{"text": f'row {n}, "quoted",\nand é\u2028' + "x" * (n * 7 % 50)} for n in range(700)]
TABLE = pyarrow.Table.from_pylist(ROWS)


def as_csv(delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def as_arrow(new) -> bytes:
    sink = io.BytesIO()
    with new(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=300)
    return sink.getvalue()


def as_parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(TABLE, sink, row_group_size=256)
    return sink.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS).encode()
CONTENTS = {
    "a.jsonl": LINES,
    "a.NDJSON": b"\xef\xbb\xbf" + LINES,
    "array.json": b" \n" + ARRAY,
    "pretty.json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "lines.json": LINES,
    "data.json": json.dumps({"version": "1", "about": {"text": [1]}, "data": ROWS, "end": 1}).encode(),
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "rows.json": json.dumps({"rows": ROWS}, indent=2).encode(),
    "a.csv": as_csv(","),
    "a.tsv": as_csv("\t"),
    "a.parquet": as_parquet(),
    "stream.arrow": as_arrow(pyarrow.ipc.new_stream),
    "file.arrow": as_arrow(pyarrow.ipc.new_file),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.jsonl.zst": zstandard.compress(LINES[:999]) + zstandard.compress(LINES[999:]),
    "array.json.gz": gzip.compress(ARRAY),
    "a.csv.zst": zstandard.compress(as_csv(",")),
}


def texts(path: Path, **keys) -> list[str]:
    files = read_files([entry(path, **keys)])
    return [document.segments[0].text for file in files for document in read_documents(file)]


@pytest.mark.parametrize("name", CONTENTS)
def test_every_container_gives_the_same_rows(write, name):
    assert texts(write(name, CONTENTS[name])) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
def test_compressed_text_is_text(write, packed):
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}[packed]
    assert texts(write(f"a.txt.{packed}", compress("hello é".encode()))) == ["hello é"]


def test_rows_are_read_as_they_are_asked_for(write, monkeypatch):
    """A file of many rows whose last is broken gives the first ones, and little of it is held."""
    path = write("a.json", b"[" + b",".join([b'{"text": "' + b"x" * 1000 + b'"}'] * 900) + b", oops]")
    held = []
    more = json_rows._Objects._more

    def watched(self, size):
        held.append(len(self._text))
        return more(self, size)

    monkeypatch.setattr(json_rows._Objects, "_more", watched)
    rows = rows_of(path, Container("json"))
    assert sum(1 for _, _ in zip(range(899), rows, strict=False)) == 899
    assert max(held) < 4 * json_rows.BLOCK
    next(rows)
    with pytest.raises(UserError, match="row 901\n  not valid JSON"):
        next(rows)


def test_a_row_longer_than_a_block_is_whole(write):
    long = [{"text": "é" * 90_000}, {"text": "\\u00e9\n" * 60_000}]
    for name, content in {
        "a.json": json.dumps(long, ensure_ascii=False),
        "b.json": "\n".join(map(json.dumps, long)),
        "c.json": json.dumps({"x" * 100_000: 1, "data": long}),
    }.items():
        assert texts(write(name, content.encode())) == [row["text"] for row in long]


def test_null_columns_and_numbers_keep_their_types(write):
    sink = io.BytesIO()
    rows = [{"input_ids": [1, 2, 3], "labels": None}, {"input_ids": [4], "labels": [-100]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    (file,) = read_files([entry(write("a.parquet", sink.getvalue()))])
    first, second = read_token_samples(file)
    assert (first.tokens.tolist(), first.labels, second.labels.tolist()) == ([1, 2, 3], None, [-100])
    assert str(second.origin) == f"{file.path}, row 2"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", "[1, 2]", "row 1\n  not a JSON object"),
        ("a.json", '[{"text": "a"}\n {"text": "b"}]', "row 1\n  not valid JSON: a comma is missing"),
        ("a.json", '[{"text": "a"}, {"text": ', "row 2\n  not valid JSON"),
        ("a.json", '[{"text": "a"}, {"text": "b"}', "row 2\n  not valid JSON"),
        ("a.json", '[{"text": ' + "[" * 100_000, "row 1\n  not valid JSON: nested deeper"),
        ("a.json", r'[{"text": "\ud800"}]', "row 1\n  not valid JSON: a text holds half"),
        ("a.json", '{"name": {"text": "x"},\n "more": 1}', "keys of the first are name, more"),
        ("a.json", '{"text": "x"}, {"text": "y"}', "row 1\n  not valid JSON"),
        ("a.json", '[{"text": "x"}]\n[{"text": "y"}]', "more follows behind the array"),
        ("a.json", '{"text": "x"} 7', "row 2\n  not a JSON object"),
        ("a.json", '{"name": 1,\n "rows" [1]}', "not valid JSON: a key and a colon"),
        ("a.json", "12", "holds no rows"),
        ("a.json", b'[{"text": "\xff"}]', "is not UTF-8 text.*\n  convert it"),
        ("a.csv", "text,id\na\n", "line 2\n  1 fields, the first line has 2 names"),
        ("a.csv", 'text\nfine\n"open\n', "line 3\n  not valid CSV"),
        ("a.csv", "text,text\na,b\n", "line 1\n  names the column 'text' twice"),
        ("a.csv", b"text\n\xff\n", "is not UTF-8 text.*\n  convert it"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text.*\n  convert it"),
        ("a.csv", "text\n", "holds no rows"),
        (
            "a.csv",
            "a;text\n1;2\n",
            "line 1\n  its first line has one column, and ';' in it\n  separate columns with commas",
        ),
        ("a.tsv", "a|text\n1|2\n", "line 1\n  its first line has one column, and '\\|' in it"),
        ("a.parquet", "text", "is no parquet file, though its name says so"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
        ("a.arrow", b"ARROW1 and no more", "cannot be read as Arrow"),
        ("a.jsonl", gzip.compress(LINES), "holds gz, which its name does not say"),
        ("a.jsonl.gz", LINES, "its name ends in .gz, but its content is not compressed that way"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], "cannot be unpacked"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-20], "cannot be unpacked"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:40] + b"no", "cannot be unpacked"),
        ("a.jsonl.lz4", b"\x04\x22\x4d\x18", r".jsonl.lz4\n  is not text, and .lz4 is not a format that is read"),
        ("a.parquet.gz", gzip.compress(as_parquet()), "a parquet file inside .gz\n  unpack it"),
        ("a.csv", as_parquet(), "holds parquet, which its name does not say"),
        ("a.pkl", b"\x80\x04K\x01.", "pkl is not a format that is read"),
        ("a.txt", as_parquet(), "holds parquet"),
    ],
)
def test_what_is_no_such_file_is_refused(write, name, content, told):
    path = write(name, content)
    with pytest.raises(UserError, match=told) as error:
        texts(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", CONTENTS)
def test_damage_is_one_message_and_no_cut_table_is_taken_for_a_whole_one(write, name):
    dice = random.Random(name)
    for kind in range(8):
        content = bytearray(CONTENTS[name])
        at = dice.randrange(len(content))
        if kind % 4 == 0:
            del content[at:]
        elif kind % 4 == 1:
            content[at] = dice.randrange(256)
        elif kind % 4 == 2:
            content[at:at] = dice.randbytes(20)
        else:
            del content[at : at + dice.randrange(1, 3000)]
        path = write(name, bytes(content))
        try:
            found = texts(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            text = name.lower().endswith(("jsonl", "json", "ndjson", "csv", "tsv"))
            assert kind % 4 or text or len(found) == len(ROWS)


def test_ds_type_says_what_a_file_of_another_ending_is(write):
    assert texts(write("rows.dat", LINES), ds_type="json") == [row["text"] for row in ROWS]
    assert texts(write("table.txt", as_csv(",")), ds_type="csv") == [row["text"] for row in ROWS]
    assert texts(write("notes.log", "a,b\n"), ds_type="text") == ["a,b\n"]
    with pytest.raises(UserError, match="is no parquet file"):
        texts(write("b.dat", LINES), ds_type="parquet")
    with pytest.raises(UserError, match="datasets.ds_type: xml\n  is not known\n  known: json"):
        texts(write("c.dat", LINES), ds_type="xml")
