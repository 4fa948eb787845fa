"""Runs on every rank of a pool: masks of a mesh against those of one process."""

import torch
from torch import Tensor

from nn.shards import chunk, parallel_of, part, tokens_of
from tessera.layout.parallel import Parallel
from tessera.layout.streams import HIDDEN
from tessera.models.decoder import drop
from tessera.nn.attention import Attention, AttentionConfig
from tessera.nn.norm import RMSNorm

B, FEATURES, HEADS, P, KEY = 4, 16, 4, 0.3, 5


def masks(parallel: Parallel, sequence: int) -> tuple[Tensor, Tensor]:
    """This rank's masks of the residual stream [T_local, F_local] and of attention probabilities [B, H, S, S]."""
    norm = RMSNorm(FEATURES, parallel.residual, parallel, 1e-6)
    attention = Attention(AttentionConfig(FEATURES, HEADS, HEADS, 4, dropout=P), parallel, name="layers.1.attention")
    tokens = tokens_of(torch.zeros(B, sequence, dtype=torch.int64), parallel, KEY)
    features = FEATURES // parallel.mesh.size(parallel.residual.features)
    ones = torch.ones(len(tokens.residual.rows), features, dtype=torch.float64)
    return drop(ones, tokens, P, norm, "layers.1.mlp"), attention._keep(tokens, KEY)


def masks_agree(sizes: dict[str, int], sequence_parallel: bool, sequence: int) -> tuple[bool, bool]:
    """Whether this rank's masks are, bit for bit, its parts of the masks of one process."""
    parallel = parallel_of(sizes, sequence_parallel)
    mesh = parallel.mesh
    stream, probabilities = masks(parallel, sequence)
    whole_stream, whole_probabilities = masks(parallel_of({}), sequence)
    expected = chunk(chunk(whole_probabilities, 0, HIDDEN.tokens, mesh), 1, HIDDEN.features, mesh)
    return torch.equal(stream, part(whole_stream, parallel.residual, mesh)), torch.equal(probabilities, expected)
