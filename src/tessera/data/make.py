"""Writes a folder of prepared data, row by row: tokenizer trained if need be, rows, held-out rows, manifest."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tessera.core import terminal
from tessera.core.errors import UserError
from tessera.core.files import remove
from tessera.data.added_tokens import AddedTokens
from tessera.data.assemble import DataSettings, Tally, assemble_samples, end_tokens, texts_of
from tessera.data.auto_tokenizer import has_tokenizer, read_auto
from tessera.data.columns import Written, sum_of
from tessera.data.encode import in_pieces
from tessera.data.manifest import GIVEN, MANIFEST, STREAM_TOKENIZER, TRAINED, Manifest
from tessera.data.order import Permutation
from tessera.data.samples import HELD_OUT, Sample, SampleWriter, Split, read_rows
from tessera.data.sources import SourceFile
from tessera.data.tokenizer import TextTokenizer, save_tokenizer, special_ids, train_bpe, with_tokens, write_loaded


class Sources(NamedTuple):
    """What rows are made from: the files to train on, those to evaluate on, and the tokenizer.

    `tokenizer`: an int is the size of one that is to be trained on the first; None: all files are tokenized.
    """

    train: list[SourceFile]
    held_out: list[SourceFile]
    tokenizer: TextTokenizer | int | None


def make(
    config: DataSettings, sources: Sources, key: str, vocab_size: int | None, folder: Path, notes: list[str]
) -> Manifest:
    """Write the new folder `folder`, whole; `notes` gets what is found on the way.

    UserError: what is wrong with the data, or a token that `vocab_size` has no room for. OSError of the disk.
    """
    tokenizer = sources.tokenizer
    if isinstance(tokenizer, int):
        tokenizer = _trained(sources.train, tokenizer, vocab_size, AddedTokens.of(config))
    folder.mkdir()
    tally, parts = Tally(), dict[Split, SampleWriter]()
    given: dict[Split, list[SourceFile]] = {"train": sources.train, "eval": sources.held_out}
    for split, files in given.items():
        if files:
            with _progress("tokenizing", files) as passed:
                rows = assemble_samples(config, files, tokenizer, tally, passed)
                parts[split] = _write_rows(rows if vocab_size is None else _fitting(rows, vocab_size), folder / split)
    notes += tally.whole
    largest = max(parts.values(), key=lambda part: part.largest, default=None)
    if config.val_set_size:
        parts = _split(folder, parts["train"].rows, config.val_set_size, config.seed)
    for split, part in parts.items():
        if not part.targets:
            place = (sources.held_out if sources.held_out and split == "eval" else sources.train)[0].path
            raise UserError("datasets", place, f"no row of the {split} split has a token to learn")
    written = {f"{split}/{name}": one for split, part in parts.items() for name, one in part.files.items()}
    if tokenizer and tokenizer.folder is None:
        save_tokenizer(tokenizer, folder)
    if tokenizer and not sources.train:  # of a stream
        write_loaded(tokenizer, folder / STREAM_TOKENIZER)
    for file in folder.glob("*.json"):
        content = file.read_bytes()
        written[file.name] = Written(len(content), sum_of(content))
    special = _special_ids(config, tokenizer) if tally.closing else set()
    train, held_out = parts.get("train"), parts.get("eval")
    manifest = Manifest(
        key=key,
        train_rows=train.rows if train else 0,  # of a stream none are written
        train_tokens=train.tokens if train else 0,
        train_targets=train.targets if train else 0,
        eval_rows=held_out.rows if held_out else 0,
        eval_tokens=held_out.tokens if held_out else 0,
        eval_targets=held_out.targets if held_out else 0,
        sequence_len=config.sequence_len,
        dropped_rows=tally.counts["dropped_rows"],
        truncated_rows=tally.counts["truncated_rows"],
        short_rows=tally.counts["short_rows"],
        dull_rows=tally.counts["dull_rows"],
        inner_masked=tally.counts["inner_masked"],
        largest_token=largest.largest if largest else 0,
        largest_token_place=largest.largest_place if largest else "",
        tokenizer=None if tokenizer is None else GIVEN if tokenizer.folder else TRAINED,
        tokenizer_size=tokenizer.vocab_size if tokenizer else None,
        eos_token_id=tokenizer.eos_id if tokenizer else None,
        end_tokens=end_tokens(tokenizer, special, tally.closing),
        files=written,
    ).summed()
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    return manifest


def _special_ids(config: DataSettings, tokenizer: TextTokenizer | None) -> set[int]:
    """The special tokens of the tokenizer that tokenized rows are from, as far as one is known."""
    if tokenizer is not None:
        return special_ids(tokenizer.backend)
    folder = Path(config.tokenizer if isinstance(config.tokenizer, str | Path) else config.base_model)
    return special_ids(read_auto(folder, "tokenizer").backend_tokenizer) if has_tokenizer(folder) else set()


def _trained(files: list[SourceFile], size: int, vocab_size: int | None, added: AddedTokens) -> TextTokenizer:
    """A tokenizer of `size` ids and the `added` ones, trained on the texts. UserError: too many for the model."""
    with _progress("training the tokenizer", files) as passed:
        tokenizer = train_bpe(in_pieces(texts_of((f for f in files if f.kind != "tokenized"), passed)), size)
    tokenizer = with_tokens(tokenizer, added) if added else tokenizer
    if vocab_size is not None:
        _check_trained(tokenizer.vocab_size, vocab_size)
    return tokenizer


@contextmanager
def _progress(what: str, files: list[SourceFile]) -> Iterator[Callable[[SourceFile, int], None]]:
    """A bar over the bytes of `files`; what is yielded is told of the characters that are read of one.

    Those are a little fewer than bytes, or many more where the file is compressed: a finished file counts whole.
    """
    sizes = {id(file): file.path.stat().st_size for file in files}
    current, before, within = id(files[0]), 0, 0
    with terminal.progress(what, sum(sizes.values())) as show:

        def passed(file: SourceFile, characters: int) -> None:
            nonlocal current, before, within
            if id(file) != current:
                before, current, within = before + sizes[current], id(file), 0
            within += characters
            show(before + min(within, sizes[current]))

        yield passed


def _write_rows(rows: Iterable[Sample], folder: Path) -> SampleWriter:
    """Write a split as its rows come."""
    with SampleWriter(folder) as writer:
        for row in rows:
            writer.append(row)
    return writer


def _fitting(rows: Iterable[Sample], size: int) -> Iterator[Sample]:
    """The rows. UserError at once for one with a token that the model has no embedding for."""
    for row in rows:
        if row.largest() >= size:
            _check_largest(row.largest(), str(row.origin), size)
        yield row


def _split(folder: Path, count: int, val_set_size: int | float, seed: int) -> dict[Split, SampleWriter]:
    """The `count` rows of train/ without those that are held out, and those as eval/: each in order; `seed` draws."""
    most = count - 1
    share = min(most, max(1, round(val_set_size * count))) if val_set_size < 1 else int(val_set_size)
    if share > most or not most:
        reason = f"leaves no row to train on: there are {count:,}"
        raise UserError("val_set_size", val_set_size, reason, f"at most {most}")
    held_out = np.sort(Permutation(count, HELD_OUT, seed).at(np.arange(share)))
    everything = (folder / "train").rename(folder / "rows")
    with SampleWriter(folder / "train") as train, SampleWriter(folder / "eval") as kept_back:
        following = 0
        for index, row in enumerate(read_rows(everything)):
            is_held_out = following < share and held_out[following] == index
            following += is_held_out
            (kept_back if is_held_out else train).append(row)
    remove(everything)
    return {"train": train, "eval": kept_back}


def check_vocabulary(manifest: Manifest, vocab_size: int | None) -> None:
    """Every token must have a row in the model's embedding, every id of a tokenizer trained here too."""
    if vocab_size is None:
        return
    if manifest.tokenizer == TRAINED:
        _check_trained(manifest.tokenizer_size or 0, vocab_size)
    _check_largest(manifest.largest_token, manifest.largest_token_place, vocab_size)


def _check_trained(size: int, vocab_size: int) -> None:
    if size > vocab_size:
        reason = f"larger than the model's vocabulary of {vocab_size}"
        raise UserError("tokenizer.vocab_size", size, reason, f"at most {vocab_size}")


def _check_largest(token: int, place: str, vocab_size: int) -> None:
    if token >= vocab_size:
        reason = f"token {token} is outside the model's vocabulary of {vocab_size}"
        hint = f"ids from 0 to {vocab_size - 1}, from the tokenizer that belongs to the model"
        raise UserError("datasets", place, reason, hint)
