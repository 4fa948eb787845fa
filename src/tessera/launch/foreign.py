"""The same run through another launcher: torchrun or accelerate, with the options that mean the same there."""

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from tessera.core import terminal
from tessera.core.errors import UserError
from tessera.launch.options import PORT, LaunchOptions


def run_foreign(options: LaunchOptions, here: int, command: Sequence[str]) -> NoReturn:
    """Print the other launcher's command and become it. Raises UserError when it is not installed."""
    if options.launcher == "accelerate" and importlib.util.find_spec("accelerate") is None:
        raise UserError("--launcher", "accelerate", "is not installed", "pip install accelerate, or use torchrun")
    words = foreign_command(options, here, command)
    terminal.say(shlex.join(words))
    os.execv(words[0], words)


def foreign_command(options: LaunchOptions, here: int, command: Sequence[str]) -> list[str]:
    """Words that start `python command...` in `here` ranks on this machine; the last option of each is ours."""
    machines, machine = options.machines or 1, options.machine or 0
    if options.launcher == "torchrun":
        words = ["-m", "torch.distributed.run", f"--nproc-per-node={here}", f"--max-restarts={options.max_restarts}"]
        where = [f"--nnodes={machines}", f"--node-rank={machine}", f"--master-addr={options.main_address}"]
        where += [f"--master-port={options.main_port or PORT}"]
        words += where if machines > 1 else ["--standalone"]
    else:
        words = ["-m", "accelerate.commands.launch", f"--num_processes={here * machines}"]
        words += [f"--num_machines={machines}", f"--max_restarts={options.max_restarts}"]
        words += ["--mixed_precision=no", "--dynamo_backend=no"]  # or it says which it takes
        if machines > 1:
            words += [f"--machine_rank={machine}", f"--main_process_ip={options.main_address}"]
            words += ["--rdzv_backend=static"]
        # 0: a free port. On one machine accelerate too asks for a port that is not in use.
        words += [f"--main_process_port={options.main_port or (PORT if machines > 1 else 0)}"]
        words += ["--multi_gpu"] if here * machines > 1 else []  # its name for several processes, on CPU too
    return [sys.executable, *words, *command]
