"""Processes that begin with everything imported: scripts and commands cost what they do, not two seconds of imports.

They are forked from a server that has done so. What a process imports by itself, and how a launcher starts ranks, is
tested with real ones, at least once for each kind of command.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

# What a rank's first test would import, a second of CPU each: torch._dynamo is taken in by torch's first optimizer.
PRELOAD = [
    "numpy",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "torch.profiler",
    "tessera.cli.main",
    "tessera.verify.session",
    "tessera.train.trainer",
    "tessera.launch.launch",
    "tessera.launch.workers",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "transformers.models.auto.tokenization_auto",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "support.frozen",
]


def forkserver() -> Any:
    """The multiprocessing context of processes that are forked from a server which has imported PRELOAD."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # Python 3.11 hands sys.path to the processes, but not to the server, which leaves out what it does not find.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        multiprocessing.forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Ended:
    """The exit code of each process, and what each has written."""

    codes: list[int]
    out: list[str]
    err: list[str]


def python(script: Path, ranks: int | None = None) -> Ended:
    """As `python script`; with `ranks`, as torchrun runs that script in so many processes."""
    return _run(_script, [str(script)], ranks)


def tessera(*words: str, ranks: int | None = None, user: int | None = None) -> Ended:
    """As `tessera words...`, as `user` if given; with `ranks`, as torchrun runs that command in so many processes."""
    return _run(_command if user is None else partial(_command_of, user), ["tessera", *words], ranks)


class Running:
    """A command that goes on beside the test: of `subprocess.Popen` what tests need, with its output in files."""

    def __init__(self, words: list[str], variables: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tessera-forked-")
        self._said = Path(self._folder.name, "out"), Path(self._folder.name, "err")
        given = (words, variables, self._said)
        self._process = forkserver().Process(target=_begin_alone, args=given, name=" ".join(words[:2]), daemon=True)
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written, once it has ended."""
        self.wait(timeout)
        out, err = (file.read_text() for file in self._said)
        self._folder.cleanup()
        return out, err


def start(*words: str, variables: dict[str, str]) -> Running:
    """As `tessera words...` with these variables alone; what torch reads of them when it is imported comes too late."""
    return Running(["tessera", *words], variables)


def _begin_alone(words: list[str], variables: dict[str, str], said: tuple[Path, Path]) -> None:
    os.environ.clear()
    tempfile.tempdir = None
    _begin(_command, words, variables, said)


def _script(words: list[str]) -> None:
    runpy.run_path(words[0], run_name="__main__")


def _command(words: list[str]) -> None:
    from tessera.cli.main import main

    main()


def _command_of(user: int, words: list[str]) -> None:
    os.setegid(user)
    os.seteuid(user)
    _command(words)


def _run(target: Callable[[list[str]], None], words: list[str], ranks: int | None, patience: float = 300) -> Ended:
    context, port, processes = forkserver(), _free_port(), []
    with tempfile.TemporaryDirectory(prefix="tessera-forked-") as name:
        files = [(Path(name) / f"out-{rank}", Path(name) / f"err-{rank}") for rank in range(ranks or 1)]
        for rank, said in enumerate(files):
            variables = {} if ranks is None else _of_torchrun(rank, ranks, port)
            process = context.Process(target=_begin, args=(target, words, variables, said))
            process.start()
            processes.append(process)
        end = time.monotonic() + patience
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()  # nothing to one that has ended
            process.join()
        out, err = ([files[rank][stream].read_text() for rank in range(len(files))] for stream in (0, 1))
    return Ended([process.exitcode for process in processes], out, err)


def _begin(
    target: Callable[[list[str]], None], words: list[str], variables: dict[str, str], said: tuple[Path, Path]
) -> None:
    for number, path in enumerate(said, 1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "COLUMNS"):
        os.environ.pop(name, None)
    os.environ.update({"NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": ""} | variables)
    sys.argv = words
    target(words)


def _of_torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {name: str(n) for name, n in numbers.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
