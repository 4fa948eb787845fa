"""Finds and reads the files of `datasets`: text files become documents, token files become rows.

| file                                                | kind      | becomes                                  |
|-----------------------------------------------------|-----------|------------------------------------------|
| text, in files of any other name                    | text      | a document; all are cut into windows     |
| .jsonl with `text` (or `field`); `type: completion` | lines     | a document a line, each a row of its own |
| .jsonl with `instruction`, `output`; `type: alpaca` | alpaca    | a document a line, its prompt apart      |
| .jsonl with `input_ids`                             | tokenized | rows as they are                         |

.ndjson and .jsonlines are .jsonl too, whatever the case. Without a `type` such a file is recognised by the keys of
its first row, and what is no text, or JSON under another name, is refused. Every mistake is a UserError that
names the file, and the line where there is one.
"""

import codecs
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, Protocol

import numpy as np

from tessera.core.errors import UserError
from tessera.core.files import SMALL, in_words, parse_json
from tessera.data.rows import check_keys
from tessera.data.samples import IGNORED, Ids, Origin, Sample

FileKind = Literal["text", "lines", "alpaca", "tokenized"]
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
NOT_TEXT = {
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".feather",
    ".npy",
    ".npz",
    ".bin",
    ".pkl",
    ".pt",
    ".safetensors",
}
NOT_TEXT |= {".zip", ".gz", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".pdf", ".docx", ".xlsx"}
BLOCK = 1 << 20
"""Bytes hashed at a time."""


class DatasetSettings(Protocol):
    """One entry of `datasets`; `field` is the key of a JSONL row that holds its text."""

    @property
    def path(self) -> str: ...
    @property
    def type(self) -> str | None: ...
    @property
    def field(self) -> str: ...


@dataclass(frozen=True)
class SourceFile:
    """A file, the BLAKE2b of its content (a byte order mark left out), and `field` as in the entry that named it.

    Of its content no more is held than is read at a time: a block, or a line.
    """

    path: Path
    digest: str
    kind: FileKind
    field: str


@dataclass(frozen=True)
class Document:
    """Text to learn, behind a `prompt` that is only read (or learnt too, with `train_on_inputs`)."""

    origin: Origin
    text: str
    prompt: str = ""


