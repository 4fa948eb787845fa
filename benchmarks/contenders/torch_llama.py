"""transformers' Llama cut by torch's `parallelize_module`, as fast as that API was found to go on it.

Head and embedding are cut over the vocabulary, the loss is torch's `loss_parallel`, and one shared input for
q, k, v (and for gate, up) lets their input gradients be reduced once instead of three times.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from transformers import LlamaForCausalLM

from benchmarks.contenders.optimizing import Training
from benchmarks.workload import Shape

IGNORED = -100


def parallelize(model: LlamaForCausalLM, world: int, sequence_parallel: bool) -> None:
    """Cut `model` over `world` ranks; the residual stream is cut over the sequence, or replicated."""
    mesh = init_device_mesh("cpu", (world,))
    stream, whole = (Shard(1) if sequence_parallel else Replicate()), Replicate()

    def norms(*names: str) -> dict[str, SequenceParallel]:
        return {name: SequenceParallel() for name in names} if sequence_parallel else {}

    layer_plan = {
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": stream},
            desired_input_kwarg_layouts={"hidden_states": whole},
        ),
        "mlp": PrepareModuleInput(input_layouts=stream, desired_input_layouts=whole),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
        "self_attn.o_proj": RowwiseParallel(output_layouts=stream),
        "mlp.down_proj": RowwiseParallel(output_layouts=stream),
        **norms("input_layernorm", "post_attention_layernorm"),
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, layer_plan)
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=stream),
        "lm_head": ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False),
        **norms("model.norm"),
    }
    parallelize_module(model, mesh, ends)


def build(shape: Shape, folder: Path, rank: int, world: int, sequence_parallel: bool) -> Training:
    """The whole model on every rank first, then cut."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    parallelize(model, world, sequence_parallel)
    positions = torch.arange(shape.sequence)[None]  # the model would count those of the cut stream

    def logits(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, position_ids=positions, use_cache=False).logits.flatten(0, 1)

    def backward(tokens: Tensor) -> Tensor:
        labels = F.pad(tokens[:, 1:], (0, 1), value=IGNORED).flatten()
        with loss_parallel():
            loss = F.cross_entropy(logits(tokens), labels, ignore_index=IGNORED)
            loss.backward()
        assert isinstance(loss, DTensor)
        return loss.full_tensor().detach()

    return Training(model, backward)
