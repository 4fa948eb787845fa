"""What every rank of every pool would compute alike is computed by one: the others read it from a file."""

import hashlib
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_folder: Path | None = None  # the session's, in a worker of a pool


def share_in(folder: Path) -> None:
    """From now on this process shares what it computes once with all that share in the same folder."""
    global _folder
    _folder = folder


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`functools.cache` for all ranks together: rank 0 computes, and writes tensors for the others to read.

    All ranks must ask for it; arguments are told apart by how they are written (`repr`).
    """

    @cache
    def computed(*arguments: Any) -> Any:
        if _folder is None:
            return function(*arguments)
        asked = f"{function.__module__}.{function.__qualname__}{arguments!r}"
        file = _folder / f"{hashlib.sha256(asked.encode()).hexdigest()}.pt"
        if not file.exists() and dist.get_rank() == 0:
            part = file.with_suffix(".part")
            torch.save(function(*arguments), part)
            os.replace(part, file)
        while not file.exists():  # a rank 0 that fails ends the whole pool
            time.sleep(0.001)
        return torch.load(file, weights_only=True)

    return computed
