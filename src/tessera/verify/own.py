"""A rank's own part of a sum over mesh axes, computed by one process: what is left when the sum is not taken.

of an activation or its gradient    the product with the weights that this rank holds along the axis alone
of a parameter's gradient           that of the loss on the sequences that this rank holds along the axes
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.data.samples import IGNORED
from tessera.engine.step import Step
from tessera.layout.spec import ParameterSpec, local_slice
from tessera.models.decoder import Decoder
from tessera.nn.parameter import named_specs
from tessera.verify.trace import Point, Trace, behind


def of_point(point: Point, axis: str, model: Decoder, reference: Decoder, trace: Trace) -> Tensor | None:
    """The whole tensor at `point` from the part of its operation's weights that this rank has along `axis`.

    `trace` is that of `reference`, the model in one process, and `model` the layout's. None for operations whose sums
    are not of this kind: norms, the loss, and what attention or an activation comes after.
    """
    operation = behind(point, model)
    if point.backward:
        name = operation.last.rpartition(".")[0] if point.output else operation.last
    else:
        name = point.name if point.output else ""
    arguments = trace.arguments.get((point.micro_batch, name))
    if arguments is None:
        return None
    module = reference.get_submodule(name)
    x = arguments[0].detach()
    with _masked(module, {n.removeprefix(f"{name}."): s for n, _, s in named_specs(model)}, axis, model.parallel.mesh):
        if not point.backward:
            with torch.no_grad():
                return module(x, *arguments[1:])
        dy = trace.values[Point(point.micro_batch, True, operation.last, True)]
        x.requires_grad_()
        return torch.autograd.grad(module(x, *arguments[1:]), x, dy)[0]


@contextmanager
def _masked(module: nn.Module, specs: dict[str, ParameterSpec], axis: str, mesh: Mesh) -> Iterator[None]:
    """Zero, for a while, everything in a module's parameters that other places of `axis` hold."""
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            for dim, axes in enumerate(specs[name].cuts):
                if axis in axes:
                    kept.setdefault(name, parameter.detach().clone())
                    own = _own_indices(parameter.shape[dim], axes, axis, mesh)
                    shape = [1] * parameter.ndim
                    shape[dim] = -1
                    parameter.mul_(own.view(shape).to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                module.get_parameter(name).copy_(value)


def _own_indices(n: int, axes: tuple[str, ...], axis: str, mesh: Mesh) -> Tensor:
    """Which of n elements cut over `axes` lie at this rank's place of `axis`, wherever along the others."""
    own = torch.zeros(n, dtype=torch.bool)
    for rank in range(mesh.world):
        other = mesh.at(rank)
        if other.coordinates[axis] == mesh.coordinates[axis]:
            own[local_slice(n, axes, other)] = True
    return own


def of_parameter(
    name: str, axes: Sequence[str], tokens: Sequence[str], mesh: Mesh, reference: Step, batches: Sequence[MicroBatch]
) -> Tensor:
    """The whole gradient of a parameter from the sequences at this rank's place of `axes`.

    `tokens` are the axes that cut the tokens of the stream it acts on, major to minor.
    """
    reference.gradients([_own_sequences(batch, axes, tokens, mesh) for batch in batches], 0)
    gradient = reference.model.get_parameter(name).grad
    assert gradient is not None
    return gradient


def _own_sequences(batch: MicroBatch, axes: Sequence[str], tokens: Sequence[str], mesh: Mesh) -> MicroBatch:
    """`batch` with the targets of all other sequences ignored; the mean is still over those of all."""
    places = itertools.product(*(range(mesh.sizes[axis]) for axis in tokens))
    own = [all(p == mesh.coordinates[a] for a, p in zip(tokens, place, strict=True) if a in axes) for place in places]
    each = len(batch.targets) // len(own)
    mine = torch.tensor(own).repeat_interleave(each).unsqueeze(1)
    return replace(batch, targets=torch.where(mine, batch.targets, IGNORED))
