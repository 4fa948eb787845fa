"""Mistral (Jiang et al. 2023): Llama whose queries may see only the last `sliding_window` tokens."""

from dataclasses import replace

from tessera.models.config import LayerKind, ModelConfig
from tessera.models.families import llama
from tessera.models.families.keys import Keys

WINDOW = 4096
"""What transformers takes where config.json has no `sliding_window`; null there means none."""


def read(keys: Keys) -> ModelConfig:
    """Llama's keys with other defaults, no biases, and the window of every layer (a run refuses one below its rows)."""
    keys.defaults(num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072)
    window = None if "sliding_window" in keys.nulls else keys.size("sliding_window", WINDOW)
    return replace(
        llama.read(keys),
        family="mistral",
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        layer_kinds=(LayerKind(window),),
    )


MISTRAL = replace(llama.LLAMA, architecture="MistralForCausalLM", read=read)
