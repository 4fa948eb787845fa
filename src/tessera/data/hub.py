"""Data sets of the Hugging Face hub, and local folders made like them, by the `datasets` library.

It downloads and converts once, into Arrow files in its own cache; from then on those are what is read.
"""

from pathlib import Path
from typing import Any

from tessera.core.errors import UserError
from tessera.core.network import reachable
from tessera.data.formats.entry import Entry


def hub_files(entry: Entry) -> list[Path]:
    """The Arrow files of the split that `entry` asks for. UserError: it cannot be had; it says what to do instead."""
    try:
        import datasets  # takes two seconds; only data sets of this kind need it
        from datasets import packaged_modules
        from huggingface_hub import constants
    except ImportError as error:
        hint = f"pip install datasets; or {_by_hand(entry)}"
        raise UserError("datasets", entry.path, "needs the package datasets, which is not installed", hint) from error
    if entry.path in packaged_modules._PACKAGED_DATASETS_MODULES:
        reason = "is a reader of the datasets library, not the name of a data set"
        raise UserError("datasets", entry.path, reason, "path: the file or folder itself")
    local = Path(entry.path).is_dir()
    files: Any = list(entry.data_files) or None
    told = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    offline = local or told[0] or not reachable(constants.ENDPOINT)
    try:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline  # then it looks into its cache alone
        # no code that comes with a data set is run: trust_remote_code is never given
        found: Any = datasets.load_dataset(entry.path, entry.name, data_files=files, revision=entry.revision)
    except Exception as error:  # the library lets those of every layer below it through
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if local:
            raise UserError("datasets", entry.path, f"cannot be read: {said}", "its README.md may say how") from error
        if offline:
            said = "HF_HUB_OFFLINE is set" if told[0] else f"{constants.ENDPOINT} cannot be reached"
        reason = f"no such file or folder, and the Hugging Face hub gives no data set of this name: {said}"
        raise UserError("datasets", entry.path, reason, _by_hand(entry)) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = told
    if entry.split_name not in found:
        raise UserError("datasets.split", entry.split or "unset", f"{entry.path} has {', '.join(map(str, found))}")
    return [Path(file["filename"]) for file in found[entry.split_name].cache_files]


def _by_hand(entry: Entry) -> str:
    folder = entry.path.rpartition("/")[2]
    return (
        f"where there is a network: hf download --repo-type dataset {entry.path} --local-dir {folder}; "
        f"then datasets: [{{path: ./{folder}}}]"
    )
