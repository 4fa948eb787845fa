"""MicroBatch: what the loader gives to a step, and a step to the model."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """Rows of a micro-batch as one packed stream of tokens, which several ranks own together.

    `bounds` has the first token of each document, and the stream's length at the end; `owned` the chunks (first, end)
    of the stream that each owner has. E.g. of two owners of the documents a a b b b b: bounds 0 2 6, owned
    (((0, 1), (4, 6)), ((1, 4),)).
    """

    bounds: tuple[int, ...]
    owned: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class MicroBatch:
    """The rows that one forward runs together; each row is one document unless `documents` says otherwise.

    `input_ids` and `targets` are int64 [B, S]: targets[b, t] is the label of token t+1, or −100 for none, and `valid`
    is the number of the others. `first_document` is the number of documents of the optimizer step before these, those
    of other data ranks included: it makes a document's place in the step.

    `positions` [B, S] has each token's place in its document; None: 0 … S−1 in every row. `documents` [B, S] has each
    token's document, numbered within the micro-batch or, with `first_document` 0, within the step; None: row b is
    document b. A document is a run of tokens of one row; what fills up a row is one too, without targets.
    E.g. a row of two documents, of three tokens and two: positions 0 1 2 0 1, documents 0 0 0 1 1.

    `streams`, where several ranks share sequences: this is one rank's part (nn/context/cut.py), a row for each part of
    the rows that attention's layout makes, and tokens lie there in the order in which their owner has them.
    """

    input_ids: Tensor
    targets: Tensor
    valid: int
    first_document: int = 0
    positions: Tensor | None = None
    documents: Tensor | None = None
    streams: tuple[Stream, ...] | None = None

    @cached_property
    def document_starts(self) -> tuple[int, ...]:
        """At which of the B · S tokens, row after row, the documents begin: found on the host, before `to` a GPU."""
        B, S = self.input_ids.shape
        return tuple(range(0, B * S, S)) if self.documents is None else document_starts(self.documents)

    @property
    def document_lengths(self) -> list[int]:
        """The tokens of each document, padding among them."""
        starts = self.document_starts
        return [end - start for start, end in zip(starts, (*starts[1:], self.input_ids.numel()), strict=True)]

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with its tensors on `device`."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        batch = replace(self, **moved)
        if self.streams is None:  # of a part of streams nobody asks where documents begin
            vars(batch)["document_starts"] = self.document_starts
        return batch


def document_starts(documents: Tensor) -> tuple[int, ...]:
    """At which tokens of `documents` [B, S], counted row after row, another document begins."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    torch.ne(documents[:, 1:], documents[:, :-1], out=begins[:, 1:])
    return tuple(begins.flatten().nonzero().flatten().tolist())
