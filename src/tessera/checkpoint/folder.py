"""A checkpoint as files: what makes a folder whole, its sums, and which one of a run is the latest.

    output_dir/checkpoint-N/    .metadata, __R_K.distcp     what DCP writes: every tensor, each rank its shards
                                state.json                  what the run remembers (state.py)
                                SHA256SUMS                  of each file above, for `sha256sum -c`
    output_dir/LATEST           the name of the last checkpoint, replaced when that has its name

A checkpoint is written as `.checkpoint-N.part` and renamed when every rank has finished: a folder with the final name
is whole. Every file is synced before the rename, so that this holds after a power cut too.
"""

import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from tessera.checkpoint.state import FORMAT, RunState
from tessera.core.collectives import gathered
from tessera.core.errors import UserError

STATE = "state.json"
METADATA = ".metadata"
SUMS = "SHA256SUMS"
LATEST = "LATEST"

# ------------------------------------------------------------------------------------------- written


def sums_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each of these files, in hexadecimal."""
    sums = {}
    for name in names:
        with (folder / name).open("rb") as file:
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def seal(part: Path, state: RunState, sums: Mapping[str, str]) -> None:
    """Add state.json and SHA256SUMS (`sums` are those of the tensors' files) to a folder that DCP has written."""
    _write(part / STATE, state.to_json())
    write_sums(part, {**sums, **sums_of(part, (METADATA, STATE))})
    _sync(part)


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """SHA256SUMS; its first line, a comment for sha256sum, is the sum of those that follow."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    _write(folder / SUMS, f"# {hashlib.sha256(lines.encode()).hexdigest()}  the lines below\n{lines}")


def publish(part: Path, final: Path) -> None:
    """Give a sealed folder its name, then let LATEST say so; at each moment LATEST's checkpoint is whole."""
    named, replaced = final.with_name(f".{LATEST}.part"), final.with_name(f".{final.name}.replaced.part")
    _write(named, final.name + "\n")
    if final.exists():
        final.rename(replaced)
    part.rename(final)
    os.replace(named, final.with_name(LATEST))
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def discard_parts(output_dir: Path) -> None:
    """Remove what saves that failed or were killed have left."""
    for unfinished in output_dir.glob(".checkpoint-*.part"):
        shutil.rmtree(unfinished)
    (output_dir / f".{LATEST}.part").unlink(missing_ok=True)


def rotate(output_dir: Path, last: Path, keep: int | None) -> str:
    """Remove all but the newest `keep` checkpoints (None: keep all), never `last`; returns what went wrong."""
    # `last` always stays, even beside those with higher numbers
    others = [path for path in whole_checkpoints(output_dir) if path != last]
    for old in others[: max(0, len(others) - keep + 1)] if keep else []:
        going = old.with_name(f".{old.name}.removed.part")  # a run killed meanwhile leaves what the next save removes
        try:
            old.rename(going)
            shutil.rmtree(going)
        except OSError as error:
            return f"{old} could not be removed: {error}"
    return ""


def _write(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Make the names in `folder` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------- read


def read_state(folder: Path) -> RunState:
    """The JSON part of a checkpoint. UserError: another format, or a file is missing, too short or (if small) altered.

    The sums of the large files are left to `verify`, which takes as long as reading them.
    """
    if not (folder / SUMS).is_file():
        raise _without_sums(folder)
    sums = read_sums(folder)
    for name in (STATE, METADATA):  # before they are parsed
        try:
            if sums_of(folder, [name])[name] != sums.get(name):
                raise altered(folder, name)
        except OSError as error:
            raise not_whole(folder, f"{name}: {error.strerror}") from error
    found = _format(folder)
    if found != FORMAT:
        raise _other_format(folder, found)
    try:
        state = RunState.from_json((folder / STATE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise not_whole(folder, f"{STATE}: {error}") from error
    _check_files(folder, sums)
    return state


def _format(folder: Path) -> object:
    """The format of a checkpoint, which says what else its state.json must have."""
    try:
        return dict(json.loads((folder / STATE).read_text("utf-8"))).get("format")
    except (OSError, ValueError, TypeError) as error:
        raise not_whole(folder, f"{STATE}: {error}") from error


def _without_sums(folder: Path) -> UserError:
    """A checkpoint of format 1 has no sums; of any other their file has been lost."""
    found = _format(folder)
    return not_whole(folder, f"{SUMS} is missing") if found == FORMAT else _other_format(folder, found)


def _other_format(folder: Path, found: object) -> UserError:
    hint = f"format 1 had no {SUMS}: finish that run with the version that began it" if found == 1 else ""
    return UserError("resume_from_checkpoint", folder, f"has format {found}, this version reads {FORMAT}", hint)


def read_sums(folder: Path) -> dict[str, str]:
    """What SHA256SUMS says, by file name. Raises UserError when the file itself is altered."""
    try:
        head, _, lines = (folder / SUMS).read_text("utf-8").partition("\n")
    except (OSError, ValueError) as error:
        raise not_whole(folder, f"{SUMS}: {error}") from error
    if head != f"# {hashlib.sha256(lines.encode()).hexdigest()}  the lines below":
        raise not_whole(folder, f"{SUMS} is damaged: its first line is not the sum of the others")
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines.splitlines())}


def _check_files(folder: Path, sums: Mapping[str, str]) -> None:
    """Raise UserError unless every file that .metadata counts on lies in `folder`, has a sum, and is long enough."""
    ends: dict[str, int] = dict.fromkeys(sums, 0)
    for entry in read_metadata(folder).storage_data.values():
        ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, end in sorted(ends.items()):
        if name not in sums:
            raise not_whole(folder, f"{name} has no sum in {SUMS}")
        if Path(name).name != name or not (folder / name).is_file():
            raise not_whole(folder, f"{name} is missing")
        size = (folder / name).stat().st_size
        if size < end:
            raise not_whole(folder, f"{name} is truncated, it has {size} of {end} bytes")


def verify(folder: Path) -> None:
    """Compare every file with its sum, each rank its share; collective. UserError on every rank that names the file."""
    sums = read_sums(folder)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wrong: list[tuple[str, str]] = []
    for name in sorted(sums)[rank::world]:
        try:
            if sums_of(folder, [name])[name] != sums[name]:
                wrong.append((name, ""))
        except OSError as error:
            wrong.append((name, f"cannot be read: {error.strerror}"))
    for name, reason in sorted(itertools.chain.from_iterable(gathered(wrong, world))):
        raise not_whole(folder, f"{name} {reason}") if reason else altered(folder, name)


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [
        (int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [path for _, path in sorted(found) if all((path / name).is_file() for name in (STATE, METADATA))]


def latest(output_dir: Path) -> Path | None:
    """The checkpoint that LATEST names, or, where that is not whole, the newest whole one."""
    whole = whole_checkpoints(output_dir)
    named = _latest_name(output_dir)
    return next((path for path in whole if path.name == named), whole[-1] if whole else None)


def _latest_name(output_dir: Path) -> str:
    try:
        return (output_dir / LATEST).read_text("utf-8").strip()
    except (OSError, ValueError):
        return ""


def set_aside(output_dir: Path, after: int) -> list[Path]:
    """Rename the checkpoints of steps beyond `after` to abandoned-…, so that none is taken for a new run's."""
    renamed = []
    for path in whole_checkpoints(output_dir):
        if int(path.name.partition("-")[2]) > after:
            if path.name == _latest_name(output_dir):
                (output_dir / LATEST).unlink()
            names = (output_dir / f"abandoned-{path.name}{f'.{again}' if again else ''}" for again in itertools.count())
            renamed.append(path.rename(next(name for name in names if not name.exists())))
    return renamed


def not_whole(folder: Path, reason: str) -> UserError:
    """What is wrong with a checkpoint, and which others lie beside it."""
    return _refusal(folder, f"is not a whole checkpoint: {reason}")


def altered(folder: Path, name: str) -> UserError:
    """The refusal of a file that is not the one that was written."""
    return _refusal(folder, f"{folder.name}/{name} does not match {SUMS}")


def _refusal(folder: Path, reason: str) -> UserError:
    others = [path.name for path in whole_checkpoints(folder.parent) if path.name != folder.name]
    hint = f"others there: {', '.join(others)}" if others else "there is no other beside it"
    return UserError("resume_from_checkpoint", folder, reason, hint)


# ------------------------------------------------------------------------------------------- DCP's metadata

_METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
}


class MetadataUnpickler(pickle.Unpickler):
    """DCP's metadata is a pickle: only the plain classes it consists of may be named in it."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("pathlib._local", "pathlib")  # as Python 3.13 calls it
        if name in _METADATA_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint needs")


def read_metadata(folder: Path) -> Metadata:
    """What .metadata says. Raises UserError for anything else, of which nothing is run."""
    try:
        metadata = MetadataUnpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
    except Exception as error:  # unpickling what is not a pickle raises nearly everything
        raise not_whole(folder, f"{METADATA}: {error}") from error
    if not isinstance(metadata, Metadata):
        raise not_whole(folder, f"{METADATA} holds something else")
    return metadata


class Reader(dcp.FileSystemReader):
    """torch's reader with the restricted unpickler, which runs once; tensors are read with weights_only already."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder, self.metadata = folder, read_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = self.metadata
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
