"""The schedule of a run, chosen by measuring: the trainer's forward and backward of two layers, on the run's own mesh.

Two, and whole: the products of one layer by themselves leave out what their collectives overlap with, and the norms,
which a loop gives more to do. Embedding and head move in the same way under every schedule; they are cut short.

Candidates are the gathered product, whole and in slices, and the loops, as far as the config allows them. Those whose
scratch memory (scratch.py) is above the limit are not run; if all are, the one that needs least is taken. Nor are
those that a profile of this machine (`tessera measure`) puts surely behind: with the whole of its band they are slower
than another with the whole of its own. Without one all are run; so they are on several machines, whose links the
profile of one does not have. What was measured is remembered in the user's cache folder, by everything that it depends
on.

Every rank decides by itself, from numbers that are the same on all: what rank 0 remembers and reads in its profile, and
the slowest rank's times.
"""

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

import tessera
from tessera.core import device as devices
from tessera.core.axes import MODEL_AXES
from tessera.core.collectives import all_reduce, largest
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.resolve import parallel_of
from tessera.layout.shape import StepShape, padded_length
from tessera.layout.streams import Streams
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.nn.parameter import to_local
from tessera.plan.calibrate import corrected, place_of
from tessera.plan.cluster import measured_here
from tessera.plan.machine import Profile
from tessera.plan.remembered import Remembered
from tessera.plan.scratch import scratch_bytes
from tessera.plan.time import StepTime, step_time
from tessera.plan.work import step_work
from tessera.sizes.context import WHOLE, ContextParallel
from tessera.sizes.rules import Ask, TensorParallel, first_misfit
from tessera.sizes.schedule import Schedule

KINDS = (("gather", 1), ("gather", 2), ("gather", 4), ("gather", 8), ("summa", 1), ("cannon", 1))
LAYERS = 2
ROUNDS = 12


@dataclass(frozen=True)
class Candidate:
    """A schedule with the layouts it needs: `rows` of `length` (padded) tokens of `model`, and `scratch` bytes."""

    model: ModelConfig
    parallel: Parallel
    rows: int
    length: int
    recompute: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def scratch(self) -> int:
        return scratch_bytes(self.model, self.tokens, self.parallel, recompute=self.recompute)

    @property
    def name(self) -> str:
        return str(self.parallel.schedule)


@dataclass(frozen=True)
class Tuning:
    """What was chosen, and from what. `milliseconds`: of those that were run, by name; `limit`: of scratch bytes;
    `behind`: names of those that the machine's profile puts surely behind.
    """

    schedule: Schedule
    candidates: Sequence[Candidate]
    milliseconds: dict[str, float]
    limit: int
    source: str
    trouble: str | None = None
    behind: Sequence[str] = ()

    def lines(self) -> list[str]:
        """What a person wants to know: the source, a table of the candidates, and what went wrong beside."""
        rows = ["  schedule          ms   scratch MiB"]
        for candidate in self.candidates:
            took = self.milliseconds.get(candidate.name)
            marks = ["chosen"] * (candidate.parallel.schedule == self.schedule)
            marks += ["above the limit"] * (candidate.scratch > self.limit)
            marks += ["surely behind by the profile of this machine"] * (candidate.name in self.behind)
            shown = "not run" if took is None else f"{took:.2f}"
            rows.append(
                f"  {candidate.name:10}{shown:>10}{candidate.scratch / 2**20:14.2f}   {', '.join(marks)}".rstrip()
            )
        return [
            f"schedule auto: {self.schedule}, {self.source}",
            *(rows if len(self.candidates) > 1 else []),
            *([self.trouble] if self.trouble else []),
        ]


def tune(
    tensor: TensorParallel,
    shape: StepShape,
    model: ModelConfig,
    mesh: Mesh,
    compute: torch.dtype,
    scratch_gib: float,
    *,
    tf32: bool = False,
    context: ContextParallel = WHOLE,
) -> Tuning:
    """The fastest schedule that `tensor` allows on `mesh`; every rank calls it, and gets the same.

    `shape` is that of full-length rows, not padded. Candidates may hold `scratch_gib` GiB of gathered operands.
    """
    every, limit = candidates(tensor, shape, model, mesh, compute, context), int(scratch_gib * 2**30)
    running = [c for c in every if c.scratch <= limit]
    if len(running) > 1:
        key = _key(tensor, shape, model, mesh, compute, scratch_gib, tf32, context)
        return _fastest(running, every, limit, Remembered(key))
    asked = f"tensor_parallel_scratch_gib: {scratch_gib:g}"
    if len(every) == 1:
        source = "the only one here"
    elif running:
        source = f"the only one within {asked}"
    else:
        source = f"which needs least; all need more than {asked}"
    (chosen,) = running or [min(every, key=lambda c: c.scratch)]
    return Tuning(chosen.parallel.schedule, every, {}, limit, source)


