"""Runs on every rank of a pool: one linear layer in panels, against the dense one that every rank computes."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import tessera.product.panels
from distributed.order_cases import Products
from nn.shards import drawer, fill, part
from support.compare import error
from support.mesh import shared_mesh
from tessera.core.collectives import Recorder, start_shift
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import Layout, residual_layout
from tessera.nn.linear import ColumnParallelLinear, ParallelLinear, RowParallelLinear, parallel_linear
from tessera.nn.parameter import named_specs, to_local
from tessera.sizes.schedule import Schedule

T, R, H = 18, 36, (27, 9)  # tokens; features of the residual stream; of the hidden stream, weight by weight
FLOAT64 = 8


def layers_of(column: bool, parallel: Parallel) -> list[ParallelLinear]:
    """Two column-parallel layers that read the same X, or a row-parallel one."""
    if column:
        return [ColumnParallelLinear(R, features, parallel, bias=True) for features in H]
    return [RowParallelLinear(H[0], R, parallel, bias=True)]


def run(column: bool, sizes: dict[str, int], schedule: Schedule) -> tuple[float, dict[str, int], dict[str, list[str]]]:
    """The worst error of results and gradients; words received by axis, forward and backward; the forward's events."""
    mesh = shared_mesh(sizes)
    parallel = Parallel(mesh, residual_layout(True, schedule.name), torch.float64, torch.float64, schedule)
    layers, draw = layers_of(column, parallel), drawer(7)
    X = draw(T, R if column else H[0]).requires_grad_()
    values = [{n: draw(*spec.shape).requires_grad_() for n, _, spec in named_specs(layer)} for layer in layers]
    Y = [torch.nn.functional.linear(X, v["weight"], v["bias"]) for v in values]
    dY = [draw(*y.shape) for y in Y]
    torch.autograd.backward(Y, dY)

    for layer, whole in zip(layers, values, strict=True):
        fill(layer, {n: v.detach() for n, v in whole.items()})
    x = part(X.detach(), layers[0].input, mesh).requires_grad_()
    panels = Products(recorder := Recorder(), {})
    with recorder:
        with panels:
            y = parallel_linear(layers, x)
        forward = [*recorder.events]
        torch.autograd.backward(y, [part(v, layers[0].output, mesh) for v in dY])
    pairs = [(x.grad, part(_grad(X), layers[0].input, mesh))]
    for layer, whole, mine, theirs in zip(layers, values, y, Y, strict=True):
        pairs.append((mine, part(theirs, layer.output, mesh)))
        pairs.append((to_local(layer.weight.grad), _shard(_grad(whole["weight"]), layer, mesh)))
    words: dict[str, int] = {}
    for record in recorder.records:
        words[record.axis] = words.get(record.axis, 0) + record.received // FLOAT64
    return max(error(a, b) for a, b in pairs), words, {axis: _along(axis, forward) for axis in mesh.present(sizes)}


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _shard(whole: Tensor, layer: ParallelLinear, mesh: Mesh) -> Tensor:
    return part(whole, Layout(*layer.specs["weight"].cuts), mesh)


def _along(axis: str, events: list[tuple[str, Any]]) -> list[str]:
    """What happens along one axis, and the products in between."""
    return [what for what, record in events if what == "product" or record.axis == axis]


def closed_form(column: bool, sizes: dict[str, int], schedule: str) -> dict[str, int]:
    """The words this rank should receive: blocks of R and W come in or go out, the same q − 1 and what Cannon skews.

    A column-parallel layer's R comes in and its W comes in, and in the backward both again and both go out; of a
    row-parallel layer R goes out and W comes in, then R comes in, W again, and W goes out.
    """
    mesh, q = shared_mesh(sizes), sizes["row"]
    blocks = {"col": T // q * (R // q), "row": (sum(H) if column else H[0]) // q * (R // q)}
    ways = {"col": (2, 1) if column else (1, 1), "row": (2, 1)}  # how often it comes in, and goes out
    words = {}
    for axis, other in (("col", "row"), ("row", "col")):
        across = mesh.coordinates[other] if schedule == "cannon" else 0
        comes, goes = q - 1 + (across % q != 0), q - 1 + ((1 - across) % q != 0 if schedule == "cannon" else 0)
        words[axis] = blocks[axis] * (ways[axis][0] * comes + ways[axis][1] * goes)
    return words


def layer_cases(sizes: dict[str, int], schedule: Schedule) -> dict[str, Any]:
    """All of the above for both kinds of layer, and this rank's coordinates."""
    names = {"column": True, "row": False}
    found: dict[str, Any] = {name: run(column, sizes, schedule) for name, column in names.items()}
    wanted = {name: closed_form(column, sizes, schedule.name) for name, column in names.items()}
    return found | {"words": wanted, "at": shared_mesh(sizes).coordinates}


def errors_shifting_backwards(sizes: dict[str, int]) -> float:
    """The least error of both kinds of layer when cannon's shifts go the other way round."""
    with patch.object(tessera.product.panels, "start_shift", lambda x, by, group: start_shift(x, -by, group)):
        return min(run(column, sizes, Schedule("cannon"))[0] for column in (True, False))
