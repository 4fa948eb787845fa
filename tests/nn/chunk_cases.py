"""Runs on every rank of a pool: heads traded in groups, against heads traded at once."""

from typing import Any

import torch
from torch import Tensor

from nn.shards import mesh_of
from support.compare import error
from tessera.core.collectives import Recorder
from tessera.core.live_memory import PeakMemory
from tessera.data.batch import Stream
from tessera.layout.context import Context
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.nn.context.assign import assign
from tessera.nn.context.attention import shared_attention
from tessera.nn.context.route import route_of


def attended(
    sizes: dict[str, int], transport: str, chunks: int, heads: tuple[int, int], tokens: int, features: int = 4
) -> dict[str, Any]:
    """Result and gradients of this rank, what it received along ulysses, and the peaks of forward and backward.

    `tokens` are this rank's; the stream is one document, and a short one behind it.
    """
    mesh = mesh_of(sizes)
    parallel = Parallel(mesh, residual_layout(True), context=Context(transport, chunks))
    total = tokens * mesh.world
    bounds = (0, total - 3, total)
    route = route_of(Stream(bounds, assign(bounds, mesh.sizes["ring"])), parallel, None)
    generator = torch.Generator().manual_seed(mesh.rank)

    def random(count: int) -> Tensor:
        return torch.randn(tokens, count, features, dtype=torch.float64, generator=generator)

    q, k, v, d_out = random(heads[0]), random(heads[1]), random(heads[1]), random(heads[0])
    for x in (q, k, v):
        x.requires_grad_()
    with Recorder() as recorder, PeakMemory() as memory:
        for x in (q, k, v, d_out):
            x.view(-1)  # which counts them
        before = memory.current
        out = shared_attention(q, k, v, route, parallel)
        forward, memory.peak, kept = memory.peak - before, 0, memory.current - before
        calls = len(recorder.records)
        out.backward(d_out)
    traded = [sum(r.received for r in part if r.axes == ("ulysses",)) for part in _split(recorder.records, calls)]
    return {
        "tensors": [x.detach() for x in (out, q.grad, k.grad, v.grad)],
        "received": traded,
        "calls": [sum(r.axes == ("ulysses",) for r in part) for part in _split(recorder.records, calls)],
        "peaks": (forward, memory.peak - before),
        "kept": kept,
    }


def _split(records: list[Any], at: int) -> tuple[list[Any], list[Any]]:
    return records[:at], records[at:]


def chunks_error(sizes: dict[str, int], transport: str, chunks: int, heads: tuple[int, int]) -> float:
    """The worst relative difference of result and gradients from those of one group."""
    one, several = (attended(sizes, transport, n, heads, 12)["tensors"] for n in (1, chunks))
    return max(error(x, y) for x, y in zip(several, one, strict=True))


def figures(sizes: dict[str, int], counts: list[int], heads: tuple[int, int], tokens: int) -> list[dict[str, Any]]:
    """What `attended` counts for each number of groups."""
    found = []
    for n in counts:
        runs = [attended(sizes, "exchange", n, heads, tokens, 16) for _ in range(3)]
        # the least: threads of gloo may let go of what they have sent a moment late
        peaks = tuple(map(min, *(run["peaks"] for run in runs)))
        found.append({key: value for key, value in runs[0].items() if key != "tensors"} | {"peaks": peaks})
    return found
