"""The process that cases are forked from: it has imported everything, makes the world, and does seeds."""

import gc
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz import chats, containers, folders, inputs, rows, running, states, streams  # noqa: F401 - they enter their groups
from fuzz.case import Case, Finding, solve
from fuzz.reach import note_readers
from fuzz.subject import HANG
from fuzz.world import VARIABLES, World, instead_of_ranks, make_world
from support.forked import PRELOAD, forkserver


@dataclass
class Solved:
    """What came of a seed."""

    seed: int
    group: str
    what: str
    seconds: float
    findings: list[Finding] = field(default_factory=list)
    reached: list[str] = field(default_factory=list)


def make_quick() -> None:
    """From now on in this process: what is bounded is so by less, and the curve of the losses is not drawn."""
    from tessera.data.formats import bounded, container
    from tessera.train import records

    bounded.LONGEST = 0.1
    container.ANYWAY, containers.BOMB = 1 << 20, 1 << 23
    records.plot_loss = lambda records: b"\x89PNG"  # a tenth of a second of each run


@contextmanager
def world_here(quick: bool = False) -> Iterator[World]:
    """A world in a folder of its own, in this process, which imports what cases need first.

    `quick`: with limits that are sooner reached, and a note of each reader that is called.
    """
    memory = Path("/dev/shm")  # where there is room there: cases wait for disks more than they compute
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30
    folder = Path(tempfile.mkdtemp(prefix="tessera-fuzz-", dir=memory if roomy else None))
    os.environ.update(VARIABLES, HF_HOME=str(folder / "hub"))
    for name in [
        *PRELOAD,
        "tessera.cli.launch",
        "tessera.cli.inspect",
        "tessera.cli.count",
        "tessera.cli.convert",
        "tessera.cli.verify",
        "tessera.cli.preprocess",
        "pyarrow.parquet",
        "datasets",
    ]:
        __import__(name)
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    instead_of_ranks()
    if quick:
        make_quick()
        note_readers()
    try:
        world = make_world(folder)
        AutoTokenizer.from_pretrained(world.folder / "model")  # imports the rest
        gc.collect()
        gc.freeze()  # a million objects that no child shall count again
        yield world
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def solved(seed: int, world: World, limit: float = HANG) -> Solved:
    case: Case = solve(seed, world, limit)
    return Solved(seed, case.group, case.what, case.seconds, case.findings, sorted(case.reached))


def _serve(pipe: Connection, path: list[str], quick: bool) -> None:
    sys.path[:] = path
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the folder goes, whoever interrupts the tests
    with world_here(quick) as world:
        pipe.send("ready")
        while (seed := pipe.recv()) is not None:
            try:
                pipe.send(solved(seed, world))
            except Exception:
                pipe.send(traceback.format_exc())


class Server:
    """The server, from another process; a context. `quick`: see `world_here`."""

    def __init__(self, quick: bool = False) -> None:
        self.quick = quick

    def __enter__(self) -> "Server":
        context = forkserver()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, sys.path, self.quick), name="fuzz")
        self.process.start()
        theirs.close()
        self._answer()
        return self

    def __exit__(self, *error: object) -> None:
        self.pipe.send(None)
        self.process.join(20)
        self.process.kill()

    def solve(self, seed: int) -> Solved:
        self.pipe.send(seed)
        return self._answer()

    def _answer(self) -> Any:
        answer = self.pipe.recv()
        if isinstance(answer, str) and answer != "ready":
            raise RuntimeError(answer)
        return answer
