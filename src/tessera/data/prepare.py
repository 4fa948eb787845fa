"""From the config to rows on disk: read, tokenize, fit to `sequence_len`, split, write; or reuse them.

The folder holds train/ and eval/ (see `samples`; eval/ only when rows are held out), manifest.json and, when the
tokenizer was trained on the data, its files. It is written beside its place, row by row, and renamed. What lies there
is trusted only as far as the sums in manifest.json go: a run that starts prepares anew what is not as it was, a rank
that finds such a block refuses it. Of the data no more is held in memory than is being tokenized.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import tokenizers

from tessera.core import terminal
from tessera.core.errors import UserError
from tessera.core.writing import system_error, why
from tessera.data.added_tokens import AddedTokens, TokenizerKeys
from tessera.data.alone import alone, put_in_place
from tessera.data.assemble import DataSettings
from tessera.data.formats.entry import Reading
from tessera.data.make import Sources, check_vocabulary, make
from tessera.data.manifest import GIVEN, MANIFEST, TRAINED, WHOLE, Manifest, damage, read_manifest
from tessera.data.sources import read_files
from tessera.data.stream import Stream
from tessera.data.tokenizer import TextTokenizer, given_tokenizer, named_folder

FORMAT = 3
"""Part of the cache key: raise it when the same files and settings come to give other rows."""
MANY = 0.05
"""Share of samples that may be left out without a warning."""


@dataclass(frozen=True)
class Prepared:
    """Rows ready to train on, in `folder`; `reused` when they were there already, `because` why those were not.

    `notes` are lines about the sources that the user should read. `given` is the folder of the tokenizer that the
    config names: the rows may have been made with a copy of it.
    """

    folder: Path
    manifest: Manifest
    reused: bool
    because: str = ""
    notes: tuple[str, ...] = ()
    given: Path | None = None

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer's files lie, or None when the data came tokenized."""
        return {TRAINED: self.folder, GIVEN: self.given}.get(self.manifest.tokenizer or "")

    def summary(self) -> str:
        """One line for the log, behind one for each note; below it a block where many samples were left out."""
        m = self.manifest
        told = [
            (m.train_rows, f", {m.train_tokens:,} tokens to train on"),
            (m.eval_rows, f", {m.eval_tokens:,} tokens held out"),
            (m.dropped_rows, f" longer than {m.sequence_len} dropped"),
            (m.short_rows, " shorter than min_sample_len dropped"),
            (m.truncated_rows, f" cut to {m.sequence_len} tokens"),
            (m.dull_rows, " without anything to learn left out"),
            (m.inner_masked, " with a masked token that later ones still attend to"),
        ]
        parts = [f"{count:,} row{'s' * (count > 1)}{what}" for count, what in told if count]
        again = f" (prepared again: {self.because})" if self.because else ""
        if not parts:
            return "\n".join(f"data: {note}" for note in self.notes)
        line = "data: " + "; ".join(parts) + (f" (reused from {self.folder})" if self.reused else again)
        return "\n".join([*(f"data: {note}" for note in self.notes), line, *self.warning()])

    def warning(self) -> list[str]:
        """What to tell where more than a share of MANY of the samples is not trained on: a block of lines, or none."""
        m = self.manifest
        lost, rows = m.dropped_rows + m.short_rows + m.dull_rows, m.train_rows + m.eval_rows
        share = lost / (lost + rows)
        if share <= MANY:
            return []
        lines = [f"WARNING: {lost:,} of {lost + rows:,} samples ({share:.0%}) are not trained on."]
        if m.dropped_rows:
            lines += [f"{m.dropped_rows:,} are longer than sequence_len {m.sequence_len}: raise it, or set"]
            lines += ["excess_length_strategy: truncate to keep their beginnings."]
        if m.short_rows:
            lines.append(f"{m.short_rows:,} are shorter than min_sample_len.")
        if m.dull_rows:
            lines.append(f"{m.dull_rows:,} have no token to learn within {m.sequence_len} tokens.")
        width = max(map(len, lines)) + 4
        return ["", "!" * width, *(f"! {line:{width - 4}} !" for line in lines), "!" * width, ""]


