"""A stream: documents that are read and tokenized while the run goes, one behind the other, cut into rows.

Its shards are files, in their order, pass after pass without end. An end-of-sequence token follows each document, and
a row is the next `length` tokens: the same whoever reads them, and with however many workers. From the place of a row
(shard, document, token) the stream goes on: documents before it are read and not tokenized. A text file is one
document, which is tokenized again up to its place.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain, count
from typing import NamedTuple, Protocol

import numpy as np

from tessera.core.errors import UserError
from tessera.core.text import counted
from tessera.data.added_tokens import AddedTokens, TokenizerKeys
from tessera.data.documents import Document, Segment
from tessera.data.encode import Encoder, Text
from tessera.data.formats.entry import Reading
from tessera.data.place import Place
from tessera.data.samples import Ids, Origin
from tessera.data.sources import DatasetSettings, SourceFile, is_there, read_documents, read_files, read_text
from tessera.data.tokenizer import TextTokenizer, given_tokenizer

BATCH = 1 << 14
"""Characters that a worker tokenizes at a time, at most: little beside a step, or a slow source comes in bursts."""
TEXTS = ("text", "completion", "pretrain")
"""The formats that a stream takes: whole texts, all of them learnt."""


class StreamSettings(TokenizerKeys, Protocol):
    """The keys of the config that say what a stream is made of."""

    @property
    def datasets(self) -> Sequence[DatasetSettings]: ...
    @property
    def output_dir(self) -> str: ...


@dataclass(frozen=True)
class Stream:
    """The files of a stream and what tokenizes them; it holds nothing of them, and can be sent to another process."""

    files: tuple[SourceFile, ...]
    tokenizer: TextTokenizer

    @property
    def key(self) -> str:
        """Equal for equal streams, as far as the names and sizes of the files tell."""
        parts = [*(file.key for file in self.files), self.tokenizer.digest()]
        return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def unseen(self) -> str:
        """The first of its files that is not there as it was found; "" where all are."""
        return next((str(file.path) for file in self.files if not is_there(file)), "")

    def summary(self) -> str:
        """One line for the log."""
        return f"data: a stream of {counted(len(self.files), 'file')} in their order, tokenized while the run goes"


def find_stream(config: StreamSettings, notes: list[str], tokenizer: TextTokenizer | None = None) -> Stream:
    """The stream that `config` names; of its files the beginnings are read. UserError: there is none, or no text.

    `tokenizer`: where that is loaded already.
    """
    files = read_files(config.datasets, config.output_dir, Reading.of(config), notes, stream=True)
    for file in files:
        if file.format not in TEXTS:
            reason = f"holds rows of {file.format}; a stream takes whole texts alone (type: completion)"
            raise UserError("datasets", file.path, reason, "leave streaming out: such rows are prepared before the run")
    given = tokenizer or given_tokenizer(config, AddedTokens.of(config))
    assert not isinstance(given, int)  # none is trained: the config says so
    return Stream(tuple(files), replace(given, made=None))


@dataclass(frozen=True)
class _Placed(Document):
    """A document, and where in the stream it is."""

    shard: int = 0
    number: int = 0


class Tokens(NamedTuple):
    """Tokens of a document that follow one another, its end-of-sequence token among them where they `end` it."""

    shard: int
    document: int
    ids: Ids
    end: bool


class Row(NamedTuple):
    """`tokens` [length]; where documents begin in it, the one at its start left out; and the place behind it."""

    tokens: Ids
    begins: tuple[int, ...]
    following: Place


def token_batches(
    stream: Stream, place: Place, share: int = 0, shares: int = 1, size: int = BATCH
) -> Iterator[list[Tokens]]:
    """The tokens from the document of `place` on, in batches of `size` characters; of `shares` workers, which take
    turns, those of one.

    UserError: a file cannot be read, or not be tokenized.
    """
    encoder, end = Encoder(stream.tokenizer), np.array([stream.tokenizer.eos_id], np.int32)
    for batch in encoder.encode_share(_texts(stream.files, place), size, share, shares):
        found = []
        for document, _, ids, _, last in batch:
            assert isinstance(document, _Placed)
            whole = np.concatenate([ids, end]) if last else ids
            found.append(Tokens(document.shard, document.number, whole, last))
        yield found


def rows_of(batches: Iterable[list[Tokens]], place: Place, length: int) -> Iterator[Row]:
    """The rows from `place` on, of the `batches` that begin with its document."""
    parts: list[Ids] = []
    begins: list[int] = []
    held, passed, document = 0, 0, (place.shard, place.document)
    for tokens in chain.from_iterable(batches):
        ids = tokens.ids
        if (tokens.shard, tokens.document) != document:
            document, passed = (tokens.shard, tokens.document), 0
        seen = place.token if document == (place.shard, place.document) else 0
        at = min(len(ids), max(0, seen - passed))
        while at < len(ids):
            if passed + at == 0 and held:
                begins.append(held)
            parts.append(ids[at : at + length - held])
            at, held = at + len(parts[-1]), held + len(parts[-1])
            if held == length:
                ended = tokens.end and at == len(ids)
                following = Place(document[0], document[1] + 1) if ended else Place(*document, passed + at)
                yield Row(np.concatenate(parts), tuple(begins), following)
                parts, begins, held = [], [], 0
        passed += len(ids)


def _texts(files: Sequence[SourceFile], place: Place) -> Iterator[Text]:
    """The documents from that of `place` on, without end; those that say nothing are passed over, but counted."""
    first, empty = place.document, 0
    for shard in count(place.shard):
        file, empty = files[shard % len(files)], empty + 1
        for number, (document, blocks) in enumerate(_documents(file, first), first):
            if blocks is not None or document.segments[0].text.strip():
                empty = 0
                yield _Placed(document.origin, document.segments, cut=True, shard=shard, number=number), blocks
        first = 0
        if empty > len(files):
            raise UserError("datasets", file.path, "holds no text, nor do the other files of the stream")


def _documents(file: SourceFile, first: int) -> Iterator[Text]:
    """The documents of a file but its `first` ones; the text of a text file, which is one document, comes in blocks."""
    if file.kind != "text":
        yield from ((document, None) for document in read_documents(file, first))
    elif not first:
        yield Document(Origin(file.path), (Segment(""),), cut=True), read_text(file)


def check_vocabulary(rows: Iterable[Row], vocab_size: int) -> None:
    """Raise UserError for a token that the model has no embedding for."""
    largest = max(int(row.tokens.max()) for row in rows)
    if largest >= vocab_size:
        reason = f"token {largest} is outside the model's vocabulary of {vocab_size}"
        raise UserError("tokenizer", largest, reason, "the tokenizer that belongs to the model")


def check_beginning(stream: Stream, length: int, vocab_size: int) -> None:
    """Read and tokenize the first row. UserError: that cannot be done."""
    check_vocabulary([next(rows_of(token_batches(stream, Place()), Place(), length))], vocab_size)
