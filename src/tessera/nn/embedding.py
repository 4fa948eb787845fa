"""Vocabulary-parallel embedding and learned positions.

The embedding is a product with a one-hot X whose move is free: roles T = row, K = col (the vocabulary), N = inner. Its
weight is gathered and its output summed in one collective each, whatever the schedule.
Each rank looks up the tokens that lie in its part of the vocabulary, zero elsewhere, and the parts are summed over
`col` into the residual stream. The vocabulary may be uneven. The weight lies as the head's does: a tied head is the
same shard.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.layout.parallel import Parallel
from tessera.layout.spec import Init, ParameterSpec
from tessera.nn.parameter import ParallelModule
from tessera.product.moves import gather_then_reduce_scatter, reduce_then_gather


class VocabParallelEmbedding(ParallelModule):
    """Token ids → residual stream. Weight [V: col][h: inner, row]."""

    def __init__(self, vocab_size: int, features: int, parallel: Parallel, *, init: Init = Init(std=0.02)) -> None:
        super().__init__(parallel)
        self.plan = as_head = parallel.column()
        self.output = parallel.residual
        # acts on the hidden stream's one-hot rows; its vocabulary takes the place of the hidden features
        self.declare("weight", ParameterSpec((vocab_size, features), as_head.weight_cuts, parallel.row().input, init))
        self.vocabulary = self.specs["weight"].local_slices(parallel.mesh)[0]

    def forward(self, ids_T: Tensor) -> Tensor:
        """ids_T: the token ids [T / (depth·row)] of this rank's part, alike on every rank of col and inner.

        Returns [T_local, h_local] in the residual layout.
        """
        mesh = self.parallel.mesh
        # looked up in the parameter's own dtype: its gradient is a sum over every time a token occurs
        weight = gather_then_reduce_scatter(self.stored("weight"), 1, mesh.group(self.plan.tokens_axes))
        col = mesh.group(("col",))
        if col is None:
            return F.embedding(ids_T, weight).to(self.parallel.compute)
        here = (ids_T >= self.vocabulary.start) & (ids_T < self.vocabulary.stop)
        rows = torch.where(here, ids_T - self.vocabulary.start, 0)
        partial = F.embedding(rows, weight).to(self.parallel.compute) * here.unsqueeze(-1)
        return reduce_then_gather(partial, self.output.stored_dim("col"), col)


class LearnedPositions(ParallelModule):
    """A vector for each position in its sequence, added to the residual stream. Weight [positions][h: inner]."""

    def __init__(self, positions: int, features: int, parallel: Parallel, *, init: Init = Init(std=0.02)) -> None:
        super().__init__(parallel)
        cuts = ((), parallel.residual.features)
        self.declare("weight", ParameterSpec((positions, features), cuts, parallel.residual, init))

    def forward(self, positions_T: Tensor) -> Tensor:
        """positions_T: the position of each of this rank's tokens in the residual layout."""
        last = self.specs["weight"].shape[0] - 1  # only padding lies beyond: its targets are ignored
        return F.embedding(positions_T.clamp(max=last), self.stored("weight")).to(self.parallel.compute)
