"""Starts the ranks of a run through torch's elastic agent, and ends them well.

    SIGINT, SIGTERM    forwarded once to every rank as SIGTERM: the ranks save and exit 0, and so do we
    a second one       kills the ranks
    a rank fails       the others get GRACE seconds to notice, then are killed; the first failure is told
    kill -9 on us      every rank asked the kernel to die with its parent

The agent is used directly instead of `elastic_launch`: only so are the worker processes known, which the
table above needs. Imports torch only when several processes are started.
"""

import ctypes
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tessera.errors import RunFailed, UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from tessera.config.schema import TrainConfig

GRACE = 2.0
"""Seconds that the other ranks get to end by themselves after one has failed."""

_USER_ERROR = 2
"""The exit code of a rank that raised `UserError`."""

_LAUNCHER = "TESSERA_LAUNCHER_PID"
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOST_PEER = (  # in the words of gloo, the kernel and NCCL
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "remote process exited",
)


def launch(config_path: str | Path, overrides: Sequence[str] = (), num_processes: int | None = None) -> None:
    """Train the run of a YAML file with `overrides` ("key=value"); returns when it has ended well.

    One process trains here, without torch.distributed. More are started from here, or by torchrun: then this
    process is one rank. Raises `UserError` before a process is started, `RunFailed` once they were.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        _run_rank(config_path, overrides, num_processes)
        return
    config = _load(config_path, overrides, say=True)
    world = _check_world(config, num_processes, "--num-processes")
    _preflight(config, world)
    if world == 1:
        from tessera.train.trainer import train

        train(config)
    else:
        settings = [word for override in overrides for word in ("--set", override)]
        run_workers(["-P", "-m", "tessera", "train", str(config_path), *settings], world)


def _load(config_path: str | Path, overrides: Sequence[str], say: bool) -> "TrainConfig":
    from tessera.config.load import load_config
    from tessera.config.schema import defaults_taken

    config, notes = load_config(config_path, overrides)
    if say:
        defaults = ", ".join(f"{k} {v}" for k, v in defaults_taken(config).items() if v is not None)
        print(*notes, f"defaults: {defaults}", sep="\n", flush=True)
    return config


def _check_world(config: "TrainConfig", processes: int | None, key: str) -> int:
    try:
        made = config.world_size
    except UserError:
        from tessera.train.preflight import resolve

        resolve(config)  # raises too, and knows which sizes fit the model
        raise
    if processes in (None, made):
        return made
    raise UserError(
        key,
        processes,
        f"the sizes given make {made}: tensor axes {config.axes}",
        f"use {made} processes, or tensor_parallel_size: {processes}",
    )


def _preflight(config: "TrainConfig", world: int) -> None:
    from tessera.train.preflight import preflight

    preflight(config, world)


# ---- In a rank


def die_with_parent() -> bool:
    """Whether `run_workers` started this process; if so it dies with that launcher from now on (Linux)."""
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher is None:
        return False
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def _run_rank(config_path: str | Path, overrides: Sequence[str], num_processes: int | None) -> None:
    def rank(ours: bool) -> None:
        config = _load(config_path, overrides, say=not ours and os.environ["RANK"] == "0")
        world = _check_world(config, int(os.environ["WORLD_SIZE"]), "WORLD_SIZE")
        _check_world(config, num_processes, "--num-processes")
        if not ours:
            with _one_rank_at_a_time():
                _preflight(config, world)
        from tessera.train.trainer import train

        train(config)

    as_rank(rank)


def as_rank(work: Callable[[bool], None]) -> None:
    """Do the `work` of a rank, which is told whether `run_workers` started this process; if so it tells of an error."""
    ours = die_with_parent()
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        record(work)(ours)
    except Exception as error:
        if not ours:
            raise
        # The launcher tells it. Exit handlers might wait for peers that will not answer any more.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_USER_ERROR if isinstance(error, UserError) else 1)


@contextmanager
def _one_rank_at_a_time() -> Iterator[None]:
    import fcntl

    name = f"tessera-{os.getuid()}-{os.environ['MASTER_PORT']}.lock"
    with open(Path(tempfile.gettempdir()) / name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield


# ---- In the launcher


def run_workers(args: Sequence[str], processes: int) -> None:
    """Run `python args...` in `processes` ranks on this machine, with the environment that torchrun gives.

    Rank 0's output and every rank's errors go to the terminal. Returns when every rank has exited with 0;
    raises `RunFailed` with one message about the rank that failed first.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes))),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",  # the others are ours
        _LAUNCHER: str(os.getpid()),
    }
    with tempfile.TemporaryDirectory(prefix="tessera-") as logs, _environment(environment), _quiet_agent():
        agent = _agent(args, processes, logs)
        watch = _Watch(agent)
        try:
            with watch:
                result = agent.run()
        except SignalException as stop:
            raise RunFailed(f"killed by {stop.sigval.name}", 128 + stop.sigval) from None
        finally:
            agent.get_worker_group().spec.rdzv_handler.shutdown()
        if result.is_failed():
            raise watch.failure(result.failures)


