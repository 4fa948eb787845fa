"""What one decoder needs to know of a model; families/ reads it from a Hugging Face config.json."""

from collections import Counter
from dataclasses import dataclass, replace

from tessera.nn.rope import RopeConfig


@dataclass(frozen=True)
class LayerKind:
    """What a layer may have otherwise than its neighbours. `window`: the tokens that attention sees; None: all."""

    window: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes are global. `norm`: "rms" or "layer"; `activation`: "silu" (with `gated`), "gelu" or "gelu_tanh" (without).

    Positions are rotary when `rope` is given, else a learned table of `max_positions`. Dropouts are probabilities.
    `layer_kinds` repeat from layer 0 on: (LayerKind(8), LayerKind()) gives every even layer a window of 8 tokens.
    `new_tokens`: the last rows of the vocabulary, which a run adds to those of the base model.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    norm: str = "rms"
    norm_eps: float = 1e-6
    activation: str = "silu"
    gated: bool = True
    rope: RopeConfig | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tied: bool = False
    causal: bool = True
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    initializer_range: float = 0.02
    eager_attention: bool = False
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)
    new_tokens: int = 0

    def grown_to(self, vocab_size: int) -> "ModelConfig":
        """With a vocabulary of at least `vocab_size` tokens; those beyond the base model's are `new_tokens`."""
        more = max(0, vocab_size - self.vocab_size)
        return replace(self, vocab_size=self.vocab_size + more, new_tokens=self.new_tokens + more) if more else self

    @property
    def base(self) -> "ModelConfig":
        """With the vocabulary that the weights of the base model have."""
        return replace(self, vocab_size=self.vocab_size - self.new_tokens, new_tokens=0) if self.new_tokens else self

    def kind_of(self, layer: int) -> LayerKind:
        """What layer `layer`, counted from 0, has of its own."""
        return self.layer_kinds[layer % len(self.layer_kinds)]

    @property
    def windows(self) -> tuple[tuple[int | None, int], ...]:
        """The windows of its layers, each with the number of layers that have it; None: all tokens."""
        return tuple(Counter(self.kind_of(layer).window for layer in range(self.num_layers)).items())

    @property
    def dimensions(self) -> dict[str, int]:
        """The sizes that mesh axes cut, by the names users know; see `sizes.remedies.check_sizes`."""
        return {
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads,
            "kv_features": self.num_kv_heads * self.head_dim,
            "intermediate_size": self.ffn_size,
            "vocab_size": self.vocab_size,
        }
