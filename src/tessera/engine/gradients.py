"""Gradients across the mesh: every sum exactly once, and the exact global norm.

A parameter's gradient is summed over every axis that cuts the activation it acts on and does not cut the parameter
(`ParameterSpec.summed_axes`). Most sums happen inside the products; what is left (norms and biases under sequence
parallelism, positions, replicas over depth) is summed at the end of a step: for each set of axes, large gradients each
in an all-reduce of its own, all others together in one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tessera.core.axes import AXES
from tessera.core.collectives import all_reduce, start_all_reduce
from tessera.core.mesh import Mesh
from tessera.nn.parameter import named_specs, to_local

LARGE = 2**20
"""Bytes on a rank from which a gradient travels by itself: put into a bucket it would be held twice and copied twice,
while a call more costs nothing beside a MiB on its way."""


@torch.no_grad()
def sum_replicated_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Complete the gradients of parameters smaller than their activation's cut. Call once a step, before the norm."""
    by_axes: dict[tuple[tuple[str, ...], torch.dtype], list[Tensor]] = {}
    for _, parameter, spec in named_specs(model):
        axes = mesh.present(spec.summed_axes)
        if axes and parameter.grad is not None and to_local(parameter.grad).numel():
            by_axes.setdefault((axes, parameter.dtype), []).append(to_local(parameter.grad))
    travelling = [
        (grads, start_all_reduce(_flat(grads).to(mesh.device), mesh.group(axes)))  # offloaded ones come back for it
        for (axes, _), every in sorted(by_axes.items(), key=lambda item: (item[0][0], str(item[0][1])))
        for grads in _together(every)
    ]
    for grads, pending in travelling:
        parts = pending.wait().split([g.numel() for g in grads])
        in_place = len(grads) == 1 and grads[0].is_contiguous() and grads[0].device == parts[0].device
        if not in_place:
            torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])


def _together(grads: list[Tensor]) -> list[list[Tensor]]:
    """The gradients of one set of axes as they travel: the large ones each alone, then the others in one bucket.

    All ranks of the group decide alike: along the axes that it spans their shards are copies, so of one size.
    """
    small = [g for g in grads if g.nbytes < LARGE]
    return [[g] for g in grads if g.nbytes >= LARGE] + ([small] if small else [])


def _flat(grads: list[Tensor]) -> Tensor:
    """What is handed over for these: of one alone a view, if it is contiguous, so that it is summed in place."""
    return grads[0].reshape(-1) if len(grads) == 1 else torch.cat([g.reshape(-1) for g in grads])


@torch.no_grad()
def gradient_norm(model: nn.Module, mesh: Mesh, *riders: Tensor) -> tuple[Tensor, ...]:
    """The 2-norm of the whole model's gradient, every element counted once, and the sum over the ranks of each rider.

    All float64 scalars, after one all-reduce of a few numbers: what else ranks must sum or agree on once a step (the
    loss, a request to stop) rides along without a collective of its own.
    """
    counted = []
    for _, parameter, spec in named_specs(model):
        if parameter.grad is not None and first_copy(mesh, spec.cut_axes):
            # row by row: one float32 sum over millions of elements is off by 1e-4, and differently on each mesh;
            # a vector is one row, as long as the vocabulary when it is the head's bias
            narrow = torch.promote_types(parameter.dtype, torch.float32)
            wide = torch.float64 if len(spec.shape) == 1 else narrow
            counted.append(torch.linalg.vector_norm(to_local(parameter.grad), dim=-1, dtype=wide).reshape(-1))
    squares = torch.cat(counted).double().square().sum() if counted else torch.zeros((), dtype=torch.float64)
    squares = squares.to(mesh.device)
    numbers = torch.stack([squares, *(rider.to(squares) for rider in riders)])
    total = all_reduce(numbers, mesh.group(AXES))
    return total[0].sqrt(), *total[1:]


def first_copy(mesh: Mesh, cut_axes: Iterable[str]) -> bool:
    """Whether this rank is the first of those that hold the same part of something cut over `cut_axes`.

    Stages of a pipeline hold different layers: none is the copy of another.
    """
    cut = {"pp", *cut_axes}
    return all(mesh.coordinates[axis] == 0 for axis in AXES if axis not in cut)


@torch.no_grad()
def clip_gradients(model: nn.Module, norm: float, max_norm: float) -> None:
    """Scale every gradient by max_norm / norm when that is below 1 (torch.nn.utils.clip_grad_norm_'s formula)."""
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        grads = [to_local(p.grad) for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, scale)
