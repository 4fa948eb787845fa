"""A profile brought to the runs of a machine: rates that explain measured steps, and what they leave unexplained.

The rates are fitted to the logarithm of each run's seconds by Levenberg and Marquardt's damped least squares, starting
from a profile's and held near them (a normal prior on the logarithm of each factor); errors beyond `BEND` count
linearly (Huber 1964), since some measured runs are odd in ways that no rate explains. What remains is kept with the
profile, by what runs are alike (`machine.Residuals`): kernels have shapes at which they are fast or slow.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.streams import Streams
from tessera.models.config import ModelConfig
from tessera.plan.machine import Curve, Profile, Residuals
from tessera.plan.time import ONE_STAGE, Pipeline, StepTime, step_time
from tessera.plan.traffic import Transfer
from tessera.plan.update import ADAMW, Update
from tessera.plan.work import Moved, Multiplied, Work, step_work

BEND = 0.03
"""The error, as a share, beyond which a run counts linearly."""
PRIOR, MEASURED_PRIOR = 0.7, 0.15
"""The standard deviation of the logarithm of a rate's factor before any run is seen: of a rate from published figures,
or by which several ranks at once are slower; and of a rate that was measured on the machine."""
ROUNDS = 60


@dataclass(frozen=True)
class Run:
    """A measured step: the work of its longest rank, `place` by `machine.LIKE`, and the seconds that it took."""

    work: Work
    place: tuple[float, ...]
    seconds: float
    pipeline: Pipeline = ONE_STAGE

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        shape: StepShape,
        parallel: Parallel,
        per_machine: int,
        seconds: float,
        *,
        offload: bool = False,
        update: Update = ADAMW,
    ) -> "Run":
        """A step of `parallel`'s ranks, `per_machine` of them on each machine, that took so many seconds."""
        (place,) = place_of(model, shape, parallel)
        work = step_work(model, shape, parallel, per_machine, offload=offload, update=update)
        return cls(work, tuple(map(float, place)), seconds)


def calibrated(profile: Profile, runs: Sequence[Run], name: str, only: Collection[str] | None = None) -> Profile:
    """`profile` with the rates that explain `runs`, and what these leave; raises ValueError without runs.

    `only`: names of rates to fit, the others stay; e.g. {"product_flops", "shared.2"}. All of them without it.
    """
    if not runs:
        raise ValueError("calibration needs at least one measured run")
    alike = _of_like_products(runs)
    logs = np.log([run.seconds for run in runs])
    bare = replace(profile, residuals=None)
    known = {rate: scale for rate, scale in _rates_of(profile).items() if only is None or rate in only}
    rates = list(known.values())
    priors = np.array([_prior(rate, profile) for rate in known])

    def missed(factors: NDArray[Any]) -> NDArray[Any]:
        at, total = _scaled(bare, rates, factors), np.empty(len(runs))
        for places, work, pipeline in alike:
            total[places] = step_time(work, at, pipeline).total
        return np.asarray(logs - np.log(total))

    factors = _least(lambda factors: np.concatenate([_bent(missed(factors) / BEND), factors / priors]), len(rates))
    residuals = Residuals(tuple(run.place for run in runs), tuple(map(float, missed(factors))))
    return replace(_scaled(bare, rates, factors), name=name, residuals=residuals, measured=True)


def _of_like_products(runs: Sequence[Run]) -> list[tuple[list[int], Work, Pipeline]]:
    """The runs whose models have the same kinds of products, stacked; and their places."""
    places: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for place, run in enumerate(runs):
        places[tuple((each.site, each.phase) for each in run.work.products)].append(place)
    return [
        (own, stacked([runs[place].work for place in own]), stacked([runs[place].pipeline for place in own]))
        for own in places.values()
    ]


_Scale = Callable[[Profile, float], Profile]
"""A profile with one of its rates times a factor."""


def _curves(field: str, part: str) -> _Scale:
    def scale(profile: Profile, factor: float) -> Profile:
        curves: Mapping[str, Curve] = getattr(profile, field)
        scaled = {kind: replace(curve, **{part: getattr(curve, part) * factor}) for kind, curve in curves.items()}
        changed: dict[str, Any] = {field: scaled}
        return replace(profile, **changed)

    return scale


def _rate(field: str) -> _Scale:
    most = 1.0 if field in ("overlap", "memory_efficiency") else np.inf  # these are shares
    return lambda profile, factor: replace(profile, **{field: min(most, getattr(profile, field) * factor)})


def _at_once(ranks: int) -> _Scale:
    """What one rank computes by itself takes longer with so many at once, whatever it computes."""

    def scale(profile: Profile, factor: float) -> Profile:
        def of(what: str, known: Mapping[int, float]) -> Mapping[int, float]:
            return {
                count: times * factor if count == ranks and what != "links" else times for count, times in known.items()
            }

        return replace(profile, shared={what: of(what, known) for what, known in profile.shared.items()})

    return scale


_FIELDS = (
    *("product_flops", "product_half", "attention_flops", "attention_half"),
    *("score_seconds", "memory_efficiency", "score_bytes"),
    *("dispatch_seconds", "overlap", "step_seconds"),
)
_PARTS = ("alpha_seconds", "hop_seconds", "bytes_per_second")
_RATES: Mapping[str, _Scale] = {
    **{field: _rate(field) for field in _FIELDS},
    **{f"{level}.{part}": _curves(level, part) for level in ("inside", "between") for part in _PARTS},
}


