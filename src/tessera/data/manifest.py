"""What a folder of prepared data holds, as its manifest.json says it, and what of it is no longer as it was written."""

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from tessera.core.errors import UserError
from tessera.core.files import in_words, read_bytes, read_json
from tessera.data.columns import Written, sum_of
from tessera.data.samples import Split, open_samples

TRAINED, GIVEN = "trained", "given"
SPLITS: tuple[Split, Split] = ("train", "eval")
WHOLE = 2**28
"""Bytes up to which prepared data are compared with their sums when a run starts; larger ones as they are read."""
MANIFEST = "manifest.json"
STREAM_TOKENIZER = "stream_tokenizer.json"
"""The tokenizer of a stream, as it is loaded: for the ranks, which tokenize it."""
Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds, as manifest.json says it.

    Tokens count every token, targets those that are learnt. Short rows (below `min_sample_len`) and dull rows (no
    target left: a single token, a prompt that fills the row) were left out. `inner_masked` counts tokenized rows
    whose attention_mask hides a token that later ones still see. `tokenizer` is GIVEN where a folder had it, TRAINED
    where it was trained on the data or changed and lies in the prepared folder, or None where none was needed. `files`
    are all others there but the sums of their blocks, and `sum` is that of the rest of this. `end_tokens` are those
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
    short_rows: Count
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


def read_manifest(folder: Path, key: str = "output_dir") -> tuple[Manifest | None, str]:
    """The manifest of an earlier `prepare`, or None: no folder, an empty one, another version's; or damage, then why.

    UserError, under the config key `key`: the folder holds something else, which must not be replaced.
    """
    try:
        inside = {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        raise UserError(key, folder, f"is where prepared data go: {in_words(error)}") from error
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
        raise UserError(key, folder, reason, f"move that away, or choose another {key}")
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
    files = {MANIFEST, STREAM_TOKENIZER, "tokenizer.json", "tokenizer_config.json"}
    return bool(rows) and rows <= columns and inside <= {*files, *SPLITS}


def damage(folder: Path, manifest: Manifest, whole: int) -> str:
    """What is not as `prepare` wrote it, or "". The rows' own sums are left to their reader above `whole` bytes."""
    left = dict(manifest.files)
    try:
        for split in filter(manifest.rows, SPLITS):
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
