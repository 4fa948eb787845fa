"""Runs on every rank of a pool: linear layers, feed-forward blocks and norms against torch's own, in float64."""

import torch
import torch.nn.functional as F
from torch import nn

from nn.shards import drawer, fill, parallel_of, part, whole_gradients
from support.compare import error
from tessera.core.collectives import Recorder
from tessera.engine.gradients import sum_replicated_gradients
from tessera.nn.linear import ColumnParallelLinear, RowParallelLinear, parallel_linear
from tessera.nn.mlp import MLP
from tessera.nn.norm import LayerNorm, RMSNorm

T, K, N = 24, 16, 32
KINDS = {"column": ColumnParallelLinear, "row": RowParallelLinear}


def linear_errors(kind, sizes, sequence_parallel, uncut, count, leave_out=None):
    """Errors of `count` layers over one x; what plausible mistakes would be off by; the collectives that ran."""
    parallel = parallel_of(sizes, sequence_parallel)
    mesh, draw = parallel.mesh, drawer(1)
    X, dY = draw(T, K).requires_grad_(), [draw(T, N) for _ in range(count)]
    values = {f"{i}.{name}": draw(*shape) for i in range(count) for name, shape in (("weight", (N, K)), ("bias", (N,)))}
    theirs = {name: value.clone().requires_grad_() for name, value in values.items()}
    Y = [F.linear(X, theirs[f"{i}.weight"], theirs[f"{i}.bias"]) for i in range(count)]
    torch.autograd.backward(Y, dY)

    layers = nn.ModuleList(KINDS[kind](K, N, parallel, bias=True) for _ in range(count))
    fill(layers, values)
    plan = layers[0].plan
    x = (X.detach().clone() if uncut else part(X.detach(), plan.input, mesh)).requires_grad_()
    with Recorder(leave_out) as recorder:
        y = parallel_linear(list(layers), x, uncut=uncut)
        torch.autograd.backward(y, [part(dy, plan.output, mesh) for dy in dY])
    partial = {name: gradient.clone() for name, gradient in whole_gradients(layers).items()}
    with recorder:
        sum_replicated_gradients(layers, mesh)
    gradients = whole_gradients(layers)

    def worst(named, of):
        return max(error(named[n], theirs[n].grad) for n in theirs if n.endswith(of))

    errors = {
        "output": max(error(a, part(b.detach(), plan.output, mesh)) for a, b in zip(y, Y, strict=True)),
        "input gradient": error(x.grad, X.grad if uncut else part(X.grad, plan.input, mesh)),
        "weight gradient": worst(gradients, "weight"),
        "bias gradient": worst(gradients, "bias"),
    }
    bias = values["0.bias"]
    wrong = {
        "bias left out": error(Y[0].detach() - bias, Y[0].detach()),
        "bias added twice": error(Y[0].detach() + bias, Y[0].detach()),
        "bias gradient not summed": worst(partial, "bias"),
    }
    return errors, wrong, [r.kind for r in recorder.records]


def mlp_errors(activation, sizes, sequence_parallel):
    """Output and every gradient of a feed-forward block with biases."""
    gated = activation == "silu"
    parallel = parallel_of(sizes, sequence_parallel)
    mesh, draw = parallel.mesh, drawer(2)
    block = MLP(K, N, parallel, activation=activation, gated=gated, bias=True)
    shapes = {"gate": (N, K), "up": (N, K), "down": (K, N)}
    values = {}
    for name in shapes if gated else ("up", "down"):
        values |= {f"{name}.weight": draw(*shapes[name]) / 4, f"{name}.bias": draw(shapes[name][0])}
    X, dY = draw(T, K).requires_grad_(), draw(T, K)
    p = {name: value.clone().requires_grad_() for name, value in values.items()}
    up = F.linear(X, p["up.weight"], p["up.bias"])
    if gated:
        hidden = F.silu(F.linear(X, p["gate.weight"], p["gate.bias"])) * up
    else:
        hidden = F.gelu(up, approximate="tanh" if activation == "gelu_tanh" else "none")
    Y = F.linear(hidden, p["down.weight"], p["down.bias"])
    Y.backward(dY)

    fill(block, values)
    x = part(X.detach(), block.input, mesh).requires_grad_()
    y = block(x)
    y.backward(part(dY, block.output, mesh))
    sum_replicated_gradients(block, mesh)
    gradients = whole_gradients(block)
    errors = {name: error(gradients[name], p[name].grad) for name in p}
    errors["output"] = error(y, part(Y.detach(), block.output, mesh))
    errors["input gradient"] = error(x.grad, part(X.grad, block.input, mesh))
    return errors


NORMS = {
    "rms": (RMSNorm, lambda x, p: F.rms_norm(x, (K,), p["weight"], 1e-3)),
    "layer": (LayerNorm, lambda x, p: F.layer_norm(x, (K,), p["weight"], p["bias"], 1e-3)),
}


def norm_errors(kind, sizes, sequence_parallel, leave_out=None):
    """A norm of the residual stream; an epsilon large enough to be seen."""
    parallel = parallel_of(sizes, sequence_parallel)
    mesh, draw = parallel.mesh, drawer(3)
    build, reference = NORMS[kind]
    norm = build(K, parallel.residual, parallel, 1e-3)
    values = {name: draw(K) for name in norm.specs}
    X, dY = (0.1 * draw(T, K) + 0.2).requires_grad_(), draw(T, K)
    theirs = {name: value.clone().requires_grad_() for name, value in values.items()}
    Y = reference(X, theirs)
    Y.backward(dY)

    fill(norm, values)
    x = part(X.detach(), norm.input, mesh).requires_grad_()
    with Recorder(leave_out) as recorder:
        y = norm(x)
        y.backward(part(dY, norm.output, mesh))
        sum_replicated_gradients(norm, mesh)
    gradients = whole_gradients(norm)
    errors = {f"{name} gradient": error(gradients[name], theirs[name].grad) for name in theirs}
    errors["output"] = error(y, part(Y.detach(), norm.output, mesh))
    errors["input gradient"] = error(x.grad, part(X.grad, norm.input, mesh))
    return errors, [r.axis for r in recorder.records]
