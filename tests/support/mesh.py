"""Meshes of a worker, one for each shape: a process group keeps a thread that polls, so a new one each time adds up."""

from functools import cache

from tessera.mesh import Mesh


def shared_mesh(sizes: dict[str, int]) -> Mesh:
    """The mesh of these sizes in this process."""
    return _mesh(tuple(sizes.items()))


@cache
def _mesh(sizes: tuple[tuple[str, int], ...]) -> Mesh:
    return Mesh(dict(sizes))
