"""The micro-batches of an optimizer step from a stream: made ready by a thread, of what worker processes tokenize.

A step takes the next G = M·D·A rows of the stream, M in a micro-batch, of D data ranks, in A accumulation steps:
micro-batch a of rank r those from (a·D + r)·M on, as `Loader` has them. So D does not change which rows a step has.
Every process of a run tokenizes the whole stream and keeps its own rows: simple, and each knows where all rows end
without a word from the others. It costs each of them a core or more; where tokenizing is slower than the steps, more
workers help as long as there are cores, and prepared data always.
"""

import queue
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from threading import Event, Thread

import numpy as np
import torch

from tessera.core.errors import RunFailed, UserError
from tessera.data.batch import MicroBatch
from tessera.data.epochs import ORDER, Unit
from tessera.data.place import Place
from tessera.data.samples import IGNORED
from tessera.data.stream import BATCH, Row, Stream, Tokens, check_vocabulary, rows_of, token_batches
from tessera.data.stream_worker import Worker, tokens_of_workers


@dataclass(frozen=True)
class StreamShape:
    """Rows of `length` tokens, padded to a multiple of `length_multiple`; with `isolated` no document in a row sees
    another. `vocab_size` is that of the model."""

    length: int
    vocab_size: int
    isolated: bool = False
    length_multiple: int = 1
    pad_id: int = 0


class StreamLoader:
    """Micro-batches of `stream` for data rank `data_rank` of `data_ranks`, step after step.

    `workers` processes tokenize (0: the thread does), `prefetch` steps are kept ready.
    """

    unit: Unit = "row"
    order = ORDER
    packed = False  # no rows that can be counted before the run
    last_sample = None

    def __init__(
        self,
        stream: Stream,
        shape: StreamShape,
        micro_batch_size: int,
        accumulation: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        workers: int = 1,
        prefetch: int = 2,
    ) -> None:
        self.stream, self.shape = stream, shape
        self.micro_batch_size, self.accumulation = micro_batch_size, accumulation
        self.data_rank, self.data_ranks = data_rank, data_ranks
        self._count = workers
        self._ready: queue.Queue[tuple[list[MicroBatch], Place] | Exception] = queue.Queue(prefetch)
        self._workers: list[Worker] = []
        self._thread: Thread | None = None
        self._stop = Event()
        self.start_at(0, 0, Place())

    @property
    def samples_per_step(self) -> int:
        """G: the rows of one optimizer step, over all data ranks."""
        return self.micro_batch_size * self.accumulation * self.data_ranks

    def start_at(self, step: int, sample: int, place: Place) -> None:
        """Optimizer step `step` begins with row `sample` of the stream, which is at `place`."""
        self._first_step, self.first_sample = step, sample
        self._next = step
        self._places = {step: place}

    def samples_before(self, step: int) -> int:
        """The rows that come before optimizer step `step`."""
        return self.first_sample + (step - self._first_step) * self.samples_per_step

    def place(self, step: int) -> Place:
        """Where optimizer step `step` begins: the next one, or one of the last two."""
        return self._places[step]

    def epoch(self, step: int) -> float:
        """The passes over the files before optimizer step `step`, as `place`: files that are done, of all."""
        return self.place(step).shard / len(self.stream.files)

    def step_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step`, one for each accumulation step; steps come one after another.

        RunFailed: the stream cannot be read any further.
        """
        if step != self._next:
            raise ValueError(f"step {step} is asked for, the next one of the stream is {self._next}")
        if self._thread is None:
            self._thread = Thread(target=self._fill, args=[self._places[step]], daemon=True)
            self._thread.start()
        found = self._ready.get()
        if isinstance(found, Exception):
            self._ready.put(found)  # for whoever asks again
            if isinstance(found, UserError):
                raise RunFailed(f"{found.value} {found.reason}" + (f"; {found.hint}" if found.hint else ""))
            raise found
        batches, self._places[step + 1] = found
        self._places.pop(step - 1, None)
        self._next = step + 1
        return batches

    def close(self) -> None:
        """End thread and processes."""
        self._stop.set()
        for worker in self._workers:
            worker.kill()
        if self._thread is not None:
            self._thread.join()
        for worker in self._workers:
            worker.close()
        self._workers = []

    def _fill(self, place: Place) -> None:
        """The thread: make steps ready until there is enough of them."""
        try:
            for step in self._steps(place):
                if not self._put(step):
                    return
        except Exception as error:  # it is raised where the step is asked for
            self._put(error)

    def _put(self, one: tuple[list[MicroBatch], Place] | Exception) -> bool:
        """Whether there was room for it before `close`."""
        while not self._stop.is_set():
            try:
                self._ready.put(one, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _steps(self, place: Place) -> Iterator[tuple[list[MicroBatch], Place]]:
        rows = rows_of(self._tokens(place), place, self.shape.length)
        while True:
            step = list(islice(rows, self.samples_per_step))
            check_vocabulary(step, self.shape.vocab_size)  # all rows: no rank goes on alone
            share = np.arange(len(step)).reshape(self.accumulation, self.data_ranks, -1)
            yield [self._assemble(step, mine.tolist()) for mine in share[:, self.data_rank]], step[-1].following

    def _tokens(self, place: Place) -> Iterator[list[Tokens]]:
        size = min(BATCH, self.samples_per_step * self.shape.length)  # a part of a step
        if not self._count:
            return token_batches(self.stream, place, size=size)
        for share in range(self._count):
            self._workers.append(Worker(self.stream, place, share, self._count, size))
        return tokens_of_workers(self._workers)

    def _assemble(self, step: list[Row], mine: list[int]) -> MicroBatch:
        """The rows `mine` of a step as tensors."""
        shape, length = self.shape, self.shape.length
        padded = len(mine), -(-length // shape.length_multiple) * shape.length_multiple
        input_ids, targets = np.full(padded, shape.pad_id, np.int64), np.full(padded, IGNORED, np.int64)
        documents = np.full(padded, -1, np.int64)  # padding is a document of its own
        positions = np.broadcast_to(np.arange(padded[1]), padded).copy()
        for at, number in enumerate(mine):
            row = step[number]
            input_ids[at, :length], targets[at, : length - 1] = row.tokens, row.tokens[1:]
            documents[at, :length] = number * length  # numbers that no other row of the step has
            for begin in row.begins:
                documents[at, begin:length] += 1
                positions[at, begin:] = np.arange(padded[1] - begin)
                if shape.isolated:
                    targets[at, begin - 1] = IGNORED
        valid = int(np.count_nonzero(targets != IGNORED))
        batch = torch.from_numpy(input_ids), torch.from_numpy(targets), valid
        if shape.isolated:
            return MicroBatch(*batch, 0, torch.from_numpy(positions), torch.from_numpy(documents))
        return MicroBatch(*batch, mine[0])
