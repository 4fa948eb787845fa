"""Rows of tokens: in memory while they are prepared, memory-mapped while they are trained on.

A split is a folder: `tokens.npy` (int32, all rows behind one another), `offsets.npy` (int64, row i is
tokens[offsets[i]:offsets[i+1]]), only when labels differ from tokens `labels.npy`, and only when a row holds several
documents `positions.npy` (both int32, like tokens), each with its sums (`columns.py`).
Labels are unshifted: labels[t] is the token at t, or IGNORED where nothing is to be learnt.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tessera.data.columns import Column, ColumnWriter, Written

IGNORED = -100
"""The label that no loss is taken over, as in Hugging Face and torch."""

HELD_OUT, EPOCH_ORDER = 1, 2
"""First numbers of the seeds of `shuffled`, which keep the two uses of one seed apart."""

Ids = NDArray[np.int32]
Split = Literal["train", "eval"]


class Origin(NamedTuple):
    """Where a row comes from, for messages: a file, and the line or row in it (None: the whole file).

    As text, bytes of a name that are no text are written as \\xff: what is said goes to files of UTF-8 too.
    """

    path: Path
    line: int | None = None
    unit: str = "line"

    def __str__(self) -> str:
        path = os.fsencode(self.path).decode(errors="backslashreplace")
        return path if self.line is None else f"{path}, {self.unit} {self.line}"


@dataclass(frozen=True)
class Sample:
    """One row in memory. `labels` is None where they equal the tokens.

    `positions` (int32, like the tokens) has each token's place in its document; None: the row is one document.
    `inner_masked`: its attention mask hid a token before one it did not hide, which attention here will see.
    """

    tokens: Ids
    origin: Origin
    labels: Ids | None = None
    inner_masked: bool = False
    positions: Ids | None = None

    def targets(self) -> int:
        """The number of tokens that this row teaches: its labels, the first aside, that are not ignored."""
        if self.labels is None:
            return max(0, len(self.tokens) - 1)
        return int(np.count_nonzero(self.labels[1:] != IGNORED))

    def largest(self) -> int:
        """The largest id among tokens and labels."""
        return int(max(self.tokens.max(), IGNORED if self.labels is None else self.labels.max()))

    def cut(self, length: int) -> "Sample":
        """The row without what lies beyond `length` tokens."""
        labels, positions = (None if x is None else x[:length] for x in (self.labels, self.positions))
        return replace(self, tokens=self.tokens[:length], labels=labels, positions=positions)


class Samples:
    """A split on disk: `rows[i]` is (input_ids, labels), both int32 of one length, views of mapped files.

    UserError, naming the file, where that is not as it was written; what is read is checked before it is returned.
    """

    def __init__(self, tokens: Column, labels: Column | None, offsets: Column, positions: Column | None = None) -> None:
        self._tokens, self._labels, self._offsets, self._positions = tokens, labels, offsets, positions
        first, last = offsets.at(0), offsets.at(len(offsets) - 1)
        for column in (tokens, labels, positions):
            if column is not None and (first, last) != (0, len(column)):
                raise column.altered(f"has {len(column)} tokens, offsets.npy is of {last - first}")

    @property
    def columns(self) -> list[Column]:
        """The files."""
        all_columns = (self._tokens, self._offsets, self._labels, self._positions)
        return [column for column in all_columns if column is not None]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> tuple[Ids, Ids]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first, end = self._offsets[index : index + 2]
        tokens = self._tokens[first:end]
        return tokens, tokens if self._labels is None else self._labels[first:end]

    def positions(self, index: int) -> Ids | None:
        """The places of row `index`'s tokens in their documents (int32), which begin at 0; None: it is one document."""
        if self._positions is None:
            return None
        first, end = self._offsets[index : index + 2]
        return self._positions[first:end]

    def length(self, index: int) -> int:
        """The number of tokens in row `index`."""
        first, end = self._offsets[index : index + 2]
        return int(end - first)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of tokens in each of these rows."""
        return np.asarray(self._offsets.take(indices + 1) - self._offsets.take(indices))


class SampleWriter:
    """Writes the rows of one split into the new folder `folder` as they come, and keeps the sums of what they hold.

    `labels.npy` begins with the first row whose labels differ from its tokens, `positions.npy` with the first row of
    several documents: what the rows before have is filled in. OSError where the disk takes no more.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = self.tokens = self.targets = 0
        self.largest, self.largest_place = 0, ""
        self.files: dict[str, Written] = {}
        folder.mkdir()
        self._columns = {"tokens.npy": self._column("tokens.npy"), "offsets.npy": self._column("offsets.npy", np.int64)}
        self._columns["offsets.npy"].append(np.zeros(1, np.int64))

    def append(self, row: Sample) -> None:
        """Write a row."""
        columns = self._columns
        if row.labels is not None and "labels.npy" not in columns and (row.labels != row.tokens).any():
            self._begin("labels.npy", columns["tokens.npy"].so_far())
        if row.positions is not None and "positions.npy" not in columns:
            self._begin("positions.npy", self._positions_so_far())
        self.rows += 1
        self.tokens += len(row.tokens)
        self.targets += row.targets()
        columns["tokens.npy"].append(row.tokens)
        columns["offsets.npy"].append(np.array([self.tokens]))
        if "labels.npy" in columns:
            columns["labels.npy"].append(row.tokens if row.labels is None else row.labels)
        if "positions.npy" in columns:
            columns["positions.npy"].append(np.arange(len(row.tokens)) if row.positions is None else row.positions)
        if (largest := row.largest()) > self.largest or not self.largest_place:
            self.largest, self.largest_place = largest, str(row.origin)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the files, which `files` then has by name; or leave them as they are, after an error."""
        try:
            if kind is None:
                self.files = {name: column.close() for name, column in self._columns.items()}
        finally:
            for column in self._columns.values():
                column.abandon()

    def _column(self, name: str, dtype: type[np.generic] = np.int32) -> ColumnWriter:
        return ColumnWriter(self.folder / name, dtype)

    def _begin(self, name: str, parts: Iterable[NDArray[Any]]) -> None:
        self._columns[name] = self._column(name)
        for part in parts:
            self._columns[name].append(part)

    def _positions_so_far(self) -> Iterator[NDArray[Any]]:
        end = 0
        for offsets in self._columns["offsets.npy"].so_far():
            lengths, end = np.diff(offsets, prepend=end), int(offsets[-1]) if len(offsets) else end
            yield np.concatenate([np.arange(length) for length in lengths] or [np.arange(0)])


def read_rows(folder: Path) -> Iterator[Sample]:
    """The rows of a split, one after another, read and not mapped: no more than a row is held, whatever the size."""
    names = [name for name in ("tokens.npy", "labels.npy", "positions.npy") if (folder / name).exists()]
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("rb")) for name in ("offsets.npy", *names)}
        for file in files.values():
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
        offsets = files.pop("offsets.npy")
        (start,) = np.frombuffer(offsets.read(8), np.int64)
        while content := offsets.read(8):
            (end,) = np.frombuffer(content, np.int64)
            row = {name: np.frombuffer(file.read(4 * int(end - start)), np.int32) for name, file in files.items()}
            start = end
            yield Sample(row["tokens.npy"], Origin(folder), row.get("labels.npy"), positions=row.get("positions.npy"))


def open_samples(folder: Path, split: Split) -> Samples:
    """Map the rows that `prepare` wrote into `folder`. UserError: the split has no rows, or not those that it had."""
    place = folder / split
    labels, positions = (
        Column(file, np.int32) if os.path.lexists(file) else None
        for file in (place / "labels.npy", place / "positions.npy")
    )
    return Samples(Column(place / "tokens.npy", np.int32), labels, Column(place / "offsets.npy", np.int64), positions)


def shuffled(count: int, *seed: int) -> NDArray[np.int64]:
    """The numbers 0 .. count-1 in an order drawn from `seed`.

    They are sorted by the raw output of a PCG64, which numpy promises to keep the same in every version (it
    does not for `permutation`): a run resumed after an upgrade sees its rows in the same order.
    """
    draws = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(draws, kind="stable")


def unigram_entropy(train: Samples, held_out: Samples, vocab_size: int) -> float:
    """Nats per target that a model knowing only token frequencies loses on held-out rows.

    The cross entropy, over the targets of `held_out`, of the distribution of the targets of `train` with
    add-one smoothing: p(v) = (count(v) + 1) / (total + vocab_size), so that unseen tokens have a finite cost.
    With the training rows as `held_out` it is, but for the smoothing, the entropy of that distribution.
    """
    counts = _target_counts(train, vocab_size)
    log_p = np.log(counts + 1) - np.log(counts.sum() + vocab_size)
    seen = _target_counts(held_out, vocab_size)
    return float(-(seen * log_p).sum() / seen.sum())


def _target_counts(rows: Samples, vocab_size: int) -> NDArray[np.int64]:
    counts = np.zeros(vocab_size, np.int64)
    for index in range(len(rows)):
        targets = rows[index][1][1:]
        counts += np.bincount(targets[targets != IGNORED], minlength=vocab_size)
    return counts
