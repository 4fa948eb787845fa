"""Files are found, recognised and read; every mistake names its file and line."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tests.data.helpers import entry

from tessera.core.errors import UserError
from tessera.data.documents import Segment
from tessera.data.samples import Origin
from tessera.data.sources import read_documents, read_files, read_token_samples


def text_of(document):
    """All of a document's text."""
    return "".join(segment.text for segment in document.segments)


def test_a_folder_is_read_in_sorted_order_without_hidden_and_empty_files(write):
    for name, text in {
        "b.txt": "B",
        "a/z.md": "AZ",
        "a/b.py": "AB",
        ".git/x": "no",
        "e.txt": "",
        "c": "C",
    }.items():
        folder = write(f"d/{name}", text).parent
    files = read_files([entry(folder)])
    assert [text_of(document) for file in files for document in read_documents(file)] == ["AB", "AZ", "B", "C"]


def test_a_folder_that_cannot_be_listed_is_refused_and_not_left_out(write, monkeypatch):
    write("d/b.txt", "B")
    locked = write("d/sub/c.txt", "C").parent
    listed = os.scandir

    def scandir(path):
        if str(path) == str(locked):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="sub\n  cannot be read: permission denied"):
        read_files([entry(locked.parent)])


def test_a_file_in_a_folder_that_cannot_be_searched_is_refused_by_name(write, monkeypatch):
    file, looked_at = write("d/b.txt", "B"), Path.stat

    def stat(path, **how):
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return looked_at(path, **how)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(UserError, match="b.txt\n  cannot be read: permission denied"):
        read_files([entry(file)])


@pytest.mark.parametrize(
    ("name", "row", "kind"),
    [
        ("a.JSONL", {"text": "x"}, "completion"),
        ("a.ndjson", {"text": "x"}, "completion"),
        ("a.jsonlines", {"input_ids": [1]}, "tokenized"),
        ("a.jsonl", {"input_ids": [1, 2], "text": "x"}, "tokenized"),
        ("a.jsonl", {"text": "x"}, "completion"),
        ("a.jsonl", {"instruction": "x", "output": "y"}, "alpaca"),
    ],
)
def test_format_of_an_untyped_file(write, name, row, kind):
    assert [file.format for file in read_files([entry(write(name, [row]))])] == [kind]


def test_type_decides_before_the_keys(write):
    row = {"input_ids": [1], "text": "x", "body": "b", "instruction": "i", "output": "o"}
    jsonl, text = write("a.jsonl", [row]), write("a.json", [row])
    files = read_files([entry(jsonl, "completion", "body"), entry(text, "completion"), entry(text, "alpaca")])
    assert [file.format for file in files] == ["completion", "completion", "alpaca"]
    assert [text_of(d) for d in read_documents(files[0])] == ["b"]


def test_text_comes_back_exactly(write):
    text = "a\r\nb\u2028c\ttab \n\n"
    (file,) = read_files([entry(write("a.txt", b"\xef\xbb\xbf" + text.encode()))])
    assert text_of(next(read_documents(file))) == text
    (file,) = read_files([entry(write("a.jsonl", b"\xef\xbb\xbf\r\n" + json.dumps({"text": text}).encode()))])
    assert text_of(next(read_documents(file))) == text


