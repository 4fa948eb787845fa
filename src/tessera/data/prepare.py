"""From the config to rows on disk: read, tokenize, fit to `sequence_len`, split, write; or reuse them.

The folder holds train/ and eval/ (see `samples`; eval/ only when rows are held out), manifest.json and, when the
tokenizer was trained on the data, its files. It is written beside its place, row by row, and renamed. What lies there
is trusted only as far as the sums in manifest.json go: a run that starts prepares anew what is not as it was, a rank
that finds such a block refuses it. Of the data no more is held in memory than is being tokenized.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import tokenizers

from tessera.core import terminal
from tessera.core.errors import UserError
from tessera.core.files import remove
from tessera.core.writing import system_error, why
from tessera.data.added_tokens import AddedTokens
from tessera.data.alone import alone, put_in_place
from tessera.data.assemble import DataSettings, Tally, assemble_samples, end_tokens, texts_of
from tessera.data.auto_tokenizer import has_tokenizer, read_auto
from tessera.data.columns import Written, sum_of
from tessera.data.encode import in_pieces
from tessera.data.formats.entry import Reading
from tessera.data.manifest import MANIFEST, SPLITS, TRAINED, WHOLE, Manifest, damage, read_manifest
from tessera.data.order import Permutation
from tessera.data.samples import HELD_OUT, Sample, SampleWriter, read_rows
from tessera.data.sources import SourceFile, read_files
from tessera.data.tokenizer import (
    TextTokenizer,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    train_bpe,
    with_tokens,
)

FORMAT = 3
"""Part of the cache key: raise it when the same files and settings come to give other rows."""
MANY = 0.05
"""Share of samples that may be left out without a warning."""


@dataclass(frozen=True)
class Prepared:
    """Rows ready to train on, in `folder`; `reused` when they were there already, `because` why those were not.

    `notes` are lines about the sources that the user should read.
    """

    folder: Path
    manifest: Manifest
    reused: bool
    because: str = ""
    notes: tuple[str, ...] = ()

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer's files lie, or None when the data came tokenized."""
        name = self.manifest.tokenizer
        return self.folder if name == TRAINED else Path(name) if name else None

    def summary(self) -> str:
        """One line for the log, behind one for each note; below it a block where many samples were left out."""
        m = self.manifest
        told = [
            (m.train_rows, f", {m.train_tokens:,} tokens to train on"),
            (m.eval_rows, f", {m.eval_tokens:,} tokens held out"),
            (m.dropped_rows, f" longer than {m.sequence_len} dropped"),
            (m.truncated_rows, f" cut to {m.sequence_len} tokens"),
            (m.dull_rows, " without anything to learn left out"),
            (m.inner_masked, " with a masked token that later ones still attend to"),
        ]
        parts = [f"{count:,} row{'s' * (count > 1)}{what}" for count, what in told if count]
        again = f" (prepared again: {self.because})" if self.because else ""
        line = "data: " + "; ".join(parts) + (f" (reused from {self.folder})" if self.reused else again)
        return "\n".join([*(f"data: {note}" for note in self.notes), line, *self.warning()])

    def warning(self) -> list[str]:
        """What to tell where more than a share of MANY of the samples is not trained on: a block of lines, or none."""
        m = self.manifest
        lost, rows = m.dropped_rows + m.dull_rows, m.train_rows + m.eval_rows
        share = lost / (lost + rows)
        if share <= MANY:
            return []
        lines = [f"WARNING: {lost:,} of {lost + rows:,} samples ({share:.0%}) are not trained on."]
        if m.dropped_rows:
            lines += [f"{m.dropped_rows:,} are longer than sequence_len {m.sequence_len}: raise it, or set"]
            lines += ["excess_length_strategy: truncate to keep their beginnings."]
        if m.dull_rows:
            lines.append(f"{m.dull_rows:,} have no token to learn within {m.sequence_len} tokens.")
        width = max(map(len, lines)) + 4
        return ["", "!" * width, *(f"! {line:{width - 4}} !" for line in lines), "!" * width, ""]


