"""Trains the run of a YAML file: in this process, in ranks that it starts (here, or here and on other machines), or as
one rank that somebody else has started. `workers.py` says how ranks are run, `machines.py` how machines agree.

The file is read once, by the launcher of machine 0 (by rank 0 under another launcher), whatever happens to it later:
every rank and every restart is handed the `Run` that it resolves to.
"""

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.checkpoint.lock import RunLock
from tessera.config.load import load_config
from tessera.config.schema import TrainConfig, defaults_taken
from tessera.core import terminal
from tessera.core.errors import UserError
from tessera.launch.debug import output_kept
from tessera.launch.interface import interface_variables
from tessera.launch.machines import HANDED, Machines, Place
from tessera.launch.options import LaunchOptions
from tessera.launch.rank import as_rank, handed, is_rank, restarted, run_id, started_again
from tessera.launch.scratch import sweep_scratch
from tessera.launch.workers import Restarts, environment, run_workers
from tessera.train.stop import stopped_at_once

if TYPE_CHECKING:
    from torch.distributed import Store

    from tessera.train.run import Run


# tessera.train imports torch, which `--help` and a mistake in the file do without: hence the imports inside functions.


def launch(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    num_processes: int | None = None,
    options: LaunchOptions | None = None,
) -> None:
    """Train the run of a YAML file with `overrides` ("key=value"); returns when it has ended well.

    One process trains here, without torch.distributed. More are started from here, or by torchrun: then this
    process is one rank. Raises `UserError` before a process is started, `RunFailed` once they were.
    """
    if is_rank():
        take_over = options is not None and options.take_over
        as_rank(lambda ours: _rank(config_path, overrides, num_processes, ours, take_over))
        return
    options = options or LaunchOptions()
    config = _load(config_path, overrides, say=options.machine in (None, 0))
    place = options.place()
    config = filled_in(config, *options.asked_for(num_processes))
    if options.machine in (None, 0):
        terminal.say(*config.idle_fsdp_keys())
    world = config.world_size
    here = options.processes_here(world)
    settings = [word for override in overrides for word in ("--set", override)]
    command = ["-m", "tessera", "train", str(config_path), *settings]
    if options.launcher != "tessera":
        from tessera.launch.foreign import run_foreign

        if not Path(config_path).is_file():  # a pipe, which has been read
            reason = f"can be read only once, and {options.launcher} starts processes that read it again"
            raise UserError("config file", config_path, reason, "write it to a file")
        os.environ.update(variables(place))
        run_foreign(options, here, command + ["--take-over"] * options.take_over)
    elif world == 1 and not options.max_restarts:
        from tessera.train.run import prepared_run
        from tessera.train.trainer import train

        sweep_scratch()
        output = Path(config.output_dir)
        with RunLock(options.take_over) as lock:
            with stopped_at_once():
                run = prepared_run(config, here, lock)
            with output_kept(output):
                train(run)
    else:
        with environment(variables(place)):  # before torch is imported
            _launch_ranks(config, options, place, here, ["-P", *command])


def _launch_ranks(config: TrainConfig, options: LaunchOptions, place: Place, here: int, command: list[str]) -> None:
    from tessera.launch.wiring import wired_order
    from tessera.train.run import check, prepared_run

    output, lock = Path(config.output_dir), RunLock(options.take_over)
    if place.rank == 0:
        lock.glance(output)  # before it listens where that run may listen
    with Machines(place, here, output) as machines, lock:
        # machine 0 locks the folder and prepares the data
        with stopped_at_once():
            run = prepared_run(config, here, lock) if place.rank == 0 else check(config, here)
        newest = _Resume(config).newest

        def handed(resume: str | None) -> str:
            lock.check()
            return run.going_on_from(resume).to_json()

        order, said = wired_order(run.config, run.model, here)
        terminal.say(*said)
        restarts = Restarts(options.max_restarts, newest, handed, lambda: _less_memory(run))
        with environment(order):
            run_workers(command, here, machines, restarts)


