"""Tiled MLP (ALST, Bekman et al. 2025): a block over some of its tokens after the others, forward and backward.

    forward     of each tile: the block, of which nothing is kept but all tiles' input
    backward    of each tile: the block again, then its gradients; those of the weights are summed over tiles

So the wide tensors in between exist for one tile. A tile's X and Y move as all of them would, in more calls, and once
more in the backward, as in a layer that is recomputed. Weights that are gathered for products are gathered once in
each pass for all tiles, and their gradients reduced once; only where they come panel by panel (summa, cannon, slices)
do they come again for each tile. In a layer that is recomputed as a whole the tiles are not computed in that second
run, which ends when all that it saves is there.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

# mypy: disable-error-code="no-untyped-def"

Operands = Sequence[Tensor | None]
"""The local weights of a block, and its biases, None where there is none."""


class Block(Protocol):
    """What `in_tiles` runs: x [T, F] to y of the same shape, each row by itself."""

    def gather(self, operands: Operands) -> Operands:
        """The operands as all tiles multiply them."""
        ...

    def run(self, x_TF: Tensor, operands: Operands) -> Tensor:
        """The block of one tile, differentiable; `operands` are gathered."""
        ...

    def reduce(self, gradients: Operands) -> Operands:
        """The conjugate of `gather`, of the sums over tiles; None where there is no gradient."""
        ...


def tiles_of(tokens: int, features: int) -> int:
    """The number of tiles unless it is given: tokens that a rank multiplies for each feature of the residual stream.

    Then what is wide of a tile is no larger than a weight.
    """
    return max(1, math.ceil(tokens / features))


def tile_sizes(tokens: int, tiles: int | None, features: int, gathered: int = 1, scattered: int = 1) -> list[int]:
    """Parts of a rank's `tokens` of the residual stream, as equal as can be; `tiles`, or as many as `tiles_of` says.

    A tile is brought together from `gathered` ranks, then cut over `scattered` ones. Alike on all of these ranks.
    """
    unit = scattered // math.gcd(scattered, gathered)
    units = tokens // unit
    tiles = max(1, min(tiles_of(tokens * gathered, features) if tiles is None else tiles, units))
    return [(units // tiles + (place < units % tiles)) * unit for place in range(tiles)]


class _Tiled(torch.autograd.Function):
    """Its forward leaves y empty, which `in_tiles` fills: what is saved is there before the first tile is computed."""

    @staticmethod
    def forward(ctx, x: Tensor, block: Block, sizes: list[int], *operands: Tensor | None):
        ctx.block, ctx.sizes = block, sizes
        ctx.given = [operand is not None for operand in operands]
        ctx.save_for_backward(x, *(operand for operand in operands if operand is not None))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, *saved = ctx.saved_tensors
        remaining = iter(saved)
        operands = [next(remaining) if given else None for given in ctx.given]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        whole = ctx.block.gather(operands)
        leaves = [None if w is None else w.detach().requires_grad_(n) for w, n in zip(whole, needs, strict=True)]
        dx = torch.empty_like(x) if needs_x else None
        sums: list[Tensor | None] = [None] * len(leaves)
        for first, end in pairwise(accumulate(ctx.sizes, initial=0)):
            with torch.enable_grad():
                tile = x[first:end].detach().requires_grad_(needs_x)
                y = ctx.block.run(tile, leaves)
            wanted = [*([tile] if needs_x else []), *(w for w in leaves if w is not None and w.requires_grad)]
            found = iter(torch.autograd.grad(y, wanted, dy[first:end]))
            if dx is not None:
                dx[first:end] = next(found)
            for place, leaf in enumerate(leaves):
                if leaf is not None and leaf.requires_grad:
                    sums[place] = _added(sums[place], next(found))
        sums = [s if s is None else s.to(w.dtype) for s, w in zip(sums, whole, strict=True)]
        return dx, None, None, *ctx.block.reduce(sums)


def _added(total: Tensor | None, gradient: Tensor) -> Tensor:
    """Summed over tiles in float32 or wider."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(wide, copy=True) if total is None else total.add_(gradient)


def in_tiles(x_TF: Tensor, block: Block, sizes: list[int], operands: Operands) -> Tensor:
    """`block` of x, tile by tile of `sizes`; the operands are differentiable."""
    y_TF = _Tiled.apply(x_TF, block, sizes, *operands)
    with torch.no_grad():
        whole = block.gather([None if operand is None else operand.detach() for operand in operands])
        for x_tile, y_tile in zip(x_TF.detach().split(sizes), y_TF.detach().split(sizes), strict=True):
            y_tile.copy_(block.run(x_tile, whole))
    return y_TF