def _fastest(running: list[Candidate], every: list[Candidate], limit: int, remembered: Remembered) -> Tuning:
    """The fastest of those `running`: as remembered, else measured, but for those surely behind."""
    mesh, trouble = running[0].parallel.mesh, None
    known = _from_first(_known(running, remembered) if mesh.rank == 0 else [], len(running), mesh)
    left = [candidate for candidate, took in zip(running, known, strict=True) if took < math.inf]
    behind = [candidate.name for candidate in running if candidate not in left]
    names, best = [candidate.name for candidate in left], [took for took in known if took < math.inf]
    if len(left) == 1:
        source = "the others are surely behind by the profile of this machine"
        return Tuning(left[0].parallel.schedule, every, {}, limit, source, behind=behind)
    source = f"as measured before ({remembered.path})"
    if min(best) <= 0:
        best = _measure([_Trial(candidate) for candidate in left])
        gc.collect()  # layers and the order of their weights refer to one another
        source = f"measured: forward and backward of {LAYERS} layers, {running[0].tokens} tokens, up to {ROUNDS} rounds"
        trouble = remembered.write(dict(zip(names, best, strict=True))) if mesh.rank == 0 else None
    fastest = left[best.index(min(best))].parallel.schedule
    return Tuning(fastest, every, dict(zip(names, best, strict=True)), limit, source, trouble, behind)


def _known(running: list[Candidate], remembered: Remembered) -> list[float]:
    """Of each candidate its remembered milliseconds, 0 where it must be measured, infinite where it need not be run."""
    behind = surely_behind(running)
    left = [candidate.name for candidate, slow in zip(running, behind, strict=True) if not slow]
    times = iter(remembered.read(left) or [0.0] * len(left))
    return [math.inf if slow else next(times) for slow in behind]


def surely_behind(running: Sequence[Candidate]) -> list[bool]:
    """Of each candidate whether the profile of this machine puts it behind another, each with its band against it."""
    mesh = running[0].parallel.mesh
    here = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world))
    stack = devices.stack(gpu=mesh.device.type == "cuda")
    profile = next(iter(measured_here(devices.hardware(mesh.device), stack, mesh.world)), None)
    if profile is None or here != mesh.world:
        return [False] * len(running)
    times = [_predicted(candidate, profile) for candidate in running]
    soonest = min(time.total * (1 + time.error) for time in times)
    return [bool(time.total * (1 - time.error) > soonest) for time in times]


def _predicted(candidate: Candidate, profile: Profile) -> StepTime:
    """What a trial of the candidate takes, by the planner."""
    parallel, model = candidate.parallel, replace(candidate.model, num_layers=LAYERS, vocab_size=_vocabulary(candidate))
    shape = StepShape(candidate.rows, candidate.length, 1, recompute=candidate.recompute)
    profile = profile.in_dtype(devices.dtype_name(parallel.compute))
    time = step_time(step_work(model, shape, parallel, parallel.mesh.world), profile)
    time = replace(time, optimizer=0.0)  # a trial updates nothing
    time = corrected(time, place_of(model, shape, parallel), profile)
    return replace(time, calibration=float(np.sum(time.calibration)), error=float(np.max(time.error)))


def _vocabulary(candidate: Candidate) -> int:
    """Ids of a trial's model: embedding and head move the same under every schedule, and are cut short."""
    return 8 * candidate.parallel.mesh.sizes["col"]


def kinds(data_ranks: int) -> Sequence[tuple[str, int]]:
    """The schedules, with slices, that auto chooses from; beside data or sequence axes FSDP2 moves weights: one."""
    return KINDS if data_ranks == 1 else KINDS[:1]


def candidates(
    tensor: TensorParallel,
    shape: StepShape,
    model: ModelConfig,
    mesh: Mesh,
    compute: torch.dtype,
    context: ContextParallel = WHOLE,
) -> list[Candidate]:
    """The schedules that fit the other switches and the model; one is enough where nothing moves."""
    found = []
    for name, slices in kinds(mesh.size(Streams.batch)) if mesh.world > 1 else KINDS[:1]:
        asked = replace(tensor, schedule=name, slices=slices)
        if first_misfit(Ask(asked, model.dimensions, shape.batch)) is None:
            parallel = parallel_of(asked, mesh, shape.batch, model.dimensions, compute=compute, context=context)
            length = padded_length(shape.sequence, shape.batch, parallel.residual, mesh)
            found.append(Candidate(model, parallel, shape.batch, length, shape.recompute))
    return found


