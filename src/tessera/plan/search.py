"""Every layout that a number of devices can have, and what each costs: thousands at once, by arrays of their sizes.

    meshes     every way to cut the devices over replicate, shard, context, inner, depth, row and col that fits the
               model; ulysses is of the context's ranks what `sizes.context` takes
    batches    every micro-batch that divides a data rank's rows
    switches   recompute, weights kept after the forward, MLPs in tiles, schedules of the products
    savers     gradients summed after every micro-batch, what layers keep in host memory, states in host memory, MLPs in
               tiles where nothing else is computed again, and every set of these together

Candidates that share every switch and every rule are one group: closed forms of plan/ take its sizes as arrays. What
is left out is never the best, which tests/plan/test_search.py holds against all of it on small spaces:

    sequence_parallel: false, which moves as much and holds more
    of two candidates that fit and differ in recompute alone, the one that computes more
    of two that fit and differ in savers alone, the one with more: a saver takes time, and gives none back. But tiles
    do where layers run again, for they compute no more and their weights come once less (there they are no saver),
    and where what layers keep travels, for that is less
    savers beside a candidate that without them is no faster than the best of those that fit, and more savers beside
    what with fewer takes a tenth longer than that one
    of schedules other than gather, those that take a tenth longer than the best, and beside savers those of layouts
    that with gather are not among the best `KEPT`
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.core.axes import DATA_AXES, SEQUENCE_AXES
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import anatomy_of
from tessera.models.config import ModelConfig
from tessera.plan.buffers import library_bytes
from tessera.plan.calibrate import corrected, place_of
from tessera.plan.candidates import NEVER, SLOWER, Found, Numbers, Switches, attention_of, joined, meshes, untimed
from tessera.plan.choice import RECOMPUTES, Training
from tessera.plan.host import host_bytes, room_on_host
from tessera.plan.machine import Cluster
from tessera.plan.many import ManyMeshes
from tessera.plan.peak import peak_bytes
from tessera.plan.tiles import largest_tile
from tessera.plan.time import StepTime, step_time
from tessera.plan.traffic import step_transfers
from tessera.plan.update import Update
from tessera.plan.work import step_work
from tessera.sizes.schedule import LOOPS

SCHEDULES = (("gather", 2), ("gather", 4), ("gather", 8), ("summa", 1), ("cannon", 1))
"""Beside gather in one piece."""
KEPT = 300
RUNNER_UP = 1.1
"""Of candidates with savers those are kept whose step takes at most so many times as long as the fastest."""


SAVERS: dict[str, Any] = {"sync_each_batch": True, "offload": True, "tiles": None, "offload_params": True}
"""The switches that save memory at the cost of time alone, as they are when they are on."""
PLAIN = [
    Switches(recompute, reshard, tiles=tiles)
    for recompute in RECOMPUTES
    for tiles in ((1,) if recompute == "false" else (1, None))
    for reshard in (False, True)
]
COMBINED = [names for count in (1, 2, 3, 4) for names in combinations(SAVERS, count)]
"""Every set of savers but none, the small ones first."""


def search(
    model: ModelConfig, cluster: Cluster, training: Training, *, savers: bool = True, exhaustive: bool = False
) -> Found:
    """Every layout of all of the cluster's devices for `training`; `exhaustive` leaves nothing out.

    `savers`: with what saves memory at the cost of time alone. What fits is said in plan/fit.py; where nothing surely
    fits, what may fit is timed. The result may be empty.
    """
    sizes, batch = meshes(model, cluster.devices, training)
    sets = COMBINED if savers else []
    plain = PLAIN if savers else [way for way in PLAIN if way.tiles == 1]
    every = [*plain, *(_saving(way, names) for names in sets for way in plain if _adds(way, names))]
    # of all: what is computed again, or lies elsewhere, moves along no other axes
    buffers = _buffers(model, cluster, untimed(sizes, batch, plain[0], training))
    costs = [
        _costs(model, cluster, untimed(sizes, batch, switches, training, buffers))
        for switches in (every if exhaustive else plain)
    ]
    found = joined(costs, training)
    if exhaustive:
        found = _timed(model, cluster, found, np.full(len(found), True))
        places, surely = np.flatnonzero(np.isfinite(found.seconds)), bool(found.fitting(cluster).any())
        return joined([found, *_with_schedules(model, cluster, found, places, surely)], training)
    for surely in (True, False):
        within = _within(model, cluster, found, len(batch), surely, sets)
        if np.isfinite(within.seconds).any():
            break
    return within.only(within.peak < NEVER)


def _saving(switches: Switches, names: Iterable[str]) -> Switches:
    """The same with these savers."""
    return switches._replace(**{name: SAVERS[name] for name in names})


def _adds(way: Switches, names: Iterable[str]) -> bool:
    """Whether these savers are tried beside `way`: tiles are not where layers run again, for there they are a way."""
    return way.recompute == "false" or "tiles" not in names


def _surely_slower(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether `names` are `others` and more, and so no faster.

    Tiles beside offloaded activations may be: then less travels to the host.
    """
    return set(others) < set(names) and not ("tiles" in names and "tiles" not in others and "offload" in others)


