"""Which keys a query of attention sees: a value, of which each kernel materialises only the block that it needs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.nn.documents import Documents


@dataclass(frozen=True)
class Mask:
    """Which keys of its row a query sees.

    `causal`: none after itself. `window`: those fewer than so many tokens away, itself among them.
    `documents`: those of its own document; None: each row is one document.
    E.g. causal with a window of 2: query 3 sees the keys 2 and 3.
    """

    causal: bool
    window: int | None = None
    documents: Documents | None = None

    def hidden(self, queries: range, keys: range, device: torch.device) -> Tensor | None:
        """True where a query does not see a key: boolean [q, k], or [B, 1, q, k] with documents; None: all are seen."""
        hidden, ahead = None, 1 if self.causal else self.window  # by how much the first hidden key is ahead
        if ahead is not None:
            ones = torch.ones(len(queries), len(keys), dtype=torch.bool, device=device)
            itself = queries.start - keys.start  # the diagonal on which a query meets its own key
            hidden = ones.triu(itself + ahead)
            if self.window is not None:
                hidden |= ones.tril(itself - self.window)
        if self.documents is not None:
            own, other = (self.documents.ids[:, part.start : part.stop] for part in (queries, keys))
            foreign = (own.unsqueeze(-1) != other.unsqueeze(-2)).unsqueeze(1)
            hidden = foreign if hidden is None else foreign.logical_or_(hidden)
        return hidden
