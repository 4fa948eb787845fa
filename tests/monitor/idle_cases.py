"""Runs on every rank of a pool: times in collectives, made by hand, told apart by what the ranks tell one another."""

from distributed.model_cases import LLAMA, batches, build, share
from support.mesh import shared_mesh
from tessera.core.axes import AXES
from tessera.core.collectives import Recorder
from tessera.core.recorder import GATHER_WAIT, SUM_WAIT
from tessera.engine.fsdp import mark_waits
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.monitor.idle import Together
from tessera.monitor.timeline import Timeline, Waits


def split_of(
    sizes: dict[str, int], machines: list[str], waits: list[list[Waits]]
) -> tuple[float, dict[tuple[str, ...], float], list[tuple[str, ...]]]:
    """What this rank is told of its own `waits`; the axes of the collectives that it took."""
    mesh = shared_mesh(sizes)
    for axes in sorted({one.axes for own in waits for one in own}):
        mesh.group(axes)
    mesh.group(AXES)
    with Recorder() as recorder:
        idle, communication = Together(mesh, machines).split(waits[mesh.rank])
    return idle, communication, [record.axes for record in recorder.records]


class Ahead:
    """A clock of a device that goes on while the host issues: it shows how often it was asked."""

    blocks = False

    def __init__(self) -> None:
        self.now_ = 0

    def mark(self) -> int:
        self.now_ += 1
        return self.now_

    def start(self) -> None:
        pass

    def now(self) -> float:
        return float(self.now_)

    def seconds(self, mark: int) -> float:
        return float(mark)


def waits_of_fsdp() -> tuple[int, list[int], float]:
    """Layers of a decoder in FSDP2's hands whose waits are marked as on a GPU; the marks of each wait in a step; the
    seconds of communication along shard."""
    mesh = shared_mesh({"shard": 2})
    model = build(LLAMA, mesh, fsdp=("shard",))
    for unit in [*model.layers.values(), model]:
        mark_waits(unit, ("shard",))
    clock = Ahead()
    step = Step(model, build_optimizer(model, "sgd", (0.9, 0.95), 1e-6, 0.0))
    with Recorder(clock=clock) as recorder:
        step([share(batch, mesh) for batch in batches(LLAMA, 2, 0)], 0, 1e-2)
    timeline = Timeline(clock)
    timeline.add(recorder.spans)
    timeline.settle()
    _, communication = Together(mesh, ["here"] * 2).split(timeline.waits)
    return (
        len(model.layers),
        [len(s.marks) for s in recorder.spans if s.kind in (GATHER_WAIT, SUM_WAIT)],
        communication[("shard",)],
    )
