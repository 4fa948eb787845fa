"""What NCCL_DEBUG and its like make the ranks print is kept by rank, in output_dir/debug.

    rank-3.log              all that rank 3 writes to stderr: Python's own lines still reach the terminal too
    rank-3-nccl-PID.log     NCCL's lines, unless NCCL_DEBUG_FILE says where they go
    collectives-rank-3      torch's flight recorder, where one of its variables is set and a collective times out

Ranks inherit the variables of their launcher; each machine's launcher has its own.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tessera.core import terminal
from tessera.core.files import in_words
from tessera.launch.workers import environment

FOLDER = "debug"
_RECORDERS = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_SILENT: dict[str, tuple[str, ...]] = {  # variables that make ranks print, with the values that do not
    "NCCL_DEBUG": (),
    "TORCH_DISTRIBUTED_DEBUG": ("OFF",),
    "TORCH_CPP_LOG_LEVEL": ("ERROR", "FATAL", "2", "3"),
    "GLOO_LOG_LEVEL": ("ERROR", "UNSET"),
    "TORCH_LOGS": (),
    **dict.fromkeys(_RECORDERS, ("0",)),
}


def asked(variables: Mapping[str, str]) -> list[str]:
    """The names of those among `variables` that make ranks print more than they do by themselves."""
    return [n for n, silent in _SILENT.items() if variables.get(n) and variables[n].upper() not in silent]


@contextmanager
def output_kept(output: Path) -> Iterator[None]:
    """While this rank trains, keep what it prints in `output`/debug, where a variable makes it print; else do nothing.

    A file that cannot be opened is told of, and changes nothing.
    """
    names, folder, rank = asked(os.environ), output / FOLDER, int(os.environ.get("RANK", "0"))
    if not names:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = (folder / f"rank-{rank}.log").open("a", buffering=1, errors="backslashreplace")
    except OSError as error:
        terminal.say(f"what rank {rank} prints is not kept in {folder}: {in_words(error)}", error=True)
        yield
        return
    if rank == 0:
        terminal.say(f"{', '.join(names)}: what each rank prints is kept in {folder}/rank-N.log")
    with kept, environment(_files(folder, rank)), _stderr_in(kept):
        yield


def _files(folder: Path, rank: int) -> dict[str, str]:
    """The variables that say where libraries write, for those that have files of their own and are asked to print."""
    files = {}
    if os.environ.get("NCCL_DEBUG"):
        files["NCCL_DEBUG_FILE"] = str(folder).replace("%", "%%") + f"/rank-{rank}-nccl-%p.log"
    if any(name in os.environ for name in _RECORDERS):  # torch appends the rank
        files |= dict.fromkeys(
            ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), f"{folder}/collectives-rank-"
        )
    return {name: value for name, value in files.items() if not os.environ.get(name)}


@contextmanager
def _stderr_in(kept: TextIO) -> Iterator[None]:
    """Have all that this process and its children write to stderr go to a file; what Python writes, to both."""
    sys.stderr.flush()
    before, shown = sys.stderr, os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    kept.write(f"---- process {os.getpid()}\n")
    os.dup2(kept.fileno(), 2)  # for libraries of C++, which know no sys.stderr
    sys.stderr = _Both(kept, shown)
    try:
        yield
    finally:
        sys.stderr = before
        os.dup2(shown.fileno(), 2)
        shown.close()


class _Both(terminal.Lasting):
    """A stream into a file and to the terminal; no write to it fails."""

    def __init__(self, kept: TextIO, shown: TextIO) -> None:
        super().__init__(kept)
        self.shown = terminal.Lasting(shown)

    def write(self, text: str) -> int:
        self.shown.write(text)
        return super().write(text)

    def flush(self) -> None:
        self.shown.flush()
        super().flush()