GOOD = {"text": "fine"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "empty"),
        ("a.txt", b"ab\xff", "not UTF-8 text: byte 2 is 0xff"),
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", "\n \n", "empty"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3\n  not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2\n  not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n["text"]', "line 2\n  not a JSON object"),
        ("a.jsonl", "[" * 100_000, "line 1\n  not valid JSON"),
        ("a.jsonl", [{"txt": "a", "id": 1}], "keys of the first are txt, id"),
        ("a.jsonl", [{}], "keys of the first are none"),
        ("a.jsonl", [GOOD, {"txt": "a"}], "line 2\n  `text` must be a string; the row has txt"),
        ("a.jsonl", [GOOD, {"text": 1}], "line 2\n  `text` must be a string; it is int"),
        ("a.jsonl", [GOOD, {"text": "\ud800"}], "line 2\n  not valid JSON: a text holds half of a surrogate pair"),
        ("a.jsonl", [{"instruction": "x", "output": None}], "line 1\n  `output` must be a string"),
        ("a.jsonl", [{"instruction": "x", "output": "", "input": 3}], "line 1\n  `input` must be a string"),
        (
            "a.jsonl",
            [{"input_ids": [1]}, {"input_ids": []}],
            "line 2\n  `input_ids` must be a list of integers",
        ),
        ("a.jsonl", [{"input_ids": [1.0, 2]}], "line 1\n  `input_ids` must be a list of integers"),
        ("a.jsonl", [{"input_ids": [[1], [2, 3]]}], "`input_ids` must be a list of integers"),
        ("a.jsonl", [{"input_ids": "12"}], "`input_ids` must be a list of integers"),
        ("a.jsonl", [{"input_ids": [2**31]}], "`input_ids` must be a list of integers of 32 bits"),
        ("a.jsonl", [{"input_ids": [2**70]}], "`input_ids` must be a list of integers"),
        ("a.jsonl", [{"input_ids": [3, -1]}], "negative token -1"),
        ("a.jsonl", [{"input_ids": [3, 1], "labels": [1]}], "`labels` has 1 entries, `input_ids` has 2"),
        ("a.jsonl", [{"input_ids": [3, 1], "labels": [1, -5]}], "`labels` holds -5"),
        ("a.jsonl", [{"input_ids": [3, 1], "attention_mask": [1, 2]}], "must hold 0 and 1"),
    ],
)
def test_bad_files_are_named(write, name, content, says):
    path = write(name, content)
    with pytest.raises(UserError) as error:
        for file in read_files([entry(path)]):
            list((read_token_samples if file.kind == "tokenized" else read_documents)(file))
    assert str(path) in str(error.value)
    assert says in str(error.value)


def test_missing_paths_and_unknown_types_are_named(tmp_path, write):
    with pytest.raises(UserError, match="no such file or folder") as error:
        read_files([entry(tmp_path / "nowhere.txt")])
    assert "nowhere.txt" in str(error.value)
    with pytest.raises(UserError, match="holds no data"):
        read_files([entry(write("d/empty.txt", "").parent)])
    with pytest.raises(UserError, match="no data set is given"):
        read_files([])
    for kind, told in {
        "alpacca": "is not a known type of rows\n  nearest: alpaca",
        "zzz": "is not a known type of rows\n  known: chat_template, sharegpt",
        "alpaca:loud": "is not a known type",
        "oasst:load_x": "is not a known type",
        "llama2_chat": "this format is not read\n  use chat_template",
        "context_qa.load_v2": "this format is not read\n  its question has two parts",
        "bradley_terry.chat_template": "this format is not read\n  reward models are not trained here",
    }.items():
        with pytest.raises(UserError, match=f"datasets.type: {kind}\n  {told}"):
            read_files([entry(write("a.jsonl", [GOOD]), kind)])


