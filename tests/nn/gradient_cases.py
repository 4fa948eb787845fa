"""Runs on every rank of a pool: norms, clipping and sums of gradients against torch's on the whole ones."""

import torch
from torch import Tensor

from distributed.model_cases import MODELS, batches, build, full
from nn.shards import chunk, drawer, mesh_of
from tessera.collectives import Recorder, all_reduce
from tessera.mesh import MODEL_AXES
from tessera.models.decoder import Decoder
from tessera.nn.parameter import named_specs, to_local
from tessera.parallel.gradients import clip_gradients, gradient_norm, sum_replicated_gradients


def with_gradients(name: str, sizes: dict[str, int]) -> tuple[Decoder, dict[str, Tensor]]:
    """A model whose gradients are drawn, and those gradients whole."""
    model, draw = build(MODELS[name], mesh_of(sizes)), drawer(12)
    whole = {}
    for parameter_name, parameter, spec in named_specs(model):
        part = whole[parameter_name] = draw(*spec.shape)
        for dim, axes in enumerate(spec.cuts):
            part = chunk(part, dim, axes, model.parallel.mesh)
        parameter.grad = torch.zeros_like(parameter)
        to_local(parameter.grad).copy_(part)
    return model, whole


def norm_and_clipping(name: str, sizes: dict[str, int]) -> dict[str, float]:
    """Errors against torch; what counting replicated parameters once a rank gives; collectives of the norm."""
    model, whole = with_gradients(name, sizes)
    mesh = model.parallel.mesh
    leaves = [torch.nn.Parameter(g.clone()) for g in whole.values()]
    for leaf in leaves:
        leaf.grad = leaf.detach().clone()
    want = torch.nn.utils.get_total_norm([leaf.grad for leaf in leaves]).item()
    with Recorder() as recorder:
        norm, rider = gradient_norm(model, mesh, torch.tensor(2.5))
    calls = len(recorder.records)
    everything = sum(to_local(p.grad).square().sum() for p in model.parameters())
    naive = all_reduce(everything, mesh.group(MODEL_AXES)).sqrt().item()

    def gap() -> float:
        return max(
            (full(p.grad) - leaf.grad).abs().max().item() for p, leaf in zip(model.parameters(), leaves, strict=True)
        )

    clip_gradients(model, norm.item(), 2 * want)
    untouched = gap()
    clip_gradients(model, norm.item(), want / 7)
    before_theirs = gap()
    torch.nn.utils.clip_grad_norm_(leaves, want / 7)
    return {
        "norm": abs(norm.item() / want - 1),
        "counted on every rank": abs(naive / want - 1),
        "rider": rider.item(),
        "calls": calls,
        "clipped without need": untouched,
        "clipped": gap(),
        "clipping left out": before_theirs,
    }


def sums(name: str, sizes: dict[str, int], sequence_parallel: bool) -> tuple[list[tuple[str, str, int]], int]:
    """The collectives of summing a step's replicated gradients (kind, axis, bytes); elements of those 1D must sum."""
    model = build(MODELS[name], mesh_of(sizes), sequence_parallel)
    (batch,) = batches(model.config, 1)
    model(batch.input_ids, batch.targets, float(batch.valid)).backward()
    with Recorder() as recorder:
        sum_replicated_gradients(model, model.parallel.mesh)
    small = sum(p.numel() for n, p in model.named_parameters() if is_small(n))
    return [(r.kind, r.axis, r.bytes) for r in recorder.records], small


def is_small(name: str) -> bool:
    """Norms, positions and the biases added to the residual stream."""
    return "norm" in name or name == "positions.weight" or name.endswith(("out.bias", "down.bias"))
