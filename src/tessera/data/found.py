"""Which files an entry of `datasets` names: a file, those of a folder, a data set that was saved, or one of the hub.

Nothing in a folder is ever run or unpickled. A folder of several formats is refused, and so is one that only seems to
hold data: what is passed over is counted and told.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from tessera.core.errors import UserError
from tessera.core.files import in_words, read_object
from tessera.data.formats.container import (
    DS_TYPES,
    ENDINGS,
    KNOWN,
    PLAIN,
    Kind,
    is_marked_up,
    is_text,
    named,
    refuse_rows,
)
from tessera.data.formats.entry import Entry

_DOCUMENTATION = re.compile(r"(readme|licen[cs]e|copying|notice|changelog|contributing|citation)(\.\w+)*", re.I)
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SHARD = re.compile(r"^(.+)-\d{5}-of-\d{5}")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of splits, and the words in the names of files that mean them, as in the `datasets` library."""


def find_files(entry: Entry, output_dir: str | Path | None, notes: list[str]) -> list[Path]:
    """The files that hold the rows or texts of an entry, in order; `notes` gets what was left out.

    UserError: no such path, several formats, no data.
    """
    if entry.ds_type is not None and entry.ds_type not in DS_TYPES:
        raise UserError("datasets.ds_type", entry.ds_type, "is not known", f"known: {', '.join(DS_TYPES)}")
    path = Path(entry.path)
    try:
        if path.is_file():
            return _single(path, entry)
        if path.is_dir():
            return _of_folder(path, entry, output_dir, notes)
    except OSError as error:
        raise UserError("datasets", error.filename or path, f"cannot be read: {in_words(error)}") from error
    if entry.path in DS_TYPES and entry.data_files:  # axolotl's way to say it: path: json, data_files: rows.jsonl
        return _chosen(Path(), entry)
    if _is_of_the_hub(entry.path):
        from tessera.data.hub import hub_files  # imports a large library

        return hub_files(entry)
    hint = "give the path of a local file or folder, or the name of a data set of the Hugging Face hub: owner/name"
    raise UserError("datasets", path, "no such file or folder", hint)


