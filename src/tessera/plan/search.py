"""Every layout that a number of devices can have, and what each costs: thousands at once, by arrays of their sizes.

    meshes     every way to cut the devices over replicate, shard, context, inner, depth, row and col that fits the
               model; ulysses is of the context's ranks what `sizes.context` takes
    batches    every micro-batch that divides a data rank's rows
    switches   recompute, weights kept after the forward, schedules of the products

Candidates that share every switch and every rule are one group: closed forms of plan/ take its sizes as arrays. What
is left out is never the best, which tests/plan/test_search.py holds against all of it on small spaces:

    sequence_parallel: false, which moves as much and holds more
    of two candidates that fit and differ in recompute alone, the one that computes more
    of schedules other than gather, those of meshes that with gather are not among the best `KEPT`
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tessera.core.axes import DATA_AXES, MODEL_AXES, SEQUENCE_AXES
from tessera.core.errors import UserError
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.config import ModelConfig
from tessera.plan.buffers import library_bytes
from tessera.plan.calibrate import corrected, place_of
from tessera.plan.choice import RECOMPUTES, Layout, Training
from tessera.plan.fit import most_that_fits
from tessera.plan.machine import Cluster
from tessera.plan.many import ManyMeshes
from tessera.plan.peak import peak_bytes
from tessera.plan.time import StepTime, step_time
from tessera.plan.traffic import step_transfers
from tessera.plan.work import step_work
from tessera.sizes.context import ContextParallel, Surroundings, fitted
from tessera.sizes.numbers import divisors_of
from tessera.sizes.rules import every_rank_has_a_row
from tessera.sizes.schedule import LOOPS

CUT = ("replicate", "shard", "context", "inner", "depth", "row", "col")
SCHEDULES = (("gather", 2), ("gather", 4), ("gather", 8), ("summa", 1), ("cannon", 1))
"""Beside gather in one piece."""
KEPT = 300
NEVER = 2**62
"""The bytes of a candidate that is another one in other words."""
Numbers = NDArray[np.int64]


class Switches(NamedTuple):
    """What every candidate of a group shares, beside the rules that its first one shows."""

    recompute: str
    reshard: bool
    schedule: str = "gather"
    slices: int = 1


@dataclass(frozen=True)
class Found:
    """Candidates and their costs: of each its sizes by axis, micro-batch, switches, bytes at the peak, seconds.

    `buffers`: bytes of the communication library beside the peak (plan/buffers.py). `seconds` are
    infinite where a candidate was not timed, for it does not fit or another one is surely faster.
    """

    sizes: dict[str, Numbers]
    micro_batch: Numbers
    switches: list[Switches]
    which: Numbers
    peak: Numbers
    buffers: Numbers
    seconds: NDArray[np.float64]
    training: Training

    def __len__(self) -> int:
        return len(self.micro_batch)

    def fitting(self, cluster: Cluster, *, surely: bool = True) -> NDArray[np.bool_]:
        """Which candidates surely fit the cluster's devices, or may (plan/fit.py)."""
        memory = cluster.profile.memory_bytes
        return np.asarray(self.peak <= (most_that_fits(memory, self.buffers) if surely else memory))

    def layout(self, place: int) -> Layout:
        """The candidate at `place`."""
        sizes = {axis: int(n[place]) for axis, n in self.sizes.items() if n[place] > 1}
        batch, switches = int(self.micro_batch[place]), self.switches[int(self.which[place])]
        data = int(np.prod([self.sizes[axis][place] for axis in DATA_AXES]))
        return Layout(sizes, batch, self.training.global_batch // (data * batch), **switches._asdict())


def search(model: ModelConfig, cluster: Cluster, training: Training, *, exhaustive: bool = False) -> Found:
    """Every layout of all of the cluster's devices for `training`; `exhaustive` leaves nothing out.

    What fits is said in plan/fit.py; where nothing surely fits, what may fit is timed. The result may be empty.
    """
    sizes, batch = _meshes(model, cluster.devices, training)
    plain = [Switches(recompute, reshard) for recompute in RECOMPUTES for reshard in (False, True)]
    every = [_costs(model, training, sizes, batch, switches) for switches in plain]
    buffers = _buffers(model, cluster, every[0])  # of all: what is computed again moves along no other axes
    found = replace(_joined(every, training), buffers=np.tile(buffers, len(plain)))
    surely = bool(found.fitting(cluster).any())
    timed = np.full(len(found), True)
    if not exhaustive:
        timed = _worth_timing(found.fitting(cluster, surely=surely), plain, len(batch))
    found = _timed(model, cluster, found, timed)
    best = np.arange(len(found)) if exhaustive else np.argsort(found.seconds)[:KEPT]
    best = best[np.isfinite(found.seconds[best])]
    return _joined([found, *_with_schedules(model, cluster, found, best, surely=surely)], training)


def _meshes(model: ModelConfig, devices: int, training: Training) -> tuple[dict[str, Numbers], Numbers]:
    """The sizes of every axis, and the micro-batch, of all candidates that fit the model and the batch."""
    cuts = np.array([cut for cut in _factors(devices, len(CUT)) if _is_geometry(cut)], np.int64).reshape(-1, len(CUT))
    axes = dict(zip(CUT, cuts.T, strict=True))
    dims = model.dimensions
    fits = (dims["hidden_size"] % (axes["inner"] * axes["row"]) == 0) & (dims["intermediate_size"] % axes["col"] == 0)
    fits &= (dims["num_attention_heads"] % axes["col"] == 0) & (dims["kv_features"] % axes["col"] == 0)
    fits &= np.array([every_rank_has_a_row(dims["vocab_size"], int(col)) for col in axes["col"]], bool)
    fits &= training.global_batch % (axes["replicate"] * axes["shard"]) == 0
    fits &= training.sequence_len >= axes["context"] * axes["depth"] * axes["row"] * axes["inner"]
    cuts = cuts[fits]
    rows = [divisors_of(training.global_batch // int(cut[0] * cut[1])) for cut in cuts]
    which = np.repeat(np.arange(len(cuts)), [len(each) for each in rows])
    batch = np.array([n for each in rows for n in each], np.int64)
    axes = dict(zip(CUT, cuts[which].T, strict=True))
    ulysses, known = _ulysses(model, axes, batch)
    sizes = {axis: axes[axis][known] for axis in (*DATA_AXES, *MODEL_AXES)}
    sizes |= {"ring": axes["context"][known] // ulysses[known], "ulysses": ulysses[known]}
    return sizes, batch[known]


@lru_cache(maxsize=32)
def _factors(number: int, parts: int) -> list[tuple[int, ...]]:
    """Every way to write `number` as a product of so many factors, in order."""
    if parts == 1:
        return [(number,)]
    return [(first, *rest) for first in divisors_of(number) for rest in _factors(number // first, parts - 1)]


def _is_geometry(cut: Sequence[int]) -> bool:
    """Whether a row of the table of geometries has these tensor axes: none has inner and depth."""
    return cut[CUT.index("inner")] == 1 or cut[CUT.index("depth")] == 1


def _ulysses(model: ModelConfig, axes: dict[str, Numbers], batch: Numbers) -> tuple[Numbers, NDArray[np.bool_]]:
    """The ranks along ulysses of each candidate, and which candidates attention allows at all."""
    parts = axes["depth"] * axes["row"]
    by_heads, joined = _attention(model, axes, batch)
    ways = np.where(by_heads, axes["col"] * axes["inner"], axes["col"])
    allowed = ~((axes["context"] > 1) | joined) | (model.attention_dropout == 0)
    ulysses = np.ones_like(batch)
    group = np.where(by_heads, parts, parts * axes["inner"])
    for place in np.flatnonzero(allowed & (axes["context"] > 1)):
        own = int(group[place])
        rows = int(batch[place])
        around = (int(ways[place]), rows if joined[place] else rows // own, own if joined[place] else 1)
        ulysses[place] = _degree(model, int(axes["context"][place]), *around)
    return ulysses, allowed & (ulysses > 0)


def _attention(
    model: ModelConfig, axes: Mapping[str, Numbers], batch: Numbers
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where heads are cut along inner, and where ranks of tensor axes share rows (layout/streams.py)."""
    parts, both = axes["depth"] * axes["row"], axes["col"] * axes["inner"]
    divide = (model.num_heads % both == 0) & (model.num_kv_heads * model.head_dim % both == 0)
    by_heads = divide & (batch % (parts * axes["inner"]) != 0)
    return by_heads, batch % np.where(by_heads, parts, parts * axes["inner"]) != 0


@lru_cache(maxsize=4096)
def _degree(model: ModelConfig, context: int, ways: int, rows: int, joined: int) -> int:
    """What `context_parallel_mode: auto` takes; 0 where nothing fits."""
    heads = model.num_heads // ways
    read = max(1, heads * model.num_kv_heads // model.num_heads)
    around = Surroundings(heads, read, model.head_dim, rows=max(1, rows), joined=joined)
    try:
        return fitted(ContextParallel(context), around).sizes["ulysses"]
    except UserError:
        return 0


def _groups(model: ModelConfig, sizes: dict[str, Numbers], batch: Numbers) -> Iterator[NDArray[np.int64]]:
    """The places of candidates that share every rule: whether FSDP2 serves them, how attention cuts their rows."""
    rules = np.zeros(len(batch), np.int64)
    data = sizes["replicate"] * sizes["shard"] > 1
    for rule in (data, *_attention(model, sizes, batch), *(sizes[axis] > 1 for axis in SEQUENCE_AXES)):
        rules = rules * 2 + rule
    for rule in np.unique(rules):
        yield np.flatnonzero(rules == rule)


def _group(model: ModelConfig, places: Numbers, found: Found, switches: Switches) -> tuple[StepShape, Parallel]:
    """The group at `places` as closed forms take it; its first candidate says which layouts its streams have."""
    training: Training = found.training
    batch: Any = found.micro_batch[places]  # closed forms take arrays for whole numbers
    sizes = {axis: n[places] for axis, n in found.sizes.items()}
    first = replace(found.layout(int(places[0])), **switches._asdict())
    parallel = replace(first.parallel(model, training), mesh=ManyMeshes(sizes).as_mesh)
    micro_batches = training.global_batch // (parallel.mesh.size(DATA_AXES) * batch)
    every = replace(first, micro_batch=batch, micro_batches=micro_batches)
    return every.shape(training, parallel), parallel


def _costs(
    model: ModelConfig, training: Training, sizes: dict[str, Numbers], batch: Numbers, switches: Switches
) -> Found:
    """The peak of every candidate with these switches; none is timed yet, and buffers are not counted."""
    count = len(batch)
    which, peak, buffers = (np.zeros(count, np.int64) for _ in range(3))
    found = Found(sizes, batch, [switches], which, peak, buffers, np.full(count, np.inf), training)
    for places in _groups(model, sizes, batch):
        shape, parallel = _group(model, places, found, switches)
        found.peak[places] = peak_bytes(model, shape, parallel).total
    if not switches.reshard:  # means nothing where FSDP2 serves no axis
        found.peak[np.prod([sizes[axis] for axis in (*DATA_AXES, *SEQUENCE_AXES)], axis=0) == 1] = NEVER
    return found


def _buffers(model: ModelConfig, cluster: Cluster, found: Found) -> Numbers:
    """What the communication library takes for each candidate; all of them have the same switches."""
    buffers = found.buffers.copy()
    for places in _groups(model, found.sizes, found.micro_batch):
        shape, parallel = _group(model, places, found, found.switches[0])
        transfers = step_transfers(model, shape, parallel)
        buffers[places] = library_bytes(transfers, parallel.mesh, cluster.profile, cluster.per_machine)
    return buffers


def _worth_timing(fitting: NDArray[np.bool_], plain: Sequence[Switches], count: int) -> NDArray[np.bool_]:
    """The candidates that fit, but for those that another one surely beats: it fits and computes less again."""
    fits = fitting.reshape(len(plain), count)
    worth = fits.copy()
    for reshard in (False, True):
        chain = [place for place, switches in enumerate(plain) if switches.reshard == reshard]
        for at, place in enumerate(chain):
            worth[place] &= ~fits[chain[:at]].any(axis=0)
    return worth.reshape(-1)


def _timed(model: ModelConfig, cluster: Cluster, found: Found, worth: NDArray[np.bool_]) -> Found:
    """With the seconds of the candidates that are `worth` it."""
    seconds = found.seconds.copy()
    for place, switches in enumerate(found.switches):
        chosen = np.flatnonzero(worth & (found.which == place))
        if not len(chosen):
            continue
        sizes = {axis: n[chosen] for axis, n in found.sizes.items()}
        for places in _groups(model, sizes, found.micro_batch[chosen]):
            own = chosen[places]
            shape, parallel = _group(model, own, found, switches)
            seconds[own] = _time(model, cluster, shape, parallel).total
    return replace(found, seconds=seconds)


def _time(model: ModelConfig, cluster: Cluster, shape: StepShape, parallel: Parallel) -> StepTime:
    time = step_time(step_work(model, shape, parallel, cluster.per_machine), cluster.profile)
    return corrected(time, place_of(model, shape, parallel), cluster.profile)


def _with_schedules(
    model: ModelConfig, cluster: Cluster, found: Found, best: NDArray[np.int64], *, surely: bool
) -> Iterator[Found]:
    """The best candidates with the schedules that their meshes allow."""
    for name, slices in SCHEDULES:
        allowed = best[_allowed(model, found, best, name, slices)]
        for which in np.unique(found.which[allowed]):
            own = allowed[found.which[allowed] == which]
            switches = found.switches[int(which)]._replace(schedule=name, slices=slices)
            sizes = {axis: n[own] for axis, n in found.sizes.items()}
            costs = _costs(model, found.training, sizes, found.micro_batch[own], switches)
            costs = replace(costs, buffers=_buffers(model, cluster, costs))
            yield _timed(model, cluster, costs, costs.fitting(cluster, surely=surely))


def _allowed(model: ModelConfig, found: Found, places: NDArray[np.int64], name: str, slices: int) -> NDArray[np.bool_]:
    """Whether a mesh has a product that moves, and the schedule takes it (sizes/rules.py, layout/resolve.py)."""
    sizes = {axis: n[places] for axis, n in found.sizes.items()}
    data = sizes["replicate"] * sizes["shard"] * sizes["ring"] * sizes["ulysses"] > 1
    moves = sizes["col"] * np.where(data, 1, sizes["row"]) > 1
    if name in LOOPS:
        square = (sizes["row"] == sizes["col"]) & (sizes["row"] > 1)
        return np.asarray(square & (~data | (sizes["inner"] == 1)) & (sizes["depth"] == 1))
    block = model.hidden_size // (sizes["inner"] * sizes["row"])
    return np.asarray(moves & (block % slices == 0))


def _joined(parts: Sequence[Found], training: Training) -> Found:
    """All candidates of `parts`, in order."""
    switches: list[Switches] = []
    which = []
    for part in parts:
        which.append(part.which + len(switches))
        switches += part.switches
    sizes = {axis: np.concatenate([part.sizes[axis] for part in parts]) for axis in parts[0].sizes}
    others = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("micro_batch", "peak", "buffers", "seconds")
    )
    batch, peak, buffers, seconds = others
    return Found(sizes, batch, switches, np.concatenate(which), peak, buffers, seconds, training)


def fastest_too_large(model: ModelConfig, cluster: Cluster, found: Found) -> int | None:
    """The place of the fastest of the candidates that hardly do not fit; None where all fit."""
    too_large = np.flatnonzero(~found.fitting(cluster) & (found.peak < NEVER))
    if not len(too_large):
        return None
    chosen = np.full(len(found), False)
    chosen[too_large[np.argsort(found.peak[too_large], kind="stable")[:KEPT]]] = True
    seconds = np.where(chosen, _timed(model, cluster, found, chosen).seconds, np.inf)
    return int(np.argmin(seconds))


def buildable(model: ModelConfig, devices: int, training: Training) -> bool:
    """Whether any layout of so many devices divides the model and the batch."""
    return len(_meshes(model, devices, training)[1]) > 0