def prepare(config: DataSettings, vocab_size: int | None, folder: Path | None = None) -> Prepared:
    """Write the rows of `config.datasets` to `folder` (default: as `prepared_folder`), or reuse equal ones.

    `vocab_size` is the model's: a larger token id is an error (None: not checked). Where another process is preparing
    the same folder this one waits and reuses. UserError: data or tokenizer that cannot be read or do not fit, or a
    folder that cannot be written; nothing is left then, and what was there stays.
    """
    notes: list[str] = []
    files = read_files(config.datasets, config.output_dir, Reading.of(config), notes)
    added = AddedTokens.of(config)  # the exported tokenizer has them, whatever the rows are made from
    tokenizer = _given_tokenizer(config) if added or any(file.kind != "tokenized" for file in files) else None
    key = _cache_key(config, files, tokenizer)
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
        with _writing(folder, named), alone(folder, lambda: _say_waiting(folder)) as beside:
            manifest, _ = there()  # another process may have made it meanwhile
            reused = manifest is not None
            if manifest is None:
                manifest = _make(config, files, tokenizer, key, vocab_size, beside, notes)
                put_in_place(beside, folder)
    _check_vocabulary(manifest, vocab_size)
    return Prepared(folder, manifest, reused, because, tuple(notes))


def prepared_folder(config: DataSettings, key: str) -> Path:
    """Where the rows of a config go: output_dir/prepared, or a folder of their own among those that runs share."""
    if config.dataset_prepared_path is None:
        return Path(config.output_dir) / "prepared"
    return Path(config.dataset_prepared_path) / key


def open_prepared(folder: Path) -> Prepared:
    """What `prepare` left in `folder`, without reading the data again: for ranks other than the one that prepared.

    UserError: there is none, or it is not as it was written; the rows themselves are checked when they are read.
    """
    manifest, because = read_manifest(folder)
    because = damage(folder, manifest, whole=0) if manifest else because or f"it has no {MANIFEST} of this version"
    if manifest is None or because:
        raise UserError("output_dir", folder, f"is not the prepared data of this run: {because}", "start the run again")
    return Prepared(folder, manifest, reused=True)


def _given_tokenizer(config: DataSettings) -> TextTokenizer | int:
    """The tokenizer to load, or the vocabulary size of the one to train."""
    given, added = config.tokenizer, AddedTokens.of(config)
    if given is None:
        return load_tokenizer(Path(config.base_model), "base_model", added)
    return load_tokenizer(Path(given), "tokenizer", added) if isinstance(given, str | Path) else given.vocab_size


def _special_ids(config: DataSettings, tokenizer: TextTokenizer | None) -> set[int]:
    """The special tokens of the tokenizer that tokenized rows are from, as far as one is known."""
    if tokenizer is not None:
        return special_ids(tokenizer.backend)
    folder = Path(config.tokenizer if isinstance(config.tokenizer, str | Path) else config.base_model)
    return special_ids(read_auto(folder, "tokenizer").backend_tokenizer) if has_tokenizer(folder) else set()


def _cache_key(config: DataSettings, files: list[SourceFile], tokenizer: TextTokenizer | int | None) -> str:
    """Equal for equal rows: contents and settings, not paths. An int is the size of a tokenizer to train."""
    more = f" {AddedTokens.of(config)}" if AddedTokens.of(config) else ""
    trained = f"bpe {tokenizer} {tokenizers.__version__}{more}" if isinstance(tokenizer, int) else None
    settings = {
        "format": FORMAT,
        "files": [file.key for file in files],
        "tokenizer": tokenizer.digest() if isinstance(tokenizer, TextTokenizer) else trained,
        "fit": (config.sequence_len, config.excess_length_strategy, config.train_on_inputs),
        "split": (repr(config.val_set_size), config.seed) if config.val_set_size else None,
    }
    return blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def _say_waiting(folder: Path) -> None:
    terminal.say(f"data: another process is preparing {folder}; this one waits for it")


