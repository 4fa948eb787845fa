"""Runs on every rank of a pool: a whole model on a mesh against the same model in one process, in float64."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from support.compare import worst
from support.mesh import shared_mesh
from support.once import once
from tessera.core.axes import DATA_AXES
from tessera.core.collectives import Recorder
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.fsdp import build_decoder
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.shape import Fsdp, Savers
from tessera.layout.streams import residual_layout
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.nn.parameter import named_specs, to_local
from tessera.nn.rope import RopeConfig
from tessera.sizes.schedule import Schedule

LLAMA = ModelConfig(
    family="llama",
    vocab_size=509,
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=96,
    max_positions=64,
    rope=RopeConfig(factor=8.0, original_max_positions=16),
    initializer_range=0.1,
)
GPT2 = ModelConfig(
    family="gpt2",
    vocab_size=509,
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
    ffn_size=96,
    max_positions=64,
    norm="layer",
    norm_eps=1e-5,
    activation="gelu_tanh",
    gated=False,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    head_bias=True,
    embedding_dropout=0.1,
    attention_dropout=0.1,
    residual_dropout=0.1,
    initializer_range=0.1,
)
MODELS = {
    "llama": LLAMA,
    "llama tied": replace(LLAMA, tied=True),
    "llama kv4": replace(LLAMA, num_kv_heads=4, qkv_bias=True),
    "llama q/k norm": replace(LLAMA, qk_norm=True),
    "gpt2": GPT2,
    "gpt2 tied": replace(GPT2, tied=True, head_bias=False),
    "gpt2 not causal": replace(GPT2, causal=False, attention_dropout=0.0),
}


def batch_of(input_ids: Tensor, targets: Tensor, first_document: int = 0) -> MicroBatch:
    return MicroBatch(input_ids, targets, int((targets != -100).sum()), first_document)


def batches(config: ModelConfig, count: int, seed: int = 3, size: int = 4, length: int = 12) -> list[MicroBatch]:
    """Random token ids; a quarter of the targets ignored, among them the last sequence, if there are others."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for place in range(count):
        ids = torch.randint(0, config.vocab_size, (size, length), generator=generator)
        targets = ids.roll(-1, 1)
        targets[torch.rand(size, length, generator=generator) < 0.1] = -100
        if size > 1:
            targets[-1] = -100
        made.append(batch_of(ids, targets, place * size))
    return made


def full(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(batch: MicroBatch, mesh: Mesh) -> MicroBatch:
    """The rows of this data rank."""
    rows = len(batch.targets) // mesh.size(DATA_AXES)
    first = mesh.index(DATA_AXES) * rows
    mine = slice(first, first + rows)
    return batch_of(batch.input_ids[mine], batch.targets[mine], batch.first_document + first)


def build(config: ModelConfig, mesh: Mesh, sequence_parallel: bool = True, **options: Any) -> Decoder:
    checkpointing = options.pop("gradient_checkpointing", False)
    dtype = options.pop("dtype", torch.float64)
    asked, savers = options.pop("asked", Fsdp()), options.pop("savers", Savers())
    options.setdefault("compute", dtype)
    residual = residual_layout(sequence_parallel, options.get("schedule", Schedule()).name)
    parallel = Parallel(mesh, residual, dtype=dtype, **options)
    model = build_decoder(config, parallel, asked, gradient_checkpointing=checkpointing, savers=savers)
    model.initialize(seed=5)
    return model


def train(
    model: Decoder, steps: int, smoothing: float = 0.0, dropout_seed: int = 11, size: int = 4, length: int = 12
) -> dict[str, Any]:
    """Losses, norms, this rank's shards of the first step's gradients and of the last weights."""
    optimizer = build_optimizer(model, "adamw_torch_fused", (0.9, 0.95), 1e-6, 0.1)
    step = Step(model, optimizer, max_grad_norm=0.5, label_smoothing=smoothing, seed=dropout_seed)
    results, gradients = [], {}
    for index in range(steps):
        mine = [share(batch, model.parallel.mesh) for batch in batches(model.config, 2, index, size, length)]
        results.append(step(mine, index, 1e-2))
        if index == 0:  # the update has scaled them by the clipping, alike everywhere
            gradients = {n: to_local(p.grad) for n, p in model.named_parameters()}
    return {
        "loss": [r.loss for r in results],
        "norm": [r.grad_norm for r in results],
        "gradients": gradients,
        "weights": {n: to_local(p).detach() for n, p in model.named_parameters()},
    }


@once
def reference(
    config: ModelConfig, steps: int, smoothing: float = 0.0, size: int = 4, length: int = 12
) -> dict[str, Any]:
    return train(build(config, Mesh(rank=0)), steps, smoothing, size=size, length=length)


def without_key_bias(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A softmax over keys does not see their bias: its exact gradient is zero, and AdamW divides noise by noise."""
    return {name: weight for name, weight in weights.items() if not name.endswith("attention.k.bias")}


def model_errors(
    name, sizes, sequence_parallel, steps=2, smoothing=0.0, leave_out=None, options=None, size=4, length=12
):
    """The worst relative difference of loss, norm, gradients and weights from one process; which collectives ran.

    `name` is one of MODELS, or a config; `size` sequences of `length` tokens are a micro-batch.
    """
    config = name if isinstance(name, ModelConfig) else MODELS[name]
    want = reference(config, steps, smoothing, size, length)
    model = build(config, shared_mesh(sizes), sequence_parallel, **(options or {}))
    with Recorder(leave_out) as recorder:
        got = train(model, steps, smoothing, size=size, length=length)
    relative = {
        key: max(abs(a - b) / abs(b) for a, b in zip(got[key], want[key], strict=True)) for key in ("loss", "norm")
    }
    # each rank's copy is compared where it lies: gathering one would not see that another has drifted
    mine = {n: spec.stored_slices(model.parallel.mesh) for n, _, spec in named_specs(model)}
    gradients, weights = ({n: want[key][n][mine[n]] for n in mine} for key in ("gradients", "weights"))
    relative["gradients"], worst_gradient = worst(got["gradients"], gradients)
    relative["weights"], _ = worst(without_key_bias(got["weights"]), without_key_bias(weights))
    return relative, worst_gradient, [r.kind for r in recorder.records]
