"""transformers' own Llama and loss, in one process or with its automatic tensor parallel plan."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.contenders.optimizing import Training
from benchmarks.workload import Shape


def build(shape: Shape, folder: Path, rank: int, world: int) -> Training:
    """One process for world 1, `tp_plan="auto"` over `world` ranks otherwise."""
    plan: dict[str, Any] = {}
    if world > 1:
        from transformers.distributed import DistributedConfig

        plan["distributed_config"] = DistributedConfig(tp_plan="auto", tp_size=world)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", **plan).train()

    def backward(tokens: Tensor) -> Tensor:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return Training(model, backward)
