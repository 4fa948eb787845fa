"""From the config to rows on disk: read, tokenize, fit to `sequence_len`, split, write; or reuse them.

The folder holds train/ and eval/ (see `samples`; eval/ only when rows are held out), manifest.json and, when the
tokenizer was trained on the data, its files. After every check it is written beside its place and renamed. What lies
there is trusted only as far as the sums in manifest.json go: a run that starts prepares anew what is not as it was, a
rank that finds such a block refuses it.
"""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import tokenizers
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from tessera.core.errors import UserError
from tessera.core.files import in_words, read_bytes, read_json, remove
from tessera.core.writing import system_error, why
from tessera.data.assemble import DataSettings, assemble_samples, end_tokens
from tessera.data.columns import Written, sum_of
from tessera.data.samples import HELD_OUT, Sample, Split, open_samples, shuffled, write_samples
from tessera.data.sources import SourceFile, read_documents, read_files
from tessera.data.tokenizer import (
    TextTokenizer,
    load_tokenizer,
    read_backend,
    save_tokenizer,
    special_ids,
    train_bpe,
)

FORMAT = 2
"""Part of the cache key: raise it when the same files and settings come to give other rows."""

TRAINED = "trained"
SPLITS: tuple[Split, Split] = ("train", "eval")
WHOLE = 2**28
"""Bytes up to which prepared data are compared with their sums when a run starts; larger ones as they are read."""
MANIFEST = "manifest.json"
Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds, as manifest.json says it.

    Tokens count every token, targets those that are learnt. Dull rows (no target left: a single token, a
    prompt that fills the row) were left out. `inner_masked` counts tokenized rows whose attention_mask hides
    a token that later ones still see. `tokenizer` is the folder it came from, TRAINED where it was trained on
    the data and lies in the prepared folder, or None where none was needed. `files` are all others there but
    the sums of their blocks, and `sum` is that of the rest of this. `end_tokens` are those
    that the rows teach to end on, `eos_token_id` first.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    key: str
    train_rows: Count
    train_tokens: Count
    train_targets: Count
    eval_rows: Count
    eval_tokens: Count
    eval_targets: Count
    sequence_len: Count
    dropped_rows: Count
    truncated_rows: Count
    dull_rows: Count
    inner_masked: Count
    largest_token: Count
    largest_token_place: str
    tokenizer: str | None
    tokenizer_size: Count | None
    eos_token_id: Count | None
    end_tokens: list[Count]
    files: dict[Annotated[str, Field(pattern=r"^((train|eval)/)?\w+\.(npy|json)$")], Written]
    sum: str = ""

    def summed(self) -> "Manifest":
        """The same with its own sum."""
        rest = asdict(replace(self, sum=""))
        return replace(self, sum=sum_of(json.dumps(rest, sort_keys=True).encode()))

    def rows(self, split: Split) -> int:
        """The rows of a split."""
        return self.train_rows if split == "train" else self.eval_rows


@dataclass(frozen=True)
class Prepared:
    """Rows ready to train on, in `folder`; `reused` when they were there already, `because` why those were not."""

    folder: Path
    manifest: Manifest
    reused: bool
    because: str = ""

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
        again = f" (prepared again: {self.because})" if self.because else ""
        return "data: " + "; ".join(parts) + (f" (reused from {self.folder})" if self.reused else again)


def prepare(config: DataSettings, vocab_size: int | None, folder: Path | None = None) -> Prepared:
    """Write the rows of `config.datasets` to `folder` (default: output_dir/prepared), or reuse equal ones.

    `vocab_size` is the model's: a larger token id is an error (None: not checked). Nothing is written before
    everything was checked. UserError: data or tokenizer that cannot be read or do not fit, nothing left.
    """
    folder = folder or Path(config.output_dir) / "prepared"
    there, because = _read_manifest(folder)
    files = read_files(config.datasets, config.output_dir)
    tokenizer = _given_tokenizer(config) if any(file.kind != "tokenized" for file in files) else None
    key = _cache_key(config, files, tokenizer)
    if there and there.key == key:
        because = _damage(folder, there, WHOLE)
        if not because:
            _check_vocabulary(there, vocab_size)
            return Prepared(folder, there, reused=True)

    members = [(file, [] if file.kind == "tokenized" else read_documents(file)) for file in files]
    if isinstance(tokenizer, int):
        tokenizer = train_bpe((d.prompt + d.text for _, found in members for d in found), tokenizer)
    counts: Counter[str] = Counter()
    closing: Counter[int] = Counter()
    rows = assemble_samples(config, members, tokenizer, counts, closing)
    splits = _split(rows, config.val_set_size, config.seed)
    ends = end_tokens(tokenizer, _special_ids(config, tokenizer) if closing else set(), closing)
    manifest = _manifest(config, key, splits, tokenizer, ends, counts)
    _check_vocabulary(manifest, vocab_size)
    manifest = _write(folder, splits, manifest, tokenizer)
    return Prepared(folder, manifest, reused=False, because=because)


def open_prepared(folder: Path) -> Prepared:
    """What `prepare` left in `folder`, without reading the data again: for ranks other than the one that prepared.

    UserError: there is none, or it is not as it was written; the rows themselves are checked when they are read.
    """
    manifest, because = _read_manifest(folder)
    because = _damage(folder, manifest, whole=0) if manifest else because or f"it has no {MANIFEST} of this version"
    if manifest is None or because:
        raise UserError("output_dir", folder, f"is not the prepared data of this run: {because}", "start the run again")
    return Prepared(folder, manifest, reused=True)