def test_token_rows_stay_as_they_are(write):
    rows = [
        {"input_ids": [5, 6, 7]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 9]},
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0]},
        {"input_ids": [5, 6, 7], "attention_mask": [False, True, True], "labels": [5, -100, 7]},
        {"input_ids": [5, 6, 7], "attention_mask": None, "labels": None},
    ]
    (file,) = read_files([entry(write("a.jsonl", rows))])
    read = list(read_token_samples(file))
    assert all(row.tokens.dtype == np.int32 and row.tokens.tolist() == [5, 6, 7] for row in read)
    labels = [row.labels.tolist() if row.labels is not None else None for row in read]
    assert labels == [None, [-100, 6, 9], [5, 6, -100], [-100, -100, 7], None]
    assert [row.inner_masked for row in read] == [False, False, False, True, False]
    assert [row.targets() for row in read] == [2, 2, 1, 1, 2]
    assert str(read[3].origin) == f"{file.path}, line 4"


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ({"format": "{question}"}, r"datasets.type.format: \{question\}\n  \{question\} is not known here"),
        ({"no_input_format": "{input}"}, "datasets.type.no_input_format"),
        ({"system_format": "{"}, "datasets.type.system_format"),
        ({"format": "{instruction.__class__}"}, "is not known here\n  in braces may stand instruction and input"),
        ({"format": "{instruction:>999999999}"}, "datasets.type.format"),
        ({"format": "{}"}, "datasets.type.format"),
    ],
)
def test_prompts_of_the_users_own_that_cannot_be_filled_are_refused(write, prompt, told):
    with pytest.raises(UserError, match=told):
        read_files([entry(write("a.jsonl", [{"instruction": "a", "output": "b"}]), prompt)])


def test_positions_that_begin_again_begin_a_document(write):
    rows = [
        {"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 2, 3]},
        {"input_ids": [5, 6], "position_ids": [0, 0], "labels": [5, 6]},
    ]
    (file,) = read_files([entry(write("a.jsonl", rows))])
    found = [None if row.positions is None else row.positions.tolist() for row in read_token_samples(file)]
    assert found == [[0, 1, 0, 1], None, [0, 0]]


@pytest.mark.parametrize(
    ("positions", "told"),
    [
        ([1, 2, 3], "`position_ids` holds 1 at place 0"),
        ([0, 2, 3], "`position_ids` holds 2 at place 1"),
        ([0, 1, 1], "`position_ids` holds 1 at place 2"),
        ([0, 1], "`position_ids` has 2 entries, `input_ids` has 3"),
        ([0.0, 1.0, 2.0], "`position_ids` must be a list of integers"),
    ],
)
def test_positions_that_count_otherwise_are_refused(write, positions, told):
    (file,) = read_files([entry(write("a.jsonl", [{"input_ids": [1, 2, 3], "position_ids": positions}]))])
    with pytest.raises(UserError, match=f"line 1\n  {told}"):
        next(read_token_samples(file))


def test_alpaca_prompts(write):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "la"},
        {"instruction": "Sing.", "output": "la"},
    ]
    (file,) = read_files([entry(write("a.jsonl", rows), "alpaca")])
    with_input, empty_input, without = (document.segments for document in read_documents(file))
    assert with_input[0] == Segment(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        learnt=False,
    )
    assert with_input[1] == Segment("3")
    assert (
        empty_input[0]
        == without[0]
        == Segment(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nSing.\n\n### Response:\n",
            learnt=False,
        )
    )


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("d/train.txt", [{"text": "x"}, {"text": "y"}], "holds JSON rows"),
        ("d/rows", '[\n {"text": "x"},\n {"text": "y"}\n]', "is JSON, not text"),
        ("d/rows.txt.gz", b"not gzip", "not compressed that way"),
        ("d/zipped", b"\x1f\x8b\x08\xff", "holds gz"),
        ("d/table", b"PAR1\x00\x01", "holds parquet"),
        ("d/train.Parquet", b"PAR2", "is no parquet file"),
    ],
)
def test_what_is_no_text_is_never_trained_on_as_text(write, name, content, told):
    with pytest.raises(UserError, match=told):
        read_files([entry(write(name, content).parent)])


def test_text_that_looks_like_json_is_text(write):
    """A template, a list of code, numbers: nothing that rows would be."""
    for name, text in {
        "a.txt": "{{name}} sails\nnorth",
        "b.txt": "[draft] a title\n",
        "c.txt": "[1, 2]\n{x}\n",
    }.items():
        assert [file.kind for file in read_files([entry(write(name, text))])] == ["text"]


IDS = {"input_ids": [5, 6, 7, 8]}


