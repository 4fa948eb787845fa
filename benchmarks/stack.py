"""Tokens a second and model FLOPs utilisation of a stack of decoder layers on one device.

`python benchmarks/stack.py` takes four layers of Llama 3 8B's shape; on a CPU give it small sizes. `--contender
transformers` trains the same shape with plain transformers. Prints one line, with the hardware, versions and date. MFU
counts 6 operations for each parameter of a product and token, and 6·S·h for the two products of causal attention over S
positions (Chowdhery et al. 2022, appendix B, halved for the mask).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor, nn

from tessera.core import device as devices
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.nn.rope import RopeConfig


def flops_per_token(model: ModelConfig, sequence: int) -> float:
    """Operations of forward and backward for each token, embedding look-ups aside."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    products = (
        model.num_layers * model.hidden_size * (heads + 3 * model.ffn_size) + model.hidden_size * model.vocab_size
    )
    return 6 * products + 6 * model.num_layers * sequence * model.num_heads * model.head_dim


def trainer_of(
    model: ModelConfig, device: torch.device, compute: torch.dtype
) -> tuple[nn.Module, Callable[..., object]]:
    """Tessera's decoder and its step on ids and targets."""
    decoder = Decoder(model, Parallel(Mesh({}, device), residual_layout(True), compute=compute))
    decoder.initialize(seed=0)
    step = Step(decoder, build_optimizer(decoder, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.1), max_grad_norm=1.0)
    return decoder, lambda ids, targets: step([MicroBatch(ids, targets, ids.numel())], 0, 1e-4)


def transformers_of(
    model: ModelConfig, device: torch.device, compute: torch.dtype
) -> tuple[nn.Module, Callable[..., object]]:
    """The same of transformers: its Llama with sdpa, autocast, clipping and fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        intermediate_size=model.ffn_size,
        max_position_embeddings=model.max_positions,
        attn_implementation="sdpa",
    )
    with device:
        llama = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(llama.parameters(), 1e-4, (0.9, 0.95), 1e-8, 0.1, fused=True)

    def step(ids: Tensor, targets: Tensor) -> float:
        optimizer.zero_grad()
        with torch.autocast(device.type, compute, enabled=compute != torch.float32):
            loss = llama(input_ids=ids, labels=ids, shift_labels=targets, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return llama, step


CONTENDERS = {"tessera": trainer_of, "transformers": transformers_of}


def measure(contender: str, model: ModelConfig, batch: int, sequence: int, steps: int, bf16: bool) -> str:
    """Train on random tokens; the median of `steps` steps after two that warm up."""
    device = devices.local_device()
    devices.prepare(device, tf32=False)
    stack, step = CONTENDERS[contender](model, device, torch.bfloat16 if bf16 else torch.float32)
    ids = torch.randint(0, model.vocab_size, (batch, sequence + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1].to(device), ids[:, 1:].to(device)
    seconds = []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        step(inputs, targets)  # reads the loss, so it waits for the device
        seconds.append(time.perf_counter() - begun)
    rate = batch * sequence / statistics.median(seconds[2:])
    achieved = rate * flops_per_token(model, sequence)
    peak = devices.peak_flops(device)
    share = f", {achieved / peak:.1%} of the {peak / 1e12:.0f} peak" if peak else ""
    memory = devices.peak_memory_bytes(device) / 2**30
    parameters = sum(p.numel() for p in stack.parameters())
    return (
        f"{date.today()} · {devices.describe(device)} · torch {torch.__version__} · {contender} · "
        f"{parameters / 1e9:.3f}B parameters, {batch} × {sequence} tokens, {'bf16' if bf16 else 'float32'} · "
        f"{rate:,.0f} tokens/s · "
        f"{achieved / 1e12:.2f} TFLOP/s{share} · peak memory {memory:.1f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 4, "hidden": 4096, "heads": 32, "kv-heads": 8, "ffn": 14336, "vocab": 128256}
    for name, size in {**sizes, "batch": 2, "sequence": 4096, "steps": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--contender", choices=CONTENDERS, default="tessera")
    parser.add_argument("--float32", action="store_true", help="compute in float32 instead of bf16")
    given = parser.parse_args()
    model = ModelConfig(
        family="llama",
        vocab_size=given.vocab,
        hidden_size=given.hidden,
        num_layers=given.layers,
        num_heads=given.heads,
        num_kv_heads=given.kv_heads,
        head_dim=given.hidden // given.heads,
        ffn_size=given.ffn,
        max_positions=given.sequence,
        rope=RopeConfig(theta=500000.0),
    )
    print(measure(given.contender, model, given.batch, given.sequence, given.steps, bf16=not given.float32))


if __name__ == "__main__":
    main()
