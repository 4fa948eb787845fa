"""What a run says of itself before its first step: the axes of its mesh, what moves along them, and its batch."""

import math
import os
from typing import TYPE_CHECKING

from tessera import device as devices
from tessera.mesh import AXES, DATA_AXES, Mesh
from tessera.models.config import ModelConfig
from tessera.nn.parameter import Parallel
from tessera.plan.words import step_rows, totals
from tessera.train.preflight import step_shape

if TYPE_CHECKING:
    from tessera.config.schema import TrainConfig

_CUTS = {
    "replicate": "rows of the batch",
    "shard": "rows of the batch, parameters",
    "inner": "features of the residual stream",
    "depth": "tokens",
    "row": "tokens, parameters",
    "col": "heads, ffn features, vocabulary",
}


def mesh_lines(config: "TrainConfig", model: ModelConfig, parallel: Parallel) -> list[str]:
    """The axes above size 1, outermost first; what a rank receives along them in a step; the rows of a step."""
    mesh, here = parallel.mesh, int(os.environ.get("LOCAL_WORLD_SIZE", parallel.mesh.world))
    lines = [f"mesh: {mesh} on {devices.describe(mesh.device)}"]
    if mesh.world > 1:
        rows = [(axis, str(mesh.sizes[axis]), _links((axis,), mesh, here), _CUTS[axis]) for axis in mesh.present(AXES)]
        lines += _table([("axis", "ranks", "links", "cuts"), *rows])
        lines += _traffic(config, model, parallel, here)
    data, micro, times = mesh.size(DATA_AXES), config.micro_batch_size, config.gradient_accumulation_steps
    tensor = mesh.world // data
    lines.append(
        f"effective batch: {micro} (micro) × {times} (accumulation) × {mesh.world} (ranks) / {tensor} (tensor) "
        f"= {micro * times * data} rows"
    )
    return lines


def _links(axes: tuple[str, ...], mesh: Mesh, here: int) -> str:
    """Whether the ranks along `axes` are all on one machine, of which each has `here` ranks."""
    outermost = min(AXES.index(axis) for axis in axes)
    span = math.prod(mesh.sizes[axis] for axis in AXES[outermost:])
    return "in a machine" if here % span == 0 else "between machines"


def _traffic(config: "TrainConfig", model: ModelConfig, parallel: Parallel, here: int) -> list[str]:
    """Bytes along each group of axes in a step of full-length rows, by formula, the busiest first."""
    mesh, shape = parallel.mesh, step_shape(config, parallel)
    received: dict[str, int] = {}
    for (axis, _), (_, count) in totals(step_rows(model, shape, parallel)).items():
        received[axis] = received.get(axis, 0) + count
    busiest = sorted(received.items(), key=lambda item: -item[1])
    links = {axis: _links(tuple(axis.split("·")), mesh, here) for axis in received}
    rows = [(axis, links[axis], f"{count / 2**20:,.1f}") for axis, count in busiest]
    lines = _table([("along", "links", "MiB received a step"), *rows])
    crossing, inside = (
        max((n for axis, n in received.items() if links[axis] == where), default=0)
        for where in ("between machines", "in a machine")
    )
    if crossing > inside > 0:
        busy = busiest[0][0]
        lines.append(f"  most bytes travel between machines, along {busy}: fewer ranks there would keep them inside")
    return lines


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "   ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
