"""What a process does because it is one rank among several: die with its launcher, tell its error, show its stack."""

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.launch.machines import HANDED
from tessera.launch.outcome import USER_ERROR

LAUNCHER = "TESSERA_LAUNCHER_PID"
ATTEMPT = "TESSERA_ATTEMPT"
"""How often the ranks have been started before: for a rank's own words."""
STACK = "stack.txt"
"""Beside a rank's error file: its Python stack, once it got SIGUSR1."""


def is_rank() -> bool:
    """Whether a launcher, ours or another, started this process as one of several."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


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

    try:
        record(work)(ours)
    except Exception as error:
        if not ours:
            raise
        # The launcher tells it. Exit handlers might wait for peers that will not answer any more.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(USER_ERROR if isinstance(error, UserError) else 1)


def _show_stack_when_asked() -> None:
    """Have SIGUSR1 write the stack from C: a rank that hangs runs no Python handler. SIGTERM too, before it ends us."""
    if errors := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        file = open(Path(errors).with_name(STACK), "w")  # noqa: SIM115 - open as long as the process lives
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
        faulthandler.register(signal.SIGTERM, file=file, all_threads=False, chain=True)  # until training handles it


def handed() -> bytes:
    """What the launcher of machine 0 has left for its ranks in the store where they find one another."""
    from torch.distributed import TCPStore  # the launcher has none of torch while it needs none

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False).get(HANDED)


def restarted(config: TrainConfig) -> TrainConfig:
    """The config of ranks that another launcher has started again: they go on from the latest whole checkpoint."""
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        return config
    from tessera.checkpoint.folder import latest  # imports torch

    resume = latest(Path(config.output_dir))
    return config.model_copy(update={"resume_from_checkpoint": str(resume)}) if resume else config
