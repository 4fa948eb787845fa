"""Documents: where the documents in attention's rows begin and end, as integers of the host: no layer asks a device."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tessera.data.batch import document_starts


class Span(NamedTuple):
    """A document: the tokens `first` … `end` − 1 of row `row`."""

    row: int
    first: int
    end: int


@dataclass(frozen=True)
class Documents:
    """The documents of B rows of S tokens, each a run of tokens of one row. Tokens are counted row after row.

    `ids` [B, S] names each token's document; `bounds` has the first token of each document, and B · S at the end.
    E.g. of the rows a a b and c c c: bounds 0 2 3 6.
    """

    ids: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, ids: Tensor) -> "Documents":
        """The documents that `ids` [B, S] name; of a GPU's tensor, this waits for it."""
        return cls(ids, (*document_starts(ids), ids.numel()))

    def __iter__(self) -> Iterator[Span]:
        S = self.ids.shape[1]
        for start, end in pairwise(self.bounds):
            yield Span(start // S, start % S, start % S + end - start)

    def lengths(self) -> list[list[int]]:
        """The tokens of each document, row by row."""
        found: list[list[int]] = [[] for _ in self.ids]
        for row, first, end in self:
            found[row].append(end - first)
        return found

    @cached_property
    def longest(self) -> int:
        """The tokens of the longest document."""
        return max(end - start for start, end in pairwise(self.bounds))

    @cached_property
    def offsets(self) -> Tensor:
        """`bounds` as int32 on the device of `ids`, made once."""
        return torch.tensor(self.bounds, dtype=torch.int32).to(self.ids.device, non_blocking=True)
