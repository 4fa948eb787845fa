"""Finds the files of `datasets`, and reads them: text files and rows become documents, rows of tokens samples.

`formats/` has the containers (what a file is) and the formats (what a row means); here is which files an entry names,
and the one value that says how a file is read. Every mistake is a UserError that names the file, and the row in it.
"""

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

from tessera.core.errors import UserError
from tessera.data.documents import Document, Segment
from tessera.data.formats.container import Container, count_rows, identify, opened, rows_of
from tessera.data.formats.entry import Entry, Reading
from tessera.data.formats.json_rows import TO_UTF8
from tessera.data.formats.known import CHATS, TOKENIZED, format_of, reader_of
from tessera.data.formats.template import Template, template_of
from tessera.data.formats.tokenized import token_sample
from tessera.data.found import find_files
from tessera.data.parts import Part, parts_of, slice_of
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
    template: Template | None = None
    part: Part = Part()

    @property
    def kind(self) -> FileKind:
        """What it becomes: a document that is one text, documents of rows, or samples of tokens."""
        return "text" if self.format == "text" else "tokenized" if self.format == TOKENIZED else "documents"

    @property
    def key(self) -> str:
        """Equal for files that give equal rows: content and settings, not the path."""
        entry = asdict(self.entry)
        for name in ("path", "data_files", "ds_type", "name", "split", "revision", "skip", "shards", "shards_idx"):
            del entry[name]  # they say which rows; digest and part have those
        template = None if self.template is None else asdict(self.template)
        how = [self.container, self.format, self.part, entry, self.reading.train_on_inputs, template]
        return json.dumps([self.digest, *how], default=str)


def read_files(
    datasets: Sequence[DatasetSettings],
    output_dir: str | Path | None = None,
    reading: Reading | None = None,
    notes: list[str] | None = None,
    stream: bool = False,
) -> list[SourceFile]:
    """Every file of every entry, in the order of the config; those of a folder (at any depth) sorted by path.

    Hidden and empty files of a folder are passed over, and what lies in `output_dir` where that is within the folder.
    `reading` has the keys that all entries share; `notes` gets what the user should be told, a line each. Of a `stream`
    the digest is that of name and size, for it may be too long to be read twice, and its rows are texts unless a type
    is given.
    UserError: no entry, no such path, nothing in it, a format that is not known, or the folder is `output_dir`.
    """
    if not datasets:
        raise UserError("datasets", [], "no data set is given", "datasets: [{path: ...}] names one")
    files = []
    notes = [] if notes is None else notes
    for settings in datasets:
        entry = Entry.of(settings)
        if stream and entry.type is None:
            entry = replace(entry, type="completion")
        files += _of_entry(entry, reading or Reading(), output_dir, notes, _named if stream else _digest)
    return files


def _of_entry(
    entry: Entry, reading: Reading, output_dir: str | Path | None, notes: list[str], digest_of: Callable[[Path], str]
) -> list[SourceFile]:
    slice_of(entry)
    found: list[SourceFile] = []
    templates: dict[str, Template] = {}
    for path in find_files(entry, output_dir, notes):
        if digest := digest_of(path):
            container, name = _recognised(path, entry, notes)
            if name in CHATS and not templates:
                templates = dict.fromkeys(CHATS, template_of(entry, reading, notes))
            found.append(SourceFile(path, digest, container, name, entry, reading, templates.get(name)))
    if not found:
        raise UserError("datasets", entry.path, "holds no text: the file or folder is empty")
    if slice_of(entry) is None and entry.shards is None:
        return _without_first(found, entry)
    text = next((file for file in found if file.kind == "text"), None)
    if text:
        raise UserError("datasets.split", entry.split or "unset", f"{text.path} is text: it has no rows to choose from")
    parts = parts_of(entry, len(found), lambda n, most: count_rows(found[n].path, found[n].container, most))
    chosen = [replace(file, part=part) for file, part in zip(found, parts, strict=True) if part is not None]
    if not chosen:
        raise UserError("datasets.split", entry.split or "unset", f"leaves no row of {entry.path}")
    return _without_first(chosen, entry)


def _without_first(files: list[SourceFile], entry: Entry) -> list[SourceFile]:
    """The files without the rows that the entry skips; a text file is one."""
    left, kept = entry.skip, []
    for file in files:
        if left and file.kind == "text":
            left -= 1
            continue
        if left:
            part = file.part
            rows = part.rows(count_rows(file.path, file.container, part.first + left + 1))
            if rows <= left:
                left -= rows
                continue
            file, left = replace(file, part=part._replace(first=part.first + left)), 0
        kept.append(file)
    if not kept:
        raise UserError("datasets.skip", entry.skip, f"leaves no row of {entry.path}", f"below {entry.skip - left}")
    return kept


def read_documents(file: SourceFile, first: int = 0) -> Iterator[Document]:
    """The documents of a file of text or of rows that are no tokens, from the `first` on, read as they are asked for.

    A text file is one document, read whole: `read_text` gives it in blocks.
    """
    if file.kind == "text":
        yield Document(Origin(file.path), (Segment("".join(read_text(file))),), cut=True)
        return
    read = reader_of(file.entry, file.format, file.template)
    for origin, row in islice(file.part.of(rows_of(file.path, file.container)), first, None):
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
                raise UserError("datasets", file.path, reason, TO_UTF8) from error
            passed += len(content)


def read_token_samples(file: SourceFile) -> Iterator[Sample]:
    """The rows of a tokenized file as they are: `input_ids`, optional `labels` (unshifted), `attention_mask`,
    `position_ids`. Masked positions become ignored labels."""
    return (token_sample(row, origin) for origin, row in file.part.of(rows_of(file.path, file.container)))


def _recognised(path: Path, entry: Entry, notes: list[str]) -> tuple[Container, str]:
    """What a file is, and the name of what its rows are."""
    container = identify(path, entry.ds_type)
    if container.kind == "text":
        if entry.type not in (None, "completion", "pretrain"):
            reason = f"is text, and has no rows of type {entry.type if isinstance(entry.type, str) else 'user-written'}"
            raise UserError("datasets", path, reason, "leave the type out; rows are read from .jsonl, .json, .csv, …")
        return container, "text"
    first = next(rows_of(path, container), None)
    if first is None:
        raise UserError("datasets", path, "holds no rows")
    return container, format_of(entry, path, first[1], notes)


def is_there(file: SourceFile) -> bool:
    """Whether a file of a stream has the name and size that it was found with."""
    try:
        return _named(file.path) == file.digest
    except OSError:
        return False


def _named(path: Path) -> str:
    """A digest of the name and size of a file; empty where the file is."""
    size = path.stat().st_size
    return blake2b(f"{path.name} {size}".encode(), digest_size=16).hexdigest() if size else ""


def _digest(path: Path) -> str:
    """The BLAKE2b of the content in hexadecimal; empty when that is nothing but space."""
    digest, says_something = blake2b(digest_size=16), False
    with opened(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            says_something = says_something or not block.isspace()
    return digest.hexdigest() if says_something else ""
