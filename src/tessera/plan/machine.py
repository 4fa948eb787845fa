"""What the planner knows of a machine: the rates of a device, and the links inside a machine and between machines.

A `Profile` is one device with one software stack: measured by `tessera measure`, or one of those that ship in
profiles/, each figure with its source. A `Cluster` is a number of machines of such devices. No torch.

A collective of a rank that receives b bytes takes (facts of NCCL: ring bytes over bandwidth, and a term with √b that
stands for protocols and pipelines which fill slowly)

    alpha + hop (n − 1) + root √b + b / bandwidth

with n the ranks of the group inside one machine, and the machines of a group that spans several. There the bandwidth is
that of a link between machines times the group's ranks on each (each brings its own), at most the one inside.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from tessera.core.arrays import larger, smaller, where
from tessera.core.errors import UserError
from tessera.core.files import read_bytes

Level = Literal["inside", "between"]


@dataclass(frozen=True)
class Curve:
    """The time of a collective against the bytes that a rank receives. Arrays of candidates are taken too."""

    alpha_seconds: float
    hop_seconds: float
    root_seconds: float
    bytes_per_second: float

    def seconds(self, received: Any, steps: Any, bandwidth: Any = None) -> Any:
        """Seconds of one call; `steps`: ranks or machines in a row; `bandwidth` instead of the curve's own, bytes/s."""
        rate = self.bytes_per_second if bandwidth is None else bandwidth
        fixed = self.alpha_seconds + self.hop_seconds * larger(steps - 1, 0)
        return fixed + self.root_seconds * np.sqrt(received) + received / rate


LIKE = ("tokens", "hidden_size", "features", "rows", "data", "stages", "layers")
"""By what runs are alike: binary logarithms of a micro-batch's tokens on a rank, of the model's width, of the ranks
that cut a layer's features (col, inner), of those of its mesh that cut tokens (row, depth), of those that cut the batch
and its sequences, of stages, and of a rank's layers."""
_LENGTHS = (0.6, 0.6, 0.6, 0.6, 2.0, 2.0, 8.0)
_NOISE = 0.05


