"""`tessera verify CONFIG`: a layout, or every layout of so many ranks, against one process on this machine.

Needs config.json of the base model alone: ids are random. Writes nothing but the report it is asked for. The ranks run
this command too, and are handed there what the file says.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from pydantic import TypeAdapter

from tessera.config.load import load_config
from tessera.config.schema import TrainConfig
from tessera.core import device as devices
from tessera.core.errors import UserError
from tessera.core.files import check_target
from tessera.launch.rank import as_rank, handed, is_rank
from tessera.launch.workers import Restarts, run_workers, stopped_as
from tessera.models.config import ModelConfig
from tessera.sizes.bounds import RANKS_HERE, at_most
from tessera.train.run import model_of
from tessera.train.settings import context_line, fitting_layout
from tessera.verify import report
from tessera.verify.cases import Case, cases_of, every_case
from tessera.verify.check import Checker, count_collectives
from tessera.verify.session import Session, conclude

EVERY = "all"


@dataclass(frozen=True)
class Asked:
    """The options; `all_layouts` is a number of ranks, `inject` the number of a collective or "all"."""

    overrides: Sequence[str] = ()
    full: bool = False
    all_layouts: int | None = None
    inject: str | None = None
    report: Path | None = None


Subject = tuple[TrainConfig, ModelConfig, Asked]
"""What is verified, and how: the ranks are handed it."""
_SUBJECT = TypeAdapter(Subject)


@dataclass(frozen=True)
class Work:
    """What is asked, read: the layouts, why others do not fit, how many ranks they take."""

    config: TrainConfig
    cases: list[Case]
    unfit: dict[str, str]
    world: int


def verify(config_path: Path, asked: Asked) -> None:
    """Verify, and print what was found. Raises UserError before a rank is started, RunFailed for what is wrong."""
    if is_rank():
        as_rank(lambda ours: _run_rank(*_SUBJECT.validate_json(handed()) if ours else _read(config_path, asked)))
        return
    subject = _read(config_path, asked)
    world = _work(*subject).world
    devices.stay_on_cpu_without_gpus(world)
    text, command = _SUBJECT.dump_json(subject, exclude_unset=True).decode(), ["-P", "-m", "tessera", "verify"]
    with stopped_as("stopped before everything was verified"):
        run_workers([*command, str(config_path)], world, restarts=Restarts(handed=lambda _: text))


def _read(config_path: Path, asked: Asked) -> Subject:
    """The file, and the config.json that it names."""
    config, _ = load_config(config_path, asked.overrides)
    return config, model_of(config), asked


def _work(config: TrainConfig, model: ModelConfig, asked: Asked) -> Work:
    """The layouts asked for. Raises UserError for what does not fit."""
    if asked.report is not None:
        check_target(asked.report, "--json")
    world = asked.all_layouts or config.world_size
    at_most("processes", world, RANKS_HERE, "is the number of processes on this machine")
    if world == 1:
        key, value = (
            ("--all-layouts", 1) if asked.all_layouts else ("tensor_parallel_size", config.tensor_parallel_size)
        )
        raise UserError(key, value, "one process is what layouts are compared with", "at least 2")
    if asked.all_layouts is None:
        work = Work(config, cases_of(config, model, asked.full), {}, world)
    else:
        work = Work(config, *every_case(config, model, world, asked.full), world)
    _check_injection(asked, work.cases)
    return work


def _check_injection(asked: Asked, cases: list[Case]) -> None:
    if asked.inject is None:
        return
    if asked.full:
        raise UserError("--inject", asked.inject, "leaves collectives out of the miniature", "leave --full out")
    if asked.inject == EVERY:
        return
    if len(cases) > 1:
        raise UserError("--inject", asked.inject, f"there are {len(cases)} layouts", f"--inject {EVERY}, or one layout")
    there_are = count_collectives(cases[0])
    if not asked.inject.isdecimal() or not 1 <= int(asked.inject) <= there_are:
        reason = f"is none of the {there_are} collectives of a step"
        raise UserError("--inject", asked.inject, reason, f"1 to {there_are}, or {EVERY}")


def _run_rank(config: TrainConfig, model: ModelConfig, asked: Asked) -> None:
    work = _work(config, model, asked)
    if int(os.environ["WORLD_SIZE"]) != work.world:
        raise UserError("WORLD_SIZE", os.environ["WORLD_SIZE"], f"the layout has {work.world} ranks")
    device = devices.local_device()
    devices.prepare(device, tf32=False)  # its products have three digits
    dist.init_process_group(devices.backend(device), timeout=timedelta(minutes=work.config.group_timeout_minutes))
    try:
        first = dist.get_rank() == 0
        session = Session(Checker(device), report.console() if first else None)
        omit = None if asked.inject in (None, EVERY) else int(asked.inject)
        if len(work.cases) > 1:
            results = session.several(work.cases, work.unfit)
        else:
            context = None if asked.all_layouts else context_line(fitting_layout(config, model), model)
            results = session.one(work.cases[0], omit, context)
        right = all(result.ok for result in results)
        unseen = session.leave_out_each(work.cases) if asked.inject == EVERY and right else []
        if omit is not None and right:
            unseen = [f"{work.cases[0].name}: collective {omit} of a step"]
        if first:
            conclude(results, work.unfit, unseen, asked.report)
    finally:
        dist.destroy_process_group()
