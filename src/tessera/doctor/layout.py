"""Where a run's mesh lies on the links: which axis crosses which, and whom each rank talks to along each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tessera.config.schema import TrainConfig
from tessera.core.axes import MODEL_AXES
from tessera.core.driver import NVLINK
from tessera.core.mesh import Mesh
from tessera.core.text import counted, mib
from tessera.doctor.finding import Finding, Table
from tessera.doctor.links import NETWORK, Links, way
from tessera.doctor.pairs import Measured
from tessera.layout.parallel import Parallel
from tessera.models.config import ModelConfig
from tessera.plan.traffic import step_transfers
from tessera.train.links import Axes, traffic
from tessera.train.settings import step_shape

SHOWN = 16
"""Ranks in the table of neighbours."""
BETWEEN = "between machines"


@dataclass(frozen=True)
class Along:
    """One axis, or several that are one group: its ranks, the kinds of links between neighbours, with how many each
    machine has of them, the slowest that was measured (bytes a second), the bytes that a rank receives in a step."""

    axes: Axes
    ranks: int
    links: dict[str, int]
    slowest: float | None
    received: int


@dataclass(frozen=True)
class Placed:
    """A config on its devices: `here` ranks on each machine."""

    config: TrainConfig
    model: ModelConfig
    parallel: Parallel
    here: int

    @property
    def mesh(self) -> Mesh:
        return self.parallel.mesh

    @property
    def machines(self) -> int:
        return -(-self.mesh.world // self.here)


def ring(mesh: Mesh, rank: int, axes: Axes) -> tuple[int, list[int], int]:
    """The rank from which this one receives along the ring of `axes`, the ranks of its group, the one it sends to."""
    members = mesh.at(rank).members(axes)
    place = members.index(rank)
    return members[place - 1], members, members[(place + 1) % len(members)]


def along_axes(placed: Placed, links: Links, measured: Measured | None) -> list[Along]:
    """Each axis above size 1, and each set of them that is one group; those with the most bytes first.

    Every machine counts as this one, whose `links` and `measured` pairs are known.
    """
    mesh, here = placed.mesh, placed.here
    shape = step_shape(placed.config, placed.parallel)
    received = traffic(step_transfers(placed.model, shape, placed.parallel))
    every: dict[Axes, int] = {(axis,): 0 for axis in mesh.numbering if mesh.sizes[axis] > 1}
    rates = _rates(measured, links, here)
    found = []
    for axes, count in sorted((every | received).items(), key=lambda item: -item[1]):
        kinds, slowest = Counter[str](), list[float]()
        for rank in range(min(here, mesh.world)):
            after = ring(mesh, rank, axes)[2]
            pair = (min(rank, after) % here, max(rank, after) % here)
            if after // here != rank // here:
                kinds[BETWEEN] += 1
                slowest += [rates[NETWORK]] if NETWORK in rates else []
            else:
                kinds[str(links[pair]) if pair in links else "in a machine"] += 1
                slowest += [rates[pair]] if pair in rates else []
        found.append(Along(axes, mesh.size(axes), dict(kinds), min(slowest, default=None), count))
    return found


def _rates(measured: Measured | None, links: Links, here: int) -> dict[tuple[int, int] | str, float]:
    """What was measured, by two ranks of a machine; of the network the slowest pair."""
    rates: dict[tuple[int, int] | str, float] = {}
    if measured is None:
        return rates
    for pair in measured.pairs:
        kind = way(pair, measured, links).kind
        if kind == NETWORK:
            rates[NETWORK] = min(pair.rate, rates.get(NETWORK, pair.rate))
        elif pair.second < here:
            rates[pair.first, pair.second] = pair.rate
    return rates


def axis_table(found: Sequence[Along]) -> Table:
    """The axes with their links."""
    rows = [["along", "ranks", "links to the next rank", "slowest GB/s", "MiB received a step"]]
    for one in found:
        kinds = ", ".join(kind if len(one.links) == 1 else f"{count} {kind}" for kind, count in one.links.items())
        rate = "–" if one.slowest is None else f"{one.slowest / 1e9:.3g}"
        rows.append(["·".join(one.axes), str(one.ranks), kinds, rate, mib(one.received)])
    return Table("which axis lies on which link, the busiest first", rows)


def axis_findings(found: Sequence[Along], placed: Placed, links: Links) -> list[Finding]:
    """Whether the busiest axes lie on the fastest links."""
    busy = [one for one in found if one.received]
    if not busy:
        return [Finding("mesh", "ok", "one process: nothing travels")]
    first, rest = busy[0], busy[1:]
    name = "·".join(first.axes)
    mesh = placed.mesh
    where = counted(placed.machines, "machine")
    told = [Finding("mesh", "ok", f"{mesh}, {counted(placed.here, 'rank')} on each of {where}")]
    inside = [one for one in rest if BETWEEN not in one.links]
    if BETWEEN in first.links and (inside or any(axis in MODEL_AXES for axis in first.axes)):
        mend = f"fewer ranks along {name}, so that they are at most the {placed.here} of a machine, keep them inside"
        text = f"most bytes, {mib(first.received)} MiB a step, travel between machines"
        told.append(Finding(f"along {name}", "slow", text, mend))
    elif links and not _on_nvlink(first):
        order = gpu_order(links, placed.here, _innermost(mesh))
        if order is not None:
            text = f"ranks along {name} exchange over PCIe, though NVLink joins {_innermost(mesh)} GPUs each"
            told.append(Finding(f"along {name}", "slow", text, f"CUDA_VISIBLE_DEVICES={','.join(map(str, order))}"))
        elif any(_on_nvlink(one) for one in rest):
            text = f"most bytes, {mib(first.received)} MiB a step, travel over PCIe, and fewer over NVLink"
            told.append(Finding(f"along {name}", "slow", text, f"fewer ranks along {name}, as many as NVLink joins"))
    return told


def _on_nvlink(one: Along) -> bool:
    return all(kind.startswith(NVLINK) for kind in one.links)


def _innermost(mesh: Mesh) -> int:
    """The size of the axis whose ranks are numbered one after another."""
    return next((mesh.sizes[axis] for axis in reversed(mesh.numbering) if mesh.sizes[axis] > 1), 1)


def gpu_order(links: Links, here: int, size: int) -> list[int] | None:
    """An order of the first `here` GPUs in which each `size` that follow one another are joined by NVLink.

    None where there is none, or they are so already. Greedy: the pairs and fours of NVLink bridges do not overlap.
    """
    joined = {frozenset(pair) for pair, link in links.items() if link.kind == NVLINK}
    left, order = list(range(here)), list[int]()
    while left:
        group: list[int] = []
        for gpu in left:
            if len(group) < size and all(frozenset((gpu, other)) in joined for other in group):
                group.append(gpu)
        if len(group) < min(size, len(left)) or size < 2:
            return None
        order += group
        left = [gpu for gpu in left if gpu not in group]
    return order if order != sorted(order) else None


def rank_table(placed: Placed) -> Table:
    """Of each rank its device, and along each axis its group, from whom it receives, to whom it sends around a ring."""
    mesh = placed.mesh
    axes = [axis for axis in mesh.numbering if mesh.sizes[axis] > 1]
    rows = [["rank", "machine", "device", *(f"{axis}: group (from → to)" for axis in axes)]]
    device = "GPU" if mesh.device.type == "cuda" else "cpu"
    for rank in range(min(SHOWN, mesh.world)):
        machine, place = divmod(rank, placed.here)
        cells = []
        for axis in axes:
            before, members, after = ring(mesh, rank, (axis,))
            cells.append(f"{_ranks(members)} ({before} → {after})")
        rows.append([str(rank), str(machine), f"{device} {place}" if device == "GPU" else device, *cells])
    more = mesh.world - SHOWN
    return Table("whom each rank talks to" + (f" (and {more:,} ranks more: --json)" if more > 0 else ""), rows)


def _ranks(members: Sequence[int]) -> str:
    if len(members) > 4:
        return f"{members[0]},{members[1]},…,{members[-1]}"
    return ",".join(map(str, members))