@pytest.mark.parametrize(
    ("row", "key"),
    [
        (IDS | {"cu_seqlens": [0, 2, 4]}, "cu_seqlens"),
        (IDS | {"seq_lens": [2, 2]}, "seq_lens"),
        (IDS | {"sequence_id": [0, 0, 1, 1]}, "sequence_id"),
        (IDS | {"loss_mask": [0, 0, 1, 1]}, "loss_mask"),
        (IDS | {"token_type_ids": [0, 0, 1, 1]}, "token_type_ids"),
        ({"text": "x", "weight": 0.5}, "weight"),
        ({"text": "x", "labels": [1, -100]}, "labels"),
        ({"instruction": "i", "output": "o", "system": "be brief"}, "system"),
    ],
)
def test_a_key_that_changes_the_meaning_is_refused_with_its_line(write, row, key):
    plain = {name: row[name] for name in row if name != key}
    (file,) = read_files([entry(write("a.jsonl", [plain, row]))])
    with pytest.raises(UserError, match=f"line 2\n  `{key}` would change what the row means"):
        list((read_token_samples if file.kind == "tokenized" else read_documents)(file))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("segment_id", [0, 0, 1, 1]),
        ("token_weights", [0.5, 0.5, 1.0, 1.0]),
        ("assistant_mask", [False, False, True, True]),
        ("Position_IDs", [0, 1, 0, 1]),
        ("target_ids", [6, 7, 8, 9]),
        ("cu_seqlens_q", [0, 2, 4]),
        ("lengths", [1, 3]),
    ],
)
def test_what_tells_of_tokens_under_any_name_is_refused_with_its_line(write, key, value):
    (file,) = read_files([entry(write("a.jsonl", [IDS, IDS | {key: value}]))])
    with pytest.raises(UserError, match=f"line 2\n  `{key}` has .*, and is not heeded"):
        list(read_token_samples(file))


def test_keys_that_say_nothing_are_ignored(write):
    same = {"position_ids": [0, 1, 2, 3], "cu_seqlens": [0, 4], "seq_lens": [4], "sequence_id": 3, "weight": 1.0}
    rows = [IDS | same | {"token_type_ids": [0] * 4, "loss_mask": [1] * 4, "id": 9, "source": "web", "metadata": {}}]
    rows[0] |= {"token_ids": [5, 6, 7, 8], "special_tokens_mask": [1, 0, 0, 0], "length": [4], "scores": [1, 2, 3]}
    rows[0] |= {"tokens": ["a", "b", "c", "d"], "rewards": [0.5, 0.5, 0.5, 0.5]}
    (file,) = read_files([entry(write("a.jsonl", rows))])
    assert next(read_token_samples(file)).tokens.tolist() == IDS["input_ids"]
    text = {"text": "x", "label": 1, "labels": 2, "system": "s", "id": 1}
    (file,) = read_files([entry(write("b.jsonl", [text]))])
    assert text_of(next(read_documents(file))) == "x"


@pytest.mark.parametrize("ids", ["[1, 2147483648]", "[1, -2]", "[1, 1e400]", "[1, 99999999999999999999999]"])
def test_ids_out_of_range_are_refused_with_their_line(write, ids):
    (file,) = read_files([entry(write("a.jsonl", '{"input_ids": [1]}\n{"input_ids": ' + ids + "}\n"))])
    with pytest.raises(UserError, match="line 2"):
        list(read_token_samples(file))


def test_json_nested_without_end_is_refused(write):
    with pytest.raises(UserError, match="line 1\n  not valid JSON: nested deeper"):
        read_files([entry(write("a.jsonl", '{"text": ' + "[" * 200_000 + "}\n"))])


def test_a_name_that_is_no_text_is_written_as_its_bytes():
    assert str(Origin(Path(os.fsdecode(b"data/a\xff.txt")), 3)) == r"data/a\xff.txt, line 3"
