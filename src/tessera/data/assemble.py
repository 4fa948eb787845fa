"""Documents into the rows that are trained on, one after another: cut into windows, or ended and fitted one by one."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np

from tessera.core.errors import UserError
from tessera.data.added_tokens import TokenizerKeys
from tessera.data.documents import Document, Segment
from tessera.data.encode import Encoded, Encoder, Text
from tessera.data.samples import IGNORED, Ids, Origin, Sample
from tessera.data.sources import DatasetSettings, SourceFile, read_documents, read_text, read_token_samples
from tessera.data.tokenizer import TextTokenizer


class DataSettings(TokenizerKeys, Protocol):
    """The keys of the config that this room reads."""

    @property
    def datasets(self) -> Sequence[DatasetSettings]: ...
    @property
    def sequence_len(self) -> int: ...
    @property
    def excess_length_strategy(self) -> str: ...
    @property
    def min_sample_len(self) -> int | None: ...
    @property
    def train_on_inputs(self) -> bool: ...
    @property
    def val_set_size(self) -> int | float: ...
    @property
    def seed(self) -> int: ...
    @property
    def output_dir(self) -> str: ...
    @property
    def test_datasets(self) -> Sequence[DatasetSettings] | None: ...
    @property
    def dataset_prepared_path(self) -> str | None: ...
    @property
    def dataset_processes(self) -> int | None: ...


@dataclass
class Tally:
    """What is counted on the way, under the names of the manifest, and what is found for messages.

    `closing`: how often each token is the last to be learnt, in rows that bring their own end. `whole`: a line for each
    text that was too long and could not be cut.
    """

    counts: Counter[str] = field(default_factory=Counter)
    closing: Counter[int] = field(default_factory=Counter)
    longest: int = 0
    first_too_long: Origin | None = None
    whole: list[str] = field(default_factory=list)


def assemble_samples(
    config: DataSettings,
    files: Sequence[SourceFile],
    tokenizer: TextTokenizer | None,
    tally: Tally,
    passed: Callable[[SourceFile, int], None] = lambda file, characters: None,
) -> Iterator[Sample]:
    """The rows of all files in their order; neighbouring text files are one stream, cut into windows.

    `tokenizer` may be None when every file is tokenized. `passed` is told of the characters that were read of a file.
    UserError: no row is left; or rows are too long, where that is refused.
    """
    kept = 0
    for kind, group in groupby(files, key=lambda file: file.kind):
        if kind == "tokenized":
            rows: Iterator[_Row] = (_Row(row, True) for file in group for row in read_token_samples(file))
        else:
            assert tokenizer is not None
            encoder = Encoder(tokenizer, config.dataset_processes, tally.whole)
            encoded = encoder.encode(texts_of(group, passed))
            rows = _rows(encoded, tokenizer.eos_id, config.sequence_len, joined=kind == "text")
        for row, ends_itself in rows:
            fitted = _fit(config, row, tally, keep_dull=kind == "tokenized")
            if fitted is not None:
                kept += 1
                if ends_itself:
                    tally.closing.update(_closing(fitted))
                yield fitted
    too_long, short, dull = (tally.counts[name] for name in ("dropped_rows", "short_rows", "dull_rows"))
    if too_long and config.excess_length_strategy == "raise":
        reason = f"{too_long:,} rows exceed sequence_len {config.sequence_len}; the first: {tally.first_too_long}"
        hint = f"sequence_len: {tally.longest} holds the longest; or excess_length_strategy: drop, or truncate"
        raise UserError("excess_length_strategy", "raise", reason, hint)
    if not kept:
        raise _no_row_is_left(config, files, tally)


def _no_row_is_left(config: DataSettings, files: Sequence[SourceFile], tally: Tally) -> UserError:
    too_long, short, dull = (tally.counts[name] for name in ("dropped_rows", "short_rows", "dull_rows"))
    longer = "a larger sequence_len" + (", or excess_length_strategy: truncate" if too_long else "")
    answers = longer if tally.counts["truncated_rows"] else "are columns and roles of the answers right?"
    reasons = [
        (too_long, f"longer than sequence_len {config.sequence_len}", longer),
        (short, f"shorter than min_sample_len {config.min_sample_len}", "a smaller min_sample_len"),
        (dull, "without a token to learn", f"{answers}; a row needs two tokens"),
    ]
    lost = ", ".join(f"{count:,} {why}" for count, why, _ in reasons if count)
    hint = "; ".join(dict.fromkeys(way_out for count, _, way_out in reasons if count))
    named = ", ".join(str(file.path) for file in files[:3])
    return UserError("datasets", named, f"no row is left: {lost or 'the data are empty'}", hint)


def texts_of(
    files: Iterable[SourceFile], passed: Callable[[SourceFile, int], None] = lambda file, characters: None
) -> Iterator[Text]:
    """Every document of files that are not tokenized; a text file comes in blocks."""
    for file in files:
        if file.kind == "text":
            yield Document(Origin(file.path), (Segment(""),), cut=True), _told(read_text(file), file, passed)
            continue
        for document in read_documents(file):
            yield document, None
            passed(file, sum(len(segment.text) for segment in document.segments))


def _told(blocks: Iterable[str], file: SourceFile, passed: Callable[[SourceFile, int], None]) -> Iterator[str]:
    for block in blocks:
        yield block
        passed(file, len(block))


def end_tokens(tokenizer: TextTokenizer | None, special: Set[int], closing: Counter[int]) -> list[int]:
    """The tokens that rows were made to end on: that of `tokenizer`, and `special` ones that tokenized rows end on.

    The latter close what is learnt at a stretch: a row, or a turn of a chat whose other turns are masked. A token that
    closes less than a tenth of them is there by chance.
    """
    often = [end for end, count in closing.most_common() if end in special and 10 * count >= closing.total()]
    return list(dict.fromkeys([tokenizer.eos_id, *often] if tokenizer else often))


def _closing(row: Sample) -> list[int]:
    """The last label of each stretch of labels that are learnt."""
    labels = row.tokens if row.labels is None else row.labels
    learnt = labels != IGNORED
    found: list[int] = labels[learnt & ~np.append(learnt[1:], False)].tolist()
    return found


class _Row(NamedTuple):
    """A row, and whether it brings its own end: one that came tokenized, or as a chat template writes it."""

    sample: Sample
    ends_itself: bool


class _Windows:
    """Tokens as they come, in rows of `length`."""

    def __init__(self, length: int) -> None:
        self._length, self._held = length, 0
        self._parts: list[tuple[Ids, Ids]] = []  # tokens and labels
        self._origin: Origin | None = None  # of the first

    def add(self, tokens: Ids, labels: Ids, origin: Origin) -> Iterator[_Row]:
        """The windows that are full now."""
        while self._held + len(tokens) >= self._length:
            room = self._length - self._held
            self._append(tokens[:room], labels[:room], origin)
            yield from self.rest()
            tokens, labels = tokens[room:], labels[room:]
        self._append(tokens, labels, origin)

    def rest(self) -> Iterator[_Row]:
        """The last window, which may be short."""
        if self._held:
            assert self._origin is not None
            tokens, labels = zip(*self._parts, strict=True)
            yield _Row(_sample(tokens, labels, self._origin), False)
        self._parts, self._held = [], 0

    def _append(self, tokens: Ids, labels: Ids, origin: Origin) -> None:
        if len(tokens):
            if not self._held:
                self._origin = origin
            self._parts.append((tokens, labels))
            self._held += len(tokens)


def _rows(encoded: Iterable[Encoded], eos_id: int, length: int, joined: bool) -> Iterator[_Row]:
    """A row a document, or as many windows of `length` as it fills: prompt and answer, then the end of sequence.

    `joined`: documents are one stream, cut into windows, with end-of-sequence tokens between them.
    """
    windows, between = _Windows(length), False
    end = np.array([eos_id], np.int32)
    tokens: list[Ids] = []
    labels: list[Ids] = []
    for document, segment, ids, mask, last in encoded:
        learnt = document.segments[segment].learnt is True
        if joined and between:  # no end follows the last document
            yield from windows.add(end, end, document.origin)
        between = joined and last
        marked = ids if learnt else np.where(False if mask is None else mask, ids, np.int32(IGNORED))
        if last and document.ended and not joined:
            ids = np.concatenate([ids, end])
            marked = np.concatenate([marked, end if learnt else np.full_like(end, IGNORED)])
        if document.cut:
            yield from windows.add(ids, marked, document.origin)
            if last and not joined:
                yield from windows.rest()
            continue
        tokens.append(ids)
        labels.append(marked)
        if last:
            yield _Row(_sample(tokens, labels, document.origin), not document.ended)
            tokens, labels = [], []
    yield from windows.rest()


def _sample(tokens: Sequence[Ids], labels: Sequence[Ids], origin: Origin) -> Sample:
    whole = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
    if all(one is other for one, other in zip(tokens, labels, strict=True)):
        return Sample(whole, origin)
    learnt = np.concatenate(labels)
    return Sample(whole, origin, None if np.array_equal(learnt, whole) else learnt)


def _fit(config: DataSettings, row: Sample, tally: Tally, keep_dull: bool) -> Sample | None:
    """The row, cut where that is asked for; None where it is longer than `sequence_len`, shorter than
    `min_sample_len`, or dull: without any target.

    Tokenized rows keep the dull ones: whoever made them may count on their number and order.
    """
    length = len(row.tokens)
    if length > config.sequence_len:
        tally.longest = max(tally.longest, length)
        tally.first_too_long = tally.first_too_long or row.origin
        if config.excess_length_strategy != "truncate":
            tally.counts["dropped_rows"] += 1
            return None
        tally.counts["truncated_rows"] += 1
        row = row.cut(config.sequence_len)
    if config.min_sample_len and length < config.min_sample_len:
        tally.counts["short_rows"] += 1
        return None
    if not keep_dull and not row.targets():
        tally.counts["dull_rows"] += 1
        return None
    tally.counts["inner_masked"] += row.inner_masked
    return row
