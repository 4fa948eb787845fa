"""Tiny random transformers models, saved as folders; ours loaded from them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.decoder import Decoder
from tessera.models.hub import load_weights, read_model_config
from tessera.nn.parameter import named_specs, to_local

LLAMA = {
    "vocab_size": 509,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {
    "vocab_size": 509,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "llama tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama biases head_dim rope": transformers.LlamaConfig(
        **LLAMA, attention_bias=True, mlp_bias=True, head_dim=10, rope_parameters=dict(ROPE)
    ),
    "qwen3": transformers.Qwen3Config(**LLAMA, head_dim=10),
    "qwen2": transformers.Qwen2Config(**LLAMA),
    "qwen2 tied": transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**LLAMA, sliding_window=None),
    "mistral head_dim window": transformers.MistralConfig(**LLAMA, head_dim=10, sliding_window=16),  # of 24 tokens
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt2 untied n_inner gelu": transformers.GPT2Config(
        **GPT2, tie_word_embeddings=False, n_inner=56, activation_function="gelu"
    ),
}


@cache
def random_model(case: str) -> transformers.PreTrainedModel:
    """Every parameter random, gains and biases too: what is left out or swapped shows."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[case]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(mean=float(is_gain), std=0.1)
    return model


def save(case: str, folder: Path, **options: object) -> Path:
    random_model(case).save_pretrained(folder, **options)
    return folder


def empty(folder: Path, mesh: Mesh | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    """Our model of `folder`, every parameter filled with NaN."""
    parallel = Parallel(mesh or Mesh(), residual_layout(True), dtype, dtype)
    model = Decoder(read_model_config(folder), parallel)
    for _, parameter, _ in named_specs(model):
        to_local(parameter).fill_(float("nan"))
    return model


def loaded(folder: Path, mesh: Mesh | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    model = empty(folder, mesh, dtype)
    load_weights(model, folder)
    return model


def ids() -> torch.Tensor:
    return torch.randint(0, 509, (2, 24), generator=torch.Generator().manual_seed(1))


@contextmanager
def rewritten(file: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a safetensors file to be changed; written back at the end."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    yield tensors
    save_file(tensors, file, {"format": "pt"})
