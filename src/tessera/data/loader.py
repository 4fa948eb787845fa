"""The micro-batches of an optimizer step, a pure function of the step: no state to save, so resume is exact.

Rows form one endless stream, epoch after epoch (`epochs.py`): each a sample, or packed samples. With M rows in a
micro-batch, D data ranks and A accumulation steps, a step takes the next G = M·D·A rows. Of single samples
micro-batch a of rank r takes the M rows from (a·D + r)·M on; packed rows are dealt, so that ranks are equally full.
So D does not change which rows a step has, and a run that goes on with another G (`start_at`) takes what is left.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from tessera.core.errors import RunFailed, UserError
from tessera.data.batch import MicroBatch
from tessera.data.epochs import Epochs, Unit
from tessera.data.pack import Ints, dealt
from tessera.data.samples import IGNORED, Samples


@dataclass(frozen=True)
class _Rows:
    """Rows that run together, by the samples that each holds; from row `end` on they are padding.

    `first` is, for each row, the place of its first sample among all that there are.
    """

    samples: list[list[int]]
    end: int

    @property
    def first(self) -> list[int]:
        return list(accumulate(map(len, self.samples), initial=0))

    def of(self, row: int) -> list[int]:
        return self.samples[row] if row < self.end else []


class Loader:
    """Micro-batches of `samples` for data rank `data_rank` of `data_ranks`, in the rows of `epochs`.

    S is the longest row of a micro-batch over all data ranks, or `row_length` where that is given, rounded up to a
    multiple of `length_multiple`: the same on every rank. The stream ends before row `last_sample` (None: never): from
    there on come padding rows of `pad_id` without any target, in the shape that the rows there would have had.
    What is called sample in the names here is a row of packed samples where `epochs` packs them.
    """

    def __init__(
        self,
        samples: Samples,
        epochs: Epochs,
        micro_batch_size: int,
        accumulation: int,
        length_multiple: int,
        row_length: int | None = None,
        pad_id: int = 0,
        data_rank: int = 0,
        data_ranks: int = 1,
        last_sample: int | None = None,
    ) -> None:
        if not len(samples):
            raise ValueError("there are no rows to load")
        if not 0 <= data_rank < data_ranks:
            raise ValueError(f"data_rank {data_rank} is none of {data_ranks} ranks")
        self.samples, self.epochs = samples, epochs
        self.micro_batch_size, self.accumulation = micro_batch_size, accumulation
        self.length_multiple, self.row_length = length_multiple, row_length
        self.pad_id, self.last_sample = pad_id, last_sample
        self.data_rank, self.data_ranks = data_rank, data_ranks
        self._first_step, self._first_sample = 0, 0

    @property
    def packed(self) -> bool:
        """Whether a row holds several samples."""
        return self.unit == "row"

    @property
    def unit(self) -> Unit:
        """What rows are: samples, or rows of packed ones."""
        return self.epochs.unit

    @property
    def order(self) -> int:
        """The version of the order of rows."""
        return self.epochs.version

    @property
    def samples_per_epoch(self) -> int:
        """The rows of the first epoch; where they are packed, other epochs may have some more or fewer."""
        return self.epochs.rows_in(0)

    @property
    def samples_per_step(self) -> int:
        """G: the rows of one optimizer step, over all data ranks."""
        return self.micro_batch_size * self.accumulation * self.data_ranks

    def start_at(self, step: int, sample: int) -> None:
        """Optimizer step `step` begins with row `sample` of the stream: those before have been trained on."""
        self._first_step, self._first_sample = step, sample

    @property
    def first_sample(self) -> int:
        """The row with which this run, or what is left of it, begins."""
        return self._first_sample

    def samples_before(self, step: int) -> int:
        """The rows that come before optimizer step `step`, the run's padding rows not among them."""
        before = self._first_sample + (step - self._first_step) * self.samples_per_step
        return before if self.last_sample is None else min(before, self.last_sample)

    def epoch(self, step: int) -> float:
        """The passes over the data that come before optimizer step `step`."""
        if not (before := self.samples_before(step)):
            return 0.0
        epoch, place = self.epochs.place(before - 1)  # the last row seen: the next one may be of an epoch not counted
        return epoch + (place + 1) / self.epochs.rows_in(epoch)

    def steps_for(self, num_epochs: float) -> int:
        """The optimizer steps after which all of `num_epochs` epochs is seen; the last one may go beyond them."""
        left = max(0, self.samples_for(num_epochs) - self._first_sample)
        return self._first_step + -(-left // self.samples_per_step)

    def samples_for(self, num_epochs: float) -> int:
        """The rows of `num_epochs` epochs, rounded up; what floating point adds does not count."""
        whole = int(num_epochs)
        part = num_epochs - whole and math.ceil(round((num_epochs - whole) * self.epochs.rows_in(whole), 6))
        return self.epochs.rows_before(whole) + int(part)

    def step_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step` (from 0), one for each accumulation step.

        RunFailed: a row is not as it was prepared.
        """
        first, count = self._first_sample + (step - self._first_step) * self.samples_per_step, self.samples_per_step
        with _damage_ends_the_run():
            present = count if self.last_sample is None else max(0, min(count, self.last_sample - first))
            needed = present if self.packed else count  # where S is fixed, rows that are padding do not count for it
            samples = [self.epochs.samples(first + row) for row in range(needed)]
            rows = _Rows(samples + [[] for _ in range(count - needed)], present)
            shares = self._shares(rows)  # [A, D, M]
            return [self._assemble(rows, share[self.data_rank], self._length(rows, share)) for share in shares]

    def eval_batches(self) -> Iterator[MicroBatch]:
        """Every row of the first epoch once, in order; padding rows fill up the last batch.

        RunFailed: a row is not as it was prepared.
        """
        whole, total = self.micro_batch_size * self.data_ranks, self.epochs.rows_in(0)
        for first in range(0, total, whole):
            with _damage_ends_the_run():
                present = [self.epochs.samples(row) for row in range(first, min(first + whole, total))]
                rows = _Rows(present + [[] for _ in range(whole - len(present))], len(present))
                share = np.arange(whole).reshape(self.data_ranks, -1)
                batch = self._assemble(rows, share[self.data_rank], self._length(rows, share))
            yield batch

    def _shares(self, rows: _Rows) -> Ints:
        """The rows of each micro-batch, of each data rank there, by their places in the step: [A, D, M]."""
        shape = self.accumulation, self.data_ranks, self.micro_batch_size
        if not self.packed:
            return np.arange(self.samples_per_step).reshape(shape)
        tokens = [int(self._lengths(rows.of(row)).sum()) for row in range(self.samples_per_step)]
        hands = dealt(np.array(tokens), self.data_ranks)  # [D, A·M]
        return hands.reshape(shape[1], shape[0], shape[2]).swapaxes(0, 1)

    def _lengths(self, samples: Sequence[int]) -> Ints:
        return self.samples.lengths(np.array(samples, np.int64))

    def _length(self, rows: _Rows, share: Ints) -> int:
        """S of the micro-batch whose rows, of all data ranks, are `share`."""
        longest = self.row_length
        if longest is None:
            longest = max(int(self._lengths(rows.samples[row]).sum()) for row in share.flat)
        return -(-longest // self.length_multiple) * self.length_multiple

    def _assemble(self, rows: _Rows, mine: Ints, length: int) -> MicroBatch:
        """The rows `mine` as tensors of `length` tokens."""
        shape = len(mine), length
        input_ids, targets = np.full(shape, self.pad_id, np.int64), np.full(shape, IGNORED, np.int64)
        documents = np.full(shape, -1, np.int64)  # padding is a document of its own
        positions = np.broadcast_to(np.arange(length), shape).copy()
        first, several = rows.first, self.packed
        for at, row in enumerate(mine.tolist()):
            start = 0
            for place, sample in enumerate(rows.of(row), first[row]):
                tokens, labels = self.samples[sample]
                own = slice(start, start + len(tokens))
                start = own.stop
                input_ids[at, own], targets[at, own][:-1] = tokens, labels[1:]
                documents[at, own], positions[at, own] = place, np.arange(len(tokens))
                if (within := self.samples.positions(sample)) is not None:
                    begins = np.flatnonzero(within[1:] == 0) + 1  # the documents after the first
                    number = np.zeros(len(tokens), np.int64)
                    number[begins] = 1
                    # numbers that no other sample's documents have, whatever the rows of a rank
                    documents[at, own] += number.cumsum() * first[-1]
                    positions[at, own] = within
                    targets[at, own][begins - 1] = IGNORED
                    several |= len(begins) > 0
        valid = int(np.count_nonzero(targets != IGNORED))
        batch = torch.from_numpy(input_ids), torch.from_numpy(targets), valid
        if several:
            return MicroBatch(*batch, 0, torch.from_numpy(positions), torch.from_numpy(documents))
        return MicroBatch(*batch, int(mine[0]))


@contextmanager
def _damage_ends_the_run() -> Iterator[None]:
    """Rows are checked when they are read: what is refused then is no mistake in the config of a run any more."""
    try:
        yield
    except UserError as error:
        raise RunFailed(f"{error.value} {error.reason}; {error.hint}") from error
