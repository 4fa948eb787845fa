"""Into which tiles an MLP falls on a rank, where `tiled_mlp` cuts its tokens."""

from typing import Any

from tessera.core.arrays import common_divisor, larger, rounded_up, smaller
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import Block
from tessera.nn.mlp_tiles import tile_sizes


def mlp_tiles(block: Block, shape: StepShape, parallel: Parallel) -> list[int]:
    """The tokens of each tile, as they are multiplied."""
    mesh, hidden = parallel.mesh, block.column.hidden(parallel)
    gathered = mesh.sizes["col"] if parallel.residual.stored_dim("col") == 0 else 1
    scattered = mesh.sizes["inner"] if hidden.stored_dim("inner") == 0 else 1
    tokens = shape.tokens_on(mesh, parallel.streams.ids) // gathered
    if shape.savers.mlp_tiles == 1:
        return [tokens * gathered]
    sizes = tile_sizes(tokens, shape.savers.mlp_tiles, block.column.width, gathered, scattered)
    return [size * gathered for size in sizes]


def largest_tile(block: Block, shape: StepShape, parallel: Parallel) -> tuple[Any, Any]:
    """The tokens of the largest tile, and of all together; sizes may be arrays of candidates."""
    mesh, hidden = parallel.mesh, block.column.hidden(parallel)
    gathered = mesh.sizes["col"] if parallel.residual.stored_dim("col") == 0 else 1
    scattered = mesh.sizes["inner"] if hidden.stored_dim("inner") == 0 else 1
    together = shape.tokens_on(mesh, parallel.streams.ids)
    unit = scattered // common_divisor(scattered, gathered)
    units = together // gathered // unit
    wanted = shape.savers.mlp_tiles or rounded_up(together, block.column.width)
    tiles = larger(1, smaller(wanted, units))
    return rounded_up(units, tiles) * unit * gathered, together
