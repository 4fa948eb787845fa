"""Data sets of the Hugging Face hub, and local folders made like them, by the `datasets` library.

It downloads and converts once, into Arrow files in its own cache; from then on those are what is read.
"""

from pathlib import Path
from typing import Any

from tessera.core.errors import UserError
from tessera.data.formats.entry import Entry


def hub_files(entry: Entry) -> list[Path]:
    """The Arrow files of the split that `entry` asks for. UserError: it cannot be had; it says what to do instead."""
    try:
        import datasets  # takes two seconds; only data sets of this kind need it
    except ImportError as error:
        hint = f"pip install datasets; or {_by_hand(entry)}"
        raise UserError("datasets", entry.path, "needs the package datasets, which is not installed", hint) from error
    files: Any = list(entry.data_files) or None
    try:
        # no code that comes with a data set is run: trust_remote_code is never given
        found = datasets.load_dataset(entry.path, entry.name, data_files=files, revision=entry.revision)
    except Exception as error:  # the library lets those of every layer below it through
        said = " ".join(str(error).split())[:300]
        local = Path(entry.path).is_dir()
        what = "cannot be read" if local else "is no file or folder here, and cannot be had from the Hugging Face hub"
        hint = "see its README.md" if local else _by_hand(entry)
        raise UserError("datasets", entry.path, f"{what}: {type(error).__name__}: {said}", hint) from error
    if entry.split_name not in found:
        raise UserError("datasets.split", entry.split or "unset", f"{entry.path} has {', '.join(map(str, found))}")
    return [Path(file["filename"]) for file in found[entry.split_name].cache_files]


def _by_hand(entry: Entry) -> str:
    folder = entry.path.rpartition("/")[2]
    return (
        f"where there is a network: hf download --repo-type dataset {entry.path} --local-dir {folder}; "
        f"then datasets: [{{path: ./{folder}}}]"
    )