def _is_of_the_hub(path: str) -> bool:
    """Whether a path that is no file may be the name of a data set: owner/name, or a word without an ending."""
    known = (*ENDINGS, *PLAIN)
    if not re.fullmatch(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", path) or path.lower().endswith(known):
        return False
    owner, slash, _ = path.partition("/")
    return not Path(owner).exists() if slash else "." not in path


def _single(path: Path, entry: Entry) -> list[Path]:
    if entry.data_files:
        raise UserError("datasets.data_files", entry.path, "is a file already", "path: the folder that holds the files")
    if entry.split_name != "train":
        raise UserError("datasets.split", entry.split, f"{path} is one file: it has the split train alone")
    return [path]


def _of_folder(folder: Path, entry: Entry, output_dir: str | Path | None, notes: list[str]) -> list[Path]:
    found = _without_own(sorted(file for file in _inside(folder) if file.is_file()), entry.path, output_dir)
    if entry.data_files:
        return _chosen(folder, entry)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(folder, entry)
    if entry.name is not None or _has_configurations(folder):
        from tessera.data.hub import hub_files  # imports a large library

        return hub_files(entry)
    found = [file for file in found if file.stat().st_size]
    rows, texts, others = _sorted_out(found, entry)
    if not rows and not texts:
        seen = f": it has {', '.join(file.name for file in others[:3])}" if others else ", or empty files alone"
        raise UserError("datasets", folder, f"the folder holds no data{seen}", f"read are {KNOWN}")
    chosen = _of_split(rows or texts, folder, entry, notes, by_name=bool(rows))
    if others:
        some = ", ".join(str(file.relative_to(folder)) for file in others[:3]) + (", …" if len(others) > 3 else "")
        notes.append(f"{len(others):,} other file{'s' * (len(others) > 1)} of {folder} passed over: {some}")
    return chosen


def _sorted_out(found: list[Path], entry: Entry) -> tuple[list[Path], list[Path], list[Path]]:
    """Files of rows, of text, and others. UserError: several formats, and nothing says which."""
    kinds: dict[Kind, list[Path]] = {}
    others = []
    for file in found:
        kind = "text" if entry.ds_type == "text" and is_marked_up(file) else named(file).kind
        wanted = entry.ds_type is None or kind in DS_TYPES[entry.ds_type]
        if _DOCUMENTATION.fullmatch(file.name) or file.name in _ABOUT or kind == "foreign" or not wanted:
            others.append(file)
        else:
            kinds.setdefault("json" if kind == "lines" else kind, []).append(file)
    texts = kinds.pop("text", [])
    plain = [file for file in texts if Path(file.stem if named(file).packed else file).suffix.lower() in PLAIN]
    if len(kinds) + bool(kinds and plain) > 1:
        example = [files[0].name for files in kinds.values()] + [file.name for file in plain[:1]]
        known = ", ".join([*kinds, *["text"] * bool(plain)])
        reason = f"the folder holds several formats ({known}): {', '.join(example)}"
        hint = f"ds_type: {next(iter(kinds))} reads that format alone, data_files names files; or give each an entry"
        raise UserError("datasets", entry.path, reason, hint)
    if kinds:
        return next(iter(kinds.values())), [], others + texts
    if not texts and entry.ds_type is None:
        texts = [file for file in others if _DOCUMENTATION.fullmatch(file.name) and named(file).kind == "text"]
        others = [file for file in others if file not in texts]
    odd = [file for file in texts if file.suffix.lower() not in PLAIN and not named(file).packed and not is_text(file)]
    for file in odd:
        refuse_rows(file)
    return [], [file for file in texts if file not in odd], sorted(others + odd)


def _of_split(files: list[Path], folder: Path, entry: Entry, notes: list[str], by_name: bool) -> list[Path]:
    """The files of the split that is asked for, where their names tell it: train-00000-of-00002.parquet, test.csv.

    Files of text tell it only by their whole name, `by_name` false: a text may have any title.
    """
    labels = [_label(file, folder, by_name) for file in files]
    asked = entry.split_name
    chosen = [file for file, names in zip(files, labels, strict=True) if asked in names]
    if not chosen and asked == "train" and not all(labels):
        chosen = [file for file, names in zip(files, labels, strict=True) if not names]
    if not chosen:
        there = sorted({names[0] for names in labels if names}) or ["train"]
        hint = f"there: {', '.join(there)}; data_files names files of any name"
        raise UserError("datasets.split", entry.split or "unset", f"{folder} has no files of the split {asked}", hint)
    left = len(files) - len(chosen)
    if left and entry.split is None:
        notes.append(f"{left:,} file{'s' * (left > 1)} of other splits in {folder} left out (split: train is read)")
    return chosen


def _label(file: Path, folder: Path, by_name: bool) -> list[str]:
    """The names of the split that a file is of; none where its name does not tell."""
    shard = _SHARD.match(file.stem)
    if shard:
        return [shard[1], *_meant(shard[1])]
    if not by_name:
        return [] if len(file.relative_to(folder).parts) > 1 else _meant(file.name.partition(".")[0])
    stem = file.name.partition(".")[0]
    for part in (stem, *reversed(file.relative_to(folder).parts[:-1])):
        words = re.split(r"[-._ 0-9]+", part.lower())
        if meant := next((split for word in words for split in _meant(word)), None):
            return [meant] if part is not stem else [meant, stem]
    return []


def _meant(word: str) -> list[str]:
    return [split for split, words in _SPLITS.items() if word.lower() in words]


def _chosen(folder: Path, entry: Entry) -> list[Path]:
    """The files of `data_files`, which count from the folder, or else from the current one."""
    files: list[Path] = []
    for pattern in entry.data_files:
        absolute = Path(pattern).is_absolute() or ".." in Path(pattern).parts
        places = [Path(pattern)] if absolute else [folder / pattern, Path(pattern)]
        found = next((matching for place in places if (matching := _matching(place))), [])
        if not found:
            raise UserError("datasets.data_files", pattern, f"no such file in {folder}, nor in the current folder")
        files += [file for file in found if file not in files]
    kinds = {"json" if named(file).kind == "lines" else named(file).kind for file in files}
    if len(kinds) > 1 and entry.ds_type is None:
        reason = f"names several formats ({', '.join(sorted(kinds))})"
        raise UserError("datasets.data_files", ", ".join(entry.data_files), reason, "an entry of `datasets` for each")
    return files


def _matching(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not re.search(r"[*?[]", str(place)):
        return []
    parts = place.parts
    first = next(index for index, part in enumerate(parts) if re.search(r"[*?[]", part))
    return sorted(file for file in Path(*parts[:first]).glob(str(Path(*parts[first:]))) if file.is_file())


def _saved(folder: Path, entry: Entry) -> list[Path]:
    """The Arrow files of a data set that `Dataset.save_to_disk` wrote."""
    if (folder / "dataset_dict.json").is_file():
        splits = read_object(folder / "dataset_dict.json", "datasets").get("splits")
        asked = entry.split_name
        if not isinstance(splits, list) or asked not in splits:
            there = ", ".join(map(str, splits)) if isinstance(splits, list) else ""
            reason = f"has the splits {there or 'none'}, and not {asked}"
            raise UserError("datasets.split", entry.split or "unset", f"{folder} {reason}")
        folder = folder / asked
    state = read_object(folder / "state.json", "datasets")
    given = state.get("_data_files")
    items = given if isinstance(given, list) else []
    names = [item.get("filename") if isinstance(item, dict) else None for item in items]
    whole = all(isinstance(name, str) and Path(name).name == name for name in names)
    if not names or not whole or state.get("_indices_data_files"):
        hint = "save it anew: dataset.flatten_indices().save_to_disk(…)"
        raise UserError("datasets", folder / "state.json", "names no files of rows that can be read", hint)
    return [folder / str(name) for name in names]


def _has_configurations(folder: Path) -> bool:
    """Whether a README.md says in its head which files make which configuration: the `datasets` library reads that."""
    try:
        head = (folder / "README.md").read_bytes()[: 1 << 16].decode("utf-8", "replace")
    except OSError:
        return False
    return head.startswith("---") and re.search(r"^configs:", head.split("\n---", 1)[0], re.M) is not None


def _inside(folder: Path) -> Iterator[Path]:
    """What a folder holds at any depth but for folders and what is hidden. OSError for one that cannot be listed."""

    def stop(error: OSError) -> NoReturn:
        raise error

    for place, folders, files in os.walk(folder, onerror=stop):
        # a disk's lost+found is root's alone
        folders[:] = [name for name in folders if not name.startswith(".") and name != "lost+found"]
        yield from (Path(place, name) for name in files if not name.startswith("."))


def _without_own(found: Sequence[Path], given: str, output_dir: str | Path | None) -> list[Path]:
    """The files of a data folder but for those that the run itself writes: at its next start they would be data."""
    if output_dir is None:
        return list(found)
    own, folder = Path(os.path.realpath(output_dir)), Path(os.path.realpath(given))
    if own == folder:
        reason = f"is the data folder {given} too: the run would read what it writes"
        raise UserError("output_dir", output_dir, reason, f"a folder of its own, such as {Path(output_dir) / 'run'}")
    if not own.is_relative_to(folder):
        return list(found)
    return [path for path in found if not Path(os.path.realpath(path)).is_relative_to(own)]
