"""Finds the files of `datasets`, and reads them: text files and rows become documents, rows of tokens samples.

`formats/` has the containers (what a file is) and the formats (what a row means); here is which files an entry names,
and the one value that says how a file is read. Every mistake is a UserError that names the file, and the row in it.
"""

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

from tessera.core.errors import UserError
from tessera.core.files import in_words
from tessera.data.documents import Document, Segment
from tessera.data.formats.container import Container, identify, opened, rows_of
from tessera.data.formats.entry import Entry, Reading
from tessera.data.formats.known import TOKENIZED, format_of, reader_of
from tessera.data.formats.tokenized import token_sample
from tessera.data.samples import Origin, Sample

FileKind = Literal["text", "documents", "tokenized"]
BLOCK = 1 << 20
"""Bytes hashed at a time."""


class DatasetSettings(Protocol):
    """One entry of `datasets`; `Entry` has the keys that are read of it."""

    @property
    def path(self) -> str: ...


@dataclass(frozen=True)
class SourceFile:
    """A file, the BLAKE2b of its content (a byte order mark left out), and all that says how it is read.

    It holds nothing of the content, and can be sent to another process. `format` is "text", TOKENIZED, or the name of
    what its rows are.
    """

    path: Path
    digest: str
    container: Container
    format: str
    entry: Entry
    reading: Reading

    @property
    def kind(self) -> FileKind:
        """What it becomes: a document that is one text, documents of rows, or samples of tokens."""
        return "text" if self.format == "text" else "tokenized" if self.format == TOKENIZED else "documents"

    @property
    def key(self) -> str:
        """Equal for files that give equal rows: content and settings, not the path."""
        entry = asdict(self.entry)
        for name in ("path", "data_files", "ds_type", "name", "split", "revision"):  # which file, not how
            del entry[name]
        reading = asdict(self.reading) | {"tokenizer": None}  # its content is part of the tokenizer's own digest
        return json.dumps([self.digest, self.container, self.format, entry, reading], default=str)


def read_files(
    datasets: Sequence[DatasetSettings],
    output_dir: str | Path | None = None,
    reading: Reading | None = None,
    notes: list[str] | None = None,
) -> list[SourceFile]:
    """Every file of every entry, in the order of the config; those of a folder (at any depth) sorted by path.

    Hidden and empty files of a folder are passed over, and what lies in `output_dir` where that is within the folder.
    `reading` has the keys that all entries share; `notes` gets what the user should be told, a line each.
    UserError: no entry, no such path, nothing in it, a format that is not known, or the folder is `output_dir`.
    """
    if not datasets:
        raise UserError("datasets", [], "no data set is given", "datasets: [{path: ...}] names one")
    files = []
    for settings in datasets:
        entry = Entry.of(settings)
        found = [
            _source(path, digest, entry, reading or Reading())
            for path in _without_own(_find(Path(entry.path)), entry.path, output_dir)
            if (digest := _digest(path))
        ]
        if not found:
            raise UserError("datasets", entry.path, "holds no text: the file or folder is empty")
        files += found
    return files


def read_documents(file: SourceFile) -> Iterator[Document]:
    """The documents of a file of text or of rows that are no tokens, read as they are asked for.

    A text file is one document, read whole: `read_text` gives it in blocks.
    """
    if file.kind == "text":
        yield Document(Origin(file.path), (Segment("".join(read_text(file))),), cut=True)
        return
    read = reader_of(file.entry, file.format)
    for origin, row in rows_of(file.path, file.container):
        yield read(row, origin, file.entry, file.reading)


def read_text(file: SourceFile) -> Iterator[str]:
    """The text of a text file, in blocks. UserError, with the place, where it is not UTF-8."""
    decoder, passed = codecs.getincrementaldecoder("utf-8")(), 0
    with opened(file.path, file.container.packed) as text:
        ended = False
        while not ended:
            content, before = text.read(BLOCK), decoder.getstate()[0]
            ended = not content
            try:
                yield decoder.decode(content, final=ended)
            except UnicodeDecodeError as error:
                at = passed - len(before) + error.start
                reason = f"is not UTF-8 text: byte {at} is 0x{(before + content)[error.start]:02x}"
                raise UserError("datasets", file.path, reason) from error
            passed += len(content)


def read_token_samples(file: SourceFile) -> Iterator[Sample]:
    """The rows of a tokenized file as they are: `input_ids`, optional `labels` (unshifted), `attention_mask`,
    `position_ids`. Masked positions become ignored labels."""
    return (token_sample(row, origin) for origin, row in rows_of(file.path, file.container))


def _source(path: Path, digest: str, entry: Entry, reading: Reading) -> SourceFile:
    container = identify(path, entry.ds_type)
    if container.kind == "text":
        return SourceFile(path, digest, container, "text", entry, reading)
    first: Any = None
    if entry.type is None:
        first = next(rows_of(path, container), (None, None))[1]
        if first is None:
            raise UserError("datasets", path, "holds no rows")
    return SourceFile(path, digest, container, format_of(entry, path, first), entry, reading)


def _find(path: Path) -> list[Path]:
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            return sorted(file for file in _inside(path) if file.is_file())
    except OSError as error:
        raise UserError("datasets", error.filename or path, f"cannot be read: {in_words(error)}") from error
    hint = "give the path of a local text file, a folder of them, or a .jsonl file"
    raise UserError("datasets", path, "no such file or folder", hint)


def _inside(folder: Path) -> Iterator[Path]:
    """What a folder holds at any depth but for folders and what is hidden. OSError for one that cannot be listed."""

    def stop(error: OSError) -> NoReturn:
        raise error

    for place, folders, files in os.walk(folder, onerror=stop):
        # a disk's lost+found is root's alone
        folders[:] = [name for name in folders if not name.startswith(".") and name != "lost+found"]
        yield from (Path(place, name) for name in files if not name.startswith("."))


def _without_own(found: list[Path], given: str, output_dir: str | Path | None) -> list[Path]:
    """The files of a data folder but for those that the run itself writes: at its next start they would be data."""
    if output_dir is None:
        return found
    own, folder = Path(os.path.realpath(output_dir)), Path(os.path.realpath(given))
    if own == folder:
        reason = f"is the data folder {given} too: the run would read what it writes"
        raise UserError("output_dir", output_dir, reason, f"a folder of its own, such as {Path(output_dir) / 'run'}")
    if not own.is_relative_to(folder):
        return found
    return [path for path in found if not Path(os.path.realpath(path)).is_relative_to(own)]


def _digest(path: Path) -> str:
    """The BLAKE2b of the content in hexadecimal; empty when that is nothing but space."""
    digest, says_something = blake2b(digest_size=16), False
    with opened(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            says_something = says_something or not block.isspace()
    return digest.hexdigest() if says_something else ""
