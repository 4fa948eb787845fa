"""GPT-2 (Radford et al. 2019)."""

from tessera.models.config import ModelConfig
from tessera.models.families.family import Family, Module
from tessera.models.families.keys import Keys, check_divides

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
SWITCHES = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def read(keys: Keys) -> ModelConfig:
    """The sizes, with learned positions, biases everywhere, LayerNorm and dropouts."""
    for key, built in SWITCHES.items():
        if keys.flag(key, built) != built:
            raise keys.error(key, "this variant is not built", f"{key}: {str(built).lower()}")
    hidden_size, num_heads = keys.size("n_embd", 768), keys.size("n_head", 12)
    check_divides(keys, "n_embd", hidden_size, "n_head", num_heads)
    return ModelConfig(
        family="gpt2",
        vocab_size=keys.size("vocab_size", 50257),
        hidden_size=hidden_size,
        num_layers=keys.size("n_layer", 12),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=keys.size("n_inner", 4 * hidden_size),
        max_positions=keys.size("n_positions", 1024),
        norm="layer",
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=keys.choice("activation_function", "gelu_new", ACTIVATIONS),
        gated=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied=keys.flag("tie_word_embeddings", True),
        embedding_dropout=keys.number("embd_pdrop", 0.1, below=1),
        attention_dropout=keys.number("attn_pdrop", 0.1, below=1),
        residual_dropout=keys.number("resid_pdrop", 0.1, below=1),
        initializer_range=keys.number("initializer_range", 0.02),
    )


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    read=read,
    modules=(
        Module("transformer.wte", ("embedding",)),
        Module("transformer.wpe", ("positions",)),
        Module("transformer.h.{i}.ln_1", ("layers.{i}.attention_norm",)),
        Module(
            "transformer.h.{i}.attn.c_attn",
            ("layers.{i}.attention.q", "layers.{i}.attention.k", "layers.{i}.attention.v"),
            transposed=True,
        ),
        Module("transformer.h.{i}.attn.c_proj", ("layers.{i}.attention.out",), transposed=True),
        Module("transformer.h.{i}.ln_2", ("layers.{i}.mlp_norm",)),
        Module("transformer.h.{i}.mlp.c_fc", ("layers.{i}.mlp.up",), transposed=True),
        Module("transformer.h.{i}.mlp.c_proj", ("layers.{i}.mlp.down",), transposed=True),
        Module("transformer.ln_f", ("norm",)),
        Module("lm_head", ("head",), kinds=("weight",)),
    ),
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    buffers=(".attn.bias", ".attn.masked_bias"),
)
