"""Arrays on disk, memory-mapped, that no flipped bit gets past: a block is compared with its sum before its first use.

Beside `tokens.npy`, which numpy reads, lies `tokens.npy.sums`: for every BLOCK bytes of it a BLAKE2b of 8 bytes. So a
rank checks just what it trains on, when it does, whatever the size of the data: 0.1 ms a block, once.
"""

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.core.errors import UserError
from tessera.core.files import in_words, open_file, read_bytes

BLOCK = 1 << 17
SUM = 8
"""Bytes of a block's sum."""


@dataclass(frozen=True)
class Written:
    """A file as it was written: its bytes, and a BLAKE2b of its content, or of its blocks' sums where it has those."""

    size: int
    sum: str


def sum_of(content: bytes) -> str:
    """The sum of a small file, as `Written` has it."""
    return blake2b(content, digest_size=16).hexdigest()


class ColumnWriter:
    """Writes a new .npy file of one dimension as its numbers come, and the sums of its blocks. OSError with its number.

    No more than a block is held. The file is whole only after `close`, which writes how many numbers it has.
    """

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.path, self.length = path, 0
        self._dtype = np.dtype(dtype)
        self._file = path.open("x+b")
        self._pending = bytearray(self._header())
        self._sums = bytearray()

    def append(self, numbers: NDArray[Any]) -> None:
        """Put `numbers` behind those before."""
        self._pending += numbers.astype(self._dtype, copy=False).tobytes()
        self.length += len(numbers)
        while len(self._pending) >= BLOCK:
            self._put(BLOCK)

    def so_far(self) -> Iterator[NDArray[Any]]:
        """The numbers appended up to now, part after part."""
        skip = len(self._header())
        self._file.seek(skip if self._sums else 0)
        while content := self._file.read(BLOCK):
            yield np.frombuffer(content, self._dtype)
        yield np.frombuffer(bytes(self._pending[0 if self._sums else skip :]), self._dtype)

    def close(self) -> Written:
        """Write what is left, the header and the sums."""
        if self._pending:
            self._put(len(self._pending))
        header = self._header()
        self._file.seek(0)
        first = header + self._file.read(BLOCK)[len(header) :]
        self._file.seek(0)
        self._file.write(first)
        self._sums[:SUM] = _digest(first)
        self._file.close()
        sums_of(self.path).write_bytes(self._sums)
        return Written(len(header) + self.length * self._dtype.itemsize, sum_of(bytes(self._sums)))

    def abandon(self) -> None:
        """Close the file as it is, whatever may still be on its way."""
        with suppress(OSError):
            self._file.close()

    def _put(self, size: int) -> None:
        block = bytes(self._pending[:size])
        del self._pending[:size]
        self._file.seek(0, os.SEEK_END)
        self._file.write(block)
        self._sums += _digest(block)

    def _header(self) -> bytes:
        """Of the same size for every length: numpy leaves room for its digits."""
        header = io.BytesIO()  # np.save would lose why a write failed
        shape = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(header, shape)
        return header.getvalue()


def sums_of(path: Path) -> Path:
    """Where the sums of a column's blocks lie."""
    return path.with_name(f"{path.name}.sums")


def _digest(block: Any) -> bytes:
    return blake2b(block, digest_size=SUM).digest()


class Column:
    """A .npy file of one dimension, as `ColumnWriter` left it. UserError, naming the file, as soon as it is not."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.path = path
        with open_file(path, "output_dir", hint=self._hint) as file:
            size = os.fstat(file.fileno()).st_size
        self._sums = read_bytes(sums_of(path), "output_dir", limit=2**30, hint=self._hint)
        if not size or len(self._sums) != -(-size // BLOCK) * SUM:
            raise self.altered(f"has {size} bytes, which is not what it was prepared with")
        self.written = Written(size, sum_of(self._sums))
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
            self._seen = np.zeros(len(self._sums) // SUM, bool)
            self._check(0, 1)
            self._array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise self.altered(f"cannot be read: {in_words(error)}") from error
        except UserError:
            raise
        except (ValueError, SyntaxError) as error:
            raise self.altered("is no array of numbers") from error
        if self._array.dtype != dtype or self._array.ndim != 1:
            raise self.altered(f"holds {self._array.dtype} in {self._array.ndim} dimensions, not {dtype.__name__} in 1")

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, span: slice) -> NDArray[Any]:
        """The numbers from `span.start` to `span.stop`, a view of the mapped file."""
        width, start = self._array.itemsize, len(self._bytes) - self._array.nbytes
        self._check(start + span.start * width, start + span.stop * width)
        return self._array[span]

    def take(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """The numbers at these places."""
        start = len(self._bytes) - self._array.nbytes  # of which no number lies in two blocks
        blocks = np.unique((start + indices * self._array.itemsize) // BLOCK)
        for block in blocks[~self._seen[blocks]].tolist():
            self._check(block * BLOCK, block * BLOCK + 1)
        return self._array[indices]

    def at(self, index: int) -> int:
        """One number."""
        return int(self[slice(index, index + 1)][0])

    def check_all(self) -> None:
        """Compare every block with its sum now."""
        self._check(0, len(self._bytes))

    def _check(self, start: int, stop: int) -> None:
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            if not self._seen[block]:
                content, at = self._bytes[block * BLOCK : (block + 1) * BLOCK], block * SUM
                if _digest(content) != self._sums[at : at + SUM]:
                    raise self.altered(f"is not as it was prepared: see its bytes from {block * BLOCK:,} on")
                self._seen[block] = True

    def altered(self, reason: str) -> UserError:
        """The refusal of this file."""
        return UserError("output_dir", self.path, reason, self._hint)

    @property
    def _hint(self) -> str:
        return f"remove {self.path.parent.parent}, and the next start prepares the data again"
