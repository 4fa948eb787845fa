"""A checkpoint as files: what makes a folder whole, its sums, and which one of a run is the latest.

    output_dir/checkpoint-N/    .metadata, __R_K.distcp     what DCP writes: every tensor, each rank its shards
                                state.json                  what the run remembers (state.py)
                                SHA256SUMS                  of each file above, for `sha256sum -c`
    output_dir/LATEST           the name of the last checkpoint, replaced when that has its name

A checkpoint is written as `.checkpoint-N.part` and renamed when every rank has finished: a folder with the final name
is whole. Every file is synced before the rename, so that this holds after a power cut too.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from tessera.checkpoint.metadata import metadata_of
from tessera.checkpoint.state import READ, RunState
from tessera.core.collectives import gathered
from tessera.core.errors import UserError
from tessera.core.files import free_name, in_words, open_file, parse_json, read_bytes, remove

STATE = "state.json"
METADATA = ".metadata"
SUMS = "SHA256SUMS"
LATEST = "LATEST"
LARGEST = 2**30
"""Bytes of the largest .metadata that is read: that of some ten million parts of tensors."""

# ------------------------------------------------------------------------------------------- written


def sums_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each of these files, in hexadecimal. UserError: one cannot be opened; OSError: nor read."""
    sums = {}
    for name in names:
        with open_file(folder / name, "checkpoint") as file:
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
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


def publish(part: Path, final: Path) -> list[str]:
    """Give a sealed folder its name, then let LATEST say so; at each moment LATEST's checkpoint is whole.

    Returns what is in the way, a line each. OSError: the folder could not get its name.
    """
    named, latest_file, problems = free_name(final.with_name(f".{LATEST}.part")), final.with_name(LATEST), []
    replaced = free_name(final.with_name(f".{final.name}.replaced.part"))
    _write(named, final.name + "\n")
    if os.path.lexists(final):
        final.rename(replaced)
    part.rename(final)
    try:
        if os.path.isdir(latest_file) and not latest_file.is_symlink():  # none of ours
            latest_file.rename(free_name(final.with_name(f"abandoned-{LATEST}")))
        os.replace(named, latest_file)
    except OSError as error:
        problems.append(f"{latest_file} could not be replaced: {in_words(error)}; it does not name {final.name}")
        remove(named)
    _sync(final.parent)
    if reason := remove(replaced):
        problems.append(_left_over(replaced, reason))
    return problems


def discard_parts(output_dir: Path) -> list[str]:
    """Remove what saves that failed or were killed have left; returns what cannot be removed, a line each."""
    left = [*output_dir.glob(".checkpoint-*.part"), *output_dir.glob(f".{LATEST}*.part")]
    return [_left_over(path, reason) for path in sorted(left) if (reason := remove(path))]


def _left_over(path: Path, reason: str) -> str:
    return f"{path} is left over from an earlier save and cannot be removed: {reason}"


def rotate(output_dir: Path, last: Path, keep: int | None, best: Path | None = None) -> list[str]:
    """Remove all but the newest `keep` checkpoints (None: keep all), never `last` or `best`; returns what went wrong.

    One that cannot be removed stays, and does not keep the others from going.
    """
    # `last` always stays, even beside those with higher numbers; with keep 1 two may stay: it, and the best
    whole, problems = whole_checkpoints(output_dir), []
    others = [path for path in whole if path not in (last, best)]
    staying = max(keep, len(whole) - len(others)) if keep else len(whole)
    for old in others[: len(whole) - staying]:
        going = free_name(old.with_name(f".{old.name}.removed.part"))  # if killed meanwhile, the next save removes it
        try:
            before = set(os.listdir(old))
            old.rename(going)
            reason = remove(going)
            if reason and set(os.listdir(going)) == before:
                going.rename(old)
        except OSError as error:
            reason = in_words(error)
        if reason:
            problems.append(f"{old} could not be removed: {reason}")
    return problems


def _write(file: Path, text: str) -> None:
    """A new file, synced; one of that name, or a link, is replaced and never written through."""
    file.unlink(missing_ok=True)
    with file.open("x", encoding="utf-8") as stream:
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
    """The JSON part of a checkpoint. Raises as `read_checkpoint`."""
    return read_checkpoint(folder)[0]


def read_checkpoint(folder: Path) -> tuple[RunState, Metadata]:
    """What a checkpoint says of its run, and of its tensors.

    UserError: another format, or a file is missing, too short or (if small) altered. Every tensor's parts are checked
    too, before any is read. The sums of the large files are left to `verify`, which takes as long as reading them.
    """
    if not os.path.lexists(folder / SUMS):
        raise _without_sums(folder)
    sums = read_sums(folder)
    text, metadata = _unaltered(folder, STATE, sums), _read_metadata(folder, sums)
    found = _format(folder, text)
    if type(found) is not int or found not in READ:
        raise _other_format(folder, found)
    try:
        state = RunState.from_json(text)
    except ValueError as error:
        raise not_whole(folder, f"{STATE}: {error}") from error
    _check_files(folder, sums, metadata)
    return state, metadata


def _read_metadata(folder: Path, sums: Mapping[str, str]) -> Metadata:
    """What .metadata says. Raises UserError for anything that is no checkpoint's; nothing that it names is called."""
    try:
        return metadata_of(_unaltered(folder, METADATA, sums))
    except UserError:
        raise
    except (ValueError, LookupError) as error:  # a pickle that takes from an empty stack is an IndexError
        reason = str(error)[:500] if isinstance(error, ValueError) else "takes what is not there"
        raise not_whole(folder, f"{METADATA}: {reason}") from error


