"""Parameters declared as data: one spec says how a parameter is cut, what it acts on and how it starts.

The same spec serves initialisation, loading of slices, checkpoints (through DTensor placements), the rule for gradients
and the tables that `inspect` prints. A parameter is a DTensor on the model mesh; arithmetic sees `local(parameter)`.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tessera.collectives import all_gather
from tessera.layout import HIDDEN, Layout, LinearPlan, column_parallel, row_parallel
from tessera.mesh import MODEL_AXES, Mesh
from tessera.schedule import Overlap, Schedule


@dataclass(frozen=True)
class Init:
    """How a parameter starts: normal with this standard deviation, or the constant `value` when `std` is 0."""

    std: float = 0.0
    value: float = 0.0


@dataclass(frozen=True)
class ParameterSpec:
    """`shape` is global; `cuts[d]` the axes that cut dim d, major to minor; `acts_on` the stream it is applied to."""

    shape: tuple[int, ...]
    cuts: tuple[tuple[str, ...], ...]
    acts_on: Layout
    init: Init

    @property
    def cut_axes(self) -> set[str]:
        return {axis for axes in self.cuts for axis in axes}

    @property
    def summed_axes(self) -> tuple[str, ...]:
        """The axes over which the gradient must be summed: those that cut the activation but not the parameter."""
        return tuple(axis for axis in self.acts_on.axes if axis not in self.cut_axes)

    def local_slices(self, mesh: Mesh) -> tuple[slice, ...]:
        """The part of each dim that this rank holds; uneven ones as torch.chunk cuts (the last shards are shorter)."""
        return tuple(local_slice(n, axes, mesh) for n, axes in zip(self.shape, self.cuts, strict=True))

    def placements(self, mesh: Mesh) -> list[Placement]:
        """The DTensor placement on each dim of `mesh.device_mesh`."""
        dim_of = {axis: dim for dim, axes in enumerate(self.cuts) for axis in axes}
        return [Shard(dim_of[a]) if a in dim_of else Replicate() for a in mesh.present(MODEL_AXES)]


def local_slice(n: int, axes: tuple[str, ...], mesh: Mesh) -> slice:
    """What this rank holds of n elements cut over `axes`, the first major."""
    start, stop = 0, n
    for axis in axes:
        step = -(-(stop - start) // mesh.sizes[axis])
        start, stop = (min(stop, start + step * (mesh.coordinates[axis] + i)) for i in (0, 1))
    return slice(start, stop)


@dataclass(frozen=True)
class Parallel:
    """What every layer of one model shares: the mesh, the layouts of the streams, the schedule and the dtypes.

    Parameters are held in `dtype`; products run in `compute` (bf16 over fp32 parameters, or the same). `attention` is
    the hidden stream inside attention; `weights_over` the token axes along which weights are stored cut; `overlap`
    moves weights early and their gradients late.
    """

    mesh: Mesh
    residual: Layout
    dtype: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    schedule: Schedule = Schedule()
    attention: Layout = HIDDEN
    weights_over: tuple[str, ...] = ("row",)
    overlap: Overlap = field(default_factory=Overlap, compare=False)

    def column(self, hidden: Layout = HIDDEN) -> LinearPlan:
        """The plan of a column-parallel layer, residual → hidden."""
        return column_parallel(self.residual, hidden, self.weights_over)

    def row(self, hidden: Layout = HIDDEN) -> LinearPlan:
        """The plan of a row-parallel layer, hidden → residual."""
        return row_parallel(self.residual, hidden, self.weights_over)


class ParallelModule(nn.Module):
    """A module that declares its parameters as `ParameterSpec`s."""

    def __init__(self, parallel: Parallel) -> None:
        super().__init__()
        self.parallel = parallel
        self.specs: dict[str, ParameterSpec] = {}

    def declare(self, name: str, spec: ParameterSpec) -> None:
        """Make the local shard of a parameter, uninitialised, and register it as a DTensor (plain in one process)."""
        mesh = self.parallel.mesh
        shape = [s.stop - s.start for s in spec.local_slices(mesh)]
        data: Tensor = torch.empty(shape, dtype=self.parallel.dtype, device=mesh.device)
        if mesh.device_mesh is not None:
            whole = torch.empty(spec.shape, device="meta")
            data = DTensor.from_local(
                data,
                mesh.device_mesh,
                spec.placements(mesh),
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
        self.specs[name] = spec
        self.register_parameter(name, nn.Parameter(data))

    def stored(self, name: str) -> Tensor:
        """This rank's shard of a parameter in the dtype it is held in, differentiable."""
        parameter = self._parameters[name]
        assert parameter is not None
        return local(parameter)

    def local(self, name: str) -> Tensor:
        """The same in the compute dtype."""
        return self.stored(name).to(self.parallel.compute)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{n} {list(s.shape)} → {list(to_local(self._parameters[n]).shape)}" for n, s in self.specs.items()
        )


