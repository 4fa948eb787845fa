"""Each kind of file that cannot be read becomes one UserError that names it."""

import os

import pytest

from tessera.core.errors import UserError
from tessera.core.files import open_file, parse_json, read_bytes, read_json, read_text


def _refused(read, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(*args, **options)
    return str(caught.value)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "whole").write_bytes(b"x" * 11)
    assert "no regular file" in _refused(open_file, tmp_path / "fifo", "a key")
    assert "no regular file" in _refused(open_file, "/dev/zero", "a key")
    assert "is a folder" in _refused(open_file, tmp_path, "a key")
    assert "does not exist" in _refused(open_file, tmp_path / "none", "a key")
    assert "circle" in _refused(open_file, tmp_path / "loop", "a key")
    assert "NUL" in _refused(open_file, tmp_path / "a\0b", "a key")
    assert "too long" in _refused(open_file, tmp_path / ("n" * 300), "a key")
    assert "too large: 11 B, at most 10 B" in _refused(read_bytes, tmp_path / "whole", "a key", limit=10)
    assert read_bytes(tmp_path / "whole", "a key", limit=11) == b"x" * 11


def test_a_pipe_is_read_where_it_may_be_one(tmp_path):
    end, start = os.pipe()
    os.write(start, b"a: 1")
    os.close(start)
    assert read_text(f"/dev/fd/{end}", "config file", pipes=True) == "a: 1"
    os.close(end)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 200_000, "nested deeper"),
        (b"[" * 101 + b"1" + b"]" * 101, "nested deeper"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b"1" * 5000, "cannot be read as JSON"),
    ],
)
def test_what_is_not_json_is_refused(tmp_path, content, reason):
    (tmp_path / "file.json").write_bytes(content)
    assert reason in _refused(read_json, tmp_path / "file.json", "a key")


def test_what_is_json_is_read(tmp_path):
    (tmp_path / "file.json").write_text('{"a": ["\\ud83d\\ude00", 1.5, null]}')
    assert read_json(tmp_path / "file.json", "a key") == {"a": ["\U0001f600", 1.5, None]}
    assert parse_json("[" * 100 + "]" * 100)
