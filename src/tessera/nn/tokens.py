"""The tokens of one micro-batch as one rank sees them: T = B · S of them, batch-major, cut as the two streams say."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.core.mesh import Mesh
from tessera.layout.streams import HIDDEN, Layout


@dataclass(frozen=True)
class Tokens:
    """`sequence` is S (padded); `dropout` the key of the step's masks, None in evaluation.

    `residual` are this rank's tokens in the residual stream, `attention` those of its whole sequences.
    """

    sequence: int
    residual: slice
    attention: slice
    device: torch.device
    dropout: int | None = None
    first_row: int = 0

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        residual: Layout,
        attention: Layout,
        mesh: Mesh,
        dropout: int | None = None,
        first_row: int = 0,
    ) -> "Tokens":
        """Place the tokens of `input_ids` [B, S]. Raises ValueError when they do not divide by their axes."""
        B, S = input_ids.shape
        whole_sequences = mesh.size(attention.tokens)
        if B % whole_sequences:
            raise ValueError(
                f"a batch of {B} sequences does not divide by the {whole_sequences} ranks along {attention.tokens}"
            )
        _part(B * S, HIDDEN, mesh)  # the rest of the hidden stream must divide too
        return cls(S, _part(B * S, residual, mesh), _part(B * S, attention, mesh), input_ids.device, dropout, first_row)

    def positions(self, part: slice) -> Tensor:
        """The position in its sequence of each token of `part`."""
        return torch.arange(part.start, part.stop, device=self.device) % self.sequence

    def rows(self, part: slice) -> Tensor:
        """An index of each token of `part` in the step that no layout changes, nor padding: (sequence, position)."""
        sequences = torch.arange(part.start, part.stop, device=self.device) // self.sequence + self.first_row
        return (sequences << 32) + self.positions(part)


def _part(total: int, layout: Layout, mesh: Mesh) -> slice:
    ranks = mesh.size(layout.tokens)
    if total % ranks:
        raise ValueError(f"{total} tokens do not divide by the {ranks} ranks along {layout.tokens}: pad the sequences")
    first = mesh.index(layout.tokens) * (total // ranks)
    return slice(first, first + total // ranks)
