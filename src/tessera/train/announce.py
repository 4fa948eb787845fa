"""What a run says of itself before its first step: the axes of its mesh, what moves along them, and its batch."""

import os
from collections.abc import Mapping

from tessera.config.schema import TrainConfig
from tessera.core import device as devices
from tessera.core.axes import AXES, DATA_AXES, MODEL_AXES, SEQUENCE_AXES
from tessera.core.mesh import Mesh
from tessera.core.text import counted, mib, table_lines
from tessera.layout.parallel import Parallel
from tessera.models.config import ModelConfig
from tessera.plan.traffic import step_transfers
from tessera.train.links import Axes, groups_that_leave, leaving, traffic
from tessera.train.settings import context_line, step_shape

_CUTS = {
    "replicate": "rows of the batch",
    "shard": "rows of the batch, parameters",
    "ring": "tokens of each sequence, parameters",
    "ulysses": "tokens of each sequence, in attention heads; parameters",
    "inner": "features of the residual stream",
    "depth": "tokens",
    "row": "tokens, parameters",
    "col": "heads, ffn features, vocabulary",
}


def mesh_lines(config: TrainConfig, model: ModelConfig, parallel: Parallel) -> list[str]:
    """The axes above size 1, outermost first as ranks are numbered; what a rank receives along them; a step's rows."""
    mesh, here = parallel.mesh, int(os.environ.get("LOCAL_WORLD_SIZE", parallel.mesh.world))
    lines = [f"mesh: {mesh} on {devices.describe(mesh.device)}"]
    if mesh.world > 1:
        present = [axis for axis in mesh.numbering if mesh.sizes[axis] > 1]
        rows = [(axis, str(mesh.sizes[axis]), _links((axis,), mesh, here), _CUTS[axis]) for axis in present]
        lines += table_lines([("axis", "ranks", "links", "cuts"), *rows])
        lines += _traffic(traffic(step_transfers(model, step_shape(config, parallel), parallel)), mesh, here)
    lines += filter(None, [context_line(config, model, here)])
    data, micro, times = mesh.size(DATA_AXES), config.micro_batch_size, config.gradient_accumulation_steps
    tensor, context = mesh.size(MODEL_AXES), mesh.size(SEQUENCE_AXES)
    shared = f"{tensor} (tensor)" if context == 1 else f"({tensor} (tensor) × {context} (context))"
    lines.append(
        f"effective batch: {micro} (micro) × {times} (accumulation) × {mesh.world} (ranks) / {shared} "
        f"= {counted(micro * times * data, 'row')}"
    )
    return lines


def _links(axes: Axes, mesh: Mesh, here: int) -> str:
    return "between machines" if groups_that_leave(axes, mesh, here) else "in a machine"


def _traffic(received: Mapping[Axes, int], mesh: Mesh, here: int) -> list[str]:
    """The busiest axes first; on several machines what leaves one, and how much that is in the usual order."""
    rows = [("·".join(axes), _links(axes, mesh, here), mib(count)) for axes, count in received.items()]
    lines = table_lines([("along", "links", "MiB received a step"), *rows])
    if here < mesh.world:
        told = f"  a machine sends {mib(leaving(received, mesh, here))} MiB a step to others"
        if mesh.numbering != AXES:
            usual = leaving(received, Mesh(mesh.sizes, "meta", rank=0), here)
            order = " · ".join(axis for axis in mesh.numbering if mesh.sizes[axis] > 1)
            told += f", its ranks numbered as {order}; in the usual order {mib(usual)}"
        lines.append(told)
        busiest, most = next(iter(received.items()))
        inside = [count for axes, count in received.items() if not groups_that_leave(axes, mesh, here)]
        if inside and most > inside[0] > 0:
            busy = "·".join(busiest)
            lines.append(
                f"  most bytes travel between machines, along {busy}: fewer ranks there would keep them inside"
            )
    return lines
