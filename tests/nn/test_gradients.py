"""The gradient rule as a table, the sums it asks for, and the exact norm of the whole gradient."""

import numpy as np
import pytest
import torch

from distributed.model_cases import GPT2, LLAMA, MODELS, build
from nn.gradient_cases import norm_and_clipping, sums, sums_of_large
from nn.shards import label, parallel_of, world
from support.pool import pool
from tessera.core.mesh import Mesh
from tessera.engine.gradients import gradient_norm
from tessera.layout.spec import Init, ParameterSpec
from tessera.nn.parameter import ParallelModule, named_specs

# Axes over which a gradient is still to be summed after its backward, by what the parameter is. Norms, positions and
# biases of the residual stream lie whole on the axes that cut its tokens; biases of the hidden stream likewise; what
# a weight's tokens are cut over is summed inside its product, but for depth, over which it is replicated.
GEOMETRIES = {
    "1d": ({"col": 4}, True, {"residual": ("col",), "hidden": (), "weight": ()}),
    "1d without sequence parallelism": ({"col": 4}, False, {"residual": (), "hidden": (), "weight": ()}),
    "2d": ({"row": 2, "col": 2}, True, {"residual": ("row", "col"), "hidden": ("row",), "weight": ()}),
    "2d without sequence parallelism": (
        {"row": 2, "col": 2},
        False,
        {"residual": ("row",), "hidden": ("row",), "weight": ()},
    ),
    "2.5d": (
        {"depth": 2, "row": 2, "col": 2},
        True,
        {"residual": ("depth", "row", "col"), "hidden": ("depth", "row"), "weight": ("depth",)},
    ),
    "3d": (
        {"inner": 2, "row": 2, "col": 2},
        True,
        {"residual": ("row", "col"), "hidden": ("inner", "row"), "weight": ()},
    ),
}
KINDS = {
    "embedding.weight": "weight",
    "positions.weight": "residual",
    "attention_norm.weight": "residual",
    "attention_norm.bias": "residual",
    "mlp_norm.weight": "residual",
    "mlp_norm.bias": "residual",
    "norm.weight": "residual",
    "norm.bias": "residual",
    "attention.q.weight": "weight",
    "attention.q.bias": "hidden",
    "attention.k.weight": "weight",
    "attention.k.bias": "hidden",
    "attention.v.weight": "weight",
    "attention.v.bias": "hidden",
    "attention.out.weight": "weight",
    "attention.out.bias": "residual",
    "mlp.gate.weight": "weight",
    "mlp.up.weight": "weight",
    "mlp.up.bias": "hidden",
    "mlp.down.weight": "weight",
    "mlp.down.bias": "residual",
    "head.weight": "weight",
    "head.bias": "hidden",
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_axes_to_sum_over(geometry):
    sizes, sequence_parallel, expected = GEOMETRIES[geometry]
    mesh, seen = Mesh(sizes, rank=0), set()
    for config in (LLAMA, GPT2):
        for name, _, spec in named_specs(build(config, Mesh(rank=0), sequence_parallel)):
            kind = name.split(".", 2)[2] if name.startswith("layers.") else name
            seen.add(kind)
            assert mesh.present(spec.summed_axes) == expected[KINDS[kind]], name
    assert seen == KINDS.keys()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("size", [2, 4])
def test_small_gradients_travel_together(size, name):
    """One all-reduce of all of them under sequence parallelism, none without it."""
    for records, small in pool(size).run(sums, name, {"col": size}, True):
        assert records == [("all_reduce", "col", 8 * small)]
    for records, _ in pool(size).run(sums, name, {"col": size}, False):
        assert records == []


def test_one_all_reduce_for_each_set_of_axes():
    for records, _ in pool(4).run(sums, "gpt2", {"depth": 2, "col": 2}, True):
        assert [(kind, axis) for kind, axis, _ in records] == [("all_reduce", "depth"), ("all_reduce", "depth·col")]


def test_large_gradients_are_summed_in_place():
    """Each by itself, of a MiB and more; beside them are held the bucket of the others, and what was not contiguous."""
    even, turned, first, second, vectors = 512 * 768 * 4, 2**20, 512 * 512 * 4, 511 * 512 * 4, 2 * 256 * 4
    for rank, (found, sent, held) in enumerate(pool(4, gloo=True).run(sums_of_large, {"depth": 2, "col": 2})):
        assert all(right and not before for right, before in found.values()), found
        bucket = vectors + (second if rank % 2 else 0)
        assert sent == [*([] if rank % 2 else [first]), even, turned, bucket]
        assert held == turned + bucket


@pytest.mark.parametrize("name", ["gpt2", "llama tied"])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"col": 2}, {"col": 4}, {"row": 2, "col": 2}, {"inner": 2, "col": 2}, {"depth": 2, "row": 2}],
    ids=label,
)
def test_norm_and_clipping_equal_torch(sizes, name):
    ranks = pool(world(sizes)).run(norm_and_clipping, name, sizes) if sizes else [norm_and_clipping(name, sizes)]
    for result in ranks:
        assert result["norm"] <= 1e-14 and result["clipped"] <= 1e-14, result
        assert result["clipped without need"] == 0 and result["clipping left out"] > 1e-2, result
        assert result["rider"] == 2.5 * world(sizes) and result["calls"] == bool(sizes)
        assert not sizes or result["counted on every rank"] > 1e-3, result


@pytest.mark.parametrize("shape", [(2048, 2048), (300, 8192), (500_000,)], ids=str)
def test_norm_of_large_float32_gradients(shape):
    """A float32 sum of as many squares, one after the other, is not accurate to 1e-7."""

    class Large(ParallelModule):
        def __init__(self):
            super().__init__(parallel_of({}, dtype=torch.float32))
            self.declare("weight", ParameterSpec(shape, ((),) * len(shape), self.parallel.residual, Init()))

    model = Large()
    model.weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.vector_norm(model.weight.grad, dtype=torch.float64)
    (norm,) = gradient_norm(model, Mesh(rank=0))
    assert norm.dtype == torch.float64
    assert abs(norm / exact - 1) <= 1e-7
    plain = float(np.cumsum(model.weight.grad.square().flatten().numpy())[-1]) ** 0.5
    assert abs(plain / exact - 1) > 1e-6


def test_gradients_that_are_not_there_are_left_alone():
    model = build(MODELS["llama"], Mesh(rank=0))
    assert gradient_norm(model, Mesh(rank=0))[0] == 0
    assert all(p.grad is None for p in model.parameters())
