"""Rows of JSON files: an object a line, an array of objects, an object around such an array; never read whole."""

import codecs
import json
import re
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
TO_UTF8 = "convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW_FILE"


def json_lines(file: BinaryIO, path: Path) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """Origin and object of every line that is not blank."""
    for origin, line in lines_of(file, path):
        try:
            row = parse_json(line.removesuffix(b"\n"))
        except ValueError as error:
            raise UserError("datasets", origin, f"not valid JSON: {error}", "one JSON object per line") from error
        if not isinstance(row, dict):
            raise UserError("datasets", origin, "not a JSON object", "one JSON object per line")
        yield origin, row


def lines_of(file: BinaryIO, path: Path) -> Iterator[tuple[Origin, bytes]]:
    """Origin and content of every line that is not blank."""
    # one byte more than a row may have: of a longer line no more is read
    for number, line in enumerate(iter(lambda: file.readline(SMALL + 1), b""), start=1):
        if len(line) > SMALL:
            origin = Origin(path, number)
            raise UserError("datasets", origin, f"longer than {SMALL:,} bytes", "one JSON object per line")
        if line.strip():
            yield Origin(path, number), line


def json_rows(file: BinaryIO, path: Path) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """Origin and object of every row of a .json file: an array, an array inside an object, or objects in a row."""
    return _Objects(file, path).rows()


class _Objects:
    """The objects of an array, parsed one by one from a text of which only the next one is held."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._number = file, path, 0
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at, self._ended = "", 0, False

    def rows(self) -> Iterator[tuple[Origin, dict[str, Any]]]:
        """Every object of the array that the text is, or that lies in it under a key of AROUND, or of the text."""
        inside = self._next() == "{"
        first = self._enter() if inside else None
        if first is None:
            yield from self._array()
            if not inside and self._next():
                raise self._wrong("not valid JSON: more follows behind the array")
            return
        while True:
            self._number += 1
            yield self._row(first)
            if not self._next():
                return
            first = self._value()

    def _array(self) -> Iterator[tuple[Origin, dict[str, Any]]]:
        if self._next() != "[":
            raise self._wrong("holds no rows")
        self._at += 1
        while (character := self._next()) != "]":
            if self._number:
                if character != ",":
                    raise self._wrong("not valid JSON: a comma is missing")
                self._at += 1
            self._number += 1
            yield self._row(self._value())
        self._at += 1

    def _row(self, value: Any) -> tuple[Origin, dict[str, Any]]:
        if not isinstance(value, dict):
            raise self._wrong("not a JSON object")
        return Origin(self._path, self._number, "row"), value

    def _enter(self) -> dict[str, Any] | None:
        """Go to the first array of objects under a key of AROUND; where there is none, read the whole object."""
        found: dict[str, Any] = {}
        self._at += 1
        while (character := self._next()) != "}":
            if found:
                if character != ",":
                    raise self._wrong("not valid JSON: a comma is missing")
                self._at += 1
            key = self._value()
            if not isinstance(key, str) or self._next() != ":":
                raise self._wrong("not valid JSON: a key and a colon are missing")
            self._at += 1
            if key in AROUND and self._next() == "[" and self._begins_with_an_object():
                return None
            found[key] = self._value()
        self._at += 1
        return found

    def _begins_with_an_object(self) -> bool:
        """Whether the array that begins here does."""
        while (found := _FIRST.match(self._text, self._at)) is None and self._more(BLOCK):
            pass
        return found is not None and found[1] == "{"

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
            raise self._wrong(f"is not UTF-8 text: {error.reason}", TO_UTF8) from error
        self._text, self._at = self._text[self._at :] + new, 0
        return bool(new) or not self._ended

    def _wrong(self, reason: str, hint: str = _AN_ARRAY) -> UserError:
        origin = Origin(self._path, self._number, "row") if self._number else Origin(self._path)
        return UserError("datasets", origin, reason, hint)


_DECODER = json.JSONDecoder()
_FIRST = re.compile(r"\[\s*(\S)")
