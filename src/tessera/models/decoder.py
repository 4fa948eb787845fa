"""The decoder: one model for every family, free of distribution; its layers know where their parts lie.

embedding (+ positions) → dropout → [ norm → attention → dropout → + · norm → MLP → dropout → + ] × L → norm → loss
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessera.core.host_memory import HostMemory
from tessera.data.batch import MicroBatch
from tessera.layout.parallel import Parallel
from tessera.layout.shape import Savers
from tessera.layout.spec import Init, ParameterSpec
from tessera.layout.streams import Layout, check_chain
from tessera.models.config import ModelConfig
from tessera.nn.attention import Attention, AttentionConfig
from tessera.nn.context.cut import cut
from tessera.nn.dropout import dropout
from tessera.nn.embedding import LearnedPositions, VocabParallelEmbedding
from tessera.nn.initialize import initialize
from tessera.nn.loss import LossSpec, linear_cross_entropy
from tessera.nn.mlp import MLP
from tessera.nn.norm import LayerNorm, Norm, RMSNorm
from tessera.nn.once import Once
from tessera.nn.parameter import ParallelModule, gather_whole, to_local
from tessera.nn.rope import rope_table
from tessera.nn.tokens import Tokens
from tessera.product.gathered import distributed_product
from tessera.product.overlap import BACKWARD, FORWARD, Overlap


def _norm(config: ModelConfig, parallel: Parallel) -> Norm:
    kind = {"rms": RMSNorm, "layer": LayerNorm}[config.norm]
    return kind(config.hidden_size, parallel.residual, parallel, config.norm_eps)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, parallel: Parallel, index: int, savers: Savers = Savers()) -> None:
        super().__init__()
        self.savers = savers
        self.name, self.p = f"layers.{index}", config.residual_dropout
        init = Init(std=config.initializer_range)
        # projections into the residual stream start smaller, by the number of them (GPT-2, Radford et al. 2019, 2.3)
        out_init = (
            Init(std=config.initializer_range / (2 * config.num_layers) ** 0.5) if config.norm == "layer" else init
        )
        self.attention_norm = _norm(config, parallel)
        attention = AttentionConfig(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            causal=config.causal,
            window=config.kind_of(index).window,
            qkv_bias=config.qkv_bias,
            out_bias=config.attention_out_bias,
            dropout=config.attention_dropout,
            eager=config.eager_attention,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            init=init,
            out_init=out_init,
        )
        self.attention = Attention(attention, parallel, name=f"{self.name}.attention")
        self.mlp_norm = _norm(config, parallel)
        self.mlp = MLP(
            config.hidden_size,
            config.ffn_size,
            parallel,
            activation=config.activation,
            gated=config.gated,
            bias=config.mlp_bias,
            init=init,
            out_init=out_init,
            tiles=savers.mlp_tiles,
        )
        check_chain("attention_norm", self.attention_norm.output, "attention", self.attention.input)
        check_chain("attention", self.attention.output, "mlp_norm", self.mlp_norm.input)
        check_chain("mlp_norm", self.mlp_norm.output, "mlp", self.mlp.input)

    def forward(
        self,
        x_TF: Tensor,
        tokens: Tokens,
        rope: tuple[Tensor, Tensor] | None,
        recompute: bool = False,
        host: HostMemory | None = None,
    ) -> Tensor:
        """x_TF and the result lie in the residual layout; `recompute` keeps x_TF alone for the backward, and what the
        `savers` say. With `host` what is kept lies in host memory.
        """
        if host is None:
            return self._kept(x_TF, tokens, rope, recompute, None)
        with host.saving([*map(to_local, self.parameters()), *(rope or ())]):
            return self._kept(x_TF, tokens, rope, recompute, host)

    def _kept(
        self, x_TF: Tensor, tokens: Tokens, rope: tuple[Tensor, Tensor] | None, recompute: bool, host: HostMemory | None
    ) -> Tensor:
        if recompute:  # inside the layer, so that FSDP2, which wraps it, gathers its weights once for both
            # masks come from indices, not from a generator: there is no RNG state to preserve
            once = Once(host) if self.savers.attention_once else None
            return checkpoint(self._run, x_TF, tokens, rope, once, use_reentrant=False, preserve_rng_state=False)
        return self._run(x_TF, tokens, rope)

    def _run(
        self, x_TF: Tensor, tokens: Tokens, rope: tuple[Tensor, Tensor] | None, once: Once | None = None
    ) -> Tensor:
        if once is not None:
            once.begin()
        attended = self.attention(self.attention_norm(x_TF), tokens, rope, once)
        x_TF = x_TF + drop(attended, tokens, self.p, self.attention_norm, f"{self.name}.attention")
        fed = self.mlp(self.mlp_norm(x_TF))
        return x_TF + drop(fed, tokens, self.p, self.mlp_norm, f"{self.name}.mlp")


def drop(x_TF: Tensor, tokens: Tokens, p: float, stream: Norm, layer: str) -> Tensor:
    """Dropout of the residual stream in training; `stream` is the norm whose features x has."""
    if not p or tokens.dropout is None:
        return x_TF
    features = stream.specs["weight"].local_slices(stream.parallel.mesh)[0]
    columns = torch.arange(features.start, features.stop, device=x_TF.device)
    return dropout(x_TF, tokens.residual.rows, columns, p, tokens.dropout, layer)


class OutputHead(ParallelModule):
    """The head's own parameters: none of a tied weight, which is the embedding's shard."""

    def __init__(self, config: ModelConfig, parallel: Parallel) -> None:
        super().__init__(parallel)
        self.plan = parallel.column()
        self.input = self.plan.input
        if not config.tied:
            shape = (config.vocab_size, config.hidden_size)
            init = Init(std=config.initializer_range)
            self.declare("weight", ParameterSpec(shape, self.plan.weight_cuts, self.plan.input, init))
        if config.head_bias:
            self.declare("bias", ParameterSpec((config.vocab_size,), self.plan.bias_cuts, self.plan.output, Init()))


class Decoder(nn.Module):
    """A language model of `config` on the mesh of `parallel`; its parameters are empty until `initialize` or a load."""

    keeps_gathered = False
    """Whether FSDP2 keeps gathered weights from the forward until gradients are summed (engine/fsdp.py)."""
    sums_each_batch = False
    """Whether FSDP2 sums gradients after every micro-batch, not after a step's last one alone."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: Parallel,
        *,
        gradient_checkpointing: bool = False,
        savers: Savers = Savers(),
    ) -> None:
        super().__init__()
        parallel = replace(parallel, overlap=Overlap())  # which knows the order of this model's weights
        self.config, self.parallel, self.gradient_checkpointing = config, parallel, gradient_checkpointing
        self.savers = savers
        init = Init(std=config.initializer_range)
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, parallel, init=init)
        self.embedding.used_twice = config.tied
        self.positions = None
        if config.rope is None:
            self.positions = LearnedPositions(config.max_positions, config.hidden_size, parallel, init=init)
        # by their index in the whole model, so that names are the same where some layers are elsewhere
        layers = {str(i): DecoderLayer(config, parallel, i, savers) for i in range(config.num_layers)}
        self.layers = nn.ModuleDict(layers)
        self.norm = _norm(config, parallel)
        self.head = OutputHead(config, parallel)
        check_chain("embedding", self.embedding.output, "the layers", self.norm.input)
        check_chain("norm", self.norm.output, "head", self.head.input)

    @property
    def residual(self) -> Layout:
        return self.parallel.residual

    def initialize(self, seed: int) -> None:
        """Random weights from (seed, parameter name, global index), the same on every mesh."""
        initialize(self, self.parallel.mesh, seed)

    def cut(self, batch: MicroBatch) -> MicroBatch:
        """This rank's part of a micro-batch of its data rank: where several ranks share sequences, else all of it."""
        return cut(batch, self.parallel, self.config.windows)

    def begin(self, batch: MicroBatch, dropout_key: int | None = None) -> Tokens:
        """The tokens of `batch`, the same on every model rank, for a forward that begins."""
        self.parallel.overlap.begin(FORWARD, BACKWARD if torch.is_grad_enabled() else None)
        return Tokens.of(batch, self.parallel.streams, self.parallel.mesh, dropout_key)

    def embed(self, tokens: Tokens) -> Tensor:
        """The residual stream before the first layer."""
        x = self.embedding(self._looked_up(tokens.batch.input_ids))
        if self.positions is not None:
            x = x + self.positions(tokens.residual.positions)
        return drop(x, tokens, self.config.embedding_dropout, self.norm, "embedding")

    def run_layers(self, x_TF: Tensor, tokens: Tokens) -> Tensor:
        """The residual stream after the layers that are here."""
        grad = torch.is_grad_enabled()
        rope, recompute = None, self.gradient_checkpointing and grad
        host = HostMemory(x_TF.device) if self.savers.offload and grad else None
        if self.config.rope is not None:
            rope = rope_table(tokens.positions, self.config.head_dim, self.config.rope, self.parallel.compute)
        for layer in self.layers.values():
            x_TF = layer(x_TF, tokens, rope, recompute, host)
        return x_TF

    def loss(self, x_TF: Tensor, tokens: Tokens, denominator: float, label_smoothing: float = 0.0) -> Tensor:
        """What `forward` returns, of the residual stream after the last layer."""
        head = LossSpec(
            self.head.plan.roles(self.parallel.mesh),
            self.embedding.vocabulary,
            self.config.vocab_size,
            denominator,
            label_smoothing,
        )
        targets = self._looked_up(tokens.batch.targets)
        return linear_cross_entropy(self.norm(x_TF), self._head_weight(), self._head_bias(), targets, head)

    def _looked_up(self, ids: Tensor) -> Tensor:
        """This rank's part of `ids`, flat: what the embedding looks up and the loss is taken over."""
        mesh, axes = self.parallel.mesh, self.parallel.streams.ids
        return ids.reshape(-1).chunk(mesh.size(axes))[mesh.index(axes)]

    def _head_weight(self) -> Tensor:
        return (self.embedding if self.config.tied else self.head).local("weight")

    def _head_bias(self) -> Tensor | None:
        return self.head.local("bias") if self.config.head_bias else None

    def forward(
        self, batch: MicroBatch, denominator: float, *, dropout_key: int | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        """The summed cross entropy over this rank's tokens divided by `denominator`.

        `batch` is the same on every model rank; `dropout_key` switches dropout on (see nn/dropout.py). The three parts,
        `embed`, `run_layers` and `loss`, take and give the residual stream in its layout.
        """
        tokens = self.begin(batch, dropout_key)
        return self.loss(self.run_layers(self.embed(tokens), tokens), tokens, denominator, label_smoothing)

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Full logits [B, S, V] on every rank, for sampling and tests."""
        mesh = self.parallel.mesh
        tokens = self.begin(MicroBatch(input_ids, input_ids, valid=0))
        x = self.norm(self.run_layers(self.embed(tokens), tokens))
        roles = self.head.plan.roles(mesh)
        (local,) = distributed_product(x, [self._head_weight()], [self._head_bias()], roles)
        shape, output = (input_ids.numel(), self.config.vocab_size), self.head.plan.output
        return gather_whole(local, shape, (output.tokens, output.features), mesh).view(*input_ids.shape, -1)
