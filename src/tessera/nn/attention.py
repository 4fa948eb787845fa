"""Self-attention on the hidden stream: heads cut over `col` (or col · inner), whole sequences on each rank.

q, k and v are one product of the residual stream; attend.py chooses the kernel. Grouped queries (Ainslie et al. 2023):
with kv heads that do not divide by the axes of the heads, k and v are still computed cut, then gathered along features,
and each rank takes the heads that its queries read; the backward sums their gradients into the shards.

Shape suffixes: B sequences of this rank, S positions, H heads of this rank, D head dimension, T = B·S.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.spec import Init
from tessera.layout.streams import check_chain
from tessera.nn.attend import attend
from tessera.nn.context.attention import shared_attention
from tessera.nn.context.heads import kv_heads_of
from tessera.nn.dropout import keep_mask
from tessera.nn.linear import ColumnParallelLinear, RowParallelLinear, parallel_linear
from tessera.nn.mask import Mask
from tessera.nn.norm import HeadNorm
from tessera.nn.once import Once
from tessera.nn.rope import rotate
from tessera.nn.tokens import Tokens
from tessera.product.moves import gather_then_reduce_scatter


@dataclass(frozen=True)
class AttentionConfig:
    """One layer's attention, in global sizes: `features` of the residual stream, heads of `head_dim` each.

    `window` is how many tokens a query sees, itself among them; None: all. `dropout` is the probability with which a
    softmax probability is dropped; `qk_norm_eps` the eps of an RMSNorm of each query and key head, None: there is none.
    `eager` computes step by step, whatever kernel would fit.
    """

    features: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = True
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    dropout: float = 0.0
    qk_norm_eps: float | None = None
    init: Init = Init(std=0.02)
    out_init: Init = Init(std=0.02)
    eager: bool = False


class Attention(nn.Module):
    """Multi-head self-attention: residual stream → residual stream. `name` names its dropout, alike on every mesh."""

    def __init__(self, config: AttentionConfig, parallel: Parallel, *, name: str) -> None:
        super().__init__()
        self.config, self.parallel, self.name = config, parallel, name
        hidden = self.hidden = parallel.attention
        q_features, kv_features = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

        def column(features: int) -> ColumnParallelLinear:
            bias, init = config.qkv_bias, config.init
            return ColumnParallelLinear(config.features, features, parallel, bias=bias, init=init, hidden=hidden)

        self.q, self.k, self.v = column(q_features), column(kv_features), column(kv_features)
        self.q_norm = self.k_norm = None
        if config.qk_norm_eps is not None:
            self.q_norm = HeadNorm(config.head_dim, hidden, parallel, config.qk_norm_eps)
            self.k_norm = HeadNorm(config.head_dim, hidden, parallel, config.qk_norm_eps)
        self.out = RowParallelLinear(
            q_features, config.features, parallel, bias=config.out_bias, init=config.out_init, hidden=hidden
        )
        check_chain("q, k, v", self.q.output, "attention out", self.out.input)
        self.input, self.output = self.q.input, self.out.output

    def _heads(self, mesh: Mesh) -> range:
        """The query heads of this rank."""
        local, place = self.config.num_heads // mesh.size(self.hidden.features), mesh.index(self.hidden.features)
        return range(place * local, (place + 1) * local)

    def _key_value_heads(self, k: Tensor, v: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """k and v [T, local kv features] → [B, S, H, D] each, with the heads that this rank's queries read."""
        mesh, kv_heads = self.parallel.mesh, self.config.num_kv_heads
        both, axes = torch.stack([k, v]), list(self.hidden.features)
        while kv_heads % mesh.size(axes):  # a head is cut along these axes: the minor ones come together first
            both = gather_then_reduce_scatter(both, 2, mesh.group((axes.pop(),)))
        both = both.view(2, *shape, -1, self.config.head_dim)
        if axes != list(self.hidden.features):
            held = mesh.index(axes) * (kv_heads // mesh.size(axes))
            heads = kv_heads_of(self._heads(mesh), self.config.num_heads, kv_heads)
            both = both.index_select(3, torch.tensor([head - held for head in heads], device=k.device))
        k, v = both
        return k, v

    def forward(
        self, x_TF: Tensor, tokens: Tokens, rope: tuple[Tensor, Tensor] | None = None, once: Once | None = None
    ) -> Tensor:
        """x_TF in the residual layout; `rope` the table of `rope_table`, or None for positions learned elsewhere.

        `once`: of a layer that runs again; attention itself, between the products, does not.
        """
        q, k, v = parallel_linear([self.q, self.k, self.v], x_TF)
        shape = (q.shape[0] // tokens.sequence, tokens.sequence)
        if q.stride(-1) != 1:  # scattered over features: fused kernels want each head's features side by side
            q = q.contiguous()
        q = q.view(*shape, -1, self.config.head_dim)
        k, v = self._key_value_heads(k, v, shape)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if tokens.stream is not None:
            return self.out(self._shared(q, k, v, tokens, once).flatten(1))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = Mask(self.config.causal, self.config.window, tokens.documents)
        p, key = self.config.dropout, tokens.dropout
        keep = None if not p or key is None else self._keep(tokens, key)
        out, _ = attend(q, k, v, mask, keep=keep, p=p, eager=self.config.eager, once=once)
        return self.out(out.transpose(1, 2).reshape(shape[0] * shape[1], -1))

    def _shared(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, tokens: Tokens, once: Once | None) -> Tensor:
        """Attention over sequences that several ranks share, [T, H, D]: this rank's tokens are one row."""
        if not self.config.causal or (self.config.dropout and tokens.dropout is not None):
            raise ValueError("ranks share sequences in causal attention without dropout alone")
        (q,), (k,), (v,) = q_BSHD, k_BSHD, v_BSHD
        return shared_attention(q, k, v, tokens.route(self.parallel, self.config.window), self.parallel, once=once)

    def _keep(self, tokens: Tokens, key: int) -> Tensor:
        """The mask [B, H, S, S] of probabilities kept: rows are (document, position), columns (head, position)."""
        rows, positions = tokens.attention.rows.view(-1, tokens.sequence), tokens.positions.unsqueeze(-2)
        layer = f"{self.name}.probabilities"
        # head by head: the hashes of a mask take eight times its memory
        heads = self._heads(self.parallel.mesh)
        return torch.stack([keep_mask(rows, (h << 32) + positions, self.config.dropout, key, layer) for h in heads], 1)
