"""What a process does because it is one rank among several: die with its launcher, tell its error, show its stack."""

import ctypes
import faulthandler
import hashlib
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tessera.checkpoint.lock_file import boot_id
from tessera.config.schema import TrainConfig
from tessera.core.errors import RunFailed, UserError
from tessera.launch.machines import HANDED
from tessera.launch.outcome import USER_ERROR
from tessera.launch.token import Seal

LAUNCHER = "TESSERA_LAUNCHER_PID"
KEY = "TESSERA_RUN_KEY"
"""What seals the words of our launcher to its ranks (token.py)."""
ATTEMPT = "TESSERA_ATTEMPT"
"""How often the ranks have been started before: for a rank's own words."""
STACK = "stack.txt"
"""Beside a rank's error file: its Python stack, once it got SIGUSR1."""


OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HERE = "LOCAL_WORLD_SIZE"
"""How many ranks are on this machine; not every launcher says it."""


def is_rank() -> bool:
    """Whether a launcher, ours or another, started this process as one of several: it sets all of OF_A_RANK.

    Empty ones are as good as not set, and taken out: torch too reads them. Raises UserError when some of them are set
    and others are not, or are no numbers that fit one another.
    """
    for name in (*OF_A_RANK, HERE):
        if not os.environ.get(name):
            os.environ.pop(name, None)
    given = [name for name in OF_A_RANK if name in os.environ]
    if not given:
        os.environ.pop(HERE, None)  # left over: it counts the ranks of no launcher
        return False
    if missing := [name for name in OF_A_RANK if name not in given]:
        reason = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: one that is started by "
        reason += f"torchrun has all of {', '.join(OF_A_RANK)}"
        raise UserError(given[0], os.environ[given[0]], reason, f"unset {' and '.join(given)}, or set the others too")
    world = _number("WORLD_SIZE", 1, 10**6)
    here = _number(HERE, 1, world) if HERE in os.environ else world
    _number("RANK", 0, world - 1)
    _number("LOCAL_RANK", 0, here - 1)
    _number("MASTER_PORT", 1, 65535)
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
    except (OSError, UnicodeError) as error:
        raise UserError("MASTER_ADDR", os.environ["MASTER_ADDR"], f"cannot be resolved: {error}") from None
    if os.environ.get(LAUNCHER):
        _number(LAUNCHER, 1, 2**31)
    return True


def _number(name: str, least: int, most: int) -> int:
    text = os.environ[name]
    if re.fullmatch(r"[0-9]{1,10}", text) and least <= int(text) <= most:
        return int(text)
    raise UserError(name, text, "is no such number as a launcher sets", f"a whole number from {least} to {most}")


def die_with_parent() -> bool:
    """Whether `run_workers` started this process; if so it dies with that launcher from now on (Linux)."""
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None:
        return False
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def as_rank(work: Callable[[bool], None]) -> None:
    """Do the `work` of a rank, which is told whether `run_workers` started this process; if so it tells of an error."""
    ours = die_with_parent()
    if ours:
        _show_stack_when_asked()
    from torch.distributed.elastic.multiprocessing.errors import record  # torch: a launcher does without it

    code = 0
    try:
        record(work)(ours)
    except Exception as error:  # the launcher tells it
        if not ours:
            raise
        code = USER_ERROR if isinstance(error, UserError) else 1
    if ours:
        # At once: exit handlers might wait for peers that will not answer any more, and a thread of gloo that frees a
        # tensor while the interpreter ends aborts the process, the run of which is done and whole.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _show_stack_when_asked() -> None:
    """Have SIGUSR1 write the stack from C: a rank that hangs runs no Python handler. SIGTERM too, before it ends us."""
    if errors := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        file = open(Path(errors).with_name(STACK), "w")  # noqa: SIM115 - open as long as the process lives
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
        faulthandler.register(signal.SIGTERM, file=file, all_threads=False, chain=True)  # until training handles it


def handed() -> str:
    """What the launcher of machine 0 has left for its ranks in the store where they find one another.

    Raises RunFailed when somebody else has put something there.
    """
    from torch.distributed import TCPStore  # the launcher has none of torch while it needs none

    left = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False).get(HANDED)
    text = Seal(bytes.fromhex(os.environ.pop(KEY, ""))).opened(HANDED, left)
    if text is None:
        raise RunFailed("what the ranks are to do was changed by somebody who is not the launcher: stopped")
    return text


def run_id(launch: int) -> str | None:
    """The same again where torch's agent starts the ranks of a run anew; None where no agent did.

    `launch` counts the runs that one script trains.
    """
    agents = os.environ.get("TORCHELASTIC_RUN_ID")
    if agents is None:
        return None
    name = f"{boot_id()}/{os.getppid()}" if agents == "none" else agents  # "none" is torchrun's default
    return hashlib.blake2b(f"{name}/{launch}".encode(), digest_size=16).hexdigest()


def started_again() -> bool:
    """Whether another launcher has started these ranks before."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def restarted(config: TrainConfig) -> TrainConfig:
    """The config of ranks that another launcher has started again: they go on from the latest whole checkpoint."""
    if not started_again():
        return config
    from tessera.checkpoint.folder import latest  # imports torch

    resume = latest(Path(config.output_dir))
    return config.model_copy(update={"resume_from_checkpoint": str(resume)}) if resume else config
