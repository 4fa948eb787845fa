"""Llama (Touvron et al. 2023; Grattafiori et al. 2024), and what other families share with it."""

from tessera.models.config import ModelConfig
from tessera.models.families.family import Family, Module
from tessera.models.families.keys import Keys, check_divides, check_width, rope_config


def read(keys: Keys) -> ModelConfig:
    """The sizes, with heads whose keys and values may be fewer, rotary positions and a gated MLP."""
    hidden_size, num_heads = keys.size("hidden_size", 4096), keys.size("num_attention_heads", 32)
    num_kv_heads = keys.size("num_key_value_heads", num_heads)
    max_positions = keys.size("max_position_embeddings", 2048)
    if "head_dim" not in keys.content:
        check_divides(keys, "hidden_size", hidden_size, "num_attention_heads", num_heads)
    check_divides(keys, "num_attention_heads", num_heads, "num_key_value_heads", num_kv_heads)
    head_dim = keys.size("head_dim", hidden_size // num_heads)
    check_divides(keys, "head_dim", head_dim, "the two halves that rotate", 2)
    check_width(keys, "num_attention_heads", num_heads, head_dim)
    attention_bias = keys.flag("attention_bias", False)
    return ModelConfig(
        family="llama",
        vocab_size=keys.size("vocab_size", 32000),
        hidden_size=hidden_size,
        num_layers=keys.size("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=keys.size("intermediate_size", 11008),
        max_positions=max_positions,
        norm="rms",
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        activation=keys.choice("hidden_act", "silu", {"silu": "silu"}),
        gated=True,
        rope=rope_config(keys, max_positions),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=keys.flag("mlp_bias", False),
        tied=keys.flag("tie_word_embeddings", False),
        attention_dropout=keys.number("attention_dropout", 0.0, below=1),
        initializer_range=keys.number("initializer_range", 0.02),
    )


MODULES = (
    Module("model.embed_tokens", ("embedding",)),
    Module("model.layers.{i}.input_layernorm", ("layers.{i}.attention_norm",)),
    Module("model.layers.{i}.self_attn.q_proj", ("layers.{i}.attention.q",)),
    Module("model.layers.{i}.self_attn.k_proj", ("layers.{i}.attention.k",)),
    Module("model.layers.{i}.self_attn.v_proj", ("layers.{i}.attention.v",)),
    Module("model.layers.{i}.self_attn.o_proj", ("layers.{i}.attention.out",)),
    Module("model.layers.{i}.post_attention_layernorm", ("layers.{i}.mlp_norm",)),
    Module("model.layers.{i}.mlp.gate_proj", ("layers.{i}.mlp.gate",)),
    Module("model.layers.{i}.mlp.up_proj", ("layers.{i}.mlp.up",)),
    Module("model.layers.{i}.mlp.down_proj", ("layers.{i}.mlp.down",)),
    Module("model.norm", ("norm",)),
    Module("lm_head", ("head",), kinds=("weight",)),
)

LLAMA = Family(
    architecture="LlamaForCausalLM", prefix="model.", read=read, modules=MODULES, buffers=(".rotary_emb.inv_freq",)
)
