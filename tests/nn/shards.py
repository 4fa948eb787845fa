"""Cutting whole tensors the way a layer expects them, by torch.chunk alone: the other opinion on where parts lie."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distributed.model_cases import full
from support.mesh import shared_mesh
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.layout.parallel import Parallel
from tessera.layout.streams import Layout, residual_layout
from tessera.nn.parameter import named_specs, to_local
from tessera.nn.tokens import Tokens


def mesh_of(sizes: dict[str, int]) -> Mesh:
    """A mesh over all ranks of the pool; without sizes one process of it alone."""
    return shared_mesh(sizes) if sizes else Mesh(rank=0)


def parallel_of(sizes: dict[str, int], sequence_parallel: bool = True, dtype: torch.dtype = torch.float64) -> Parallel:
    return Parallel(mesh_of(sizes), residual_layout(sequence_parallel), dtype=dtype, compute=dtype)


def drawer(seed: int) -> Callable[..., Tensor]:
    """Draws float64 normals, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def part(x: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    """This rank's part of an activation [T, F], or of its tokens [T], that lies as `layout` says."""
    for dim, axes in list(enumerate((layout.tokens, layout.features)))[: x.dim()]:
        x = chunk(x, dim, axes, mesh)
    return x.contiguous()


def chunk(x: Tensor, dim: int, axes: tuple[str, ...], mesh: Mesh) -> Tensor:
    """This rank's part of one dim, cut over `axes` one inside the other; empty where torch.chunk makes too few."""
    for axis in axes:
        parts = x.chunk(mesh.sizes[axis], dim)
        place = mesh.coordinates[axis]
        x = parts[place] if place < len(parts) else x.narrow(dim, 0, 0)
    return x


@torch.no_grad()
def fill(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Give every parameter its part of its whole value."""
    specs = list(named_specs(module))
    assert {name for name, _, _ in specs} == values.keys()
    for name, parameter, spec in specs:
        whole = values[name]
        for dim, axes in enumerate(spec.cuts):
            whole = chunk(whole, dim, axes, module_mesh(module))
        to_local(parameter).copy_(whole)


def module_mesh(module: nn.Module) -> Mesh:
    return next(m.parallel.mesh for m in module.modules() if hasattr(m, "parallel"))


def whole_gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: full(parameter.grad) for name, parameter, _ in named_specs(module)}


def tokens_of(ids: Tensor, parallel: Parallel, key: int | None = None, first_document: int = 0) -> Tokens:
    """This rank's tokens of the rows `ids`, each a document."""
    batch = MicroBatch(ids, ids, ids.numel(), first_document)
    return Tokens.of(batch, parallel.streams, parallel.mesh, key)


def label(value: Any) -> str:
    """A name for a test: the mesh it runs on."""
    return "×".join(f"{a}{n}" for a, n in value.items()) if isinstance(value, dict) else str(value)


def world(sizes: dict[str, int]) -> int:
    size = 1
    for n in sizes.values():
        size *= n
    return size
