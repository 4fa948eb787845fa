"""Ring attention (Liu et al. 2023): keys and values pass from owner to owner, while tiles are computed.

    pass       on its way                                  meanwhile
    forward    the next round's k, v                       the tiles of this round
    backward   the next round's k, v, once more            the same
               dk, dv of the round before: on with the ring where somebody reads them further on, else home

Tokens travel as far as somebody reads them: rounds that nobody needs are skipped. Sums of gradients travel in the wide
dtype, for each owner on the way adds to them. What was sent is let go of a round later: so an owner holds its own
tokens, those of a round and those of the next, however many rounds there are.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from tessera.core.collectives import Pending, start_exchange
from tessera.core.mesh import Group
from tessera.nn.context.exchange import Arrival, add_rows, rows
from tessera.nn.context.route import RingRoute, length


class Ring:
    """One pass over the key/value tokens `kv_T2HD` of this owner and those of the others."""

    def __init__(self, route: RingRoute, group: Group | None, kv_T2HD: Tensor) -> None:
        self.route, self.group, self.kv = route, group, kv_T2HD
        self._place, self._ranks = (0, 1) if group is None else (group.rank, group.size)
        self._distance = 0  # how far the owner of the round given last is behind this one
        self._own = kv_T2HD[:0]
        self._carried: Pending | None = None  # the sums for the next round, from the owner before
        self._returned: list[Pending] = []
        self._sent: list[Pending] = []
        self._sums_sent: list[Pending] = []

    def __iter__(self) -> Iterator[Arrival]:
        block, tiles = self.kv, self.route.own.tiles
        for distance in range(len(self.route.hops) + 1):
            self._distance, last = distance, distance == len(self.route.hops)
            arriving = None if last else self._pass_on(block)
            yield block, tiles
            if arriving is not None:
                block, tiles = arriving(), self.route.hops[distance].round.tiles
        _finish(self._sent)

    def _pass_on(self, block: Tensor) -> Callable[[], Tensor]:
        """Start the next hop; what waits for the round that arrives."""
        hop = self.route.hops[self._distance]
        _finish(self._sent)
        coming = block.new_empty(length(hop.round.keys), *block.shape[1:])
        leaving = [(rows(block, hop.passed), self._at(1))] if hop.passed else []
        sent, received = start_exchange(leaving, [(coming, self._at(-1))] if hop.round.keys else [], self.group)
        self._sent = sent
        return lambda: received[0].wait() if received else coming

    def _at(self, further: int) -> int:
        """The owner so many places further on."""
        return (self._place + further) % self._ranks

    def add(self, gradient_T2HD: Tensor) -> None:
        """The gradient of what the iterator gave last, in the wide dtype."""
        if not self._distance:
            self._own = gradient_T2HD
            return
        distance, hops = self._distance, self.route.hops
        hop, following = hops[distance - 1], hops[distance] if distance < len(hops) else None
        _finish(self._sums_sent)
        if self._carried is not None:
            gradient_T2HD += self._carried.wait()
        memory = [(length(following.round.keys), self._at(-1))] if following and following.round.keys else []
        memory += [(length(hop.home), self._at(distance))] if hop.home else []
        receives = [(gradient_T2HD.new_empty(n, *gradient_T2HD.shape[1:]), source) for n, source in memory]
        sends = [(rows(gradient_T2HD, hop.on), self._at(1))] if hop.on else []
        sends += [(rows(gradient_T2HD, hop.ended), self._at(-distance))] if hop.ended else []
        sent, received = start_exchange(sends, receives, self.group)
        self._sums_sent = sent
        if hop.home:
            self._returned.append(received.pop())
        self._carried = received[0] if received else None

    def home(self) -> Tensor:
        """The gradient of this owner's own tokens, from all owners together, in the wide dtype."""
        returned, own = iter(self._returned), self._own
        for hop in self.route.hops:
            if hop.home:
                add_rows(own, hop.home, next(returned).wait())
        _finish(self._sums_sent)
        return own


def _finish(sent: list[Pending]) -> None:
    """Wait until these have gone, and let go of them."""
    while sent:
        sent.pop().wait()