def read_files(datasets: Sequence[DatasetSettings], output_dir: str | Path | None = None) -> list[SourceFile]:
    """Every file of every entry, in the order of the config; those of a folder (at any depth) sorted by path.

    Hidden and empty files of a folder are passed over, and what lies in `output_dir` where that is within the folder.
    UserError: no entry, no such path, no text in it, or the folder is `output_dir`.
    """
    if not datasets:
        raise UserError("datasets", [], "no data set is given", "datasets: [{path: ...}] names one")
    files = []
    for entry in datasets:
        scanned = ((path, _digest(path)) for path in _without_own(_find(Path(entry.path)), entry.path, output_dir))
        found = [SourceFile(path, digest, _kind(path, entry), entry.field) for path, digest in scanned if digest]
        if not found:
            raise UserError("datasets", entry.path, "holds no text: the file or folder is empty")
        files += found
    return files


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


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file behind its byte order mark, if it has one."""
    try:
        with path.open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            yield file
    except OSError as error:
        raise UserError("datasets", path, f"cannot be read: {error.strerror}") from error


def _digest(path: Path) -> str:
    """The BLAKE2b of the content in hexadecimal; empty when that is nothing but space."""
    digest, says_something = blake2b(digest_size=16), False
    with _opened(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            says_something = says_something or not block.isspace()
    return digest.hexdigest() if says_something else ""


def _kind(path: Path, entry: DatasetSettings) -> FileKind:
    ending = path.suffix.lower()
    jsonl = ending in JSON_LINES
    if entry.type == "alpaca":
        return "alpaca"
    if entry.type == "completion":
        return "lines" if jsonl else "text"
    if entry.type is not None:
        hint = "completion, alpaca, or no type at all"
        raise UserError("datasets.type", entry.type, f"unknown, for {path}", hint)
    if jsonl:
        return _recognise(path, entry.field)
    problem = "is not text" if ending in NOT_TEXT else _not_text(path)
    if problem:
        hint = "write it as .jsonl, or say `type: completion` to read it raw"
        raise UserError("datasets", path, problem, hint)
    return "text"


def _not_text(path: Path) -> str:
    """Why the content of a file is no text to train on as it is; "" where it may be."""
    with _opened(path) as file:
        start = file.read(BLOCK)
        if b"\0" in start:
            return "is not text: it holds NUL bytes"
        try:
            codecs.getincrementaldecoder("utf-8")().decode(start)
        except UnicodeDecodeError as error:
            return f"is not UTF-8 text: byte {error.start} is 0x{start[error.start]:02x}"
        lead = start.lstrip()
        if not lead.startswith((b"{", b"[")):
            return ""
        if _is_json(lead.split(b"\n", 1)[0]):
            return "holds JSON rows, though its name does not end in .jsonl"
        return "is JSON, not text" if _is_json(lead + file.read(SMALL)) else ""


def _is_json(content: bytes) -> bool:
    """Whether `content` is a JSON object, or a list of them."""
    try:
        value = parse_json(content)
    except ValueError:
        return False
    return isinstance(value, dict) or isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _recognise(path: Path, field: str) -> FileKind:
    _, row = next(_json_lines(path))
    if "input_ids" in row:
        return "tokenized"
    if field in row:
        return "lines"
    if "instruction" in row and "output" in row:
        return "alpaca"
    keys = ", ".join(map(str, row)) or "none"
    hint = f"a row has `input_ids`, `{field}` (see `field`), or `instruction` and `output`"
    raise UserError("datasets", path, f"no known kind of row: the keys of the first are {keys}", hint)


def read_documents(file: SourceFile) -> list[Document]:
    """The documents of a file of text, lines or alpaca rows."""
    if file.kind == "text":
        with _opened(file.path) as opened:
            content = opened.read()
        try:
            return [Document(Origin(file.path), content.decode("utf-8"))]
        except UnicodeDecodeError as error:
            reason = f"is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}"
            raise UserError("datasets", file.path, reason) from error
    read = _alpaca if file.kind == "alpaca" else _line
    return [read(row, origin, file.field) for origin, row in _json_lines(file.path)]


def read_token_samples(file: SourceFile) -> list[Sample]:
    """The rows of a tokenized file as they are: `input_ids`, optional `labels` (unshifted), `attention_mask`.

    Masked positions become ignored labels.
    """
    return [_token_sample(row, origin) for origin, row in _json_lines(file.path)]


def _json_lines(path: Path) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """Origin and object of every line that is not blank; the file has at least one."""
    with _opened(path) as file:
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


def _string(row: dict[str, Any], key: str, origin: Origin) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        found = f"the row has {', '.join(row) or 'no key'}" if key not in row else f"it is {type(value).__name__}"
        raise UserError("datasets", origin, f"`{key}` must be a string; {found}", "`field` names the key of the text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        raise UserError("datasets", origin, f"`{key}` is not valid Unicode: {error}") from error
    return value


def _line(row: dict[str, Any], origin: Origin, field: str) -> Document:
    check_keys(row, origin, (field,))
    return Document(origin, _string(row, field, origin))


def _alpaca(row: dict[str, Any], origin: Origin, field: str) -> Document:
    check_keys(row, origin, (), prompted=True)
    instruction, output = _string(row, "instruction", origin), _string(row, "output", origin)
    given = _string(row, "input", origin) if row.get("input") is not None else ""
    return Document(origin, output, prompt=alpaca_prompt(instruction, given))


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """The Alpaca prompt up to where the response begins; `given` is the row's `input`."""
    task = "Below is an instruction that describes a task"
    if given:
        task += ", paired with an input that provides further context"
    close = "Write a response that appropriately completes the request."
    section = f"### Input:\n{given}\n\n" if given else ""
    return f"{task}. {close}\n\n### Instruction:\n{instruction}\n\n{section}### Response:\n"


def _token_sample(row: dict[str, Any], origin: Origin) -> Sample:
    tokens = _integers(row, "input_ids", origin)
    check_keys(row, origin, ("input_ids", "labels", "attention_mask"))
    if (tokens < 0).any():
        raise UserError("datasets", origin, f"`input_ids` holds the negative token {tokens.min()}")
    labels = None
    if row.get("labels") is not None:
        labels = _integers(row, "labels", origin, length=len(tokens))
        wrong = labels[(labels < 0) & (labels != IGNORED)]
        if wrong.size:
            raise UserError("datasets", origin, f"`labels` holds {wrong[0]}", f"token ids, or {IGNORED} to ignore")
    inner_masked = False
    if row.get("attention_mask") is not None:
        mask = _integers(row, "attention_mask", origin, length=len(tokens))
        if not np.isin(mask, (0, 1)).all():
            raise UserError("datasets", origin, "`attention_mask` must hold 0 and 1 alone")
        labels = np.where(mask == 1, tokens if labels is None else labels, np.int32(IGNORED))
        inner_masked = bool((np.diff(mask) > 0).any())
    return Sample(tokens, origin, labels, inner_masked)


def _integers(row: dict[str, Any], key: str, origin: Origin, length: int | None = None) -> Ids:
    problem = f"`{key}` must be a list of integers"
    value = row.get(key)
    try:
        array = np.asarray(value) if isinstance(value, list) else None
    except ValueError:  # lists of unequal lengths inside
        array = None
    if array is None or array.ndim != 1 or array.size == 0 or array.dtype.kind not in "ib":
        raise UserError("datasets", origin, f"{problem}, at least one")
    if length is not None and len(array) != length:
        raise UserError("datasets", origin, f"`{key}` has {len(array)} entries, `input_ids` has {length}")
    if array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min:
        raise UserError("datasets", origin, f"{problem} of 32 bits")
    return array.astype(np.int32)