def _given_tokenizer(config: DataSettings) -> TextTokenizer | int:
    """The tokenizer to load, or the vocabulary size of the one to train."""
    given = config.tokenizer
    if given is None:
        return load_tokenizer(Path(config.base_model), "base_model")
    return load_tokenizer(Path(given), "tokenizer") if isinstance(given, str | Path) else given.vocab_size


def _special_ids(config: DataSettings, tokenizer: TextTokenizer | None) -> set[int]:
    """The special tokens of the tokenizer that tokenized rows are from, as far as one is known."""
    if tokenizer is not None:
        return special_ids(tokenizer.backend)
    folder = Path(config.tokenizer if isinstance(config.tokenizer, str | Path) else config.base_model)
    return special_ids(read_backend(folder, "tokenizer")) if (folder / "tokenizer.json").is_file() else set()


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
    ends: list[int],
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
        end_tokens=ends,
        files={},
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


def _read_manifest(folder: Path) -> tuple[Manifest | None, str]:
    """The manifest of an earlier `prepare`, or None: no folder, an empty one, another version's; or damage, then why.

    UserError: the folder holds something else, which must not be replaced.
    """
    try:
        inside = {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        raise UserError("output_dir", folder, f"is where prepared data go: {in_words(error)}") from error
    if not inside:
        return None, ""
    entries: Any = None
    try:
        entries = read_json(folder / MANIFEST, MANIFEST)
        because = "" if isinstance(entries, dict) else f"{MANIFEST} holds something else"
    except UserError as error:
        because = f"{MANIFEST} {error.reason}"
    known = isinstance(entries, dict) and {"key", "train_rows"} <= entries.keys()
    if not (known or _written_by_us(folder, inside)):
        reason = "is where prepared data goes, but holds something else"
        raise UserError("output_dir", folder, reason, "move that away, or choose another output_dir")
    if because:
        return None, because
    if entries.keys() != {field.name for field in fields(Manifest)}:
        return None, ""  # another version's
    try:
        manifest = _JSON.validate_json(json.dumps(entries))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return None, f"{MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}"[:300]
    if manifest.sum != manifest.summed().sum:
        return None, f"{MANIFEST} is not as it was written"
    return manifest, ""


_JSON = TypeAdapter(Manifest)


def _written_by_us(folder: Path, inside: set[str]) -> bool:
    """Whether a folder without a readable manifest holds nothing but what `prepare` writes, rows among it."""
    columns = {f"{name}.npy{sums}" for name in ("tokens", "offsets", "labels", "positions") for sums in ("", ".sums")}
    try:
        rows = {entry.name for split in SPLITS if split in inside for entry in os.scandir(folder / split)}
    except OSError:
        return False
    return bool(rows) and rows <= columns and inside <= {MANIFEST, *SPLITS, "tokenizer.json", "tokenizer_config.json"}


def _damage(folder: Path, manifest: Manifest, whole: int) -> str:
    """What is not as `prepare` wrote it, or "". The rows' own sums are left to their reader above `whole` bytes."""
    left = dict(manifest.files)
    try:
        for split in SPLITS if manifest.eval_rows else SPLITS[:1]:
            rows = open_samples(folder, split)
            if len(rows) != manifest.rows(split):
                return f"{split} has {len(rows)} rows of {manifest.rows(split)}"
            for column in rows.columns:
                name = f"{split}/{column.path.name}"
                if left.pop(name, None) != column.written:
                    return f"{name} is not as it was written"
            if sum(written.size for written in manifest.files.values()) <= whole:
                for column in rows.columns:
                    column.check_all()
        for name, written in left.items():
            if "/" in name:
                return f"{name} does not exist"
            content = read_bytes(folder / name, name, limit=written.size)
            if Written(len(content), sum_of(content)) != written:
                return f"{name} is not as it was written"
    except UserError as error:
        return f"{error.value} {error.reason}"
    return ""


def _write(
    folder: Path, splits: tuple[list[Sample], list[Sample]], manifest: Manifest, tokenizer: TextTokenizer | None
) -> Manifest:
    """Write everything beside `folder`, then rename it into place; the manifest with the files' sums."""
    beside, old = (folder.with_name(f".{folder.name}.{os.getpid()}{suffix}") for suffix in ("", ".old"))
    files: dict[str, Written] = {}
    try:
        for left in (beside, old):
            remove(left)  # of a process of that number that was killed
        beside.mkdir(parents=True)
        for split, rows in zip(SPLITS, splits, strict=True):
            if rows:
                files |= {f"{split}/{name}": written for name, written in write_samples(beside / split, rows).items()}
        if tokenizer and manifest.tokenizer == TRAINED:
            save_tokenizer(tokenizer, beside)
            for file in beside.glob("*.json"):
                content = file.read_bytes()
                files[file.name] = Written(len(content), sum_of(content))
        manifest = replace(manifest, files=files).summed()
        (beside / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        if os.path.lexists(folder):
            folder.rename(old)  # removed in place and killed meanwhile, it would be neither ours nor empty
        beside.rename(folder)
    except Exception as error:
        if os.path.lexists(old) and not os.path.lexists(folder):
            old.rename(folder)
        if (found := system_error(error, beside)) is None:
            raise
        remove(beside)
        needs = sum(row.tokens.nbytes * (1 if row.labels is None else 2) for rows in splits for row in rows)
        reason = f"cannot be written: {why(found, beside, needs)}"
        raise UserError("output_dir", folder, reason) from error
    finally:
        for left in (beside, old):
            remove(left)
    return manifest
