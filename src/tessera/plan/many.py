"""Rank 0 of many layouts at once: a mesh whose axes have arrays of sizes, one element for each layout.

The closed forms of plan/ read a mesh's sizes; with these they give arrays. An axis that every layout lacks is the plain
number 1. Rank 0 holds the largest shard of what does not divide, and its coordinates are 0.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np

from tessera.core.axes import AXES
from tessera.core.mesh import Mesh


class ManyMeshes:
    """The sizes that `core.mesh.Mesh` has, each a whole number or an int64 array; there are no groups."""

    rank = 0

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        self.sizes: dict[str, Any] = {axis: _plain_one(sizes.get(axis, 1)) for axis in AXES}
        self.coordinates = dict.fromkeys(AXES, 0)
        self._products: dict[tuple[str, ...], Any] = {}
        self.world = self.size(AXES)

    def present(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Those of `axes` that some layout has above 1, in the order of `AXES`."""
        wanted = set(axes)
        return tuple(axis for axis in AXES if axis in wanted and not _is_one(self.sizes[axis]))

    def size(self, axes: Iterable[str]) -> Any:
        """How many ranks lie along `axes` together; an array of them is kept, and may not be written to."""
        axes = tuple(axes)
        if axes not in self._products:
            made = math.prod((self.sizes[axis] for axis in axes), start=1)
            if isinstance(made, np.ndarray):
                made = made.view()
                made.flags.writeable = False
            self._products[axes] = made
        return self._products[axes]

    def index(self, axes: Iterable[str]) -> int:
        """Rank 0's place."""
        return 0

    @property
    def as_mesh(self) -> Mesh:
        """This, for what is declared to take a `Mesh`."""
        return cast(Mesh, self)


def _is_one(size: Any) -> bool:
    return not isinstance(size, np.ndarray) and size == 1


def _plain_one(size: Any) -> Any:
    """An array of ones as the number 1: the axis is there in no layout."""
    if isinstance(size, np.ndarray):
        return 1 if (size == 1).all() else size.astype(np.int64)
    return int(size)
