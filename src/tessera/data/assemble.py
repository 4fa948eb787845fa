"""Documents into the rows that are trained on: cut into windows, or ended and fitted one by one."""

from collections import Counter
from collections.abc import Sequence, Set
from itertools import groupby
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tessera.core.errors import UserError
from tessera.data.added_tokens import TokenizerKeys
from tessera.data.documents import Document, Segment
from tessera.data.samples import IGNORED, Ids, Origin, Sample
from tessera.data.sources import DatasetSettings, SourceFile, read_token_samples
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
    def train_on_inputs(self) -> bool: ...
    @property
    def val_set_size(self) -> int | float: ...
    @property
    def seed(self) -> int: ...
    @property
    def output_dir(self) -> str: ...


Member = tuple[SourceFile, list[Document]]
"""A file with its documents (none: it is tokenized, and read as rows)."""


def assemble_samples(
    config: DataSettings,
    members: Sequence[Member],
    tokenizer: TextTokenizer | None,
    counts: Counter[str],
    closing: Counter[int],
) -> list[Sample]:
    """The rows of all files in their order; neighbouring text files are one stream, cut into windows.

    `counts` gets the numbers of rows dropped, truncated, left out and masked inside, under the names of the
    manifest, `closing` how often each token is the last to be learnt, in rows that bring their own end. `tokenizer` may
    be None when every file is tokenized. UserError: no row is left.
    """
    rows: list[Sample] = []
    for is_text, group in groupby(members, key=lambda member: member[0].kind == "text"):
        if is_text:
            documents = [document for _, found in group for document in found]
            rows += _fit(config, _windows(documents, tokenizer, config.sequence_len), counts)
            continue
        for file, documents in group:
            if file.kind == "tokenized":
                kept = _fit(config, list(read_token_samples(file)), counts, keep_dull=True)
                for row in kept:
                    closing.update(_closing(row))
                rows += kept
            else:
                kept = _fit(config, _document_samples(documents, tokenizer, config.sequence_len), counts)
                if documents and not documents[0].ended:  # they end as a chat template writes it
                    for row in kept:
                        closing.update(_closing(row))
                rows += kept
    if not rows:
        long, dull = counts["dropped_rows"], counts["dull_rows"]
        reason = f"no row is left: {long:,} are longer than sequence_len {config.sequence_len}, {dull:,} too short"
        hint = "a larger sequence_len, or excess_length_strategy: truncate; a row needs two tokens"
        raise UserError("datasets", ", ".join(str(file.path) for file, _ in members[:3]), reason, hint)
    return rows


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


def _windows(documents: list[Document], tokenizer: TextTokenizer | None, length: int) -> list[Sample]:
    """The documents behind one another, end-of-sequence tokens between them, in rows of `length` tokens."""
    assert tokenizer is not None
    end = np.array([tokenizer.eos_id], np.int32)
    pieces: list[Ids] = []
    for ids in tokenizer.encode([document.segments[0].text for document in documents]):
        pieces += [ids, end]
    stream = np.concatenate(pieces[:-1])
    origin = documents[0].origin if len(documents) == 1 else Origin(documents[0].origin.path.parent)
    return [Sample(stream[start : start + length], origin) for start in range(0, len(stream), length)]


def _document_samples(documents: list[Document], tokenizer: TextTokenizer | None, length: int) -> list[Sample]:
    """A row a document, or one for each window of `length` tokens that it fills.

    Segments are tokenized apart: a prompt's tokens are then those that generation starts from.
    """
    assert tokenizer is not None
    rows: list[Sample] = []
    for document in documents:
        row = _document_sample(document, tokenizer)
        rows += row.windows(length) if document.cut else [row]
    return rows


def _document_sample(document: Document, tokenizer: TextTokenizer) -> Sample:
    tokens, labels = [], []
    for place, segment in enumerate(document.segments):
        ids, learnt = _encoded(segment, tokenizer, document.opened and place == 0)
        last = document.ended and place == len(document.segments) - 1
        if (last or document.opened and place == 0) and len(ids) and ids[-1] == tokenizer.eos_id:
            ids, learnt = ids[:-1], learnt[:-1]  # the text has it already, or the tokenizer closes texts so
        if last:
            ids, learnt = np.append(ids, np.int32(tokenizer.eos_id)), np.append(learnt, segment.learnt is True)
        tokens.append(ids)
        labels.append(np.where(learnt, ids, np.int32(IGNORED)))
    row, row_labels = np.concatenate(tokens), np.concatenate(labels)
    return Sample(row, document.origin, None if np.array_equal(row, row_labels) else row_labels)


def _encoded(segment: Segment, tokenizer: TextTokenizer, opened: bool) -> tuple[Ids, NDArray[np.bool_]]:
    """The ids of a segment, and which of them are learnt: those of whose characters one lies in a learnt span."""
    found = tokenizer.backend.encode(segment.text, add_special_tokens=opened)
    ids, offsets = np.asarray(found.ids, np.int32), found.offsets
    opening = tokenizer.backend.encode("", add_special_tokens=True).ids[:1] if opened else []
    if opening and found.ids[:2] == opening * 2:  # a text that begins with the begin-of-text token has it already
        ids, offsets = ids[1:], offsets[1:]
    if isinstance(segment.learnt, bool):
        return ids, np.full(len(ids), segment.learnt)
    learnt = [any(a < end and start < b for start, end in segment.learnt) for a, b in offsets]
    return ids, np.array(learnt, bool)


def _fit(config: DataSettings, rows: list[Sample], counts: Counter[str], keep_dull: bool = False) -> list[Sample]:
    """Drop, cut or refuse rows longer than `sequence_len`, and leave out dull ones, which have no target.

    Tokenized rows keep the dull ones: whoever made them may count on their number and order.
    """
    limit, strategy = config.sequence_len, config.excess_length_strategy
    too_long = [row for row in rows if len(row.tokens) > limit]
    if too_long and strategy == "raise":
        longest = max(len(row.tokens) for row in too_long)
        reason = f"{len(too_long):,} rows exceed sequence_len {limit}; the first: {too_long[0].origin}"
        hint = f"sequence_len: {longest} holds the longest; or excess_length_strategy: drop, or truncate"
        raise UserError("excess_length_strategy", strategy, reason, hint)
    if strategy == "truncate":
        kept = [row.cut(limit) for row in rows]
        counts["truncated_rows"] += len(too_long)
    else:
        kept = [row for row in rows if len(row.tokens) <= limit]
        counts["dropped_rows"] += len(too_long)
    if not keep_dull:
        bright = [row for row in kept if row.targets()]
        counts["dull_rows"] += len(kept) - len(bright)
        kept = bright
    counts["inner_masked"] += sum(row.inner_masked for row in kept)
    return kept