def prepare(
    config: DataSettings, vocab_size: int | None, folder: Path | None = None, stream: Stream | None = None
) -> Prepared:
    """Write the rows of `config.datasets` to `folder` (default: as `prepared_folder`), or reuse equal ones.

    Where those are a `stream`, no row of it is written, but the rows to evaluate on and what a run is to know are.

    `vocab_size` is the model's: a larger token id is an error (None: not checked). Where another process is preparing
    the same folder this one waits and reuses. UserError: data or tokenizer that cannot be read or do not fit, or a
    folder that cannot be written; nothing is left then, and what was there stays.
    """
    notes: list[str] = []
    sources = _sources(config, notes, stream)
    key = _cache_key(config, sources, stream)
    folder = folder or prepared_folder(config, key)
    named = "output_dir" if config.dataset_prepared_path is None else "dataset_prepared_path"

    def there() -> tuple[Manifest | None, str]:
        manifest, because = read_manifest(folder, named)
        if manifest is None or manifest.key != key:
            return None, because
        because = damage(folder, manifest, WHOLE)
        return (None, because) if because else (manifest, "")

    manifest, because = there()
    reused = manifest is not None
    if manifest is None:
        with _writing(folder, named, sources), alone(folder, lambda: _say_waiting(folder)) as beside:
            manifest, _ = there()  # another process may have made it meanwhile
            reused = manifest is not None
            if manifest is None:
                made = make(config, sources, key, vocab_size, beside, notes)
                manifest, _ = there()  # on a disk without locks
                reused = manifest is not None
            if manifest is None:
                put_in_place(beside, folder)
                manifest = made
    check_vocabulary(manifest, vocab_size)
    given = sources.tokenizer.folder if isinstance(sources.tokenizer, TextTokenizer) else None
    return Prepared(folder, manifest, reused, because, tuple(notes), given)


def prepared_folder(config: DataSettings, key: str) -> Path:
    """Where the rows of a config go: output_dir/prepared, or a folder of their own among those that runs share."""
    if config.dataset_prepared_path is None:
        return Path(config.output_dir) / "prepared"
    return Path(config.dataset_prepared_path) / key


def open_prepared(folder: Path, config: TokenizerKeys | None = None) -> Prepared:
    """What `prepare` left in `folder`, without reading the data again: for ranks other than the one that prepared.

    `config` names the tokenizer that is handed out.
    UserError: there is none, or it is not as it was written; the rows themselves are checked when they are read.
    """
    manifest, because = read_manifest(folder)
    because = damage(folder, manifest, whole=0) if manifest else because or f"it has no {MANIFEST} of this version"
    if manifest is None or because:
        raise UserError("output_dir", folder, f"is not the prepared data of this run: {because}", "start the run again")
    return Prepared(folder, manifest, reused=True, given=None if config is None else named_folder(config))


def _sources(config: DataSettings, notes: list[str], stream: Stream | None) -> Sources:
    """The files, hashed, and the tokenizer, or the vocabulary size of the one to train."""
    _check_apart(config)
    reading = Reading.of(config)
    train = [] if stream else read_files(config.datasets, config.output_dir, reading, notes)
    held_out = read_files(config.test_datasets, config.output_dir, reading, notes) if config.test_datasets else []
    if stream:
        return Sources(train, held_out, stream.tokenizer)
    added = AddedTokens.of(config)  # the exported tokenizer has them, whatever the rows are made from
    if not added and all(file.kind == "tokenized" for file in (*train, *held_out)):
        return Sources(train, held_out, None)
    return Sources(train, held_out, given_tokenizer(config, added))


def _check_apart(config: DataSettings) -> None:
    """Raise UserError for a folder of prepared rows within one of data: at the next start they would be data."""
    if config.dataset_prepared_path is None:
        return
    shared = os.path.realpath(config.dataset_prepared_path)
    for entry in (*(config.datasets or ()), *(config.test_datasets or ())):
        if os.path.isdir(entry.path) and Path(shared).is_relative_to(os.path.realpath(entry.path)):
            reason = f"lies in the data folder {entry.path}: what is prepared would be data at the next start"
            raise UserError("dataset_prepared_path", config.dataset_prepared_path, reason, "a folder of its own")


def _cache_key(config: DataSettings, sources: Sources, stream: Stream | None) -> str:
    """Equal for equal rows: contents and settings, not paths."""
    tokenizer = sources.tokenizer
    more = f" {AddedTokens.of(config)}" if AddedTokens.of(config) else ""
    trained = f"bpe {tokenizer} {tokenizers.__version__}{more}" if isinstance(tokenizer, int) else None
    settings = {
        "format": FORMAT,
        "files": stream.key if stream else [file.key for file in sources.train],
        "held_out": [file.key for file in sources.held_out],
        "tokenizer": tokenizer.digest() if isinstance(tokenizer, TextTokenizer) else trained,
        "fit": (config.sequence_len, config.excess_length_strategy, config.train_on_inputs),
        **({"shortest": config.min_sample_len} if config.min_sample_len else {}),
        "split": (repr(config.val_set_size), config.seed) if config.val_set_size else None,
    }
    return blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def _say_waiting(folder: Path) -> None:
    terminal.say(f"data: another process is preparing {folder}; this one waits for it")


@contextmanager
def _writing(folder: Path, key: str, sources: Sources) -> Iterator[None]:
    """What keeps the folder from being written becomes a UserError; ids take about as many bytes as their text."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (found := system_error(error, folder)) is None:
            raise
        needs = sum(file.path.stat().st_size for file in (*sources.train, *sources.held_out))
        raise UserError(key, folder, f"cannot be written: {why(found, folder, needs)}") from error
