"""Documents into the rows that are trained on: cut into windows, or ended and fitted one by one."""

from collections import Counter
from collections.abc import Sequence, Set
from itertools import groupby
from typing import Protocol

import numpy as np

from tessera.core.errors import UserError
from tessera.data.added_tokens import TokenizerKeys
from tessera.data.samples import IGNORED, Ids, Origin, Sample
from tessera.data.sources import DatasetSettings, Document, SourceFile, read_token_samples
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
    manifest, `closing` how often each token is the last to be learnt, in tokenized rows. `tokenizer` may be None when
    every file is tokenized. UserError: no row is left.
    """
    rows: list[Sample] = []
    for is_text, group in groupby(members, key=lambda member: member[0].kind == "text"):
        if is_text:
            documents = [document for _, found in group for document in found]
            rows += _fit(config, _windows(documents, tokenizer, config.sequence_len), counts)
            continue
        for file, documents in group:
            if file.kind == "tokenized":
                kept = _fit(config, read_token_samples(file), counts, keep_dull=True)
                for row in kept:
                    closing.update(_closing(row))
                rows += kept
            else:
                new = _document_samples(documents, tokenizer, config.train_on_inputs)
                rows += _fit(config, new, counts)
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
    for ids in tokenizer.encode([document.text for document in documents]):
        pieces += [ids, end]
    stream = np.concatenate(pieces[:-1])
    origin = documents[0].origin if len(documents) == 1 else Origin(documents[0].origin.path.parent)
    return [Sample(stream[start : start + length], origin) for start in range(0, len(stream), length)]


def _document_samples(
    documents: list[Document], tokenizer: TextTokenizer | None, train_on_inputs: bool
) -> list[Sample]:
    """A row a document: prompt, text, end of sequence.

    Prompt and text are tokenized apart: the prompt's tokens are then those that generation starts from.
    """
    assert tokenizer is not None
    end = np.array([tokenizer.eos_id], np.int32)
    if not any(document.prompt for document in documents):
        texts = tokenizer.encode([document.text for document in documents])
        return [Sample(np.concatenate([ids, end]), d.origin) for d, ids in zip(documents, texts, strict=True)]
    prompts = tokenizer.encode([document.prompt for document in documents])
    texts = tokenizer.encode([document.text for document in documents], special=False)
    rows = []
    for document, prompt, text in zip(documents, prompts, texts, strict=True):
        labels = None if train_on_inputs else np.concatenate([np.full_like(prompt, IGNORED), text, end])
        rows.append(Sample(np.concatenate([prompt, text, end]), document.origin, labels))
    return rows


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
