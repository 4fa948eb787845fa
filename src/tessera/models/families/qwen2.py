"""Qwen 2 and 2.5 (Qwen team 2024): Llama with biases on q, k and v."""

from dataclasses import replace

from tessera.models.config import ModelConfig
from tessera.models.families import llama
from tessera.models.families.keys import Keys, check_no_window


def read(keys: Keys) -> ModelConfig:
    """Llama's keys with other defaults. The biases are always there: transformers heeds no key that names them."""
    check_no_window(keys)
    keys.defaults(num_key_value_heads=32, vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768)
    return replace(llama.read(keys), family="qwen2", qkv_bias=True, attention_out_bias=False, mlp_bias=False)


QWEN2 = replace(llama.LLAMA, architecture="Qwen2ForCausalLM", read=read)