@contextmanager
def _writing(folder: Path, key: str) -> Iterator[None]:
    """What keeps the folder from being written becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (found := system_error(error, folder)) is None:
            raise
        raise UserError(key, folder, f"cannot be written: {why(found, folder)}") from error


def _make(
    config: DataSettings,
    files: list[SourceFile],
    tokenizer: TextTokenizer | int | None,
    key: str,
    vocab_size: int | None,
    folder: Path,
    notes: list[str],
) -> Manifest:
    """Write the folder, whole, under a name beside its place; `notes` gets what is found on the way."""
    if isinstance(tokenizer, int):
        tokenizer = _trained(files, tokenizer, vocab_size, AddedTokens.of(config))
    folder.mkdir()
    tally = Tally()
    with _progress("tokenizing", files) as passed:
        rows = assemble_samples(config, files, tokenizer, tally, passed)
        if vocab_size is not None:
            rows = _within_vocabulary(rows, vocab_size)
        everything, written = _write_rows(rows, folder / "train")
    notes += tally.whole
    parts: dict[str, SampleWriter] = {"train": everything}
    if config.val_set_size:
        parts, written = _split(folder, everything.rows, config.val_set_size, config.seed)
    for name, part in parts.items():
        if not part.targets:
            raise UserError("datasets", files[0].path, f"no row of the {name} split has a token to learn")
    if tokenizer and tokenizer.folder is None:
        save_tokenizer(tokenizer, folder)
        for file in folder.glob("*.json"):
            content = file.read_bytes()
            written[file.name] = Written(len(content), sum_of(content))
    special = _special_ids(config, tokenizer) if tally.closing else set()
    train, held_out = parts["train"], parts.get("eval")
    manifest = Manifest(
        key=key,
        train_rows=train.rows,
        train_tokens=train.tokens,
        train_targets=train.targets,
        eval_rows=held_out.rows if held_out else 0,
        eval_tokens=held_out.tokens if held_out else 0,
        eval_targets=held_out.targets if held_out else 0,
        sequence_len=config.sequence_len,
        dropped_rows=tally.counts["dropped_rows"],
        truncated_rows=tally.counts["truncated_rows"],
        dull_rows=tally.counts["dull_rows"],
        inner_masked=tally.counts["inner_masked"],
        largest_token=everything.largest,
        largest_token_place=everything.largest_place,
        tokenizer=None if tokenizer is None else str(tokenizer.folder or TRAINED),
        tokenizer_size=tokenizer.vocab_size if tokenizer else None,
        eos_token_id=tokenizer.eos_id if tokenizer else None,
        end_tokens=end_tokens(tokenizer, special, tally.closing),
        files=written,
    ).summed()
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    return manifest


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


def _write_rows(rows: Iterable[Sample], folder: Path) -> tuple[SampleWriter, dict[str, Written]]:
    """Write a split as its rows come; its files by their names in the prepared folder."""
    writer = SampleWriter(folder)
    try:
        for row in rows:
            writer.append(row)
        written = writer.close()
    finally:
        writer.abandon()
    return writer, {f"{folder.name}/{name}": one for name, one in written.items()}


def _within_vocabulary(rows: Iterable[Sample], size: int) -> Iterator[Sample]:
    """The rows. UserError at once for one with a token that the model has no embedding for."""
    for row in rows:
        if row.largest() >= size:
            _check_largest(row.largest(), str(row.origin), size)
        yield row


def _split(
    folder: Path, count: int, val_set_size: int | float, seed: int
) -> tuple[dict[str, SampleWriter], dict[str, Written]]:
    """The `count` rows of train/ without those that are held out, and those as eval/: each in order; `seed` draws."""
    most = count - 1
    share = min(most, max(1, round(val_set_size * count))) if val_set_size < 1 else int(val_set_size)
    if share > most or not most:
        reason = f"leaves no row to train on: there are {count:,}"
        raise UserError("val_set_size", val_set_size, reason, f"at most {most}")
    held_out = np.sort(Permutation(count, HELD_OUT, seed).at(np.arange(share)))
    everything = (folder / "train").rename(folder / "rows")
    writers: dict[str, SampleWriter] = {name: SampleWriter(folder / name) for name in SPLITS}
    try:
        following = 0
        for index, row in enumerate(read_rows(everything)):
            is_held_out = following < share and held_out[following] == index
            following += is_held_out
            writers["eval" if is_held_out else "train"].append(row)
        written = {f"{name}/{file}": one for name, part in writers.items() for file, one in part.close().items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    remove(everything)
    return writers, written


def _check_vocabulary(manifest: Manifest, vocab_size: int | None) -> None:
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
