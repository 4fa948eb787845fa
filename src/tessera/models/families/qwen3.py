"""Qwen3 (Qwen team 2025): Llama with a norm of each query and key head."""

from dataclasses import replace

from tessera.models.config import ModelConfig
from tessera.models.families import llama
from tessera.models.families.family import Family, Module
from tessera.models.families.keys import Keys, check_no_window


def read(keys: Keys) -> ModelConfig:
    """Llama's keys with other defaults, and a norm of each query and key head."""
    check_no_window(keys)
    keys.defaults(
        num_key_value_heads=32,
        vocab_size=151936,
        intermediate_size=22016,
        max_position_embeddings=32768,
        head_dim=128,
    )
    return replace(llama.read(keys), family="qwen3", qk_norm=True)


QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    read=read,
    modules=(
        *llama.MODULES,
        Module("model.layers.{i}.self_attn.q_norm", ("layers.{i}.attention.q_norm",)),
        Module("model.layers.{i}.self_attn.k_norm", ("layers.{i}.attention.k_norm",)),
    ),
)
