"""What every contender trains: a Llama of a given shape, its weights in one folder, its batches by number."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
SEED = 1234
DISTINCT_BATCHES = 4  # batches repeat, so that the loss falls and a wrong update shows in it


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama with an untied head, and of its batch."""

    name: str
    vocab_size: int
    layers: int = 4
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 1408
    sequence: int = 256
    batch: int = 4

    @property
    def parameters(self) -> int:
        """Number of parameters, from the sizes alone."""
        attention = 2 * self.hidden**2 * (1 + self.kv_heads / self.heads)
        layer = int(attention) + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + self.hidden + 2 * self.vocab_size * self.hidden


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("8k", vocab_size=8192),
        Shape("32k", vocab_size=32000),
        Shape("tiny", vocab_size=96, layers=2, hidden=32, heads=4, kv_heads=2, ffn=64, sequence=16, batch=2),
    )
}


def write_weights(shape: Shape, folder: Path) -> None:
    """Write config.json and model.safetensors of `shape`, initialised from the fixed seed, into `folder`."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        max_position_embeddings=shape.sequence,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        dtype="float32",
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    if count != shape.parameters:
        raise AssertionError(f"shape {shape.name} should have {shape.parameters} parameters, the model has {count}")
    model.save_pretrained(folder)


def batch(shape: Shape, step: int) -> Tensor:
    """Token ids of step number `step`, int64 [batch, sequence]; its labels are the same, shifted."""
    generator = torch.Generator().manual_seed(SEED + step % DISTINCT_BATCHES)
    return torch.randint(shape.vocab_size, (shape.batch, shape.sequence), generator=generator)