def _unaltered(folder: Path, name: str, sums: Mapping[str, str]) -> bytes:
    """The content of a small file, which has its sum."""
    content = _content(folder, name)
    if hashlib.sha256(content).hexdigest() != sums.get(name):
        raise altered(folder, name)
    return content


def _content(folder: Path, name: str) -> bytes:
    try:
        return read_bytes(folder / name, name, limit=LARGEST)
    except UserError as error:
        raise not_whole(folder, f"{name}: {error.reason}") from error


def _format(folder: Path, text: bytes) -> object:
    """The format of a checkpoint, which says what else its state.json must have."""
    try:
        state = parse_json(text)
    except ValueError as error:
        raise not_whole(folder, f"{STATE}: {error}") from error
    if not isinstance(state, dict):
        raise not_whole(folder, f"{STATE}: is a {type(state).__name__}, not the state of a run")
    return state.get("format")


def _without_sums(folder: Path) -> UserError:
    """A checkpoint of format 1 has no sums; of any other their file has been lost."""
    found = _format(folder, _content(folder, STATE))
    return not_whole(folder, f"{SUMS} is missing") if found in READ else _other_format(folder, found)


def _other_format(folder: Path, found: object) -> UserError:
    hint = f"format 1 had no {SUMS}: finish that run with the version that began it" if found == 1 else ""
    reason = f"has format {str(found)[:20]}, this version reads {' and '.join(map(str, READ))}"
    return UserError("resume_from_checkpoint", folder, reason, hint)


def read_sums(folder: Path) -> dict[str, str]:
    """What SHA256SUMS says, by file name. Raises UserError when the file itself is altered."""
    try:
        head, _, lines = _content(folder, SUMS).decode("utf-8").partition("\n")
    except UnicodeDecodeError as error:
        raise not_whole(folder, f"{SUMS}: {error}") from error
    if head != f"# {hashlib.sha256(lines.encode()).hexdigest()}  the lines below":
        raise not_whole(folder, f"{SUMS} is damaged: its first line is not the sum of the others")
    found = [re.fullmatch(r"([0-9a-f]{64})  ([^/\\]{1,255})", line) for line in lines.removesuffix("\n").split("\n")]
    sums = {match[2]: match[1] for match in found if match and match[2].isprintable()}
    if len(sums) != len(found) or not sums.keys().isdisjoint((".", "..")):
        raise not_whole(folder, f"{SUMS} has a line that is no sum of a file beside it")
    return sums


def _check_files(folder: Path, sums: Mapping[str, str], metadata: Metadata) -> None:
    """Raise UserError unless every file that .metadata counts on lies in `folder`, has a sum, and is long enough."""
    ends: dict[str, int] = dict.fromkeys(sums, 0)
    for entry in metadata.storage_data.values():
        ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, end in sorted(ends.items()):
        if name not in sums:
            raise not_whole(folder, f"{name} has no sum in {SUMS}")
        if not os.path.lexists(folder / name):
            raise not_whole(folder, f"{name} is missing")
        try:
            with open_file(folder / name, name) as file:
                size = os.fstat(file.fileno()).st_size
        except UserError as error:
            raise not_whole(folder, f"{name}: {error.reason}") from error
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
        except (UserError, OSError) as error:
            reason = error.reason if isinstance(error, UserError) else in_words(error)
            wrong.append((name, f"cannot be read: {reason}"))
    for name, reason in sorted(itertools.chain.from_iterable(gathered(wrong, world))):
        raise not_whole(folder, f"{name} {reason}") if reason else altered(folder, name)


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [
        (int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-([0-9]+)", p.name))
    ]
    return [path for _, path in sorted(found) if all(os.path.isfile(path / name) for name in (STATE, METADATA))]


def latest(output_dir: Path) -> Path | None:
    """The checkpoint that LATEST names, or, where that is not whole, the newest whole one."""
    whole = whole_checkpoints(output_dir)
    named = latest_name(output_dir)
    return next((path for path in whole if path.name == named), whole[-1] if whole else None)


def latest_name(output_dir: Path) -> str:
    try:
        return read_bytes(output_dir / LATEST, LATEST, limit=300).decode("utf-8").strip()
    except ValueError:  # a UserError is one: it is no file, or too large for a name
        return ""


def set_aside(output_dir: Path, resume: Path | None, step: int) -> list[str]:
    """Rename to abandoned-… the checkpoints that a run, which goes on from `resume` at `step`, does not continue.

    Those are all where `resume` is None or no checkpoint of this folder, else those of later steps. Which one `resume`
    is, its content says: it may be a link to another disk, or be named by another path. Returns a line for each.
    """
    whole = whole_checkpoints(output_dir)
    own = [path for path in whole if resume is not None and _same(path, resume)]
    lines = []
    for path in whole:
        if path not in own and int(path.name.partition("-")[2]) > (step if own else 0):
            try:
                if path.name == latest_name(output_dir):
                    (output_dir / LATEST).unlink()
                new = path.rename(free_name(output_dir / f"abandoned-{path.name}"))
                lines.append(f"a checkpoint that this run does not continue is now {new}")
            except OSError as error:
                reason = f"cannot be renamed: {in_words(error)}"
                lines.append(f"{path}, which this run does not continue, {reason}")
    return lines


def _same(one: Path, other: Path) -> bool:
    """Whether two whole checkpoints are one, or a copy of it."""
    try:
        return _content(one, SUMS) == _content(other, SUMS)
    except UserError:
        return False


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