@dataclass(frozen=True)
class Residuals:
    """What the terms miss of measured runs: a Gaussian process over `LIKE` (Rasmussen & Williams 2006, equation 2.25).

    `logs` are those of measured over predicted seconds, of runs at `places`.
    """

    places: tuple[tuple[float, ...], ...]
    logs: tuple[float, ...]

    @property
    def spread(self) -> float:
        """The standard deviation where nothing alike was measured."""
        return float(np.sqrt(max(float(np.mean(np.square(self.logs))), _NOISE**2) + _NOISE**2))

    def at(self, places: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Of each of `places` [n, 7] the expected logarithm of measured over predicted, and its standard deviation."""
        known, logs = np.asarray(self.places, float), np.asarray(self.logs, float)
        variance = max(float(np.mean(logs**2)), _NOISE**2)
        of_known = variance * _alike(known, known) + _NOISE**2 * np.eye(len(logs))
        cross = variance * _alike(np.asarray(places, float), known)
        weights = np.linalg.solve(of_known, cross.T).T
        spread = np.maximum(variance - (weights * cross).sum(1), 0.0) + _NOISE**2
        return weights @ logs, np.sqrt(spread)

    @property
    def left_out(self) -> NDArray[Any]:
        """Of each run the logarithm of measured over predicted seconds where the others alone are known (5.12)."""
        known, logs = np.asarray(self.places, float), np.asarray(self.logs, float)
        variance = max(float(np.mean(logs**2)), _NOISE**2)
        inverse = np.linalg.inv(variance * _alike(known, known) + _NOISE**2 * np.eye(len(logs)))
        return np.asarray(inverse @ logs / np.diag(inverse))


def far_apart(places: Sequence[Sequence[float]], count: int) -> list[int]:
    """Which `count` of `places` to measure for a calibration: each the farthest from those before."""
    known = np.asarray(places, float) / np.asarray(_LENGTHS)
    apart = np.square(known - np.median(known, axis=0)).sum(1)
    chosen = [int(np.argmin(apart))]
    nearest = np.square(known - known[chosen[0]]).sum(1)
    while len(chosen) < min(count, len(known)):
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, np.square(known - known[chosen[-1]]).sum(1))
    return chosen


def _alike(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    apart = (a[:, None] - b[None]) / np.asarray(_LENGTHS)
    return np.asarray(np.exp(-0.5 * (apart**2).sum(-1)))


@dataclass(frozen=True)
class Profile:
    """One device with one stack. FLOP/s are of floats, bandwidths bytes/s, times seconds.

    `peak_flops` by dtype: the vendor's, of which MFU is a share. A product of M, N, K multiplies at
    `product_flops · d / (d + product_half)`, d the least of the three; attention does 4 HQS² FLOP in
    the forward (H heads of Q features over S tokens), 2.5 times that in the backward, half with a causal mask, at
    `attention_flops · k / (k + attention_half)`, k the keys that a query sees, and takes `score_seconds` for each pair
    of a query and a key, each way. What
    memory bounds moves at `memory_efficiency · memory_bandwidth`. The host issues an operator, as plan/work.py counts
    them, in `dispatch_seconds`: a layer takes no less than that, and where it does not run `asynchronous`, as on a CPU,
    that much more. Of what may overlap with compute the share `overlap` does; compute is `contention` times slower
    then. `step_seconds`: what a step takes beside. `inside` and `between` have a curve for a kind of collective, or for
    `any`. Where devices are joined pair by pair and not by a switch, `pair_bandwidth` is that of one such link: a group
    then has those between its ranks alone. `shared`: where ranks share cores, by what everything takes longer with so
    many at once (`slowdown`). `pairs`: two ranks each, and the bytes/s between them one way; `devices`: their GPUs, by
    what tells each from every other (none on CPUs, whose ranks have no links of their own). `error`: half of the band
    of a prediction, as a share; `measured`: on the machine itself. Kernels that form attention's scores move
    `score_bytes` for each; flash kernels none. `host_bandwidth`: bytes/s one way between a device and the memory of its
    host, `host_memory_bandwidth` those that its process moves within that memory, `host_memory_bytes` its part of it.
    `residuals`: of measured runs, what the terms alone miss. `sources` names where figures come from.
    """

    name: str
    device: str
    stack: str
    date: str
    devices_per_machine: int
    memory_bytes: int
    peak_flops: Mapping[str, float]
    product_flops: float
    product_half: float
    attention_flops: float
    memory_bandwidth: float
    memory_efficiency: float
    dispatch_seconds: float
    inside: Mapping[str, Curve]
    between: Mapping[str, Curve]
    score_bytes: float = 0.0
    attention_half: float = 0.0
    score_seconds: float = 0.0
    host_bandwidth: float = 2.5e10
    host_memory_bandwidth: float = 2.5e10
    host_memory_bytes: int = 2**37
    asynchronous: bool = True
    overlap: float = 0.7
    contention: float = 1.13
    step_seconds: float = 0.0
    error: float = 0.25
    measured: bool = False
    residuals: Residuals | None = None
    pair_bandwidth: float | None = None
    shared: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    pairs: tuple[tuple[int, int, float], ...] = ()
    devices: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def in_dtype(self, dtype: str) -> "Profile":
        """The same with the rates of products in `dtype`: those of the fastest dtype, in proportion to the peaks.

        Only the fastest one's are measured, so the band is wider by a tenth.
        """
        best = max(self.peak_flops.values(), default=0.0)
        share = self.peak_flops.get(dtype, best) / best if best else 1.0
        if share == 1.0:
            return self
        product, attention = self.product_flops * share, self.attention_flops * share
        return replace(self, product_flops=product, attention_flops=attention, error=self.error + 0.1)

    def curve(self, level: Level, kind: str) -> Curve:
        """The curve of a kind of collective at a level."""
        curves = self.inside if level == "inside" else self.between
        return curves.get(kind, curves["any"])

    def slowdown(self, what: str, ranks: Any) -> Any:
        """By what `what` takes longer where so many ranks of one machine run at once; numbers or arrays of candidates.

        Of `product`, `memory`, `attention` and `dispatch` the profile holds what one rank alone takes, so 1 for one
        rank; of `links` what groups take when every rank that was measured is at it, so 1 for all of them and less for
        fewer. Between the numbers that were measured lies a straight line, beyond them the same proportion. 1 where
        nothing is shared, as on GPUs.
        """
        known = sorted(self.shared.get(what, {}).items())
        if not known:
            return where(ranks > 0, 1.0, 1.0)
        most, times = known[-1]
        between = np.interp(ranks, [count for count, _ in known], [factor for _, factor in known])
        found = where(ranks > most, times * ranks / most, between)
        return found if isinstance(ranks, np.ndarray) else float(found)

    def collective_seconds(self, kind: str, received: Any, ranks: Any, machines: Any = 1, links: Any = 1.0) -> Any:
        """Seconds of one collective of `ranks`, on `machines` machines, each of which receives `received` bytes.

        `links`: how fast those of its group are inside a machine, beside the measured ones (plan/numbering.py). Numbers
        or arrays of candidates; 0 where there is one rank.
        """
        near, far = self.curve("inside", kind), self.curve("between", kind)
        beside = larger(1, ranks // larger(machines, 1))  # ranks of the group on one machine, each with its own link
        own = near.bytes_per_second * links
        if self.pair_bandwidth is not None:
            own = smaller(own, self.pair_bandwidth * larger(beside - 1, 1))
        inside = near.seconds(received, ranks, own)
        bandwidth = smaller(own, far.bytes_per_second * beside)
        between = larger(inside, far.seconds(received, machines, bandwidth))  # it is no faster than within one machine
        return where(ranks > 1, where(machines > 1, between, inside), 0.0)


@dataclass(frozen=True)
class Cluster:
    """`machines` of `per_machine` devices each, all alike; 0 machines: as many as are asked for with `of`."""

    machines: int
    per_machine: int
    profile: Profile

    @property
    def devices(self) -> int:
        return self.machines * self.per_machine

    def __str__(self) -> str:
        return f"{self.machines or 'N'} × {self.per_machine} × {self.profile.device}"

    def in_dtype(self, dtype: str) -> "Cluster":
        """The same with the rates of another dtype."""
        return replace(self, profile=self.profile.in_dtype(dtype))

    def of(self, devices: int) -> "Cluster":
        """The same with as many machines as so many devices need; fewer than a machine's are part of one."""
        per_machine = min(self.per_machine, devices)
        return replace(self, machines=-(-devices // per_machine), per_machine=per_machine)


_PROFILE = TypeAdapter(Profile)
BYTES = 2**20
"""Of a profile's file; those that are measured have a few thousand."""
FASTEST, LARGEST, LONGEST = 1e18, 2**50, 60.0
"""No device does so many FLOP or moves so many bytes a second, or has so many; no operator or message takes so long."""
AT_ONCE = 1024
"""Devices of a machine at most."""


def read_profile(path: Path) -> Profile:
    """A profile that `tessera measure` has written. Raises UserError for what is none, or has absurd figures."""
    hint = "tessera measure writes one"
    content = read_bytes(path, "--profile", limit=BYTES, hint=hint)
    try:
        profile = _PROFILE.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError("--profile", path, f"is no profile of a machine: {place}: {first['msg']}", hint) from error
    for name, value, least, most in _bounds(profile):
        if not least <= value <= most:
            raise UserError(
                "--profile", path, f"{name} is {value:g}, which no machine has: {least:g} to {most:g}", hint
            )
    learned = profile.residuals
    if learned is not None and (
        not learned.logs
        or len(learned.places) != len(learned.logs)
        or any(len(place) != len(LIKE) for place in learned.places)
    ):
        raise UserError("--profile", path, f"residuals.places has no {len(LIKE)} numbers of each run", hint)
    for level in ("inside", "between"):
        if "any" not in getattr(profile, level):
            raise UserError("--profile", path, f"{level} has no curve for any kind of collective", hint)
    return profile


def _bounds(profile: Profile) -> Iterator[tuple[str, float, float, float]]:
    """Each figure of a profile: its name, its value, and between what it must lie."""
    yield "devices_per_machine", profile.devices_per_machine, 1, AT_ONCE
    yield "memory_bytes", profile.memory_bytes, 1, LARGEST
    yield "host_memory_bytes", profile.host_memory_bytes, 1, LARGEST
    for dtype, peak in profile.peak_flops.items():
        yield f"peak_flops.{dtype}", peak, 1, FASTEST
    for name in ("product_flops", "attention_flops", "memory_bandwidth", "host_bandwidth", "host_memory_bandwidth"):
        yield name, getattr(profile, name), 1, FASTEST
    yield "product_half", profile.product_half, 0, 2**20
    yield "attention_half", profile.attention_half, 0, 2**20
    yield "score_seconds", profile.score_seconds, 0, 1
    yield "memory_efficiency", profile.memory_efficiency, 1e-3, 1
    yield "dispatch_seconds", profile.dispatch_seconds, 0, LONGEST
    yield "step_seconds", profile.step_seconds, 0, LONGEST
    yield "overlap", profile.overlap, 0, 1
    yield "contention", profile.contention, 1, 100
    yield "error", profile.error, 0, 10
    if profile.pair_bandwidth is not None:
        yield "pair_bandwidth", profile.pair_bandwidth, 1, FASTEST
    for what, shared in profile.shared.items():
        for ranks, times in shared.items():
            yield f"shared.{what}.{ranks}", times, 1e-3, 2 * AT_ONCE
    for first, second, rate in profile.pairs:
        yield f"pairs.{first}-{second}", rate, 1, FASTEST
    for level, curves in (("inside", profile.inside), ("between", profile.between)):
        for kind, curve in curves.items():
            yield f"{level}.{kind}.bytes_per_second", curve.bytes_per_second, 1, FASTEST
            for name in ("alpha_seconds", "hop_seconds", "root_seconds"):
                yield f"{level}.{kind}.{name}", getattr(curve, name), 0, LONGEST


def written_profile(profile: Profile) -> str:
    """A profile as JSON, which `read_profile` reads."""
    return json.dumps(_PROFILE.dump_python(profile, mode="json"), indent=1) + "\n"


def shipped_profiles() -> dict[str, Profile]:
    """The profiles that come with Tessera, by name."""
    folder = resources.files("tessera.plan") / "profiles"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    profiles = (_PROFILE.validate_json(file.read_bytes()) for file in files)
    return {profile.name: profile for profile in profiles}
