"""The tokens of one micro-batch as one rank sees them: T = B · S of them, batch-major, cut as the two streams say."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch, Stream
from tessera.layout.parallel import Parallel
from tessera.layout.streams import Layout, Streams
from tessera.nn.context.route import Route, route_of
from tessera.nn.documents import Documents


@dataclass(frozen=True)
class Part:
    """The tokens `span` of a micro-batch, those of one stream on this rank: int64 vectors [T_local], made when read."""

    batch: MicroBatch
    span: slice

    @property
    def positions(self) -> Tensor:
        """Each token's position in its document."""
        return self._vector(self.batch.positions, torch.remainder)

    @property
    def documents(self) -> Tensor:
        """Each token's document, numbered within the micro-batch."""
        return self._vector(self.batch.documents, torch.floor_divide)

    @property
    def places(self) -> Tensor:
        """The place of each token's document among all of the step."""
        return self.documents + self.batch.first_document

    @property
    def rows(self) -> Tensor:
        """An index of each token that no layout, packing or padding changes: (place of its document, position)."""
        return (self.places << 32) + self.positions

    def _vector(self, given: Tensor | None, of_index: Callable[[Tensor, int], Tensor]) -> Tensor:
        """This part of a vector that the micro-batch has; else, as every row is one document, what its index says."""
        if given is not None:
            return given.reshape(-1)[self.span]
        ids = self.batch.input_ids
        return of_index(torch.arange(self.span.start, self.span.stop, device=ids.device), ids.shape[1])


@dataclass(frozen=True)
class Tokens:
    """This rank's tokens: `residual` those in the residual stream, `attention` those of its whole sequences.

    `dropout` is the key of the step's masks, None in evaluation.
    """

    batch: MicroBatch
    residual: Part
    attention: Part
    dropout: int | None = None

    @classmethod
    def of(cls, batch: MicroBatch, streams: Streams, mesh: Mesh, dropout: int | None = None) -> "Tokens":
        """Place the tokens of `batch`. Raises ValueError when they do not divide by their axes."""
        B, axes = len(batch.input_ids), streams.attention.tokens
        if B % mesh.size(axes):
            raise ValueError(f"a batch of {B} sequences does not divide by the {mesh.size(axes)} ranks along {axes}")
        _part(batch, streams.hidden, mesh)  # the rest of the hidden stream must divide too
        return cls(batch, _part(batch, streams.residual, mesh), _part(batch, streams.attention, mesh), dropout)

    @property
    def sequence(self) -> int:
        """S, the tokens of a row, padding included."""
        return self.batch.input_ids.shape[1]

    @property
    def positions(self) -> Tensor:
        """The positions in attention's rows, [B, S]; one for all, [S], where every row has 0 … S−1."""
        if self.batch.positions is None:
            return torch.arange(self.sequence, device=self.batch.input_ids.device)
        return self.attention.positions.view(-1, self.sequence)

    @property
    def stream(self) -> Stream | None:
        """The stream of which these are a part, where several ranks share sequences; None where rows are whole."""
        if self.batch.streams is None:
            return None
        return self.batch.streams[min(self.attention.span.start // self.sequence, len(self.batch.streams) - 1)]

    def route(self, parallel: Parallel, window: int | None) -> Route:
        """What attention over `stream` moves and computes on this rank, made once for all layers of a window."""
        assert self.stream is not None
        if window not in self._routes:
            self._routes[window] = route_of(self.stream, parallel, window)
        return self._routes[window]

    @cached_property
    def _routes(self) -> dict[int | None, Route]:
        return {}

    @cached_property
    def documents(self) -> Documents | None:
        """The documents in attention's rows, made once for all layers; None where every row is one."""
        if self.batch.documents is None or self.batch.streams is not None:
            return None
        span = self.attention.span  # of whole rows
        bounds = (start - span.start for start in self.batch.document_starts if span.start <= start < span.stop)
        ids = self.attention.documents.view(-1, self.sequence)
        return Documents(ids, (*bounds, span.stop - span.start))


def _part(batch: MicroBatch, layout: Layout, mesh: Mesh) -> Part:
    total, ranks = batch.input_ids.numel(), mesh.size(layout.tokens)
    if total % ranks:
        raise ValueError(f"{total} tokens do not divide by the {ranks} ranks along {layout.tokens}: pad the sequences")
    first = mesh.index(layout.tokens) * (total // ranks)
    return Part(batch, slice(first, first + total // ranks))