def _rates_of(profile: Profile) -> Mapping[str, _Scale]:
    """The rates that this profile has: those of all, and by what several ranks at once are slower."""
    counts = sorted({count for known in profile.shared.values() for count in known if count > 1})
    return {**_RATES, **{f"shared.{count}": _at_once(count) for count in counts}}


def _prior(rate: str, profile: Profile) -> float:
    """At once, ranks wait for one that has no core, which no rate of a part shows."""
    return MEASURED_PRIOR if profile.measured and not rate.startswith("shared.") else PRIOR


def _scaled(profile: Profile, rates: Sequence[_Scale], logs: NDArray[Any]) -> Profile:
    for scale, log in zip(rates, logs, strict=True):
        profile = scale(profile, float(np.exp(log)))
    return profile


def _bent(errors: NDArray[Any]) -> NDArray[Any]:
    """Errors whose squares grow linearly above 1."""
    size = np.abs(errors)
    return np.where(size <= 1, errors, np.sign(errors) * np.sqrt(np.maximum(2 * size - 1, 0)))


def _least(errors: Callable[[NDArray[Any]], NDArray[Any]], count: int) -> NDArray[Any]:
    """The logarithms of `count` factors with the least sum of squares (Marquardt 1963)."""
    at, damping = np.zeros(count), 1e-2
    now, step = errors(at), 1e-4
    for _ in range(ROUNDS):
        slopes = np.stack([(errors(at + step * axis) - now) / step for axis in np.eye(len(at))], axis=1)
        better = None
        while better is None and damping < 1e8:
            move = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(at)), -slopes.T @ now)
            there = errors(at + move)
            better = there if (there**2).sum() < (now**2).sum() else None
            damping = damping * 4 if better is None else max(damping / 4, 1e-6)
        if better is None:
            break
        gained, at, now = (now**2).sum() - (better**2).sum(), at + move, better
        if gained < 1e-5 * (now**2).sum():
            break
    return at


def place_of(model: ModelConfig, shape: StepShape, parallel: Parallel, stages: int = 1) -> NDArray[Any]:
    """By what runs are alike, `machine.LIKE`, of a step whose rank has the layers of `model`: [1, 7], or of candidates
    [n, 7]."""
    mesh = parallel.mesh
    tokens = shape.tokens_on(mesh, parallel.streams.ids)
    features, rows, data = (mesh.size(axes) for axes in (("inner", "col"), ("depth", "row"), Streams.batch))
    like = (tokens, model.hidden_size, features, rows, data, stages, model.num_layers)
    return np.log2(np.stack([np.atleast_1d(each) for each in np.broadcast_arrays(*like)], axis=1))


def corrected(time: StepTime, places: NDArray[Any], profile: Profile) -> StepTime:
    """`time` at `places` [n, 7] as runs of like shape were measured, with the band that 90% of them lie in."""
    if profile.residuals is None:
        return time
    missed, deviation = profile.residuals.at(places)
    shape = np.shape(time.total)
    factor = np.exp(missed).reshape(shape) - 1
    # where no measured run is alike, the process knows no more than the profile
    alone = deviation >= 0.95 * profile.residuals.spread
    band = np.where(alone, max(WIDEST, profile.error), np.minimum(1.645 * deviation, WIDEST)).reshape(shape)
    return replace(time, calibration=time.total * factor, error=band)


WIDEST = 0.25
"""Half of the widest band beside measured runs, as a share."""


def stacked(values: Sequence[Any]) -> Any:
    """Numbers in like places of each of `values` as one array: works, pipelines and what they are made of.

    A collective that some do not have is one of no calls there.
    """
    first = values[0]
    if isinstance(first, Work):
        rest = {f.name: [getattr(value, f.name) for value in values] for f in fields(Work) if f.name != "moved"}
        return Work(moved=_moved([value.moved for value in values]), **{k: stacked(v) for k, v in rest.items()})
    if isinstance(first, Multiplied):
        numbers = (stacked([value[place] for value in values]) for place in range(2, len(first)))
        return Multiplied(first.site, first.phase, *numbers)
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(**{f.name: stacked([getattr(value, f.name) for value in values]) for f in fields(first)})
    if isinstance(first, Mapping):
        return {key: stacked([value.get(key, 0) for value in values]) for key in first}
    if isinstance(first, (list, tuple)):
        return [stacked(parts) for parts in zip(*values, strict=True)]
    return np.asarray(values, float)


def _moved(of_each: Sequence[Sequence[Moved]]) -> list[Moved]:
    """Collectives of the same site together."""
    by_key = [{_key(moved): moved for moved in every} for every in of_each]
    keys = dict.fromkeys(key for known in by_key for key in known)
    none = Moved(Transfer("", "", "", "", (), 0, 0, 0), 1, 1, "")
    made = []
    for key in keys:
        every = [known.get(key, none) for known in by_key]
        counts = (stacked([getattr(m.transfer, name) for m in every]) for name in ("calls", "received", "times"))
        ranks, machines = (stacked([m[place] for m in every]) for place in (1, 2))
        *what, hidden = key
        made.append(Moved(Transfer(*what, *counts), ranks, machines, hidden))
    return made


def _key(moved: Moved) -> tuple[Any, ...]:
    of = moved.transfer
    return (of.site, of.phase, of.what, of.kind, of.axes, moved.hidden)