class _Local(torch.autograd.Function):
    """DTensor → its local tensor; the gradient is wrapped with the same placements.

    `.to_local()` does the same at more than twice the cost, which a layer pays for each of its parameters.
    """

    @staticmethod
    def forward(ctx, parameter: DTensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.spec = parameter._spec
        ctx.set_materialize_grads(False)  # none comes from a product that gives its gradient late
        return parameter._local_tensor.view_as(parameter._local_tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor | None) -> Tensor | None:  # type: ignore[no-untyped-def]
        if gradient is None:
            return None
        # contiguous: an expanded gradient would corrupt accumulation into it
        return DTensor(gradient.contiguous(), ctx.spec, requires_grad=False)


def local(parameter: Tensor) -> Tensor:
    """The local tensor of a parameter, differentiable: arithmetic is on local tensors."""
    return _Local.apply(parameter) if isinstance(parameter, DTensor) else parameter


def to_local(tensor: Tensor | None) -> Tensor:
    """The local data of a parameter, gradient or optimizer state, outside autograd."""
    assert tensor is not None
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def add_gradient(parameter: nn.Parameter | None, gradient: Tensor) -> None:
    """Add to a parameter's gradient what autograd did not: `gradient` is local, in any dtype."""
    assert parameter is not None
    gradient = gradient.to(parameter.dtype)
    if parameter.grad is not None:
        to_local(parameter.grad).add_(gradient)
    elif isinstance(parameter, DTensor):
        parameter.grad = DTensor(gradient.contiguous(), parameter._spec, requires_grad=False)
    else:
        parameter.grad = gradient.contiguous()


def gather_whole(shard: Tensor, shape: tuple[int, ...], cuts: Iterable[tuple[str, ...]], mesh: Mesh) -> Tensor:
    """The whole of a tensor of which this rank holds `shard`, dim by dim; every rank gets it."""
    for dim, (length, axes) in enumerate(zip(shape, cuts, strict=True)):
        missing = -(-length // mesh.size(axes)) - shard.shape[dim]
        if missing:  # shards are as long as torch.chunk's: only what lies at the end is padding
            shard = torch.cat([shard, shard.new_zeros(*shard.shape[:dim], missing, *shard.shape[dim + 1 :])], dim)
        for axis in reversed(axes):  # the minor ones come together first
            shard = all_gather(shard, dim, mesh.group((axis,)))
        shard = shard.narrow(dim, 0, length)
    return shard


def named_specs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParameterSpec]]:
    """Every declared parameter of a model with its full name and spec, in the order of declaration."""
    for prefix, module in model.named_modules():
        if isinstance(module, ParallelModule):
            for name, spec in module.specs.items():
                yield f"{prefix}.{name}" if prefix else name, module._parameters[name], spec  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------- initialisation

_ROWS = 64  # rows drawn from one generator: a rank draws only the blocks it holds a part of


def hash_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def initialize(model: nn.Module, mesh: Mesh, seed: int) -> None:
    """Fill every parameter from its name, the seed and the global index: the values do not depend on the mesh."""
    for name, parameter, spec in named_specs(model):
        shard = to_local(parameter)
        if spec.init.std == 0:
            shard.fill_(spec.init.value)
        else:
            shard.copy_(_normal(name, spec.shape, spec.local_slices(mesh), spec.init.std, seed))


def _normal(name: str, shape: tuple[int, ...], slices: tuple[slice, ...], std: float, seed: int) -> Tensor:
    """The slice of a normal tensor whose blocks of rows each come from a generator seeded by (seed, name, block)."""
    rows, width = slices[0], math.prod(shape[1:])
    generator, drawn = torch.Generator(), []
    for block in range(rows.start // _ROWS, -(-rows.stop // _ROWS)):
        generator.manual_seed(hash_seed(seed, name, block))
        values = torch.randn(_ROWS, width, generator=generator).reshape(_ROWS, *shape[1:])
        first = max(rows.start - block * _ROWS, 0)
        drawn.append(values[(slice(first, rows.stop - block * _ROWS), *slices[1:])])
    return torch.cat(drawn) * std if drawn else torch.empty(0, *(s.stop - s.start for s in slices[1:]))
