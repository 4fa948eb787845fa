"""From the config to rows on disk: read, tokenize, fit to `sequence_len`, split, write; or reuse them.

The folder holds train/ and eval/ (see `samples`; eval/ only when rows are held out), manifest.json and, when the
tokenizer was trained on the data, its files. After every check it is written beside its place and renamed.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path

import tokenizers

from tessera.core.errors import UserError
from tessera.data.assemble import DataSettings, assemble_samples
from tessera.data.samples import HELD_OUT, Sample, Split, shuffled, write_samples
from tessera.data.sources import SourceFile, read_documents, read_files
from tessera.data.tokenizer import TextTokenizer, load_tokenizer, save_tokenizer, train_bpe

FORMAT = 1
"""Part of the cache key: raise it when the same files and settings come to give other rows."""

TRAINED = "trained"
SPLITS: tuple[Split, Split] = ("train", "eval")


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds, as manifest.json says it.

    Tokens count every token, targets those that are learnt. Dull rows (no target left: a single token, a
    prompt that fills the row) were left out. `inner_masked` counts tokenized rows whose attention_mask hides
    a token that later ones still see. `tokenizer` is the folder it came from, TRAINED where it was trained on
    the data and lies in the prepared folder, or None where none was needed.
    """

    key: str
    train_rows: int
    train_tokens: int
    train_targets: int
    eval_rows: int
    eval_tokens: int
    eval_targets: int
    sequence_len: int
    dropped_rows: int
    truncated_rows: int
    dull_rows: int
    inner_masked: int
    largest_token: int
    largest_token_place: str
    tokenizer: str | None
    tokenizer_size: int | None
    eos_token_id: int | None


@dataclass(frozen=True)
class Prepared:
    """Rows ready to train on, in `folder`; `reused` when they were there already."""

    folder: Path
    manifest: Manifest
    reused: bool

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where tokenizer.json lies, or None when the data came tokenized."""
        name = self.manifest.tokenizer
        return self.folder if name == TRAINED else Path(name) if name else None

    def summary(self) -> str:
        """One line for the log."""
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
        return "data: " + "; ".join(parts) + (f" (reused from {self.folder})" if self.reused else "")


def prepare(config: DataSettings, vocab_size: int | None, folder: Path | None = None) -> Prepared:
    """Write the rows of `config.datasets` to `folder` (default: output_dir/prepared), or reuse equal ones.

    `vocab_size` is the model's: a larger token id is an error (None: not checked). Nothing is written before
    everything was checked. UserError: data or tokenizer that cannot be read or do not fit, nothing left.
    """
    folder = folder or Path(config.output_dir) / "prepared"
    there = _read_manifest(folder)
    files = read_files(config.datasets)
    tokenizer = _given_tokenizer(config) if any(file.kind != "tokenized" for file in files) else None
    key = _cache_key(config, files, tokenizer)
    if there and there.key == key:
        _check_vocabulary(there, vocab_size)
        return Prepared(folder, there, reused=True)

    members = [(file, [] if file.kind == "tokenized" else read_documents(file)) for file in files]
    if isinstance(tokenizer, int):
        tokenizer = train_bpe((d.prompt + d.text for _, found in members for d in found), tokenizer)
    counts: Counter[str] = Counter()
    rows = assemble_samples(config, members, tokenizer, counts)
    splits = _split(rows, config.val_set_size, config.seed)
    manifest = _manifest(config, key, splits, tokenizer, counts)
    _check_vocabulary(manifest, vocab_size)
    _write(folder, splits, manifest, tokenizer)
    return Prepared(folder, manifest, reused=False)


def open_prepared(folder: Path) -> Prepared:
    """What `prepare` left in `folder`, without reading the data again: for ranks other than the one that prepared."""
    manifest = _read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder} holds no prepared data: has every rank the same file system?")
    return Prepared(folder, manifest, reused=True)


def _given_tokenizer(config: DataSettings) -> TextTokenizer | int:
    """The tokenizer to load, or the vocabulary size of the one to train."""
    given = config.tokenizer
    if given is None:
        return load_tokenizer(Path(config.base_model), "base_model")
    return load_tokenizer(Path(given), "tokenizer") if isinstance(given, str | Path) else given.vocab_size


def _cache_key(config: DataSettings, files: list[SourceFile], tokenizer: TextTokenizer | int | None) -> str:
    """Equal for equal rows: contents and settings, not paths. An int is the size of a tokenizer to train."""
    trained = f"bpe {tokenizer} {tokenizers.__version__}" if isinstance(tokenizer, int) else None
    settings = {
        "format": FORMAT,
        "files": [(f.kind, f.field, f.digest) for f in files],
        "tokenizer": tokenizer.digest() if isinstance(tokenizer, TextTokenizer) else trained,
        "fit": (config.sequence_len, config.excess_length_strategy, config.train_on_inputs),
        "split": (repr(config.val_set_size), config.seed) if config.val_set_size else None,
    }
    return blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def _split(rows: list[Sample], val_set_size: int | float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Rows to train on and rows held out, each in the order of `rows`, the latter drawn from `seed`."""
    if not val_set_size:
        return rows, []
    most = len(rows) - 1
    share = min(most, max(1, round(val_set_size * len(rows)))) if val_set_size < 1 else int(val_set_size)
    if share > most or not most:
        reason = f"leaves no row to train on: there are {len(rows):,}"
        raise UserError("val_set_size", val_set_size, reason, f"at most {most}")
    held_out = set(shuffled(len(rows), HELD_OUT, seed)[:share].tolist())
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in sorted(held_out)]