def _key(
    tensor: TensorParallel,
    shape: StepShape,
    model: ModelConfig,
    mesh: Mesh,
    compute: torch.dtype,
    scratch_gib: float,
    tf32: bool,
    context: ContextParallel = WHOLE,
) -> dict[str, Any]:
    """Everything that the times, and which candidates there are, depend on."""
    return {
        "tessera": tessera.__version__,
        "torch": torch.__version__,
        "hardware": [devices.describe(mesh.device), platform.machine(), os.cpu_count()],
        "ranks": [mesh.world, os.environ.get("LOCAL_WORLD_SIZE")],  # of which on this machine
        "mesh": [[axis, mesh.sizes[axis]] for axis in mesh.numbering if axis in MODEL_AXES],
        "model": str(model),
        "batch": [shape.batch, shape.sequence],
        "switches": asdict(tensor.as_schedule) | {"recompute": shape.recompute},
        "compute": [str(compute), tf32],
        "layout": [tensor.sequence_parallel, tensor.depth_weights, context.transport],
        "scratch_gib": scratch_gib,
    }


def _from_first(numbers: list[float], count: int, mesh: Mesh) -> list[float]:
    """Rank 0's `numbers`, so many, on every rank; the others have none."""
    own = torch.tensor(numbers or [0.0] * count, dtype=torch.float64, device=mesh.device)
    return [float(number) for number in all_reduce(own, mesh.group(MODEL_AXES)).tolist()]


def _measure(trials: "Sequence[_Trial]") -> list[float]:
    """Milliseconds of each trial, as they compare within rounds.

    The trials take turns, so that what disturbs disturbs all, and each round begins with another; of a round the
    slowest rank's time counts. Those far behind drop out: after n rounds at 1 + 1/√n times the fastest, as the error of
    a mean falls.
    """
    mesh, rounds, racing = trials[0].mesh, [], list(range(len(trials)))
    for turn in range(1 + ROUNDS):  # the first warms up
        took = [math.inf] * len(trials)
        for place in racing:
            took[place] = 1e3 * trials[place].run()
        racing = [*racing[1:], racing[0]]
        if turn:
            own = torch.tensor(took, dtype=torch.float64, device=mesh.device)
            rounds.append(largest(own, mesh.group(MODEL_AXES)).tolist())
            beside = beside_fastest(rounds)
            fastest = min(beside[place] for place in racing)
            racing = [place for place in racing if beside[place] <= (1 + turn**-0.5) * fastest]
            if len(racing) == 1:
                break
    typical = statistics.median(map(min, rounds))
    return [typical * times for times in beside]


def beside_fastest(rounds: Sequence[Sequence[float]]) -> list[float]:
    """How many times the fastest's time of a round each contender takes; `rounds` have a time for each (inf: not run).

    The geometric mean over the middle half of its rounds. On a shared machine whole rounds are slow, and single runs:
    the first does not count so, the second hardly; of the least times of two contenders the luckier one would win.
    """
    means = []
    for times in zip(*([took / min(each) for took in each] for each in rounds), strict=True):
        ran = sorted(math.log(ratio) for ratio in times if ratio < math.inf)
        quarter = len(ran) // 4
        means.append(math.exp(statistics.fmean(ran[quarter : len(ran) - quarter])))
    return means


class _Trial:
    """The trainer's step, up to its gradients, of a model of few layers as one candidate runs it, on random numbers."""

    def __init__(self, candidate: Candidate) -> None:
        self.mesh = mesh = candidate.parallel.mesh
        vocabulary = _vocabulary(candidate)
        model = replace(candidate.model, num_layers=LAYERS, vocab_size=vocabulary)
        self.decoder = Decoder(model, candidate.parallel, gradient_checkpointing=candidate.recompute)
        generator = torch.Generator(mesh.device).manual_seed(0)
        for parameter in self.decoder.parameters():
            to_local(parameter).normal_(std=model.initializer_range, generator=generator)
        self.step = Step(self.decoder, torch.optim.SGD(self.decoder.parameters(), lr=0.0))  # it is not asked to update
        ids = torch.randint(vocabulary, (candidate.rows, candidate.length), generator=torch.Generator().manual_seed(0))
        self.batch = MicroBatch(ids, ids, ids.numel())

    def run(self) -> float:
        """Seconds that a forward and backward take this rank, all ranks having begun together."""
        _finished(all_reduce(torch.zeros((), device=self.mesh.device), self.mesh.group(MODEL_AXES)))
        begun = time.perf_counter()
        self.step.gradients([self.batch], 0, self.batch.valid)
        _finished(torch.zeros((), device=self.mesh.device))
        seconds = time.perf_counter() - begun
        self.decoder.zero_grad(set_to_none=True)
        return seconds


def _finished(scalar: torch.Tensor) -> None:
    """Reading a number waits for all that was queued on its device before it, whatever kind of device that is."""
    scalar.item()
