"""Runs on every rank of a pool: norms, clipping and sums of gradients against torch's on the whole ones."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distributed.model_cases import MODELS, batches, build, full
from nn.shards import chunk, drawer, mesh_of, parallel_of
from tessera.core.axes import MODEL_AXES
from tessera.core.collectives import Recorder, all_reduce
from tessera.core.live_memory import PeakMemory
from tessera.core.mesh import Mesh
from tessera.engine.gradients import clip_gradients, gradient_norm, sum_replicated_gradients
from tessera.layout.parallel import Parallel
from tessera.layout.spec import Init, ParameterSpec
from tessera.layout.streams import HIDDEN
from tessera.models.decoder import Decoder
from tessera.nn.parameter import ParallelModule, named_specs, to_local


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
    model(batch, float(batch.valid)).backward()
    with Recorder() as recorder:
        sum_replicated_gradients(model, model.parallel.mesh)
    small = sum(p.numel() for n, p in model.named_parameters() if is_small(n))
    return [(r.kind, r.axis, r.bytes) for r in recorder.records], small


def sums_of_large(sizes: dict[str, int]) -> tuple[dict[str, tuple[bool, bool]], list[int], int]:
    """Gradients of whole numbers, whose sums are exact: of each, whether it is right, and was so before it was summed.

    Then the bytes of each collective, and the most that was held beside the gradients.
    """
    mesh = mesh_of(sizes)
    model, everyone = Large(parallel_of(sizes, dtype=torch.float32)), [Mesh(sizes, rank=r) for r in range(mesh.world)]
    own, want = {}, {}
    for number, (name, parameter, spec) in enumerate(named_specs(model)):
        fixed = set(MODEL_AXES) - set(spec.summed_axes)
        copies = [m.rank for m in everyone if all(m.coordinates[a] == mesh.coordinates[a] for a in fixed)]
        parts = {rank: _whole_numbers(to_local(parameter).shape, 8 * number + rank) for rank in copies}
        own[name], want[name] = parts[mesh.rank].clone(), sum(parts.values())
        gradient = parts[mesh.rank].T.contiguous().T if name == "turned" else parts[mesh.rank]
        parameter.grad = DTensor(gradient, parameter._spec, requires_grad=False)
    with Recorder() as recorder, PeakMemory() as memory:
        seen = [to_local(p.grad).detach() for p in model.parameters()]
        before = memory.peak = memory.current
        sum_replicated_gradients(model, mesh)
    assert before == sum(g.nbytes for g in seen)
    found = {
        n: (torch.equal(to_local(p.grad), want[n]), torch.equal(own[n], want[n])) for n, p, _ in named_specs(model)
    }
    return found, [record.bytes for record in recorder.records], memory.peak - before


class Large(ParallelModule):
    """A matrix that is large on both ranks of col, one on the first only, one whose gradient is not contiguous, two
    small vectors."""

    def __init__(self, parallel: Parallel) -> None:
        super().__init__(parallel)
        for name, shape in {"uneven": (1023, 512), "even": (1024, 768), "turned": (1024, 512)}.items():
            self.declare(name, ParameterSpec(shape, (("col",), ("inner", "row")), parallel.residual, Init()))
        for name in ("gain", "bias"):
            self.declare(name, ParameterSpec((512,), (("col",),), HIDDEN, Init()))


def _whole_numbers(shape: torch.Size, seed: int) -> Tensor:
    return torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(seed)).float()


def is_small(name: str) -> bool:
    """Norms, positions and the biases added to the residual stream."""
    return "norm" in name or name == "positions.weight" or name.endswith(("out.bias", "down.bias"))