def _manifest(
    config: DataSettings,
    key: str,
    splits: tuple[list[Sample], list[Sample]],
    tokenizer: TextTokenizer | None,
    counts: Counter[str],
) -> Manifest:
    train, held_out = splits
    targets = [sum(row.targets() for row in rows) for rows in splits]
    for name, rows, learnt in zip(SPLITS, splits, targets, strict=True):
        if rows and not learnt:
            raise UserError("datasets", rows[0].origin.path, f"no row of the {name} split has a token to learn")
    largest = max((row for rows in splits for row in rows), key=Sample.largest)
    return Manifest(
        key=key,
        train_rows=len(train),
        train_tokens=sum(len(row.tokens) for row in train),
        train_targets=targets[0],
        eval_rows=len(held_out),
        eval_tokens=sum(len(row.tokens) for row in held_out),
        eval_targets=targets[1],
        sequence_len=config.sequence_len,
        dropped_rows=counts["dropped_rows"],
        truncated_rows=counts["truncated_rows"],
        dull_rows=counts["dull_rows"],
        inner_masked=counts["inner_masked"],
        largest_token=largest.largest(),
        largest_token_place=str(largest.origin),
        tokenizer=None if tokenizer is None else str(tokenizer.folder or TRAINED),
        tokenizer_size=tokenizer.vocab_size if tokenizer else None,
        eos_token_id=tokenizer.eos_id if tokenizer else None,
    )


def _check_vocabulary(manifest: Manifest, vocab_size: int | None) -> None:
    """Every token must have a row in the model's embedding, every id of a tokenizer trained here too."""
    if vocab_size is None:
        return
    if manifest.tokenizer == TRAINED and (manifest.tokenizer_size or 0) > vocab_size:
        reason = f"larger than the model's vocabulary of {vocab_size}"
        raise UserError("tokenizer.vocab_size", manifest.tokenizer_size, reason, f"at most {vocab_size}")
    if manifest.largest_token >= vocab_size:
        reason = f"token {manifest.largest_token} is outside the model's vocabulary of {vocab_size}"
        hint = f"ids from 0 to {vocab_size - 1}, from the tokenizer that belongs to the model"
        raise UserError("datasets", manifest.largest_token_place, reason, hint)


def _read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an earlier `prepare`, or None: no folder, an empty one, another version's.

    UserError: the folder holds something else, which must not be replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        entries = json.loads((folder / "manifest.json").read_text("utf-8"))
        ours = "key" in entries and "train_rows" in entries
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        reason = "is where prepared data goes, but holds something else"
        raise UserError("output_dir", folder, reason, "move that away, or choose another output_dir")
    names = {field.name for field in fields(Manifest)}
    return Manifest(**entries) if names == set(entries) else None


def _write(
    folder: Path, splits: tuple[list[Sample], list[Sample]], manifest: Manifest, tokenizer: TextTokenizer | None
) -> None:
    """Write everything beside `folder`, then rename it into place: a folder with a manifest is whole."""
    beside, old = (folder.with_name(f".{folder.name}.{os.getpid()}{suffix}") for suffix in ("", ".old"))
    try:
        for left in (beside, old):
            shutil.rmtree(left, ignore_errors=True)  # of a process of that number that was killed
        beside.mkdir(parents=True)
        for split, rows in zip(SPLITS, splits, strict=True):
            if rows:
                write_samples(beside / split, rows)
        if tokenizer and manifest.tokenizer == TRAINED:
            save_tokenizer(tokenizer, beside)
        (beside / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        if folder.exists():
            folder.rename(old)  # removed in place and killed meanwhile, it would be neither ours nor empty
        beside.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        reason = f"cannot be written: {error.strerror}"
        raise UserError("output_dir", folder, reason) from error
    finally:
        for left in (beside, old):
            shutil.rmtree(left, ignore_errors=True)
