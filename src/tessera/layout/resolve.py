"""From the tensor axes and switches that are asked for to the layouts of a model; UserError where they do not fit."""

from collections.abc import Mapping

import torch

from tessera.core.axes import DATA_AXES, SEQUENCE_AXES
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.layout.context import Context
from tessera.layout.parallel import Parallel
from tessera.layout.streams import attention_layout, joins_rows, residual_layout
from tessera.sizes.context import WHOLE, ContextParallel
from tessera.sizes.remedies import check_sizes
from tessera.sizes.rules import TensorParallel
from tessera.sizes.schedule import LOOPS, Schedule


def parallel_of(
    tensor: TensorParallel,
    mesh: Mesh,
    batch: int,
    dimensions: Mapping[str, int],
    schedule: Schedule | None = None,
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    *,
    context: ContextParallel = WHOLE,
) -> Parallel:
    """The layouts of `tensor` on `mesh` for micro-batches of `batch` sequences: the one builder of `Parallel`.

    `dimensions` are those of the model, as `sizes.remedies.check_sizes` takes them.
    `schedule` where auto has chosen one; `compute` is `dtype` unless given. Where the mesh has data axes, FSDP2 serves
    `row` (and depth, if weights are cut over it) beside `shard`: only loops move weights along row themselves. Sequence
    axes are data axes to weights. `context`: how attention reaches its keys along them.
    """
    schedule = schedule or tensor.as_schedule
    weights_over: tuple[str, ...] = ("depth", "row") if tensor.depth_weights == "shard" else ("row",)
    fsdp = None
    if mesh.size((*DATA_AXES, *SEQUENCE_AXES)) > 1:
        loop = schedule.name in LOOPS
        stored = ("shard", *SEQUENCE_AXES)
        fsdp, weights_over = (*stored, *(() if loop else weights_over)), weights_over if loop else ()
    return Parallel(
        mesh,
        residual_layout(tensor.sequence_parallel, schedule.name),
        dtype,
        compute or dtype,
        schedule,
        attention_layout(mesh.sizes, batch, dimensions),
        weights_over,
        fsdp=fsdp,
        context=Context(context.transport, context.chunks, joins_rows(mesh.sizes, batch, dimensions)),
    )


def check_layout(
    tensor: TensorParallel, data_sizes: Mapping[str, int], dimensions: Mapping[str, int], batch: int
) -> None:
    """Raise UserError, with the nearest sizes that fit, when a layout does not fit a model or FSDP2.

    `data_sizes` are those of the data and sequence axes; `dimensions` and `batch` as `sizes.remedies.check_sizes`
    takes them.
    """
    beside_data = {axis: size for axis, size in data_sizes.items() if size > 1}
    if beside_data:
        _check_switches_beside_data_axes(tensor, beside_data)
    check_sizes(tensor, dimensions, batch)
    if tensor.schedule in LOOPS and tensor.axes["inner"] > 1 and beside_data:
        reason = "beside data axes FSDP2 takes weights cut over two other axes, here they are inner, row and col"
        hint = "tensor_parallel_schedule: gather, or no data axes"
        raise UserError("tensor_parallel_schedule", tensor.schedule, reason, hint)


def _check_switches_beside_data_axes(tensor: TensorParallel, data_sizes: Mapping[str, int]) -> None:
    """Raise UserError for switches of weights that FSDP2 moves; before check_sizes, which knows of no data axes."""
    switches = {
        "prefetch": "gathers the weights, and has fsdp_config.forward_prefetch for it",
        "defer": "sums the gradients of weights, once a step",
    }
    off = [field for field in switches if not getattr(tensor, field)]
    if not off:
        return
    data = ", ".join(f"{axis} {size}" for axis, size in data_sizes.items())
    reason = f"beside data axes (here {data}) FSDP2 {switches[off[0]]}"
    hint = ", ".join(f"tensor_parallel_{field}: true" for field in off)
    if tensor.schedule in LOOPS:  # which moves weights along row itself
        reason = f"{tensor.schedule} overlaps its panels by itself"
    elif tensor.slices == 1:
        hint += ", or no data axes"
    raise UserError(f"tensor_parallel_{off[0]}", "false", reason, hint)
