"""Exchange: one uneven all-to-all brings each owner the keys and values that its tiles read, and nothing else.

    pass       on its way                       meanwhile
    forward    k, v of others                   the tiles against the owner's own
    backward   k, v of others, once more        the same
               dk, dv of others, home           -

What arrives is not kept for the backward: no rank ever holds keys and values of others beyond one layer's pass.
Gradients travel in the dtype of keys and values, and are summed on their owner in the wide dtype.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tessera.core.collectives import Pending, start_all_to_all
from tessera.core.mesh import Group
from tessera.nn.context.route import ExchangeRoute
from tessera.nn.context.tiles import Chunk, Tile

Arrival = tuple[Tensor, tuple[Tile, ...]]
"""Key/value tokens [T, 2, kv heads, D] that are there, and the tiles to compute against them."""


class Exchange:
    """One pass over the key/value tokens `kv_T2HD` of this owner and those of the others."""

    def __init__(self, route: ExchangeRoute, group: Group | None, kv_T2HD: Tensor) -> None:
        self.route, self.group, self.kv = route, group, kv_T2HD
        self._gradients: list[Tensor] = []

    def __iter__(self) -> Iterator[Arrival]:
        arriving = self._start() if self.route.moves else None
        yield self.kv, self.route.own.tiles
        if arriving is not None:
            yield rows(arriving.wait(), self.route.order), self.route.others.tiles

    def _start(self) -> Pending:
        return start_all_to_all(rows(self.kv, self._leaving), self.route.sizes_sent, self.route.received, self.group)

    def add(self, gradient_T2HD: Tensor) -> None:
        """The gradient of what the iterator gave last."""
        self._gradients.append(gradient_T2HD)

    def home(self) -> Tensor:
        """The gradient of this owner's own tokens, from all owners together, in the wide dtype."""
        own, *others = self._gradients
        for gradient in others:
            placed = torch.empty_like(gradient, dtype=self.kv.dtype)
            for place, part in _each(placed, self.route.order, gradient):
                place.copy_(part)
            returning = start_all_to_all(placed, self.route.received, self.route.sizes_sent, self.group).wait()
            add_rows(own, self._leaving, returning)
        return own

    @property
    def _leaving(self) -> list[Chunk]:
        """The slices of this owner's tokens that go to others, reader by reader."""
        return [part for reader in self.route.sent for part in reader]


def rows(x: Tensor, slices: Sequence[Chunk]) -> Tensor:
    """These rows of x, one behind another: a view where they already are."""
    parts = [x[first:end] for first, end in slices]
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else x[:0]


def add_rows(x: Tensor, slices: Sequence[Chunk], more: Tensor) -> None:
    """The conjugate of `rows`: add to these rows of x those of `more`, one behind another."""
    for place, part in _each(x, slices, more):
        place += part


def _each(x: Tensor, slices: Sequence[Chunk], other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each slice of x beside its rows of `other`, where they lie one behind another."""
    parts = other.split([end - first for first, end in slices])
    yield from zip((x[first:end] for first, end in slices), parts, strict=True)
