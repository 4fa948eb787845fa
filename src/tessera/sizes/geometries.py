"""The table of geometries: which axes each has, and the sizes that a number of ranks gives them."""

import math
from collections.abc import Callable

from tessera.core.axes import MODEL_AXES
from tessera.core.errors import UserError
from tessera.sizes.bounds import RANKS, at_most


def _one_dimensional(size: int, depth: int) -> dict[str, int]:
    return {"col": size}


def _two_dimensional(size: int, depth: int) -> dict[str, int]:
    """The most nearly square row × col, row the smaller."""
    row = next(r for r in range(math.isqrt(size), 0, -1) if size % r == 0)
    return {"row": row, "col": size // row}


def _two_and_a_half(size: int, depth: int) -> dict[str, int]:
    if size % depth:
        reason = f"does not divide by the depth of {depth}"
        raise UserError("tensor_parallel_size", size, reason, f"use a multiple of {depth}")
    return {"depth": depth, **_two_dimensional(size // depth, depth)}


def _three_dimensional(size: int, depth: int) -> dict[str, int]:
    side = round(size ** (1 / 3))
    if side**3 != size:
        reason = "is not a cube: a 3d mesh of another shape has to be given"
        raise UserError("tensor_parallel_size", size, reason, "tensor_parallel_mesh: {inner: …, row: …, col: …}")
    return {"inner": side, "row": side, "col": side}


# tensor_parallel_mode → the sizes of (inner, depth, row, col) that a tensor_parallel_size (and depth) gives.
GEOMETRIES: dict[str, Callable[[int, int], dict[str, int]]] = {
    "1d": _one_dimensional,
    "2d": _two_dimensional,
    "2.5d": _two_and_a_half,
    "3d": _three_dimensional,
}


def mesh_sizes(mode: str, size: int, depth: int = 2) -> dict[str, int]:
    """The sizes of inner, depth, row and col of geometry `mode` at `size` ranks. Raises UserError if there are none."""
    derive = _geometry(mode)
    at_most("tensor_parallel_size", size, RANKS, "is the number of devices of a layer")
    return dict.fromkeys(MODEL_AXES, 1) | derive(size, depth)


def geometry_axes(mode: str) -> tuple[str, ...]:
    """The axes that geometry `mode` has; those it lacks are of size 1."""
    return tuple(_geometry(mode)(1, 1))


def _geometry(mode: str) -> Callable[[int, int], dict[str, int]]:
    if mode not in GEOMETRIES:
        raise UserError("tensor_parallel_mode", mode, "is not a geometry", f"there are: {', '.join(GEOMETRIES)}")
    return GEOMETRIES[mode]
