"""Parameters declared as data: one spec says how a parameter is cut, what it acts on and how it starts.

The same spec serves initialisation, loading of slices, checkpoints (through DTensor placements), the rule for gradients
and the tables that `inspect` prints. A parameter is a DTensor on the model mesh; arithmetic sees `local(parameter)`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from tessera.core.collectives import all_gather
from tessera.core.mesh import Group, Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.spec import ParameterSpec


class ParallelModule(nn.Module):
    """A module that declares its parameters as `ParameterSpec`s."""

    def __init__(self, parallel: Parallel) -> None:
        super().__init__()
        self.parallel = parallel
        self.specs: dict[str, ParameterSpec] = {}
        self.used_twice = False  # in one forward, as a tied embedding is

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
        return local(parameter, once=not self.used_twice)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{n} {list(s.shape)} → {list(to_local(self._parameters[n]).shape)}" for n, s in self.specs.items()
        )


class _Local(torch.autograd.Function):
    """DTensor → its local tensor; the gradient is wrapped with the same placements, or added to the one that is there.

    `.to_local()` does the same at more than twice the cost, which a layer pays for each of its parameters. Added here,
    a micro-batch's gradient needs no DTensor: torch works out for each mesh anew how to add two of them.
    """

    @staticmethod
    def forward(ctx, parameter: DTensor, once: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.parameter, ctx.once = parameter, once
        ctx.set_materialize_grads(False)  # none comes from a product that gives its gradient late
        return parameter._local_tensor.view_as(parameter._local_tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[no-untyped-def]
        if gradient is None:
            return None, None
        if ctx.once and ctx.parameter.grad is not None:
            to_local(ctx.parameter.grad).add_(gradient)
            return None, None
        # contiguous: an expanded gradient would corrupt accumulation into it
        return DTensor(gradient.contiguous(), ctx.parameter._spec, requires_grad=False), None


def local(parameter: Tensor, *, once: bool = False) -> Tensor:
    """The local tensor of a parameter, differentiable: arithmetic is on local tensors.

    `once`: nothing else in this forward uses the parameter, so that its gradient is whole when it comes from here.
    """
    return _Local.apply(parameter, once) if isinstance(parameter, DTensor) else parameter


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


def parameter_elements(model: torch.nn.Module) -> int:
    """Parameters that this rank holds: elements of its shards."""
    return sum(to_local(p).numel() for p in model.parameters())
