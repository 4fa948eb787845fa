"""Rows of JSON files: an object a line, an array of objects, or an object around such an array; never read whole."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tessera.core.errors import UserError
from tessera.core.files import DEPTH, SMALL, SURROGATE, check_json, parse_json
from tessera.data.samples import Origin

AROUND = ("data", "rows", "examples", "train")
"""Keys of an object under which files keep their rows."""
BLOCK = 1 << 16
_SPACE = " \t\r\n"
_AN_ARRAY = "an array of objects, or one object a line"


def json_lines(file: BinaryIO, path: Path) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """Origin and object of every line that is not blank."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        origin = Origin(path, number)
        try:
            row = parse_json(line.removesuffix(b"\n"))
        except ValueError as error:
            raise UserError("datasets", origin, f"not valid JSON: {error}", "one JSON object per line") from error
        if not isinstance(row, dict):
            raise UserError("datasets", origin, "not a JSON object", "one JSON object per line")
        yield origin, row


def json_rows(file: Any, path: Path) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """Origin and object of every row of a .json file, in whichever of the three forms it has."""
    while file.peek(1)[:1].isspace():
        file.read(1)
    if file.peek(1)[:1] == b"{" and _one_a_line(file.peek(BLOCK)):
        return json_lines(file, path)
    return _Objects(file, path).rows()


def _one_a_line(start: bytes) -> bool:
    """Whether the first line is a row by itself. Of a line too long to be seen whole: whether it does not begin so
    that its rows lie inside."""
    line, _, _ = start.partition(b"\n")
    try:
        row = parse_json(line)
    except ValueError:
        return False
    return isinstance(row, dict) and not any(_is_rows(row.get(key)) for key in AROUND)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


class _Objects:
    """The objects of an array, parsed one by one from a text of which only the next one is held."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._number = file, path, 0
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at, self._ended = "", 0, False

    def rows(self) -> Iterator[tuple[Origin, dict[str, Any]]]:
        """Every object of the array that the text is, or that lies in it under a key of AROUND."""
        if self._next() == "{":
            self._enter()
        if self._next() != "[":
            raise self._wrong(f"holds no rows: {_AN_ARRAY}")
        self._at += 1
        while (character := self._next()) != "]":
            if self._number:
                if character != ",":
                    raise self._wrong("not valid JSON: a comma is missing")
                self._at += 1
            self._number += 1
            row = self._value()
            if not isinstance(row, dict):
                raise self._wrong("not a JSON object")
            yield Origin(self._path, self._number, "row"), row

    def _enter(self) -> None:
        """Go to the value of the first key of AROUND whose value is a list."""
        seen: list[str] = []
        self._at += 1
        while self._next() == '"':
            key = self._value()
            if self._next() != ":":
                raise self._wrong("not valid JSON: a colon is missing")
            self._at += 1
            if key in AROUND and self._next() == "[":
                return
            self._value()
            seen.append(key)
            if self._next() == ",":
                self._at += 1
        reason = f"one object with the keys {', '.join(seen[:5])}: no rows under {' or '.join(AROUND)}"
        raise UserError("datasets", self._path, reason, _AN_ARRAY)

    def _next(self) -> str:
        """The next character that is no space, which stays to be read; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(BLOCK):
                return ""

    def _value(self) -> Any:
        self._next()
        size = BLOCK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                break
            except RecursionError:
                raise self._wrong(f"not valid JSON: nested deeper than {DEPTH} levels") from None
            except ValueError as error:
                cut = "Unterminated" in str(error) or getattr(error, "pos", 0) > len(self._text) - 16
                if len(self._text) - self._at > SMALL or not (cut and self._more(size)):
                    raise self._wrong(f"not valid JSON: {getattr(error, 'msg', error)}") from error
                size *= 2  # so that a long row is parsed a few times alone
        try:
            check_json(value, halves=SURROGATE.search(self._text, self._at, end) is not None or "\\u" in self._text)
        except ValueError as error:
            raise self._wrong(f"not valid JSON: {error}") from error
        self._at = end
        return value

    def _more(self, size: int) -> bool:
        """Read on; False at the end of the file."""
        if self._ended:
            return False
        block = self._file.read(size)
        self._ended = len(block) == 0
        try:
            new = self._decode(block, self._ended)
        except UnicodeDecodeError as error:
            raise self._wrong(f"is not UTF-8 text: {error.reason}") from error
        self._text, self._at = self._text[self._at :] + new, 0
        return bool(new) or not self._ended

    def _wrong(self, reason: str) -> UserError:
        origin = Origin(self._path, self._number, "row") if self._number else Origin(self._path)
        return UserError("datasets", origin, reason, _AN_ARRAY)


_DECODER = json.JSONDecoder()
