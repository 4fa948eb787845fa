"""Documents to token ids: on several threads, in their order, with no more text held than the threads work on.

The library tokenizes without Python's lock, so that threads do; each hands it batches of its own (its own threads would
all wait for the longest text of a batch, and Python meanwhile for them).
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models

from tessera.core.errors import UserError
from tessera.data.documents import Document
from tessera.data.pieces import SIZE, Cutter, Piece
from tessera.data.samples import Ids
from tessera.data.tokenizer import TextTokenizer, byte_level, frame

BATCH = 1 << 17
"""Characters that a thread tokenizes at a time; the library's records of them take a hundred times as many bytes."""
LONG = 1 << 20
"""Characters from which on a text that cannot be cut is told of."""

Text = tuple[Document, Iterable[str] | None]
"""A document and, where it is too long to be held, the text of its one segment in blocks."""


class Encoded(NamedTuple):
    """The tokens of a part of a document's segment, and which are learnt (None: all or none, as the segment says).

    `last`: the document ends with it.
    """

    document: Document
    segment: int
    ids: Ids
    learnt: NDArray[np.bool_] | None
    last: bool


class _Part(NamedTuple):
    document: Document
    segment: int
    piece: Piece
    last: bool


class Encoder:
    """Tokenizes with `tokenizer` on so many threads (None: as many as there are cores for this process).

    `whole` gets a line for each text of more than LONG characters that had to be tokenized at once.
    """

    def __init__(self, tokenizer: TextTokenizer, threads: int | None = None, whole: list[str] | None = None) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend
        self._threads = threads or len(os.sched_getaffinity(0))
        self._whole = whole if whole is not None else []
        self._backend.no_padding()  # which a call of `tokenizer.auto` may have left on
        self._backend.no_truncation()
        opening, closing = frame(self._backend)
        if closing[-1:] == [tokenizer.eos_id]:
            closing = closing[:-1]
        self._opening, self._closing = np.array(opening, np.int32), np.array(closing, np.int32)
        self._length_of = lru_cache(maxsize=4096)(self._count)

    def encode(self, texts: Iterable[Text]) -> Iterator[Encoded]:
        """The tokens of every document, part after part.

        Where it is `opened`, what the tokenizer puts around a text is there; where it is `ended`, the end-of-sequence
        token is not, whether the text or the tokenizer has it: the caller puts it there.
        """
        waiting: deque[Future[list[Encoded]]] = deque()
        with _one_thread_each(), ThreadPoolExecutor(self._threads) as pool:
            try:
                for batch in _batches(self._parts(texts), BATCH):
                    waiting.append(pool.submit(self._encode, batch))
                    if len(waiting) > 2 * self._threads:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def encode_share(self, texts: Iterable[Text], size: int, share: int, shares: int) -> Iterator[list[Encoded]]:
        """The same in batches of about `size` characters, in this thread; of `shares`, every batch of one of them."""
        with _one_thread_each():
            for number, batch in enumerate(_batches(self._parts(texts), size)):
                if number % shares == share:
                    yield self._encode(batch)

    def _parts(self, texts: Iterable[Text]) -> Iterator[_Part]:
        for document, blocks in texts:
            last = len(document.segments) - 1
            for place, segment in enumerate(document.segments):
                if blocks is None and (len(segment.text) <= 2 * SIZE or not isinstance(segment.learnt, bool)):
                    yield _Part(document, place, Piece("", segment.text), place == last)
                    continue
                previous = None
                for piece in self._cutter.cut((segment.text,) if blocks is None else blocks):
                    if len(piece.text) > LONG:
                        size = f"{len(piece.text):,} characters are tokenized at once"
                        self._whole.append(f"{document.origin}: {size}, for the tokenizer cuts them nowhere")
                    if previous is not None:
                        yield _Part(document, place, previous, False)
                    previous = piece
                assert previous is not None
                yield _Part(document, place, previous, place == last)

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self._backend)

    def _count(self, text: str) -> int:
        return len(self._backend.encode(text, add_special_tokens=False).ids)

    def _encode(self, parts: Sequence[_Part]) -> list[Encoded]:
        plain = [part.piece.before + part.piece.text for part in parts]
        try:
            found = self._backend.encode_batch_fast(plain, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            folder = self._tokenizer.folder
            raise UserError("tokenizer", folder, f"cannot tokenize the data: {error}") from error
        encoded = []
        for part, encoding in zip(parts, found, strict=True):
            document, place, piece, last = part
            ids, learnt = np.array(encoding.ids, np.int32), None
            if piece.before:
                ids = ids[self._length_of(piece.before) :]
            elif not isinstance(spans := document.segments[place].learnt, bool):
                learnt = _within(self._backend.encode(piece.text, add_special_tokens=False).offsets, spans)
            if document.opened and place == 0 and not piece.before and not _begins_with(ids, self._opening):
                ids, learnt = _joined(self._opening, ids, learnt, front=True)
            if last and document.opened and document.ended and len(self._closing):
                ids, learnt = _joined(self._closing, ids, learnt, front=False)
            if last and document.ended and ids.size and ids[-1] == self._tokenizer.eos_id:
                ids, learnt = ids[:-1], None if learnt is None else learnt[:-1]
            encoded.append(Encoded(document, place, ids, learnt, last))
        return encoded


def _batches(parts: Iterable[_Part], most: int) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.piece.text) + 1
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _begins_with(ids: Ids, opening: Ids) -> bool:
    """Whether a text has the one token that opens it already (True too where none does)."""
    return not len(opening) or len(opening) == 1 and ids[:1].tolist() == opening.tolist()


def _joined(more: Ids, ids: Ids, learnt: NDArray[np.bool_] | None, front: bool) -> tuple[Ids, NDArray[np.bool_] | None]:
    """`ids` with `more` before or behind, which are not learnt where that is said token by token."""
    masks = None if learnt is None else (np.zeros(len(more), bool), learnt)
    pair = (more, ids)
    step = 1 if front else -1
    return np.concatenate(pair[::step]), None if masks is None else np.concatenate(masks[::step])


def _within(offsets: list[tuple[int, int]], spans: tuple[tuple[int, int], ...]) -> NDArray[np.bool_]:
    """Which tokens have a character in one of the spans, which are in order and apart."""
    if not spans or not offsets:
        return np.zeros(len(offsets), bool)
    starts, ends = np.array(offsets).T
    span_starts, span_ends = np.array(spans).T
    following = np.searchsorted(span_ends, starts, side="right")  # the first span that ends after the token begins
    there = following < len(spans)
    found: NDArray[np.bool_] = there & (span_starts[np.minimum(following, len(spans) - 1)] < ends)
    return found


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """While it lasts the library starts no threads of its own."""
    key, before = "TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ[key] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def in_pieces(texts: Iterable[Text]) -> Iterator[str]:
    """The same texts for a byte-level tokenizer to be trained on, long ones cut where a word of it ends."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level()
    cutter = Cutter(backend)
    for document, blocks in texts:
        for segment in document.segments:
            if blocks is None and len(segment.text) <= 2 * SIZE:
                yield segment.text
            else:
                pieces = cutter.cut(chain((segment.text,), blocks or ()))
                yield from (piece.text for piece in pieces)
