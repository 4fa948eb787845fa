"""Into which tiles an MLP falls on a rank, where `tiled_mlp` cuts its tokens."""

from typing import Any

import numpy as np

from tessera.core.arrays import common_divisor, larger, rounded_up, smaller
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import Block
from tessera.models.config import ModelConfig
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


def counted_tiles(block: Block, shape: StepShape, parallel: Parallel) -> list[tuple[Any, Any]]:
    """The tokens of the two sizes of tiles, and how many there are of each; sizes may be arrays of candidates."""
    units, tiles, tokens = _divided(block, shape, parallel)
    return [((units // tiles + 1) * tokens, units % tiles), (units // tiles * tokens, tiles - units % tiles)]


def tile_forwards(model: ModelConfig, shape: StepShape) -> int:
    """How often a micro-batch runs each tile forward: once, and once more in the backward (nn/mlp_tiles.py).

    In a layer that runs again that run ends before them, unless dropout follows, which saves its mask.
    """
    return 3 if shape.recompute and model.residual_dropout > 0 else 2


def largest_tile(block: Block, shape: StepShape, parallel: Parallel) -> tuple[Any, Any]:
    """The tokens of the largest tile, and of all together; sizes may be arrays of candidates."""
    units, tiles, tokens = _divided(block, shape, parallel)
    return rounded_up(units, tiles) * tokens, shape.tokens_on(parallel.mesh, parallel.streams.ids)


def tiled(block: Block, shape: StepShape, parallel: Parallel) -> bool:
    """Whether an MLP falls into several tiles; of candidates' arrays: whether it may."""
    if block.attention is not None or shape.savers.mlp_tiles == 1:
        return False
    size, tokens = largest_tile(block, shape, parallel)
    return bool((size < tokens).any()) if isinstance(size < tokens, np.ndarray) else size < tokens


def _divided(block: Block, shape: StepShape, parallel: Parallel) -> tuple[Any, Any, Any]:
    """Units that no tile cuts, the tiles into which they fall, and the tokens of a unit."""
    mesh, hidden = parallel.mesh, block.column.hidden(parallel)
    gathered = mesh.sizes["col"] if parallel.residual.stored_dim("col") == 0 else 1
    scattered = mesh.sizes["inner"] if hidden.stored_dim("inner") == 0 else 1
    together = shape.tokens_on(mesh, parallel.streams.ids)
    unit = scattered // common_divisor(scattered, gathered)
    units = together // gathered // unit
    wanted = shape.savers.mlp_tiles or rounded_up(together, block.column.width)
    return units, larger(1, smaller(wanted, units)), unit * gathered
