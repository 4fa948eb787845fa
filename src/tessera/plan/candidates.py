"""The candidates of a search: every mesh and micro-batch that fits a model and a batch, as arrays, and their costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tessera.core.axes import DATA_AXES, MODEL_AXES
from tessera.core.errors import UserError
from tessera.models.config import ModelConfig
from tessera.plan.choice import Layout, Training
from tessera.plan.fit import most_that_fits
from tessera.plan.machine import Cluster
from tessera.sizes.context import ContextParallel, Surroundings, fitted
from tessera.sizes.numbers import divisors_of
from tessera.sizes.rules import every_rank_has_a_row

CUT = ("replicate", "shard", "context", "inner", "depth", "row", "col")
NEVER = 2**62
"""The bytes of a candidate that is another one in other words."""
SLOWER = NEVER - 1
"""The bytes of one that was left out, for it takes longer than another one that fits."""
Numbers = NDArray[np.int64]


class Switches(NamedTuple):
    """What every candidate of a group shares, beside the rules that its first one shows."""

    recompute: str
    reshard: bool
    schedule: str = "gather"
    slices: int = 1
    offload: bool = False
    tiles: int | None = 1
    offload_params: bool = False
    sync_each_batch: bool = False


@dataclass(frozen=True)
class Found:
    """Candidates and their costs: of each its sizes by axis, micro-batch, switches, bytes at the peak, seconds.

    `buffers`: bytes of the communication library beside the peak (plan/buffers.py). `seconds` are infinite where a
    candidate was not timed, for it does not fit or another one is surely faster.
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

    def at(self, places: Numbers, switches: Switches) -> "Found":
        """The candidates at `places` with these switches, whose costs are not known but for the buffers."""
        sizes = {axis: n[places] for axis, n in self.sizes.items()}
        return untimed(sizes, self.micro_batch[places], switches, self.training, self.buffers[places])

    def only(self, kept: NDArray[np.bool_]) -> "Found":
        """The candidates that are `kept`."""
        sizes = {axis: n[kept] for axis, n in self.sizes.items()}
        names = ("micro_batch", "which", "peak", "buffers", "seconds")
        return replace(self, sizes=sizes, **{name: getattr(self, name)[kept] for name in names})

    def layout(self, place: int) -> Layout:
        """The candidate at `place`."""
        sizes = {axis: int(n[place]) for axis, n in self.sizes.items() if n[place] > 1}
        batch, switches = int(self.micro_batch[place]), self.switches[int(self.which[place])]
        data = int(np.prod([self.sizes[axis][place] for axis in DATA_AXES]))
        return Layout(sizes, batch, self.training.global_batch // (data * batch), **switches._asdict())


def untimed(
    sizes: dict[str, Numbers], batch: Numbers, switches: Switches, training: Training, buffers: Numbers | None = None
) -> Found:
    """Candidates with the same switches, whose costs are not known yet."""
    count = len(batch)
    nothing = np.zeros(count, np.int64)
    buffers = nothing if buffers is None else buffers
    return Found(sizes, batch, [switches], nothing, nothing.copy(), buffers, np.full(count, np.inf), training)


def joined(parts: Sequence[Found], training: Training) -> Found:
    """All candidates of `parts`, in order."""
    switches: list[Switches] = []
    which = []
    for part in parts:
        which.append(part.which + len(switches))
        switches += part.switches
    sizes = {axis: np.concatenate([part.sizes[axis] for part in parts]) for axis in parts[0].sizes}
    names = ("micro_batch", "peak", "buffers", "seconds")
    batch, peak, buffers, seconds = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
    return Found(sizes, batch, switches, np.concatenate(which), peak, buffers, seconds, training)


def meshes(model: ModelConfig, devices: int, training: Training) -> tuple[dict[str, Numbers], Numbers]:
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
    by_heads, joined = attention_of(model, axes, batch)
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


def attention_of(
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


def buildable(model: ModelConfig, devices: int, training: Training) -> bool:
    """Whether any layout of so many devices divides the model and the batch."""
    return len(meshes(model, devices, training)[1]) > 0
