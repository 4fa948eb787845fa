"""Self-attention on the hidden stream: heads cut over `col` (or col · inner), whole sequences on each rank.

q, k and v are one product of the residual stream; `attend` is the one door to the kernels. Grouped queries (Ainslie et
al. 2023): with kv heads that do not divide by the axes of the heads, k and v are still computed cut, then gathered
along features, and each rank takes the heads that its queries read; the backward sums their gradients into the shards.

Shape suffixes: B sequences of this rank, S positions, H heads of this rank, D head dimension, T = B·S.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.core.device import reads_grouped_heads
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.spec import Init
from tessera.layout.streams import check_chain
from tessera.nn.dropout import keep_mask
from tessera.nn.linear import ColumnParallelLinear, RowParallelLinear, parallel_linear
from tessera.nn.norm import HeadNorm
from tessera.nn.rope import rotate
from tessera.nn.tokens import Tokens
from tessera.product.moves import gather_then_reduce_scatter


def attend(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *, causal: bool) -> Tensor:
    """softmax(q kᵀ / √D) v, causal or not; k and v may have fewer heads, each read by an equal run of query heads."""
    grouped = q_BHSD.shape[1] != k_BHSD.shape[1]
    if grouped and not reads_grouped_heads(q_BHSD):
        k_BHSD, v_BHSD, grouped = _one_a_query(k_BHSD, q_BHSD), _one_a_query(v_BHSD, q_BHSD), False
    return F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=causal, enable_gqa=grouped)


def _one_a_query(kv_BHSD: Tensor, q_BHSD: Tensor) -> Tensor:
    """Grouped kv heads repeated until each query head has its own."""
    return kv_BHSD.repeat_interleave(q_BHSD.shape[1] // kv_BHSD.shape[1], 1)


def attend_with_dropout(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, keep: Tensor, p: float, *, causal: bool
) -> Tensor:
    """The same with probabilities dropped where `keep` [B, H, S, S] is False: no fused kernel takes a mask of ours."""
    k_BHSD, v_BHSD = _one_a_query(k_BHSD, q_BHSD), _one_a_query(v_BHSD, q_BHSD)
    scores = q_BHSD @ k_BHSD.transpose(-1, -2) / math.sqrt(q_BHSD.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores.softmax(-1, dtype=wide).to(scores.dtype)
    return (probabilities * keep.to(scores.dtype).div_(1 - p)) @ v_BHSD


def kv_heads_of(query_heads: range, num_heads: int, num_kv_heads: int) -> list[int]:
    """The kv heads these query heads need: each once if all are read equally often in a row, else one a query."""
    read = [head * num_kv_heads // num_heads for head in query_heads]
    once = list(dict.fromkeys(read))
    return once if read == [h for h in once for _ in range(len(read) // len(once))] else read


class Attention(nn.Module):
    """Multi-head self-attention: residual stream → residual stream."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        parallel: Parallel,
        *,
        name: str,
        causal: bool = True,
        qkv_bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        qk_norm_eps: float | None = None,
        init: Init = Init(std=0.02),
        out_init: Init = Init(std=0.02),
    ) -> None:
        super().__init__()
        self.name, self.parallel, self.causal, self.dropout = name, parallel, causal, dropout
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        hidden = self.hidden = parallel.attention
        kv_features = num_kv_heads * head_dim
        self.q = ColumnParallelLinear(features, num_heads * head_dim, parallel, bias=qkv_bias, init=init, hidden=hidden)
        self.k = ColumnParallelLinear(features, kv_features, parallel, bias=qkv_bias, init=init, hidden=hidden)
        self.v = ColumnParallelLinear(features, kv_features, parallel, bias=qkv_bias, init=init, hidden=hidden)
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = HeadNorm(head_dim, hidden, parallel, qk_norm_eps)
            self.k_norm = HeadNorm(head_dim, hidden, parallel, qk_norm_eps)
        self.out = RowParallelLinear(
            num_heads * head_dim, features, parallel, bias=out_bias, init=out_init, hidden=hidden
        )
        check_chain("q, k, v", self.q.output, "attention out", self.out.input)
        self.input, self.output = self.q.input, self.out.output

    def _heads(self, mesh: Mesh) -> range:
        """The query heads of this rank."""
        local, place = self.num_heads // mesh.size(self.hidden.features), mesh.index(self.hidden.features)
        return range(place * local, (place + 1) * local)

    def _key_value_heads(self, k: Tensor, v: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """k and v [T, local kv features] → [B, S, H, D] each, with the heads that this rank's queries read."""
        mesh = self.parallel.mesh
        both, axes = torch.stack([k, v]), list(self.hidden.features)
        while self.num_kv_heads % mesh.size(axes):  # a head is cut along these axes: the minor ones come together first
            both = gather_then_reduce_scatter(both, 2, mesh.group((axes.pop(),)))
        both = both.view(2, *shape, -1, self.head_dim)
        if axes != list(self.hidden.features):
            held = mesh.index(axes) * (self.num_kv_heads // mesh.size(axes))
            heads = kv_heads_of(self._heads(mesh), self.num_heads, self.num_kv_heads)
            both = both.index_select(3, torch.tensor([head - held for head in heads], device=k.device))
        k, v = both
        return k, v

    def forward(self, x_TF: Tensor, tokens: Tokens, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x_TF in the residual layout; `rope` the table of `rope_table`, or None for positions learned elsewhere."""
        q, k, v = parallel_linear([self.q, self.k, self.v], x_TF)
        shape = (q.shape[0] // tokens.sequence, tokens.sequence)
        if q.stride(-1) != 1:  # scattered over features: fused kernels want each head's features side by side
            q = q.contiguous()
        q = q.view(*shape, -1, self.head_dim)
        k, v = self._key_value_heads(k, v, shape)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.dropout and tokens.dropout is not None:
            out = attend_with_dropout(q, k, v, self._keep(tokens, tokens.dropout), self.dropout, causal=self.causal)
        else:
            out = attend(q, k, v, causal=self.causal)
        return self.out(out.transpose(1, 2).reshape(shape[0] * shape[1], -1))

    def _keep(self, tokens: Tokens, key: int) -> Tensor:
        """The mask [B, H, S, S] of probabilities kept: rows are (document, position), columns (head, position)."""
        rows, positions = tokens.attention.rows.view(-1, tokens.sequence), tokens.positions.unsqueeze(-2)
        layer = f"{self.name}.probabilities"
        # head by head: the hashes of a mask take eight times its memory
        heads = self._heads(self.parallel.mesh)
        return torch.stack([keep_mask(rows, (h << 32) + positions, self.dropout, key, layer) for h in heads], 1)
