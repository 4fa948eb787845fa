"""How long collectives take, by kind, size and group: inside a machine and between machines, as training calls them.

The groups along an axis all communicate at once, as they do in a step.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tessera.core.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    reduce_scatter,
    start_all_reduce,
    start_broadcast,
    start_exchange,
    start_reduce_to,
    start_shift,
)
from tessera.core.mesh import Group, Mesh
from tessera.measure.timing import Timed, Timer
from tessera.plan.fitted import Fitted, Moved, fitted_curve
from tessera.plan.machine import Curve

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "broadcast", "reduce", "shift", "all_to_all", "receive")
"""As plan/traffic.py names them; a rank receives along a ring while it sends."""
CPU_BLOCKS = (2**12, 2**16, 2**19, 2**22)
GPU_BLOCKS = (2**14, 2**18, 2**22, 2**25, 2**27)
"""Bytes of a rank's part of what moves."""


@dataclass(frozen=True)
class Call:
    """One kind of collective that was timed: at a level, among `steps` ranks or machines; bytes a rank receives."""

    level: str
    kind: str
    steps: int
    received: float
    timed: Timed


@dataclass(frozen=True)
class Overlap:
    """Of the time of a collective beside a product: the share that is hidden, and by what the product is slower."""

    hidden: float
    contention: float


@dataclass(frozen=True)
class Linked:
    """All that was timed; its curves by level and kind; `shared`: by ranks at once, beside all of them."""

    calls: list[Call] = field(default_factory=list)
    curves: dict[str, dict[str, Fitted[Curve]]] = field(default_factory=dict)
    overlap: Overlap | None = None
    shared: dict[int, float] = field(default_factory=dict)


def measured_links(timer: Timer, blocks: Sequence[int], here: int, product: Callable[[], Tensor]) -> Linked:
    """Measure on all ranks of the timer's mesh, `here` of which are on each machine; `product` is what may overlap."""
    mesh, calls = timer.mesh, list[Call]()
    groups = list(_groups(mesh, here))
    if not groups:
        return Linked()
    for level, group in groups:
        for kind in KINDS:
            made = [_call(kind, group, block // 4, mesh.device) for block in blocks]
            for (_, received), timed in zip(made, timer.each([call for call, _ in made]), strict=True):
                calls.append(Call(level, kind, group.size, received, timed))
    curves: dict[str, dict[str, Fitted[Curve]]] = {}
    for level in dict.fromkeys(level for level, _ in groups):
        for kind in KINDS:
            own = [call for call in calls if (call.level, call.kind) == (level, kind)]
            moved = [Moved(call.received, call.steps, call.timed.seconds) for call in own]
            curves.setdefault(level, {})[kind] = fitted_curve(moved)
    inside = [group for level, group in groups if level == "inside"]
    shared = {} if mesh.device.type == "cuda" else _shared(timer, inside, blocks[len(blocks) // 2])
    return Linked(calls, curves, _overlap(timer, groups[-1][1], max(blocks), product), shared)


def _groups(mesh: Mesh, here: int) -> Iterator[tuple[str, Group]]:
    """This rank's groups: of 2, 4, 8 … and all ranks of its machine, and of one rank of each machine."""
    sizes = sorted({2**power for power in range(1, 20) if 2**power <= here and here % 2**power == 0} | ({here} - {1}))
    for size in sizes:
        yield "inside", _along(mesh, "col", size)
    if mesh.world > here:
        yield "between", _along(mesh, "shard", mesh.world // here)


def _along(mesh: Mesh, axis: str, size: int) -> Group:
    """This rank's group along an axis of so many: `col` of neighbours, `shard` of ranks as far apart as can be."""
    other = "shard" if axis == "col" else "col"
    group = Mesh({axis: size, other: mesh.world // size}, mesh.device).group([axis])
    assert group is not None
    return group


def _call(kind: str, group: Group, elements: int, device: torch.device) -> tuple[Callable[[], object], float]:
    """A call of this kind that moves blocks of so many elements, and the bytes that it brings to a rank."""
    n, own = group.size, group.rank
    block, whole = torch.zeros(elements, device=device), torch.zeros(n * elements, device=device)
    size, equal = block.nbytes, [elements] * n
    roots = [0]

    def root() -> int:
        roots[0] = (roots[0] + 1) % n  # each in turn, as the panels of a loop have them
        return roots[0]

    def exchange() -> None:
        sends, receives = start_exchange([(block, (own + 1) % n)], [(torch.empty_like(block), (own - 1) % n)], group)
        for pending in (*sends, *receives):
            pending.wait()

    calls: dict[str, tuple[Callable[[], object], float]] = {
        "all_gather": (lambda: all_gather(block, 0, group), (n - 1) * size),
        "reduce_scatter": (lambda: reduce_scatter(whole, 0, group), (n - 1) * size),
        "all_reduce": (lambda: all_reduce(whole, group), 2 * (n - 1) * size),
        "broadcast": (lambda: start_broadcast(block, root(), group).wait(), size * (n - 1) / n),
        "reduce": (lambda: start_reduce_to(block, root(), group).wait(), size * (n - 1) / n),
        "shift": (lambda: start_shift(block, 1, group).wait(), size),
        "all_to_all": (lambda: all_to_all(whole, equal, equal, group), (n - 1) * size),
        "receive": (exchange, size),
    }
    return calls[kind]


def _shared(timer: Timer, groups: Sequence[Group], block: int) -> dict[int, float]:
    """What collectives of the first few ranks take while the others wait, beside what they take with all at it."""
    mesh, found = timer.mesh, {timer.mesh.world: 1.0}
    for group in groups:
        if group.size < mesh.world:
            call, _ = _call("all_gather", group, block // 4, mesh.device)
            alone, beside = timer.each([call if mesh.rank < group.size else None, call])
            found[group.size] = alone.seconds / beside.seconds
    return found


def _overlap(timer: Timer, group: Group, block: int, product: Callable[[], Tensor]) -> Overlap:
    """An all-reduce beside products that take longer than it does by themselves."""
    whole = torch.zeros(group.size * block // 4, device=timer.mesh.device)
    collective = timer.time(lambda: all_reduce(whole, group)).seconds
    once = timer.time(product).seconds
    repeats = max(1, round(1.5 * collective / once))

    def compute() -> None:
        for _ in range(repeats):
            product()

    alone = timer.time(compute).seconds
    inside, after = timer.beside(lambda: start_all_reduce(whole, group).wait, compute)
    return Overlap(min(1.0, max(0.0, 1 - after / collective)), max(1.0, inside / alone))


def ranks_here(mesh: Mesh) -> int:
    """How many ranks are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world))