def _agent(args: Sequence[str], processes: int, logs: str) -> "LocalElasticAgent":
    from torch.distributed.elastic.agent.server import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    rendezvous = RendezvousParameters(
        "c10d", "localhost:0", uuid.uuid4().hex, min_nodes=1, max_nodes=1, local_addr="localhost"
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=processes,
        rdzv_handler=get_rendezvous_handler(rendezvous),
        entrypoint=sys.executable,
        args=tuple(arg.replace("$", "$$") for arg in args),  # the agent fills in ${local_rank}
        max_restarts=0,
        local_addr="localhost",
    )
    silent = dict.fromkeys(range(1, processes), Std.OUT)
    return LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=logs, redirects=silent))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """The agent's own account of a failure stays unsaid: `RunFailed` tells it once."""
    agent, nothing = logging.getLogger("torch.distributed.elastic"), logging.NullHandler()
    before, agent.propagate = agent.propagate, False
    agent.addHandler(nothing)
    try:
        yield
    finally:
        agent.removeHandler(nothing)
        agent.propagate = before


class _Watch:
    """Looks after the workers while the agent waits for them; see the table at the top."""

    def __init__(self, agent: "LocalElasticAgent") -> None:
        self.agent = agent
        self.signals: list[int] = []
        self.last_signal = -math.inf
        self.fallen: dict[int, float] = {}  # rank -> when it was first seen failed
        self.asked: set[int] = set()
        self.killed: set[int] = set()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="tessera-launcher", daemon=True)

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.handlers: dict[signal.Signals, Any] = {s: signal.signal(s, self._note) for s in _STOP_SIGNALS}
            self.handlers[signal.SIGQUIT] = signal.getsignal(signal.SIGQUIT)
        else:
            self.handlers = {}
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # make and schedulers pass one Ctrl+C on, so that it arrives twice: that is still the first signal
        if time.monotonic() > self.last_signal + 1:
            self.last_signal = time.monotonic()
            self.signals.append(number)

    def _watch(self) -> None:
        while not self.ended.wait(0.05):
            running = {}
            for rank, worker in _workers(self.agent).items():
                status = worker.poll()
                if status is None:
                    running[rank] = worker
                elif status != 0:
                    self.fallen.setdefault(rank, time.monotonic())
            if self.signals:
                self._ask_to_stop(running)
            out_of_patience = self.fallen and time.monotonic() > min(self.fallen.values()) + GRACE
            if out_of_patience or len(self.signals) > 1:
                self._kill(running)

    def _ask_to_stop(self, running: dict[int, "subprocess.Popen[bytes]"]) -> None:
        if not self.asked:
            print("stopping: the ranks save and exit; a second signal kills them", file=sys.stderr, flush=True)
        for rank in running.keys() - self.asked:
            running[rank].send_signal(signal.SIGTERM)
            self.asked.add(rank)

    def _kill(self, running: dict[int, "subprocess.Popen[bytes]"]) -> None:
        for rank in running.keys() - self.killed:
            with suppress(ProcessLookupError):  # it may have ended by now
                os.killpg(running[rank].pid, signal.SIGKILL)  # each worker leads a group of its own
            self.killed.add(rank)

    def failure(self, failures: Mapping[int, "ProcessFailure"]) -> RunFailed:
        """What to tell of the failed ranks: the one that fell first, and not because of another."""

        def follows(rank: int) -> bool:
            code, text = failures[rank].exitcode, _traceback(failures[rank])
            return rank in self.killed or code == -signal.SIGTERM or any(sign in text for sign in _LOST_PEER)

        fallen = [*self.fallen, *sorted(failures.keys() - self.fallen.keys())]
        rank = min((r for r in fallen if r in failures), key=follows)
        if self.signals and follows(rank):
            when = "at the second signal" if len(self.signals) > 1 else "before training had begun"
            return RunFailed(f"stopped {when}: no checkpoint was saved", 128 + self.signals[0])
        return _describe(rank, failures[rank])


def _workers(agent: "LocalElasticAgent") -> dict[int, "subprocess.Popen[bytes]"]:
    """The process of each rank, none before they are started."""
    # The agent's public face has their pids, but polling a pid would take its status from the agent.
    context: Any = agent._pcontext
    return {rank: handler.proc for rank, handler in list(context.subprocess_handlers.items())} if context else {}


def _traceback(failure: "ProcessFailure") -> str:
    message: Any = failure.error_file_data.get("message", "")
    return message.get("extraInfo", {}).get("py_callstack", "") if isinstance(message, dict) else ""


def _describe(rank: int, failure: "ProcessFailure") -> RunFailed:
    who = f"rank {rank} (process {failure.pid})"
    text = _traceback(failure)
    if text:
        kind, _, message = failure.error_file_data["message"]["message"].partition(": ")
        if kind == RunFailed.__name__ or failure.exitcode == _USER_ERROR:
            return RunFailed(message, failure.exitcode)
        return RunFailed(f"{who} failed\n{text.rstrip()}")
    if failure.exitcode < 0:
        hint = "\n  the kernel does that when memory runs out" if failure.exitcode == -signal.SIGKILL else ""
        return RunFailed(f"{who} was killed by {signal.Signals(-failure.exitcode).name}{hint}")
    return RunFailed(f"{who} ended with exit code {failure.exitcode} and left no error")
