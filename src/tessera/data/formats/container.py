"""Containers: which files hold rows, which hold text, and how either is opened; told by the name and by the content.

| ending                     | holds                                                   |
|----------------------------|---------------------------------------------------------|
| .jsonl .ndjson .jsonlines  | a JSON object a line                                    |
| .json                      | an array of objects, {"data": [...]}, or lines as above |
| .csv .tsv                  | a row a record, under a first one with the names        |
| .parquet .arrow            | columns                                                 |
| any other, where not known | text                                                    |

Any but .parquet and .arrow may be compressed: .gz .bz2 .xz .zst. A name and a content that disagree are refused.
"""

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from tessera.core.errors import UserError
from tessera.core.files import SMALL, in_words, open_file, parse_json
from tessera.data.formats.json_rows import TO_UTF8, json_lines, json_rows, lines_of
from tessera.data.formats.tables import arrow_rows, csv_rows, parquet_count, parquet_rows
from tessera.data.samples import Origin

Kind = Literal["text", "lines", "json", "csv", "tsv", "parquet", "arrow", "foreign"]
Rows = Iterator[tuple[Origin, dict[str, Any]]]

ENDINGS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonlines": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}
"""Endings of compressed files, and what those begin with."""
FOREIGN = frozenset(
    ending
    for endings in (
        ".zip .7z .tar .tgz .tbz2 .txz .rar .z .lz .lz4 .lzma .br .sz .jar .whl",
        ".pdf .doc .docx .odt .rtf .epub .xls .xlsx .ods .ppt .pptx",
        ".png .jpg .jpeg .gif .bmp .webp .tif .tiff .svg .ico .mp3 .mp4 .wav .flac .ogg .avi .mov .mkv",
        ".npy .npz .bin .pkl .pickle .joblib .pt .pth .ckpt .safetensors .gguf .onnx .h5 .hdf5 .mat .idx .so .exe .pyc",
        ".feather .orc .avro .msgpack .tfrecord .warc .db .sqlite .sqlite3 .duckdb .mdb .lance .class",
    )
    for ending in endings.split()
)
"""Endings of what is neither text nor one of the containers."""
MARKED_UP = frozenset(
    f".{ending}"
    for ending in ("xml", "html", "htm", "xhtml", "yaml", "yml", "toml", "ini", "psv", "sql", "ipynb", "geojson")
)
"""Endings of texts that are data or markup: read as text where `ds_type: text` asks for it."""
PLAIN = (".txt", ".text")
"""Endings that promise text to train on; beside rows they are a second format, not something to pass over."""
_MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"PK\x03\x04": ".zip", b"\x89PNG": ".png", b"%PDF": ".pdf"}
_MAGIC |= {magic: ending for ending, magic in COMPRESSED.items()}
DS_TYPES: dict[str, tuple[Kind, ...]] = {
    "json": ("json", "lines"),
    "jsonl": ("lines",),
    "csv": ("csv",),
    "tsv": ("tsv",),
    "parquet": ("parquet",),
    "arrow": ("arrow",),
    "text": ("text",),
}
"""Values of `ds_type`, and the containers that each names."""
KNOWN = ".jsonl, .json, .csv, .tsv, .parquet, .arrow, text; compressed as .gz, .bz2, .xz or .zst"
BLOCK = 1 << 20
SWELLS, ANYWAY = 200, 16 * 2**20
"""What a file may unpack to: so many times its size, and so many bytes in any case. Text gives five to thirty times."""


class Container(NamedTuple):
    """What a file is: the kind of container, and the ending of its compression ("" for none)."""

    kind: Kind
    packed: str = ""


def named(path: Path) -> Container:
    """What the name of a file says that it is."""
    ending, packed = path.suffix.lower(), ""
    if ending in COMPRESSED:
        ending, packed = Path(path.stem).suffix.lower(), ending
    foreign = ending in FOREIGN or ending in MARKED_UP or packed and ending not in PLAIN
    kind = ENDINGS.get(ending, "foreign" if foreign else "text")
    return Container(kind, packed)


def identify(path: Path, ds_type: str | None = None) -> Container:
    """What a file is, by `ds_type` or else its name. UserError where its content says something else."""
    kind, packed = named(path)
    start = _start(path, "")
    magic = next((ending for magic, ending in _MAGIC.items() if start.startswith(magic)), "")
    if packed and magic != packed:
        raise UserError("datasets", path, f"its name ends in {packed}, but its content is not compressed that way")
    if ds_type is not None and kind not in DS_TYPES[ds_type]:
        kind = DS_TYPES[ds_type][0]
    if kind == "foreign":
        what = "".join(path.suffixes[-2:] if packed else path.suffixes[-1:])
        if is_marked_up(path):
            hint = f"ds_type: text reads it as it is, marks and all; else convert it: read are {KNOWN}"
            raise UserError("datasets", path, f"{what} is not a format that is read", hint)
        raise UserError("datasets", path, f"is not text, and {what} is not a format that is read", f"read are {KNOWN}")
    if packed and kind in ("parquet", "arrow"):
        raise UserError("datasets", path, f"a {kind} file inside {packed}", "unpack it: its columns are compressed")
    inner = _start(path, packed) if packed else start
    expected = {"parquet": ".parquet", "arrow": ".arrow"}.get(kind, packed)
    # a stream of Arrow begins with a length instead
    if magic != expected and not (kind == "arrow" and start.startswith(b"\xff\xff\xff\xff")):
        if magic:
            raise _misnamed(path, magic)
        raise UserError("datasets", path, f"is no {expected[1:]} file, though its name says so")
    problem = _not_text(inner) or _rows_inside(path, inner, packed) if kind == "text" else ""
    if problem:
        raise UserError("datasets", path, problem, TO_UTF8 if "UTF-8" in problem else f"read are {KNOWN}")
    return Container(kind, packed)


