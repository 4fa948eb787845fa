"""Runs on every rank of a pool: what is drawn on a mesh against one process, and the course of a run on it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distributed.model_cases import GPT2, batches, build, full
from nn.shards import chunk, mesh_of, part, tokens_of
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.models.decoder import Decoder, drop
from tessera.nn.dropout import dropout_key

LENGTH, KEY = 4, dropout_key(seed=1, step=2)
TINY = replace(GPT2, vocab_size=61, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=32, max_positions=LENGTH)


def weights_agree(sizes: dict[str, int], options: dict[str, Any]) -> list[bool]:
    """Whether each initial weight is, bit for bit, the one of a single process."""
    one = dict(build(TINY, mesh_of({})).named_parameters())
    ours = build(TINY, mesh_of(sizes), **options)
    return [torch.equal(full(p), one[n].detach()) for n, p in ours.named_parameters()]


def masks(model: Decoder, size: int) -> dict[str, Tensor]:
    """This rank's masks by place: of the residual stream [T, F], of attention probabilities [B, H, S, S]."""
    parallel, p = model.parallel, model.config.residual_dropout
    mesh, residual = parallel.mesh, parallel.residual
    ids = torch.zeros(size, LENGTH, dtype=torch.int64)
    tokens = tokens_of(ids, parallel, KEY)
    ones = torch.ones(ids.numel() // mesh.size(residual.tokens), TINY.hidden_size // mesh.size(residual.features))
    places = ["embedding", *(f"layers.{i}.{block}" for i in range(len(model.layers)) for block in ("attention", "mlp"))]
    found = {place: drop(ones, tokens, p, model.norm, place) for place in places}
    return found | {f"{i}": layer.attention._keep(tokens, KEY) for i, layer in model.layers.items()}


def masks_agree(sizes: dict[str, int], options: dict[str, Any], size: int) -> list[bool]:
    """Whether each of this rank's masks is, bit for bit, its part of the mask of a single process."""
    ours, whole = build(TINY, mesh_of(sizes), **options), masks(build(TINY, mesh_of({})), size)
    mesh, residual, attention = ours.parallel.mesh, ours.parallel.residual, ours.parallel.attention

    def expected(mask: Tensor) -> Tensor:
        if mask.dim() == 2:
            return part(mask, residual, mesh)
        return chunk(chunk(mask, 0, attention.tokens, mesh), 1, attention.features, mesh)

    return [torch.equal(mask, expected(whole[place])) for place, mask in masks(ours, size).items()]


def curve(sizes: dict[str, int], options: dict[str, Any], steps: int, seed: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each of `steps` steps with dropout, in float64."""
    model = build(replace(TINY, num_layers=1), mesh_of(sizes), **options)
    optimizer = build_optimizer(model, "adamw_torch_fused", (0.9, 0.95), 1e-6, 0.1)
    step = Step(model, optimizer, max_grad_norm=0.5, label_smoothing=0.1, seed=seed)
    results = [step(batches(TINY, 1, seed=i % 3, size=4, length=LENGTH), i, 1e-2) for i in range(steps)]
    return [(r.loss, r.grad_norm) for r in results]
