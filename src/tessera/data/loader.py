"""The micro-batches of an optimizer step, a pure function of the step: no state to save, so resume is exact.

Samples form one endless stream, epoch after epoch, each in an order drawn from (seed, epoch). With M rows in
a micro-batch, D data ranks and A accumulation steps, a step takes the next G = M·D·A samples: from its first one on,
micro-batch a of rank r the M samples from (a·D + r)·M on. So D does not change the order, and a run that goes on with
another G (`start_at`) takes the samples that are left.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from tessera.core.errors import RunFailed, UserError
from tessera.data.batch import MicroBatch
from tessera.data.samples import EPOCH_ORDER, IGNORED, Samples, shuffled


class Loader:
    """Micro-batches of `rows` for data rank `data_rank` of `data_ranks`.

    S is the longest row of a micro-batch over all data ranks, rounded up to a multiple of `length_multiple`:
    the same on every rank. The stream ends before sample `last_sample` (None: never): from there on come
    padding rows of `pad_id` without any target, in the shape that the samples there would have had.
    """

    def __init__(
        self,
        rows: Samples,
        micro_batch_size: int,
        accumulation: int,
        seed: int,
        shuffle: bool,
        length_multiple: int,
        pad_id: int = 0,
        data_rank: int = 0,
        data_ranks: int = 1,
        last_sample: int | None = None,
    ) -> None:
        if not len(rows):
            raise ValueError("there are no rows to load")
        if not 0 <= data_rank < data_ranks:
            raise ValueError(f"data_rank {data_rank} is none of {data_ranks} ranks")
        self.rows, self.micro_batch_size, self.accumulation = rows, micro_batch_size, accumulation
        self.length_multiple, self.pad_id, self.last_sample = length_multiple, pad_id, last_sample
        self.data_rank, self.data_ranks = data_rank, data_ranks
        self._seed, self._shuffle = seed, shuffle
        self._first_step, self._first_sample = 0, 0
        self._order = lru_cache(maxsize=2)(self._draw_order)  # a step touches at most a few epochs

    @property
    def samples_per_epoch(self) -> int:
        """The number of rows."""
        return len(self.rows)

    @property
    def samples_per_step(self) -> int:
        """G: the samples of one optimizer step, over all data ranks."""
        return self.micro_batch_size * self.accumulation * self.data_ranks

    def start_at(self, step: int, sample: int) -> None:
        """Optimizer step `step` begins with `sample` of the stream: those before have been trained on."""
        self._first_step, self._first_sample = step, sample

    def samples_before(self, step: int) -> int:
        """The samples that come before optimizer step `step`, the run's padding rows not among them."""
        before = self._first_sample + (step - self._first_step) * self.samples_per_step
        return before if self.last_sample is None else min(before, self.last_sample)

    def steps_for(self, num_epochs: float) -> int:
        """The optimizer steps after which all of `num_epochs` epochs is seen; the last one may go beyond them."""
        left = max(0, self.samples_for(num_epochs) - self._first_sample)
        return self._first_step + -(-left // self.samples_per_step)

    def samples_for(self, num_epochs: float) -> int:
        """The samples of `num_epochs` epochs, rounded up; what floating point adds does not count."""
        return math.ceil(round(num_epochs * self.samples_per_epoch, 6))

    def step_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step` (from 0), one for each accumulation step.

        RunFailed: a row is not as it was prepared.
        """
        whole = self.micro_batch_size * self.data_ranks
        first = self._first_sample + (step - self._first_step) * self.samples_per_step
        starts = range(0, self.samples_per_step, whole)
        with _damage_ends_the_run():
            return [self._batch(range(first + at, first + at + whole), at) for at in starts]

    def eval_batches(self) -> Iterator[MicroBatch]:
        """Every row once, in file order whatever `shuffle` says; padding rows fill up the last batch.

        RunFailed: a row is not as it was prepared.
        """
        whole = self.micro_batch_size * self.data_ranks
        for first in range(0, len(self.rows), whole):
            present = range(first, min(first + whole, len(self.rows)))
            indices: list[int | None] = [*present, *[None] * (whole - len(present))]
            with _damage_ends_the_run():
                batch = self._assemble(indices, self._padded_length(present))
            yield batch

    def _batch(self, samples: range, place: int) -> MicroBatch:
        indices = [self._row_of(sample) for sample in samples]
        end = samples.stop if self.last_sample is None else self.last_sample
        present = [index if sample < end else None for sample, index in zip(samples, indices, strict=True)]
        return self._assemble(present, self._padded_length(indices), place)

    def _row_of(self, sample: int) -> int:
        epoch, position = divmod(sample, len(self.rows))
        return int(self._order(epoch)[position]) if self._shuffle else position

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        return shuffled(len(self.rows), EPOCH_ORDER, self._seed, epoch)

    def _padded_length(self, indices: Iterable[int]) -> int:
        longest = max(self.rows.length(index) for index in indices)
        return -(-longest // self.length_multiple) * self.length_multiple

    def _assemble(self, indices: Sequence[int | None], length: int, place: int = 0) -> MicroBatch:
        """This rank's share of the rows `indices` (None: a padding row), as tensors of `length` tokens."""
        before = self.data_rank * self.micro_batch_size
        mine = indices[before:][: self.micro_batch_size]
        input_ids = np.full((len(mine), length), self.pad_id, np.int64)
        targets = np.full((len(mine), length), IGNORED, np.int64)
        for at, index in enumerate(mine):
            if index is not None:
                tokens, labels = self.rows[index]
                input_ids[at, : len(tokens)] = tokens
                targets[at, : len(labels) - 1] = labels[1:]
        valid = int(np.count_nonzero(targets != IGNORED))
        return MicroBatch(torch.from_numpy(input_ids), torch.from_numpy(targets), valid, place + before)


@contextmanager
def _damage_ends_the_run() -> Iterator[None]:
    """Rows are checked when they are read: what is refused then is no mistake in the config of a run any more."""
    try:
        yield
    except UserError as error:
        raise RunFailed(f"{error.value} {error.reason}; {error.hint}") from error