def is_marked_up(path: Path) -> bool:
    """Whether a file's name, that of what is compressed in it, says that it is a text of data or markup."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path).suffix.lower() in MARKED_UP


def is_text(path: Path) -> bool:
    """Whether a file of any name may be text: UTF-8 without NUL, as far as its beginning tells."""
    return not _not_text(_start(path, ""))


def refuse_rows(path: Path) -> None:
    """Raise UserError for a file that is Parquet, Arrow or compressed under a name that does not say so."""
    start = _start(path, "")
    magic = next((ending for magic, ending in _MAGIC.items() if start.startswith(magic)), "")
    if magic in ENDINGS or magic in COMPRESSED:
        raise _misnamed(path, magic)


def _misnamed(path: Path, ending: str) -> UserError:
    return UserError("datasets", path, f"holds {ending[1:]}, which its name does not say", f"name it …{ending}")


def rows_of(path: Path, container: Container) -> Rows:
    """The rows of a file in their order, read as they are asked for. UserError, naming the row, where one is none."""
    with opened(path, container.packed) as file:
        if container.kind == "lines":
            yield from json_lines(file, path)
        elif container.kind == "json":
            yield from json_rows(file, path)
        elif container.kind in ("csv", "tsv"):
            yield from csv_rows(file, path, "," if container.kind == "csv" else "\t")
        else:
            yield from (parquet_rows if container.kind == "parquet" else arrow_rows)(file, path)


def count_rows(path: Path, container: Container, most: int | None = None) -> int:
    """The number of rows of a file, or `most` where there are more, after which no more is read.

    Lines are not parsed, and of a Parquet file the footer alone is read.
    """
    if container.kind not in ("lines", "parquet"):
        return sum(1 for _ in islice(rows_of(path, container), most))
    with opened(path, container.packed) as file:
        if container.kind == "lines":
            return sum(1 for _ in islice(lines_of(file, path), most))
        count = parquet_count(file, path)
        return count if most is None else min(count, most)


@contextmanager
def opened(path: Path, packed: str = "") -> Iterator[BinaryIO]:
    """The content of a file, unpacked, behind its byte order mark if it has one; buffered, so that it can be peeked."""
    with open_file(path, "datasets") as raw:
        try:
            file = _unpacked(raw, packed, path)
            if file.peek(3)[:3] == codecs.BOM_UTF8:
                file.read(3)
            yield cast(BinaryIO, file)
        except UserError:
            raise
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            what = f"cannot be unpacked: {error}" if packed else f"cannot be read: {in_words(cast(OSError, error))}"
            raise UserError("datasets", path, what) from error


def _unpacked(raw: BinaryIO, packed: str, path: Path) -> io.BufferedReader:
    if packed == ".zst":
        try:
            import zstandard  # few need it
        except ImportError as error:
            raise UserError("datasets", path, "needs the package zstandard", "pip install zstandard") from error
        unpacked: Any = _Zstd(raw, zstandard.ZstdDecompressor())
    else:
        opening: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(packed)
        if opening is None:
            return cast(io.BufferedReader, raw)
        unpacked = opening(raw)
    return io.BufferedReader(cast(Any, _Bounded(unpacked, os.fstat(raw.fileno()).st_size, path)))


class _Bounded(io.RawIOBase):
    """What a file unpacks to. UserError where that is so much more than the file that it can be no text."""

    def __init__(self, unpacked: Any, size: int, path: Path) -> None:
        self._unpacked, self._path = unpacked, path
        self._left = max(SWELLS * size, ANYWAY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._unpacked.readinto(buffer)
        self._left -= count
        if self._left < 0:
            reason = f"unpacks to more than {SWELLS} times its size, which no text does"
            raise UserError("datasets", self._path, reason, "unpack it yourself, and look at what it holds")
        return count


class _Zstd(io.RawIOBase):
    """What a zstandard file holds, frame behind frame. OSError where it is damaged, EOFError where it is cut."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self._raw, self._new = raw, decompressor.decompressobj
        self._frame: Any = None
        self._packed = self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._packed = self._packed or self._raw.read(4096)  # little: it may become thousands of times as much
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._content = self._frame.decompress(self._packed)
            except Exception as error:  # zstandard.ZstdError, which is no OSError
                raise OSError(str(error)) from error
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size


def _start(path: Path, packed: str) -> bytes:
    with opened(path, packed) as file:
        return file.read(BLOCK)


def _not_text(start: bytes) -> str:
    """Why content that begins so is no text; "" where it may be."""
    if b"\0" in start:
        return "is not text: it holds NUL bytes"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text: byte {error.start} is 0x{start[error.start]:02x}"
    return ""


def _rows_inside(path: Path, start: bytes, packed: str) -> str:
    """Why a file that is named as text is rows; "" where it is not."""
    lead = start.lstrip()
    if not lead.startswith((b"{", b"[")):
        return ""
    if _is_json(lead.split(b"\n", 1)[0]):
        return "holds JSON rows, though its name does not end in .jsonl"
    if len(start) == BLOCK:
        with opened(path, packed) as file:
            lead = file.read(SMALL).lstrip()
    return "is JSON, not text: name it .json" if _is_json(lead) else ""


def _is_json(content: bytes) -> bool:
    """Whether `content` is a JSON object, or a list of them."""
    try:
        value = parse_json(content)
    except ValueError:
        return False
    return isinstance(value, dict) or isinstance(value, list) and any(isinstance(item, dict) for item in value)
