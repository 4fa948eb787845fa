"""Bugs that implementations of these geometries have had, put in on every rank of a pool, each beside its symptom.

`put_in(name)` holds a bug for as long as the context lasts; each `…_holds` says whether what the bug breaks holds.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import tessera.engine.gradients
import tessera.layout.streams
import tessera.nn.initialize
import tessera.nn.linear
import tessera.product.panels
import tessera.product.roles
from distributed import model_cases
from distributed.model_cases import LLAMA, batches, build, model_errors
from support.mesh import shared_mesh
from tessera.core.mesh import Mesh
from tessera.layout.spec import ParameterSpec
from tessera.layout.streams import Streams, residual_layout
from tessera.models.config import ModelConfig
from tessera.nn.initialize import hash_seed
from tessera.nn.linear import RowParallelLinear
from tessera.nn.parameter import named_specs, to_local
from tessera.nn.tokens import Tokens
from tessera.sizes.schedule import Schedule

Sizes = dict[str, int]


def summed_without(axis: str) -> Any:
    """Gradients are not summed over `axis`."""
    right = ParameterSpec.summed_axes.fget  # type: ignore[attr-defined]
    wrong = property(lambda spec: tuple(a for a in right(spec) if a != axis))
    return patch.object(ParameterSpec, "summed_axes", wrong)


def batch_cut_over_the_grid_only() -> Any:
    """Every layer of depth works on the same tokens."""
    streams = tessera.layout.streams.Streams(
        tessera.layout.streams.Layout(("row", "col"), ("inner",)),
        tessera.layout.streams.Layout(("row", "inner"), ("col",)),
    )
    right = Tokens.of.__func__  # type: ignore[attr-defined]
    return patch.object(Tokens, "of", classmethod(lambda cls, batch, _, *a: right(cls, batch, streams, *a)))


def products_in_half_precision() -> Any:
    right = tessera.nn.linear.distributed_product

    def wrong(x: Any, weights: Any, biases: Any, *rest: Any) -> Any:
        half = [w.half().to(w.dtype) for w in weights]
        return right(x.half().to(x.dtype), half, biases, *rest)

    return patch.object(tessera.nn.linear, "distributed_product", wrong)


def biases_live_on_the_first_row() -> Any:
    right = tessera.engine.gradients.sum_replicated_gradients

    def wrong(model: Any, mesh: Any) -> None:
        right(model, mesh)
        for name, parameter, _ in named_specs(model):
            if name.endswith("bias") and mesh.coordinates["row"]:
                to_local(parameter.grad).zero_()

    return patch("tessera.engine.step.sum_replicated_gradients", wrong)


@contextmanager
def groups_swapped_by_every_layer() -> Iterator[None]:
    """Which axis a product uses depends on how many products came before it."""
    right, state = tessera.layout.streams.LinearPlan.roles, {"swapped": False}

    def wrong(plan: Any, mesh: Any) -> Any:
        roles = right(plan, mesh)
        state["swapped"] = not state["swapped"]
        if not state["swapped"]:
            return roles
        groups = {"tokens": roles.outputs or roles.inputs, "outputs": roles.tokens if roles.outputs else None}
        return tessera.product.roles.Roles(
            groups["tokens"], groups["outputs"], roles.tokens if roles.inputs else None, roles.x_dim, roles.w_dim, 0
        )

    with patch.object(tessera.layout.streams.LinearPlan, "roles", wrong):
        yield


@contextmanager
def seeds_of_each_rank() -> Iterator[None]:
    rank = torch.distributed.get_rank()
    with patch.object(tessera.nn.initialize, "hash_seed", lambda *parts: hash_seed(*parts, rank)):
        yield


def row_bias_added_by_every_rank() -> Any:
    right = RowParallelLinear.local_bias

    def wrong(layer: RowParallelLinear) -> Any:
        bias = right(layer)
        return None if bias is None else bias * layer.parallel.mesh.sizes["col"]

    return patch.object(RowParallelLinear, "local_bias", wrong)


def grids_of_one_crash() -> Any:
    """A loop asks its group for its size, though an axis of size 1 has none."""

    def wrong(leg: Any, group: Any) -> None:
        leg.group, leg.panels, leg.rank = group, group.size, group.rank

    return patch.object(tessera.product.panels.Broadcasts, "__init__", wrong)


BUGS = {
    "no depth reduction of dW": lambda: summed_without("depth"),
    "bias and norm gradients not reduced across row": lambda: summed_without("row"),
    "batch cut over the grid only": batch_cut_over_the_grid_only,
    "gathered X and W kept": lambda: patch.object(Schedule, "keep", property(lambda self: True, lambda self, v: None)),
    "a grid of one crashes": grids_of_one_crash,
    "half precision hard-coded": products_in_half_precision,
    "biases live on the first row": biases_live_on_the_first_row,
    "groups swapped by every layer": groups_swapped_by_every_layer,
    "seeds of each rank": seeds_of_each_rank,
    "row bias added by every rank": row_bias_added_by_every_rank,
}


# ------------------------------------------------------------------------------------------- what they break


# An uneven vocabulary under groups that are not the right ones ends the process instead of the numbers.
EVEN = {"llama even": replace(LLAMA, vocab_size=512)}
_reference = cache(model_cases.reference)  # computed before the bug is put in


def same_numbers(sizes: Sizes, name: str) -> bool:
    """Loss, norm, gradients and weights of two steps equal one process."""
    try:
        with patch.object(model_cases, "reference", _reference), patch.dict(model_cases.MODELS, EVEN):
            errors, _, _ = model_errors(name, sizes, True)
    except (RuntimeError, ValueError):  # shapes that do not fit, or torch's own refusal
        return False
    return max(errors.values()) <= 1e-12


@cache
def _drawn_alone() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in build(LLAMA, Mesh(rank=0)).named_parameters()}


def same_init(sizes: Sizes) -> bool:
    """Each rank's shards are slices of what one process draws."""
    mesh, whole = shared_mesh(sizes), _drawn_alone()
    shards = named_specs(build(LLAMA, mesh))
    return all(torch.equal(to_local(p), whole[name][spec.local_slices(mesh)]) for name, p, spec in shards)


