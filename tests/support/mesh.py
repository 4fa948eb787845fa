"""Meshes of a worker, one for each shape: a process group keeps a thread that polls, so a new one each time adds up."""

from collections.abc import Sequence
from functools import cache

from tessera.core.axes import AXES
from tessera.core.mesh import Mesh


def shared_mesh(sizes: dict[str, int], numbering: Sequence[str] = AXES) -> Mesh:
    """The mesh of these sizes in this process, its ranks counted in this order."""
    return _mesh(tuple((axis, sizes[axis]) for axis in AXES if sizes.get(axis, 1) > 1), tuple(numbering))


@cache
def _mesh(sizes: tuple[tuple[str, int], ...], numbering: tuple[str, ...]) -> Mesh:
    return Mesh(dict(sizes), numbering=numbering)
