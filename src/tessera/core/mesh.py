"""Mesh: named axes over the ranks, and the process group of any set of them.

    pp · replicate · shard · ring · ulysses · inner · depth · row · col          outermost first

The busiest axis is innermost, so that its ranks lie inside a node; a run on several nodes may number its ranks in
another order (train/links.py). Axes of size 1 do not exist for torch: they are no dimension of the DeviceMesh, have no
process group, and every collective along them returns its argument.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from tessera.core.axes import AXES, MODEL_AXES


@dataclass(frozen=True)
class Group:
    """The ranks that differ from this one only along `axes`, in the order of `AXES`; `rank` is this one's place there.

    torch sorts them by number, which is the same order unless the mesh's numbering puts several of the axes in another.
    """

    axes: tuple[str, ...]
    size: int
    rank: int
    process_group: ProcessGroup


class Mesh:
    """Ranks arranged along named axes.

    `sizes` gives the size of each axis (those left out are 1); their product must be the world size, and
    torch.distributed must be initialised if it is above 1. `rank` defaults to this process's own. `numbering` is the
    order of the axes in which ranks are counted, outermost first: ranks get other coordinates and nothing else changes,
    provided that axes whose shards a gather or scatter puts together as one group are counted in the order of `AXES`.
    """

    def __init__(
        self,
        sizes: Mapping[str, int] | None = None,
        device: torch.device | str = "cpu",
        rank: int | None = None,
        numbering: Sequence[str] = AXES,
    ) -> None:
        sizes, self.numbering = dict(sizes or {}), tuple(numbering)
        self.sizes = {axis: sizes.get(axis, 1) for axis in AXES}
        self.present(sizes)  # knows every axis
        if sorted(self.numbering) != sorted(AXES):
            raise ValueError(f"ranks are numbered along every axis once, not along {self.numbering}")
        self.device = torch.device(device)
        self.world = math.prod(self.sizes.values())
        initialised = dist.is_available() and dist.is_initialized()
        if rank is None and self.world != (dist.get_world_size() if initialised else 1):
            running = dist.get_world_size() if initialised else 1
            raise ValueError(f"a mesh {self} has {self.world} ranks, but {running} are running")
        self.rank = rank if rank is not None else (dist.get_rank() if initialised else 0)
        self.coordinates: dict[str, int] = {}
        rest = self.rank
        for axis in reversed(self.numbering):
            rest, self.coordinates[axis] = divmod(rest, self.sizes[axis])
        self._groups: dict[tuple[str, ...], Group] = {}
        self._arranged: dict[tuple[tuple[str, ...], ...], DeviceMesh] = {}
        self._described: dict[tuple[tuple[str, ...], ...], DeviceMesh] = {}

    def __str__(self) -> str:
        return " × ".join(f"{axis} {size}" for axis, size in self.sizes.items() if size > 1) or "one process"

    def at(self, rank: int) -> "Mesh":
        """The same mesh as another rank sees it, for its coordinates: it makes no groups."""
        return Mesh(self.sizes, self.device, rank, self.numbering)

    def present(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Those of `axes` whose size is above 1, in the order of `AXES`."""
        wanted = set(axes)
        if wanted - set(AXES):
            raise ValueError(f"unknown mesh axes {sorted(wanted - set(AXES))}; the axes are {', '.join(AXES)}")
        return tuple(axis for axis in AXES if axis in wanted and self.sizes[axis] > 1)

    def name(self, axes: Sequence[str]) -> str:
        """Axes taken together as one name."""
        return "·".join(self.present(axes)) or axes[0]

    def size(self, axes: Iterable[str]) -> int:
        """How many ranks lie along `axes` together."""
        return math.prod(self.sizes[axis] for axis in axes)

    def index(self, axes: Iterable[str]) -> int:
        """This rank's place along `axes` together, the first of them major."""
        place = 0
        for axis in axes:
            place = place * self.sizes[axis] + self.coordinates[axis]
        return place

    def members(self, axes: Iterable[str]) -> list[int]:
        """The ranks that differ from this one only along `axes`, this one too, in the order of `AXES`; makes no group.

        E.g. of a mesh of shard 2 and col 2, rank 1 has the members 1 and 3 along shard, 0 and 1 along col.
        """
        present, stride, strides = self.present(axes), 1, dict[str, int]()
        for axis in reversed(self.numbering):
            strides[axis], stride = stride, stride * self.sizes[axis]
        first = self.rank - sum(self.coordinates[axis] * strides[axis] for axis in present)
        steps = ([place * strides[axis] for place in range(self.sizes[axis])] for axis in present)
        return [first + sum(step) for step in itertools.product(*steps)]

    def group(self, axes: Iterable[str]) -> Group | None:
        """The process group along `axes`, made when first asked for; None when it would be this rank alone.

        Making one is collective: every rank asks for the same groups in the same order, because all run one program.
        """
        present = self.present(axes)
        if not present:
            return None
        if present not in self._groups:
            process_group = self._new_process_group(present)
            _take_default_timeout(process_group)
            self._groups[present] = Group(present, self.size(present), self.index(present), process_group)
        return self._groups[present]

    def _new_process_group(self, present: tuple[str, ...]) -> ProcessGroup:
        for arranged in self._arranged.values():
            if self.name(present) in (arranged.mesh_dim_names or ()):
                return arranged.get_group(self.name(present))
        if len(present) == 1 and self.world == self.size(MODEL_AXES):
            return self.arranged([(axis,) for axis in self.present(MODEL_AXES)]).get_group(present[0])
        dims = [AXES.index(axis) for axis in present]
        rows = self._ranks().movedim(dims, tuple(range(-len(dims), 0))).reshape(-1, self.size(present)).tolist()
        mine, _ = dist.new_subgroups_by_enumeration(rows)
        return mine

    def arranged(self, dims: Sequence[tuple[str, ...]]) -> DeviceMesh:
        """All ranks as a DeviceMesh with one dim for each of `dims`, the axes of one taken together, the first major.

        Axes in none of them are one more dim, before the others, if they have more than one rank. Making one is
        collective; it is made once. `name` says what its dims are called.
        """
        key = tuple(dims)
        if key not in self._arranged:
            self._arranged[key] = self._arrange(key, communicates=True)
        return self._arranged[key]

    def described(self, dims: Sequence[tuple[str, ...]]) -> DeviceMesh:
        """The same without process groups: it only says which rank is where."""
        key = tuple(dims)
        if key not in self._described:
            self._described[key] = self._arrange(key, communicates=False)
        return self._described[key]

    def _arrange(self, dims: tuple[tuple[str, ...], ...], communicates: bool) -> DeviceMesh:
        rest = self.present(axis for axis in AXES if not any(axis in dim for dim in dims))
        every = [rest, *dims] if rest else list(dims)
        order = [AXES.index(axis) for dim in every for axis in dim]
        ones = [place for place in range(len(AXES)) if place not in order]
        ranks = self._ranks().permute(*ones, *order).reshape([self.size(dim) for dim in every])
        names = tuple(map(self.name, every))
        return DeviceMesh(self.device.type, ranks, mesh_dim_names=names, _init_backend=communicates)

    def _ranks(self) -> torch.Tensor:
        """Every rank, at its coordinates."""
        counted = torch.arange(self.world).reshape([self.sizes[axis] for axis in self.numbering])
        return counted.permute([self.numbering.index(axis) for axis in AXES])

    @property
    def device_mesh(self) -> DeviceMesh | None:
        """The DeviceMesh of the model axes above size 1, on which parameters are DTensors; None for one process."""
        present = self.present(MODEL_AXES)
        return self.arranged([(axis,) for axis in present])[present] if present else None


def _take_default_timeout(group: ProcessGroup) -> None:
    """Give `group` the timeout of the default group: torch gives groups made later its own default, half an hour."""
    everyone = dist.distributed_c10d._get_default_group()
    for device in group._device_types:
        own, default = group._get_backend(device), everyone._get_backend(device)
        # Only backends that wait have timeouts; the fake one of counting without devices has none.
        if hasattr(own, "_set_default_timeout") and hasattr(default.options, "_timeout"):
            own._set_default_timeout(default.options._timeout)
