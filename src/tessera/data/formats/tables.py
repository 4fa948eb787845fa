"""Rows of tables: CSV and TSV by the standard library, Parquet and Arrow by pyarrow, a batch of rows at a time."""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tessera.core.errors import UserError
from tessera.core.files import SMALL
from tessera.data.formats.json_rows import TO_UTF8
from tessera.data.samples import Origin

BATCH = 256
"""Rows of a Parquet file that are held at a time, and those of its row group still encoded."""


def csv_rows(file: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """Every record as a row, under the names of the first record; all values are text."""
    csv.field_size_limit(SMALL)
    text = io.TextIOWrapper(file, "utf-8", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    try:
        for record in reader:
            origin = Origin(path, line)
            line = reader.line_num + 1
            if not record:
                continue
            if not names:
                names = _names(record, path)
                continue
            if len(record) != len(names):
                reason = f"{len(record)} fields, the first line has {len(names)} names"
                raise UserError("datasets", origin, reason, 'a text with commas or line ends stands in "…"')
            yield origin, dict(zip(names, record, strict=True))
    except csv.Error as error:
        raise UserError("datasets", Origin(path, line), f"not valid CSV: {error}") from error
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text: {error.reason}"
        raise UserError("datasets", Origin(path, line), reason, TO_UTF8) from error
    finally:
        text.detach()  # the file is closed by who opened it


def _names(record: list[str], path: Path) -> list[str]:
    names = [name.strip() for name in record]
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), "")):
        reason = f"its first line has one column, and {other!r} in it"
        raise UserError("datasets", Origin(path, 1), reason, "separate columns with commas; with tabs in a .tsv file")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            "datasets", Origin(path, 1), f"names the column {twice!r} twice", "the first line names columns"
        )
    return names


def parquet_rows(file: BinaryIO, path: Path) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """Every row of a Parquet file, row group by row group."""
    with _pyarrow(path, "Parquet"):
        from pyarrow import parquet  # on demand: it takes a third of a second

        table = parquet.ParquetFile(file, page_checksum_verification=True)
        yield from _rows(table.iter_batches(batch_size=BATCH, use_threads=False), path)


def parquet_count(file: BinaryIO, path: Path) -> int:
    """The number of rows of a Parquet file, which its footer says."""
    with _pyarrow(path, "Parquet"):
        from pyarrow import parquet

        count: int = parquet.ParquetFile(file).metadata.num_rows
        return count


def arrow_rows(file: BinaryIO, path: Path) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """Every row of an Arrow file, in either of its forms."""
    with _pyarrow(path, "Arrow"):
        from pyarrow import ipc

        if file.peek(6)[:6] == b"ARROW1":  # type: ignore[attr-defined]
            table = ipc.open_file(file)
            yield from _rows((table.get_batch(index) for index in range(table.num_record_batches)), path)
        else:
            yield from _rows(ipc.open_stream(file), path)


@contextmanager
def _pyarrow(path: Path, format: str) -> Iterator[None]:
    """What pyarrow raises within, or that it is missing, as a UserError."""
    try:
        from pyarrow import ArrowException
    except ImportError as error:
        reason = "needs the package pyarrow, which is not installed"
        raise UserError("datasets", path, reason, "pip install pyarrow") from error
    try:
        yield
    except (ArrowException, OSError) as error:
        raise UserError("datasets", path, f"cannot be read as {format}: {error}") from error


def _rows(batches: Any, path: Path) -> Iterator[tuple[Origin, dict[str, Any]]]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # or else a damaged file could end this process: its offsets are followed as they are
        for start in range(0, batch.num_rows, BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield Origin(path, number, "row"), row