def _no_slower(one: Switches, other: Switches) -> bool:
    """Whether a candidate is no slower with `one` of the plain ways than with the `other`, for it computes less again.

    Tiles run once more themselves, so they are never faster than layers that run once.
    """
    less = RECOMPUTES.index(one.recompute) <= RECOMPUTES.index(other.recompute)
    return less and (one.tiles == other.tiles or one.recompute == "false")


def _within(
    model: ModelConfig, cluster: Cluster, found: Found, count: int, surely: bool, sets: Sequence[tuple[str, ...]]
) -> Found:
    """The plain candidates `found`, `count` of each way, and those with `sets` of savers or another schedule that may
    be the best of what `surely` fits, or of what may fit, timed."""
    worth, tight = _worth_timing(found, found.fitting(cluster, surely=surely), count)
    found = _timed(model, cluster, found, worth)
    saved = list(_with_savers(model, cluster, found, tight, surely, sets)) if sets and tight.any() else []
    best = min(float(part.seconds.min(initial=np.inf)) for part in (found, *saved))
    scheduled = list(_with_schedules(model, cluster, found, np.flatnonzero(worth | tight), surely, best))
    if saved:
        with_savers = joined(saved, found.training)
        fastest = np.argsort(with_savers.seconds)[:KEPT]
        fastest = fastest[np.isfinite(with_savers.seconds[fastest])]
        scheduled += _with_schedules(model, cluster, with_savers, fastest, surely)
    return joined([found, *saved, *scheduled], found.training)


def _with_savers(
    model: ModelConfig,
    cluster: Cluster,
    found: Found,
    tight: NDArray[np.bool_],
    surely: bool,
    sets: Sequence[tuple[str, ...]],
) -> Iterator[Found]:
    """Candidates that do not fit, with savers: those first that are fastest without, until these are no faster than the
    best that fits."""
    best = float(found.seconds.min(initial=np.inf))
    without = _without_savers(model, cluster, found, tight, best)
    order = np.flatnonzero(without < best)
    order = order[np.argsort(without[order], kind="stable")]
    first, many = 0, KEPT
    while first < len(order) and without[order[first]] < best:
        taken = order[first : first + many]
        taken = taken[without[taken] < best]
        for which in np.unique(found.which[taken]):
            own = taken[(found.which[taken] == which) & (without[taken] < best)]
            for part in _saved(model, cluster, found, own, surely, sets, best):
                best = min(best, float(part.seconds.min(initial=np.inf)))
                yield part
        first, many = first + many, 4 * many


