"""`tessera convert FROM TO`."""

import re
from pathlib import Path

import torch

from tessera.checkpoint import convert as checkpoints
from tessera.core import terminal
from tessera.core.errors import UserError
from tessera.core.files import check_target_folder, usable_path

DTYPES = ("float32", "bfloat16", "float16")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert(source: Path, target: Path, config: Path | None, dtype: str | None, max_shard_size: str | None) -> None:
    """Convert between a checkpoint and a Hugging Face folder; see `checkpoint/convert.py`."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError("--dtype", dtype, "is not a dtype to write", f"one of {', '.join(DTYPES)}")
    for key, path in (("FROM", source), ("TO", target), ("--config", config)):
        try:
            usable_path(str(path))
        except ValueError as error:
            raise UserError(key, path, str(error)) from error
    if not target.exists():
        check_target_folder(target, "TO")
    size = None if max_shard_size is None else bytes_of(max_shard_size)
    kind = None if dtype is None else getattr(torch, dtype)
    terminal.say(str(checkpoints.convert(source, target, config=config, dtype=kind, max_shard_bytes=size)))


def bytes_of(size: str) -> int:
    """The bytes of 500MB, 5GB, 2GiB or a plain number. Raises UserError for anything else, and for nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", size.strip(), re.IGNORECASE)
    unit = UNITS.get(match[2].upper()) if match else None
    number = 0.0 if match is None or unit is None else float(match[1]) * unit
    if not 1 <= number <= 2**63:  # infinite, with enough digits
        raise UserError("--max-shard-size", size, "is not a size", "for example 500MB, 5GB or 2GiB")
    return int(number)
