"""A parameter declared as data: how it is cut, what it acts on and how it starts.

The same spec serves initialisation, loading of slices, checkpoints (through DTensor placements), the rule for gradients
and the tables that `inspect` prints.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch.distributed.tensor import Placement, Replicate, Shard

from tessera.core.arrays import smaller
from tessera.core.mesh import Mesh
from tessera.layout.streams import Layout


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
        start = smaller(used.stop, used.start + step * mesh.index(self.stored_over))
        return slice(start, smaller(used.stop, start + step)), *others

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """The shape of what this rank uses."""
        return tuple(part.stop - part.start for part in self.local_slices(mesh))

    def stored_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """The shape of what this rank holds."""
        return tuple(part.stop - part.start for part in self.stored_slices(mesh))

    def placements(self, axes: Iterable[str]) -> list[Placement]:
        """The DTensor placement along each of the mesh's `axes`, as the rank uses the parameter."""
        dim_of = {axis: dim for dim, axes in enumerate(self.cuts) for axis in axes}
        return [Shard(dim_of[a]) if a in dim_of else Replicate() for a in axes]


def local_slice(n: int, axes: tuple[str, ...], mesh: Mesh) -> slice:
    """What this rank holds of n elements cut over `axes`, the first major."""
    start, stop = 0, n
    for axis in axes:
        step = -(-(stop - start) // mesh.sizes[axis])
        start, stop = (smaller(stop, start + step * (mesh.coordinates[axis] + i)) for i in (0, 1))
    return slice(start, stop)
