"""Where several ranks share sequences: which tokens each has, which tiles of attention it computes, what it receives.

Worked out in one process, by the very plans that the run follows (nn/context): no rank is needed. Rows of a micro-batch
make streams (layout/context.py); what is told is the first one of the first data rank.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from tessera.core.axes import DATA_AXES
from tessera.core.mesh import Mesh
from tessera.data.batch import Stream
from tessera.inspect.held import Inspection
from tessera.inspect.picture import Grid
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import Attention, anatomy_of
from tessera.models.config import ModelConfig
from tessera.nn.context.assign import work
from tessera.nn.context.cut import streams_of
from tessera.nn.context.route import RingRoute, length, route_of
from tessera.nn.context.tiles import Chunk
from tessera.plan.sequences import attention_moves

EDGES = 128  # of the picture's blocks, along each side


@dataclass(frozen=True)
class Share:
    """What the `ranks` at one place of a stream have: the same tokens, and in attention some of the heads each.

    `holds`: chunks of the stream; `computes`: those whose queries are computed here, all of the owner's, in so many
    `tiles`; `pairs` of a query and a key in them, summed over the layers. `tokens`: keys and values that a layer's
    forward receives; `bytes`: all that its attention receives in forward and backward, of the busiest of the ranks.
    """

    ranks: tuple[int, ...]
    holds: tuple[Chunk, ...]
    computes: tuple[Chunk, ...]
    tiles: int
    pairs: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Sequences:
    """A stream of `rows`, one of `streams` of a micro-batch, and the shares of its ranks; the mean work is `mean`."""

    stream: Stream
    rows: float
    streams: int
    shares: tuple[Share, ...]

    @property
    def mean(self) -> float:
        return sum(share.pairs for share in self.shares) / len(self.shares)

    @property
    def grid(self) -> Grid:
        """Who computes which block of queries × keys; nobody where no query sees a key."""
        edges = _edges(self.stream)
        blocks = tuple(slice(first, end) for first, end in pairwise(edges))
        title = "attention: queries ↓, keys →\na rank computes its tiles for its heads"
        return Grid(title, blocks, blocks, tuple(tuple(self._row(block, blocks)) for block in blocks), causal=True)

    def _row(self, queries: slice, keys: tuple[slice, ...]) -> Iterator[tuple[int, ...]]:
        bounds = self.stream.bounds
        seen = []  # by whom, the first key and the end of the keys
        for share in self.shares:
            for first, end in share.computes:
                a, b = max(first, queries.start), min(end, queries.stop)
                if a < b:
                    seen.append((share.ranks, bounds[bisect_right(bounds, a) - 1], b))
        for block in keys:
            found = {rank for ranks, low, b in seen if low < block.stop and block.start < b for rank in ranks}
            yield tuple(sorted(found))


def shared_sequences(model: ModelConfig, inspection: Inspection, shape: StepShape) -> Sequences | None:
    """The first stream of a step of `shape`; None where each rank has whole sequences."""
    parallel = inspection.parallel
    if not parallel.cuts_sequences:
        return None
    streams = streams_of(shape.document_starts[0], shape.tokens, parallel, model.windows)
    places: dict[tuple[int, int], list[Mesh]] = {}
    for mesh in inspection.ranks:
        joined = parallel.context.joined
        if mesh.index(DATA_AXES) == 0 and (joined or mesh.index(parallel.attention.tokens) == 0):
            places.setdefault((mesh.index(parallel.owners), mesh.coordinates["ulysses"]), []).append(mesh)
    pairs = work(streams[0].owned, streams[0].bounds, model.windows)
    plan = _Plan(parallel, _attention(model), streams[0], shape)
    shares = tuple(plan.share(ranks, owner, pairs[owner]) for (owner, _), ranks in sorted(places.items()))
    return Sequences(streams[0], shape.batch / len(streams), len(streams), shares)


@dataclass(frozen=True)
class _Plan:
    """What the shares of a stream follow from."""

    parallel: Parallel
    attention: Attention
    stream: Stream
    shape: StepShape

    def share(self, ranks: list[Mesh], owner: int, pairs: int) -> Share:
        """That of the `ranks` at one place, whose owner computes so many `pairs`."""
        first, owned = ranks[0], self.stream.owned[owner]
        each = length(owned) // first.sizes["ulysses"]
        route = route_of(self.stream, replace(self.parallel, mesh=first), self.attention.window)
        rounds = [hop.round for hop in route.hops] if isinstance(route, RingRoute) else [route.others]
        return Share(
            tuple(mesh.rank for mesh in ranks),
            _part(owned, each * first.coordinates["ulysses"], each),
            owned,
            sum(len(each.tiles) for each in (route.own, *rounds)),
            pairs,
            sum(length(each.keys) for each in rounds),
            max(map(self.received, ranks)),
        )

    def received(self, mesh: Mesh) -> int:
        """Bytes that a rank receives in forward and backward of a layer's attention."""
        tokens = self.shape.tokens_on(mesh, self.parallel.attention.tokens)
        parallel = replace(self.parallel, mesh=mesh)
        return sum(move.received for move in attention_moves(self.attention, self.stream, tokens, parallel))


def _attention(model: ModelConfig) -> Attention:
    return next(block.attention for block in anatomy_of(model).layers[0] if block.attention is not None)


def _part(chunks: tuple[Chunk, ...], skipped: int, tokens: int) -> tuple[Chunk, ...]:
    """So many tokens of the chunks, after the first `skipped`."""
    found = []
    for first, end in chunks:
        low, high = min(end, first + skipped), min(end, first + skipped + tokens)
        skipped, tokens = max(0, skipped - (end - first)), tokens - (high - low)
        if low < high:
            found.append((low, high))
    return tuple(found)


def _edges(stream: Stream) -> list[int]:
    """Where chunks and documents begin and end; of too many, some that lie apart evenly."""
    edges = sorted({0, *stream.bounds, *(edge for chunks in stream.owned for chunk in chunks for edge in chunk)})
    if len(edges) <= EDGES + 1:
        return edges
    return sorted({edges[round(n * (len(edges) - 1) / EDGES)] for n in range(EDGES + 1)})


def documents_of(lengths: tuple[int, ...], shape: StepShape) -> StepShape:
    """The shape with documents of these lengths in every row; what is left of a row is one too."""
    begins = [at for at in accumulate(lengths, initial=0) if at < shape.sequence]
    starts = tuple(row * shape.sequence + begin for row in range(shape.batch) for begin in begins)
    return replace(shape, documents=(starts,) * shape.micro_batches)
