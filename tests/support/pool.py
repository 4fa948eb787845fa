"""A pool of worker processes, one rank each, that lives as long as the test session: a test costs milliseconds.

`pool(4).run(function, *arguments)` calls a module-level function on every rank and returns the results in rank order.
An error on any rank fails the test with that rank's traceback, and the pool is started afresh.

Each size of world has processes of its own. They are forked from a server that has imported what they need, so that
eight ranks start in 0.2 s and share their memory; to form another world out of the same processes would take as long
(joining gloo's threads 0.3 s, and then every mesh's groups again).
"""

import atexit
import datetime
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from support.forked import forkserver

GROUP_TIMEOUT = datetime.timedelta(seconds=60)


@cache
def shared_folder() -> Path:
    """A folder of this session for all pools: their stores, and what is computed once."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="tessera-pools-", dir=memory))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _serve(rank: int, world: int, gloo: bool, store: str, connection: Any) -> None:
    import torch
    import torch.distributed as dist

    from support.mailbox import use_mailbox
    from support.once import share_in

    if rank:  # the first reads and writes tokenizers with it; four seconds a rank would be long for the others
        sys.modules["transformers"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    share_in(Path(store).parent)
    _share_one_device()
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=GROUP_TIMEOUT
    )
    if not (gloo or "TESSERA_TEST_GLOO" in os.environ):
        use_mailbox(Path(f"{store}-messages"))
    while (job := connection.recv()) is not None:
        function, arguments = job
        try:
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()


def _share_one_device() -> None:
    """One gloo device for all groups of this process: each has a thread that polls, also while nothing is to do."""
    from torch.distributed import ProcessGroupGloo

    initialize, device = ProcessGroupGloo.__init__, ProcessGroupGloo.create_default_device()

    def __init__(self: Any, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [device], 2, timeout
        initialize(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = __init__


class Pool:
    """`world` ranks that wait for jobs."""

    def __init__(self, world: int, gloo: bool = False) -> None:
        self.world, self.gloo = world, gloo
        self._start()

    def _start(self) -> None:
        context, store = forkserver(), tempfile.mktemp(prefix="store-", dir=shared_folder())
        self.connections, self.processes = [], []
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, self.gloo, store, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a dead worker reads as end of file
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, deadline: float = 120) -> list[Any]:
        """Results of `function(*arguments)` on every rank, in rank order."""
        for connection in self.connections:
            connection.send((function, arguments))
        answers: list[tuple[bool, Any]] = [(False, "no answer (waiting for another rank?)")] * self.world
        waiting = {connection: rank for rank, connection in enumerate(self.connections)}
        end, failed = time.monotonic() + deadline, False
        while waiting and time.monotonic() < end:
            for connection in multiprocessing.connection.wait(list(waiting), timeout=max(0.0, end - time.monotonic())):
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    answers[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.processes[rank].join(1)
                    answers[rank] = (False, f"the worker died with exit code {self.processes[rank].exitcode}")
                if not answers[rank][0] and not failed:  # the others may be waiting for this rank: a short grace
                    failed, end = True, min(end, time.monotonic() + 1)
        if not all(ok for ok, _ in answers):
            self.close()
            self._start()
            raise AssertionError("\n".join(f"[rank {r}] {text}" for r, (ok, text) in enumerate(answers) if not ok))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@cache
def pool(world: int, gloo: bool = False) -> Pool:
    """The session's pool of `world` ranks; with `gloo` one whose collectives go the way of a real run."""
    return Pool(world, gloo)
