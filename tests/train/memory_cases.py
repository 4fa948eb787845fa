"""A run in a process of its own that may allocate next to nothing more, in one phase of its third step."""

import os
import resource
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tessera.checkpoint.saver import HostCopies
from tessera.train.where import Where

LARGE = 2**34
SPARE = 64 * 2**20


def limited(words: list[str], phase: str, said: tuple[Path, Path]) -> None:
    """`tessera words...`, in which this phase of step 3 asks for LARGE bytes, with SPARE left of its ulimit -v."""
    for number, path in enumerate(said, 1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    os.environ["NO_COLOR"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "COLUMNS"):
        os.environ.pop(name, None)
    sys.argv = ["tessera", *words]
    from tessera.cli.main import main

    real_enter, real_copy = Where.enter, HostCopies._copy
    state = {"now": False}

    def ask() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, before[1]))
        try:
            torch.empty(LARGE, dtype=torch.uint8)
        except RuntimeError:
            if phase == "save":  # what follows has memory again
                from tessera.core import exhausted

                free = exhausted.host_bytes_free()
                resource.setrlimit(resource.RLIMIT_AS, before)
                with patch.object(exhausted, "host_bytes_free", lambda: free):
                    raise
            raise

    def enter(self: Where, name: str, step: int | None = None) -> None:
        real_enter(self, name, step)
        if name == phase != "save" and self.step == 3:
            ask()
        state["now"] = state["now"] or (name == "save" and self.step == 3)  # copied beside the next step

    def copy(self: HostCopies, *args: Any) -> Any:
        if phase == "save" and state["now"]:
            ask()
        return real_copy(self, *args)

    with patch.object(Where, "enter", enter), patch.object(HostCopies, "_copy", copy):
        main()
