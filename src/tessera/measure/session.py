"""`tessera measure`: starts ranks on this machine, or is one under torchrun, and writes what they measured.

The ranks run this command too: first all of them, for the rates; then 1, 2, 4 … of them, for whole small steps, which
the rates are brought to. Under torchrun its ranks do both, and only steps of all of them are timed. The profile goes
into the user's cache folder and to --output.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from tessera.core import device as devices
from tessera.core import terminal
from tessera.core.collectives import gathered
from tessera.core.errors import RunFailed, UserError
from tessera.core.files import check_target, writing_target
from tessera.core.mesh import Mesh
from tessera.core.writing import replace_file
from tessera.doctor.examine import MOST_RANKS
from tessera.doctor.pairs import measure_pairs
from tessera.launch.rank import as_rank, handed, is_rank
from tessera.launch.scratch import scratch
from tessera.launch.workers import Restarts, run_workers, stopped_as
from tessera.measure import compute, links
from tessera.measure.profile import here, lines, profile_of
from tessera.measure.steps import (
    SmallStep,
    brought,
    lower_quartiles,
    read_seconds,
    small_steps,
    timed_steps,
    written_seconds,
)
from tessera.measure.timing import QUICK, Effort, Timer, powers_to
from tessera.plan.cluster import profiles_folder
from tessera.plan.machine import Profile, read_profile, written_profile
from tessera.sizes.bounds import RANKS_HERE, at_most

TIMEOUT = timedelta(minutes=10)
ROUNDS = 5
"""Times that a whole step is timed."""


@dataclass(frozen=True)
class Asked:
    """The options of the command, as the ranks are handed them. `threads` of each rank, where the user has set them.

    `result`: where rank 0 leaves for its launcher what was measured; `steps`: that is whole steps, not rates.
    """

    output: Path | None = None
    quick: bool = False
    threads: int | None = None
    result: Path | None = None
    steps: bool = False


_ASKED = TypeAdapter(Asked)


@dataclass(frozen=True)
class Amount:
    """What is measured, and for how long: sizes of what is computed, bytes of blocks that move, those of a pair."""

    effort: Effort
    sizes: compute.Sizes
    blocks: tuple[int, ...]
    pair: int

    @classmethod
    def usual(cls, device: torch.device, quick: bool) -> "Amount":
        """For a device, or a few seconds of it."""
        if device.type == "cuda":
            sizes = compute.QUICK_ON_GPU if quick else compute.ON_GPU
            return cls(
                QUICK if quick else Effort(), sizes, links.GPU_BLOCKS[1::2] if quick else links.GPU_BLOCKS, 2**27
            )
        sizes = compute.QUICK_ON_CPU if quick else compute.ON_CPU
        return cls(QUICK if quick else Effort(), sizes, links.CPU_BLOCKS[:3] if quick else links.CPU_BLOCKS, 2**22)


def measure(asked: Asked, ranks: int | None) -> None:
    """Measure, print, write. `ranks`: None for one on each GPU, or on CPUs on each core up to MOST_RANKS.

    Raises UserError before a rank is started, RunFailed where one fails.
    """
    if is_rank():
        as_rank(lambda ours: _run_rank(_ASKED.validate_json(handed()) if ours else asked))
        return
    if asked.output is not None:
        check_target(asked.output, "--output")
    gpus = torch.cuda.device_count()
    ranks = ranks or gpus or min(devices.cores_here(), MOST_RANKS)
    at_most("--ranks", ranks, RANKS_HERE, "is the number of processes on this machine")
    devices.stay_on_cpu_without_gpus(ranks)
    with scratch() as folder:
        asked = replace(asked, result=Path(folder) / "result.json")
        profile, timed = read_profile(_left_by_ranks(asked, ranks)), list[tuple[SmallStep, float]]()
        for count in () if asked.quick else powers_to(ranks):
            seconds = read_seconds(_left_by_ranks(replace(asked, steps=True), count).read_text())
            timed += zip(small_steps(count, gpus >= ranks), seconds, strict=True)
    _finish(profile, timed, asked.output)


def _left_by_ranks(asked: Asked, ranks: int) -> Path:
    """Start so many ranks; where they have left what they measured."""
    assert asked.result is not None
    text = _ASKED.dump_json(asked).decode()
    with stopped_as("stopped before everything was measured; no profile was written"):
        run_workers(["-P", "-m", "tessera", "measure"], ranks, restarts=Restarts(handed=lambda _: text))
    return asked.result


def measured_profile(mesh: Mesh, amount: Amount, threads: int | None, date: str) -> tuple[Profile, list[str]]:
    """Measure on every rank of `mesh`, which all call this. Returns the profile and what to tell, on each the same."""
    per_machine = links.ranks_here(mesh)
    if len(set(gathered(per_machine, mesh.world))) > 1:
        raise RunFailed("machines have different numbers of ranks: measure with as many on each")
    timer = Timer(mesh, amount.effort)
    computed = compute.measured_compute(timer, amount.sizes, per_machine, threads)
    product = compute.middle_product(mesh.device, computed.dtype, amount.sizes)
    linked = links.measured_links(timer, amount.blocks, per_machine, product)
    pairs = measure_pairs(mesh, amount.pair) if mesh.world > 1 else None
    profile = profile_of(computed, linked, pairs, here(mesh, per_machine, date))
    return profile, lines(profile, computed, linked, pairs)


def _run_rank(asked: Asked) -> None:
    device = devices.local_device()
    devices.prepare(device, tf32=False)
    dist.init_process_group(devices.backend(device), timeout=TIMEOUT)
    try:
        mesh = Mesh({"shard": dist.get_world_size()}, device)
        steps = [] if asked.quick else small_steps(mesh.world, device.type == "cuda")
        if asked.steps:
            seconds = lower_quartiles(timed_steps(steps, mesh, ROUNDS))
            if mesh.rank == 0:
                _leave(written_seconds(seconds), asked.result)
            return
        profile, told = measured_profile(mesh, Amount.usual(device, asked.quick), asked.threads, today())
        if mesh.rank == 0:
            terminal.say(*told)
        if asked.result is None:
            seconds = lower_quartiles(timed_steps(steps, mesh, ROUNDS))
            if mesh.rank == 0:
                _finish(profile, list(zip(steps, seconds, strict=True)), asked.output)
        elif mesh.rank == 0:
            _leave(written_profile(profile), asked.result)
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _leave(text: str, result: Path | None) -> None:
    assert result is not None
    result.write_text(text)


def _finish(profile: Profile, timed: Sequence[tuple[SmallStep, float]], output: Path | None) -> None:
    """Bring the rates to the steps, tell how near they are, write the profile."""
    told: list[str] = []
    if timed:
        runs = {str(step): step.run(seconds, profile.devices_per_machine) for step, seconds in timed}
        profile, told = brought(profile, runs, "whole steps of small models")
    terminal.say("", *told, "", *written(profile, output))


def written(profile: Profile, output: Path | None) -> list[str]:
    """Write the profile; what to tell of it. A cache folder that takes no files is no failure."""
    text, kept = written_profile(profile), profiles_folder() / f"{profile.name}.json"
    told = []
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(kept, text.encode())
        told.append(f"kept for later: {kept}")
    except OSError as error:
        told.append(f"what was measured could not be kept: {error}")
    if output is not None:
        with writing_target(output, "--output"):
            output.write_text(text)
        told.append(f"written: {output}")
    return told


def today() -> str:
    """The date of a profile: ISO, of UTC."""
    return datetime.now(UTC).date().isoformat()


def threads_asked() -> int | None:
    """The threads of a rank that the user has set: OMP_NUM_THREADS, which a launcher leaves as it is.

    Raises UserError for what is no number.
    """
    text = os.environ.get("OMP_NUM_THREADS", "")
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= RANKS_HERE:
        raise UserError("OMP_NUM_THREADS", text, "is no number of threads", "unset it")
    return int(text)
