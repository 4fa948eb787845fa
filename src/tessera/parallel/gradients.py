"""Gradients across the mesh: every sum exactly once, and the exact global norm.

A parameter's gradient is summed over every axis that cuts the activation it acts on and does not cut the parameter
(`ParameterSpec.summed_axes`). Most sums happen inside the products; what is left (norms and biases under sequence
parallelism, positions, replicas over depth) travels in one all-reduce for each set of axes, all parameters together.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tessera.collectives import all_reduce, start_all_reduce
from tessera.mesh import AXES, Mesh
from tessera.nn.parameter import named_specs, to_local


@torch.no_grad()
def sum_replicated_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Complete the gradients of parameters smaller than their activation's cut. Call once a step, before the norm."""
    buckets: dict[tuple[tuple[str, ...], torch.dtype], list[Tensor]] = {}
    for _, parameter, spec in named_specs(model):
        axes = mesh.present(spec.summed_axes)
        if axes and parameter.grad is not None:
            buckets.setdefault((axes, parameter.dtype), []).append(to_local(parameter.grad))
    travelling = [
        (grads, start_all_reduce(torch.cat([g.reshape(-1) for g in grads]), mesh.group(axes)))
        for (axes, _), grads in sorted(buckets.items(), key=lambda item: (item[0][0], str(item[0][1])))
    ]
    for grads, pending in travelling:
        parts = pending.wait().split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])


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
            wide = torch.float64 if len(spec.shape) == 1 else None
            counted.append(torch.linalg.vector_norm(to_local(parameter.grad), dim=-1, dtype=wide).reshape(-1))
    squares = torch.cat(counted).double().square().sum() if counted else torch.zeros((), dtype=torch.float64)
    squares = squares.to(mesh.device)
    numbers = torch.stack([squares, *(rider.to(squares) for rider in riders)])
    total = all_reduce(numbers, mesh.group(AXES))
    return total[0].sqrt(), *total[1:]


def first_copy(mesh: Mesh, cut_axes: Iterable[str]) -> bool:
    """Whether this rank is the first of those that hold the same part of something cut over `cut_axes`."""
    cut = set(cut_axes)
    return all(mesh.coordinates[axis] == 0 for axis in AXES if axis not in cut)


@torch.no_grad()
def clip_gradients(model: nn.Module, norm: float, max_norm: float) -> None:
    """Scale every gradient by max_norm / norm when that is below 1 (torch.nn.utils.clip_grad_norm_'s formula)."""
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        grads = [to_local(p.grad) for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, scale)
