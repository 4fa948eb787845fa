"""The tokens of one micro-batch as one rank sees them: T = B · S of them, batch-major, cut as the two streams say."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.layout import HIDDEN, Layout
from tessera.mesh import Mesh


@dataclass(frozen=True)
class Tokens:
    """`sequence` is S (padded); `dropout` the key of this micro-batch's masks, None in evaluation."""

    sequence: int
    residual: slice
    hidden: slice
    device: torch.device
    dropout: int | None = None

    @classmethod
    def of(cls, input_ids: Tensor, residual: Layout, mesh: Mesh, dropout: int | None = None) -> "Tokens":
        """Place the tokens of `input_ids` [B, S]. Raises ValueError when they do not divide by their axes."""
        B, S = input_ids.shape
        whole_sequences = mesh.size(HIDDEN.tokens)
        if B % whole_sequences:
            raise ValueError(
                f"a batch of {B} sequences does not divide by the {whole_sequences} ranks along {HIDDEN.tokens}"
            )
        return cls(S, _part(B * S, residual, mesh), _part(B * S, HIDDEN, mesh), input_ids.device, dropout)

    def positions(self, part: slice) -> Tensor:
        """The position in its sequence of each token of `part`."""
        return torch.arange(part.start, part.stop, device=self.device) % self.sequence

    def rows(self, part: slice) -> Tensor:
        """A global index of each token of `part` that does not depend on padding: (sequence in the batch, position)."""
        return (torch.arange(part.start, part.stop, device=self.device) // self.sequence << 32) + self.positions(part)


def _part(total: int, layout: Layout, mesh: Mesh) -> slice:
    ranks = mesh.size(layout.tokens)
    if total % ranks:
        raise ValueError(f"{total} tokens do not divide by the {ranks} ranks along {layout.tokens}: pad the sequences")
    first = mesh.index(layout.tokens) * (total // ranks)
    return slice(first, first + total // ranks)


def length_multiple(batch: int, residual: Layout, mesh: Mesh) -> int:
    """What sequence lengths must be a multiple of, so that `batch` sequences divide over the residual stream."""
    ranks = mesh.size(residual.tokens)
    return next(m for m in range(1, ranks + 1) if batch * m % ranks == 0)
