"""Parameters declared as data: one spec says how a parameter is cut, what it acts on and how it starts.

The same spec serves initialisation, loading of slices, checkpoints (through DTensor placements), the rule for gradients
and the tables that `inspect` prints. A parameter is a DTensor on the model mesh; arithmetic sees `local(parameter)`.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tessera.collectives import all_gather
from tessera.layout import HIDDEN, Layout, LinearPlan, column_parallel, row_parallel
from tessera.mesh import DATA_AXES, MODEL_AXES, SEQUENCE_AXES, Group, Mesh
from tessera.schedule import Overlap, Schedule


@dataclass(frozen=True)
class Init:
    """How a parameter starts: normal with this standard deviation, or the constant `value` when `std` is 0."""

    std: float = 0.0
    value: float = 0.0


@dataclass(frozen=True)
class ParameterSpec:
    """`shape` is global; `cuts[d]` the axes that cut dim d, major to minor; `acts_on` the stream it is applied to.

    FSDP2 stores dim 0 of that cut again, over the axes `stored_over` taken together; it comes back whole before it is
    used. Gradients are summed by FSDP2 along the axes `served`.
    """

    shape: tuple[int, ...]
    cuts: tuple[tuple[str, ...], ...]
    acts_on: Layout
    init: Init
    stored_over: tuple[str, ...] = ()
    served: tuple[str, ...] = ()

    @property
    def stored_cuts(self) -> tuple[tuple[str, ...], ...]:
        """The axes that cut each dim of what a rank holds."""
        return (*self.cuts[0], *self.stored_over), *self.cuts[1:]

    @property
    def cut_axes(self) -> set[str]:
        return {axis for axes in self.stored_cuts for axis in axes}

    @property
    def summed_axes(self) -> tuple[str, ...]:
        """The axes over which the gradient must be summed: those that cut the activation but not the parameter."""
        return tuple(axis for axis in self.acts_on.axes if axis not in self.cut_axes and axis not in self.served)

    def local_slices(self, mesh: Mesh) -> tuple[slice, ...]:
        """The part of each dim that this rank uses; uneven ones as torch.chunk cuts (the last shards are shorter)."""
        return tuple(local_slice(n, axes, mesh) for n, axes in zip(self.shape, self.cuts, strict=True))

    def stored_slices(self, mesh: Mesh) -> tuple[slice, ...]:
        """The part of each dim that this rank holds: of dim 0 less than it uses, under FSDP2."""
        used, *others = self.local_slices(mesh)
        step = -(-(used.stop - used.start) // mesh.size(self.stored_over))
        start = min(used.stop, used.start + step * mesh.index(self.stored_over))
        return slice(start, min(used.stop, start + step)), *others

    def placements(self, axes: Iterable[str]) -> list[Placement]:
        """The DTensor placement along each of the mesh's `axes`, as the rank uses the parameter."""
        dim_of = {axis: dim for dim, axes in enumerate(self.cuts) for axis in axes}
        return [Shard(dim_of[a]) if a in dim_of else Replicate() for a in axes]


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
    the hidden stream inside attention; `weights_over` the token axes along which weights are stored cut, and gathered
    by the products; `overlap` moves weights early and their gradients late. `fsdp`, where data axes are above 1, are
    the axes over which FSDP2 stores parameters cut (parallel/data.py); it gathers them layer by layer.
    """

    mesh: Mesh
    residual: Layout
    dtype: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    schedule: Schedule = Schedule()
    attention: Layout = HIDDEN
    weights_over: tuple[str, ...] = ("row",)
    overlap: Overlap = field(default_factory=Overlap, compare=False)
    fsdp: tuple[str, ...] | None = None

    @property
    def served(self) -> tuple[str, ...]:
        """The axes along which FSDP2 sums every gradient: all that cut the batch, but for those of `weights_over`."""
        batch = (*DATA_AXES, *SEQUENCE_AXES, "depth", "row")
        return () if self.fsdp is None else tuple(axis for axis in batch if axis not in self.weights_over)

    @property
    def device_mesh(self) -> DeviceMesh | None:
        """Where parameters are DTensors before FSDP2 has cut them; None where they are plain tensors."""
        if self.fsdp is None:
            return self.mesh.device_mesh
        axes = self.parameter_axes
        return self.data_mesh[axes] if axes else None

    @property
    def parameter_axes(self) -> tuple[str, ...]:
        """The model axes above size 1 that FSDP2 leaves to the layers. It takes at most two."""
        return tuple(axis for axis in self.mesh.present(MODEL_AXES) if axis not in self.served)

    @property
    def data_mesh(self) -> DeviceMesh:
        """All ranks: the replicas, the axes `fsdp` as one dim, and the parameters' axes."""
        assert self.fsdp is not None
        return self.mesh.arranged([self.fsdp, *((axis,) for axis in self.parameter_axes)])

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
        parallel, mesh = self.parallel, self.parallel.mesh
        spec = replace(spec, stored_over=parallel.fsdp or (), served=parallel.served)
        shape = [s.stop - s.start for s in spec.local_slices(mesh)]
        # under FSDP2 memory comes with its shards: no rank ever holds what it uses of the whole model
        device = mesh.device if parallel.fsdp is None else "meta"
        data: Tensor = torch.empty(shape, dtype=parallel.dtype, device=device)
        if parallel.device_mesh is not None:
            whole = torch.empty(spec.shape, device="meta")
            data = DTensor.from_local(
                data,
                parallel.device_mesh,
                spec.placements(parallel.parameter_axes),
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
        self.specs[name] = spec
        self.register_parameter(name, nn.Parameter(data))

    def stored(self, name: str) -> Tensor:
        """This rank's shard of a parameter in the dtype it is held in, which FSDP2 may have cast; differentiable."""
        return self._shard(name).to(self.parallel.dtype)

    def local(self, name: str) -> Tensor:
        """The same in the compute dtype."""
        return self._shard(name).to(self.parallel.compute)

    def _shard(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        assert parameter is not None
        return local(parameter)

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


def as_stored(tensor: Tensor, spec: ParameterSpec, parallel: Parallel) -> Tensor:
    """A parameter, or what is shaped like it, as a DTensor that says what this rank holds; the memory is the same.

    FSDP2's own DTensors say so only where every shard of the other axes is cut alike: theirs count rows as if `shard`
    had cut first. Here it cuts last, as it does.
    """
    if not spec.stored_over:
        return tensor.detach()
    dims = [*((axis,) for axis in parallel.parameter_axes), spec.stored_over]
    mesh = parallel.mesh.described(dims)
    rest = [Replicate()] * (mesh.ndim - len(dims))
    placements = [*rest, *spec.placements(parallel.parameter_axes), Shard(0)]
    whole = torch.empty(spec.shape, device="meta")
    return DTensor.from_local(
        to_local(tensor), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def gather_whole(shard: Tensor, shape: tuple[int, ...], cuts: Iterable[tuple[str, ...]], mesh: Mesh) -> Tensor:
    """The whole of a tensor of which this rank holds `shard`, dim by dim; every rank gets it."""
    for dim, (length, axes) in enumerate(zip(shape, cuts, strict=True)):
        groups = [mesh.group((axis,)) for axis in reversed(axes)]  # the minor ones come together first
        shard = _joined(shard, dim, length, mesh.size(axes), groups)
    return shard


def _joined(shard: Tensor, dim: int, length: int, ranks: int, groups: Iterable[Group | None]) -> Tensor:
    missing = -(-length // ranks) - shard.shape[dim]
    if missing:  # shards are as long as torch.chunk's: only what lies at the end is padding
        shard = torch.cat([shard, shard.new_zeros(*shard.shape[:dim], missing, *shard.shape[dim + 1 :])], dim)
    for group in groups:
        shard = all_gather(shard, dim, group)
    return shard.narrow(dim, 0, length)


def gather_parameter(parameter: Tensor, spec: ParameterSpec, mesh: Mesh) -> Tensor:
    """The whole of a parameter on every rank, on the mesh's device."""
    used, stored_over = spec.local_slices(mesh)[0], spec.stored_over
    shard = to_local(parameter).to(mesh.device)
    shard = _joined(shard, 0, used.stop - used.start, mesh.size(stored_over), [mesh.group(stored_over)])
    return gather_whole(shard, spec.shape, spec.cuts, mesh)


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
            shard.copy_(_normal(name, spec.shape, spec.stored_slices(mesh), spec.init.std, seed))


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