def _without_savers(
    model: ModelConfig, cluster: Cluster, found: Found, tight: NDArray[np.bool_], best: float
) -> NDArray[np.float64]:
    """The seconds of the `tight` ones of the plain candidates; infinite where these cannot be below `best`.

    To compute less again, or to keep weights, takes no longer.
    """
    seconds = np.full(len(found), np.inf)
    per_way = len(found) // len(found.switches)
    least = np.zeros((len(found.switches), per_way))
    for place, way in enumerate(found.switches):
        others = enumerate(found.switches[:place])
        before = [at for at, other in others if other.reshard <= way.reshard and _no_slower(other, way)]
        least[place] = least[before].max(axis=0, initial=0.0)
        own = place * per_way + np.flatnonzero(tight.reshape(least.shape)[place] & (least[place] < best))
        chosen = np.full(len(found), False)
        chosen[own] = True
        seconds[own] = _timed(model, cluster, found, chosen).seconds[own]
        least[place, own - place * per_way] = seconds[own]
    return seconds


def _saved(
    model: ModelConfig,
    cluster: Cluster,
    found: Found,
    places: Numbers,
    surely: bool,
    sets: Sequence[tuple[str, ...]],
    best: float,
) -> Iterator[Found]:
    """Candidates that share switches with every set of savers, but where a part of the set is enough, or takes longer
    than a runner-up of the `best` seconds may."""
    if not len(places):
        return
    plain = found.switches[int(found.which[places[0]])]
    settled: dict[tuple[str, ...], NDArray[np.bool_]] = {}
    for names in (names for names in sets if _adds(plain, names)):
        done = np.full(len(places), False)
        for smaller, by_these in settled.items():
            if _surely_slower(names, smaller):
                done |= by_these
        settled[names] = np.full(len(places), False)
        own = places[~done]
        if not len(own):
            continue
        part = _costs(model, cluster, found.at(own, _saving(plain, names)), below=RUNNER_UP * best)
        fitting = part.fitting(cluster, surely=surely)
        settled[names][~done] = fitting | (part.peak == SLOWER)
        part = replace(part, seconds=np.where(fitting, part.seconds, np.inf))
        best = min(best, float(part.seconds.min()))
        yield part


def _groups(model: ModelConfig, sizes: dict[str, Numbers], batch: Numbers) -> Iterator[NDArray[np.int64]]:
    """The places of candidates that share every rule: whether FSDP2 serves them, how attention cuts their rows."""
    rules = np.zeros(len(batch), np.int64)
    data = sizes["replicate"] * sizes["shard"] > 1
    for rule in (data, *attention_of(model, sizes, batch), *(sizes[axis] > 1 for axis in SEQUENCE_AXES)):
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


def _costs(model: ModelConfig, cluster: Cluster, found: Found, below: float | None = None) -> Found:
    """With the memory of every candidate; all of them have the same switches.

    With `below` they are timed before, and what takes so many seconds or more has the bytes SLOWER. NEVER is that of
    one whose switches mean nothing, or whose host has no room for what they bring there.
    """
    (way,), peaks, seconds = found.switches, np.full(len(found), NEVER), found.seconds.copy()
    training = found.training
    for places in _groups(model, found.sizes, found.micro_batch):
        shape, parallel = _group(model, places, found, way)
        places = places[np.broadcast_to(_able(model, cluster, shape, parallel, way, training.update), places.shape)]
        if below is not None and len(places):
            shape, parallel = _group(model, places, found, way)
            seconds[places] = _time(model, cluster, shape, parallel, training, way.offload_params).total
            peaks[places] = SLOWER
            places = places[seconds[places] < below]
        if len(places):  # the others cost nothing further
            shape, parallel = _group(model, places, found, way)
            offload, update = way.offload_params, training.update
            peaks[places] = peak_bytes(model, shape, parallel, offload=offload, update=update).total
    return replace(found, peak=peaks, seconds=seconds)