def variables(place: Place) -> dict[str, str]:
    """What launcher and ranks need in their environment to work with other machines."""
    if place.machines == 1:
        return {}
    # A store that is gone would be told in pages of C++ frames; torch reads this when it is imported.
    quiet = {} if "TORCH_CPP_LOG_LEVEL" in os.environ else {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    return interface_variables(place.address) | quiet


def _load(config_path: str | Path, overrides: Sequence[str], say: bool) -> TrainConfig:
    config, notes = load_config(config_path, overrides)
    if say:
        terminal.say(*notes, f"defaults: {len(defaults_taken(config))} keys (tessera config show lists them)")
    return config


def filled_in(config: TrainConfig, processes: int | None, key: str) -> TrainConfig:
    """The config for so many processes (None: as many as its sizes make); `key` said how many."""
    try:
        _ = config.axes
    except UserError:
        from tessera.train.run import resolve

        resolve(config)  # raises too, and knows which sizes fit the model
        raise
    config = config.filled_in(processes, key)
    made = config.world_size
    if processes in (None, made):
        return config
    sizes = ", ".join(f"{axis} {size}" for axis, size in config.mesh_sizes.items() if size > 1) or "no axis above 1"
    raise UserError(
        key,
        processes,
        f"the sizes given make {made}: {sizes}",
        f"use {made} processes, or leave dp_shard_size out, which then is what the others leave",
    )


def _less_memory(run: "Run") -> list[str]:
    import torch

    from tessera.train.less_memory import less_memory

    gpus = torch.cuda.device_count() > 0  # asks no GPU for a context
    bf16 = gpus if run.config.bf16 == "auto" else run.config.bf16
    return less_memory(run.config, run.model, torch.bfloat16 if bf16 else torch.float32, copies=not gpus)


class _Resume:
    """Which checkpoint ranks that are started again go on from: the newest that this run itself has made."""

    def __init__(self, config: TrainConfig) -> None:
        self.output = Path(config.output_dir)
        self.before = self._checkpoints()

    def newest(self) -> str | None:
        """Its path; None when there is none yet, so that the run begins as it did at first."""
        made = [path for path, written in self._checkpoints().items() if self.before.get(path) != written]
        return str(made[-1]) if made else None

    def _checkpoints(self) -> dict[Path, int]:
        """Whole checkpoints, oldest first, with the time of their last file: a number may be used again."""
        if not self.output.is_dir():  # no need to import torch
            return {}
        from tessera.checkpoint.folder import STATE, whole_checkpoints

        return {path: (path / STATE).stat().st_mtime_ns for path in whole_checkpoints(self.output)}


# ---- In a rank


def _rank(
    config_path: str | Path, overrides: Sequence[str], num_processes: int | None, ours: bool, take_over: bool
) -> None:
    """One rank: of ours it is handed the run, else rank 0 makes it for all and locks output_dir."""
    from tessera.checkpoint.folder import latest
    from tessera.train.run import Run, check_gpus, prepared_run
    from tessera.train.trainer import train

    if ours:
        run = Run.from_json(handed())
        with output_kept(Path(run.config.output_dir)):
            train(run)
        return
    from torch.distributed import DistError, rendezvous

    try:
        store, rank, world = next(iter(rendezvous("env://")))
    except DistError as error:
        where = f"{os.environ['MASTER_ADDR']} port {os.environ['MASTER_PORT']}"
        reason = f"the ranks do not find one another there: {str(error).partition(chr(10))[0]}"
        raise UserError("MASTER_ADDR", where, reason) from None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))

    launch = store.add(f"tessera/launches/{rank}", 1)  # a script may launch several runs
    lock = RunLock(take_over, run_id(launch))

    def make() -> str:
        config = filled_in(_load(config_path, overrides, say=True), world, "WORLD_SIZE")
        if started_again():
            lock.take(Path(config.output_dir))
            if lock.before and lock.before.id == lock.id and lock.before.run:  # whatever the file says by now
                return Run.from_json(lock.before.run).going_on_from(latest(Path(config.output_dir))).to_json()
        made = prepared_run(filled_in(restarted(config), num_processes, "--num-processes"), here, lock).to_json()
        lock.remember(made)
        return made

    check_gpus(here)
    with lock:
        run = Run.from_json(_made_by_first(store, rank, launch, make))
        if rank and os.environ.get("LOCAL_RANK", "0") == "0":
            run.check_weights()  # of another machine than rank 0's, before ranks wait for one another
        with output_kept(Path(run.config.output_dir)):
            train(run, store)


def _made_by_first(store: "Store", rank: int, launch: int, make: Callable[[], str]) -> str:
    """What rank 0 makes, on every rank; a UserError there is raised on all. Data may take long to prepare.

    `launch` counts what has been made so before.
    """
    key = f"{HANDED}/{launch}"
    if rank == 0:
        try:
            made = make()
        except UserError as error:
            told = [error.key, None if error.value is None else str(error.value), error.reason, error.hint]
            store.set(key, json.dumps({"refused": told}))
            raise
        store.set(key, made)
        return made
    store.wait([key], timedelta(days=1))
    text = store.get(key).decode()
    if told := json.loads(text).get("refused"):
        raise UserError(*told)
    return text