def every_token_once(sizes: Sizes, config: ModelConfig = LLAMA) -> bool:
    """The residual stream of a rank is 1/P of the whole, and no two ranks of depth hold the same tokens."""
    mesh = shared_mesh(sizes)
    (batch,) = batches(config, 1)
    tokens = Tokens.of(batch, Streams(residual_layout(True)), mesh)
    return len(tokens.residual.rows) * math.prod(sizes.values()) == batch.input_ids.numel()


def saved_are_shards(sizes: Sizes) -> bool:
    """What a layer saves for its backward of its input and weights is its shards of them."""
    mesh, saved = shared_mesh(sizes), []
    parallel = build(LLAMA, mesh).parallel
    layer = tessera.nn.linear.ColumnParallelLinear(16, 32, parallel)
    x = torch.zeros(8 // mesh.size(parallel.residual.tokens), 16 // mesh.sizes["inner"], dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda t: t):
        layer(x.requires_grad_())
    return sum(saved) <= x.numel() + to_local(layer.weight).numel()


def one_rank_runs(schedule: str) -> bool:
    """The loops on a grid of one rank."""
    try:
        model = build(LLAMA, Mesh(rank=0), schedule=Schedule(schedule))
        (batch,) = batches(LLAMA, 1)
        return bool(torch.isfinite(model(batch, 1.0)))
    except AttributeError:
        return False


CHECKS = {"numbers": same_numbers, "init": same_init, "tokens": every_token_once, "saved": saved_are_shards,
          "one": one_rank_runs}  # fmt: skip


def with_and_without(bug: str, check: str, *arguments: Any) -> tuple[bool, bool]:
    """Whether `check` holds as things are, and with the bug put in."""
    right = CHECKS[check](*arguments)
    with BUGS[bug]():
        return right, CHECKS[check](*arguments)