def _able(
    model: ModelConfig, cluster: Cluster, shape: StepShape, parallel: Parallel, way: Switches, update: Update
) -> Any:
    """Which candidates have several micro-batches, where `way` sums the gradients of each, several tiles, where it asks
    for tiles, room on the host for what goes there, and FSDP2 where it asks for something of it."""
    able: Any = shape.micro_batches > 1 if way.sync_each_batch else True
    if not way.reshard or way.offload_params or way.sync_each_batch:
        able = able & (parallel.mesh.size((*DATA_AXES, *SEQUENCE_AXES)) > 1)
    if way.tiles != 1:
        size, tokens = largest_tile(anatomy_of(model).layers[0][1], shape, parallel)
        able = able & (size < tokens)
    if way.offload or way.offload_params:
        host = host_bytes(model, shape, parallel, offload=way.offload_params, update=update)
        able = able & (host <= room_on_host(cluster.profile))
    return able


def _buffers(model: ModelConfig, cluster: Cluster, found: Found) -> Numbers:
    """What the communication library takes for each candidate; all of them have the same switches."""
    buffers = found.buffers.copy()
    for places in _groups(model, found.sizes, found.micro_batch):
        shape, parallel = _group(model, places, found, found.switches[0])
        transfers = step_transfers(model, shape, parallel)
        buffers[places] = library_bytes(transfers, parallel.mesh, cluster.profile, cluster.per_machine)
    return buffers


def _worth_timing(found: Found, fitting: NDArray[np.bool_], count: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The plain candidates that fit, but for those that another one surely beats: it fits and computes less again.

    Then those that do not fit, but for those that another one beats likewise: what savers may be worth a try beside.
    """
    fits = fitting.reshape(len(found.switches), count)
    worth, tight = fits.copy(), (~fits & (found.peak < NEVER).reshape(fits.shape))
    for place, way in enumerate(found.switches):
        others = enumerate(found.switches[:place])
        beaten = fits[[at for at, other in others if other.reshard == way.reshard and _no_slower(other, way)]].any(0)
        worth[place] &= ~beaten
        tight[place] &= ~beaten
    return worth.reshape(-1), tight.reshape(-1)


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
            seconds[own] = _time(model, cluster, shape, parallel, found.training, switches.offload_params).total
    seconds[found.peak == NEVER] = np.inf
    return replace(found, seconds=seconds)


def _time(
    model: ModelConfig, cluster: Cluster, shape: StepShape, parallel: Parallel, training: Training, offload: bool
) -> StepTime:
    work = step_work(model, shape, parallel, cluster.per_machine, offload=offload, update=training.update)
    return corrected(step_time(work, cluster.profile), place_of(model, shape, parallel), cluster.profile)


def _with_schedules(
    model: ModelConfig, cluster: Cluster, found: Found, places: Numbers, surely: bool, best: float | None = None
) -> Iterator[Found]:
    """The candidates at `places` with the schedules that their meshes allow, which may take less memory too; without
    those that take longer than a runner-up of the `best` seconds may, where these are given."""
    for name, slices in SCHEDULES:
        allowed = places[_allowed(model, found, places, name, slices)]
        for which in np.unique(found.which[allowed]):
            own = allowed[found.which[allowed] == which]
            same = found.at(own, found.switches[int(which)]._replace(schedule=name, slices=slices))
            part = _costs(model, cluster, same, below=np.inf if best is None else RUNNER_UP * best)
            known, buffers = part.peak < SLOWER, part.buffers.copy()
            buffers[known] = _buffers(model, cluster, same.only(known))
            part = replace(part, buffers=buffers)
            fitting = part.fitting(cluster, surely=surely)
            part = replace(part, seconds=np.where(fitting, part.seconds, np.inf))
            best = None if best is None else min(best, float(part.seconds.min(initial=np.inf)))
            yield part


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


def fastest_too_large(model: ModelConfig, cluster: Cluster, found: Found) -> int | None:
    """The place of the fastest of the candidates that hardly do not fit; None where all fit."""
    too_large = np.flatnonzero(~found.fitting(cluster) & (found.peak < SLOWER))
    if not len(too_large):
        return None
    chosen = np.full(len(found), False)
    chosen[too_large[np.argsort(found.peak[too_large], kind="stable")[:KEPT]]] = True
    seconds = np.where(chosen, _timed(model, cluster, found, chosen).seconds, np.inf)
    return int(np.argmin(seconds))
