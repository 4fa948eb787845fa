"""Column- and row-parallel layers, feed-forward blocks: against torch's Linear, in float64."""

import pytest
import torch
import torch.nn.functional as F

from nn.linear_cases import linear_errors, mlp_errors
from nn.shards import label, world
from support.pool import pool
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.nn.linear import ColumnParallelLinear
from tessera.nn.mlp import MLP, gelu, gelu_tanh, swiglu
from tessera.sizes.schedule import Schedule

TOLERANCE = 1e-12
MESHES = [{"col": 2}, {"col": 4}]
OTHER_AXES = [{"row": 2, "col": 2}, {"inner": 2, "col": 2}, {"depth": 2, "col": 2}]


def check(sizes, *arguments):
    for errors, wrong, _ in pool(world(sizes)).run(linear_errors, *arguments):
        assert max(errors.values()) <= TOLERANCE, errors
        assert wrong["bias left out"] > 1e-2 and wrong["bias added twice"] > 1e-2
    return wrong


@pytest.mark.parametrize("uncut", [False, True], ids=["cut", "uncut"])
@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_linear_equals_torch(sizes, kind, sequence_parallel, uncut):
    wrong = check(sizes, kind, sizes, sequence_parallel, uncut, 1)
    replicated = kind == "row" and sequence_parallel  # each rank saw its own tokens of the output only
    assert (wrong["bias gradient not summed"] > 1e-2) == replicated


@pytest.mark.parametrize("uncut", [False, True], ids=["cut", "uncut"])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("sizes", OTHER_AXES, ids=label)
def test_linear_equals_torch_on_every_axis(sizes, kind, uncut):
    wrong = check(sizes, kind, sizes, True, uncut, 1)
    assert wrong["bias gradient not summed"] > 1e-2


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("sizes", [{"col": 2}, {"inner": 2, "col": 2}], ids=label)
def test_several_layers_over_one_input(sizes, kind):
    for sequence_parallel in (True, False):
        check(sizes, kind, sizes, sequence_parallel, False, 3)
        check(sizes, kind, sizes, sequence_parallel, True, 3)


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize("uncut", [False, True], ids=["cut", "uncut"])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_leaving_out_any_collective_is_seen(kind, uncut, sequence_parallel):
    sizes = {"inner": 2, "col": 2}
    run = pool(4).run
    *_, kinds = run(linear_errors, kind, sizes, sequence_parallel, uncut, 1)[0]
    assert kinds
    for index, collective in enumerate(kinds):
        results = run(linear_errors, kind, sizes, sequence_parallel, uncut, 1, index)
        assert max(max(errors.values()) for errors, *_ in results) > 1e-2, f"{index} ({collective}) went unseen"


def test_an_input_that_does_not_divide_is_refused():
    with pytest.raises(AssertionError, match=r"dim 0 of \(3, 16\) does not divide by the 2 ranks of row"):
        pool(2).run(uncut_with_three_tokens)


def uncut_with_three_tokens():
    from nn.shards import parallel_of
    from tessera.nn.linear import ColumnParallelLinear

    layer = ColumnParallelLinear(16, 32, parallel_of({"row": 2}))
    layer(torch.zeros(3, 16, dtype=torch.float64), uncut=True)


# ------------------------------------------------------------------------------------------ feed-forward blocks


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize("sizes", [*MESHES, {"inner": 2, "col": 2}], ids=label)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_mlp_equals_torch(activation, sizes, sequence_parallel):
    for errors in pool(world(sizes)).run(mlp_errors, activation, sizes, sequence_parallel):
        assert max(errors.values()) <= TOLERANCE, errors


def test_swiglu_equals_autograd():
    torch.manual_seed(0)
    gate, up, dy = (4 * torch.randn(7, 9, dtype=torch.float64) for _ in range(3))
    ours, theirs = ([gate.clone().requires_grad_(), up.clone().requires_grad_()] for _ in range(2))
    y, expected = swiglu(*ours), F.silu(theirs[0]) * theirs[1]
    y.backward(dy)
    expected.backward(dy)
    pairs = [(y, expected), (ours[0].grad, theirs[0].grad), (ours[1].grad, theirs[1].grad)]
    for value, want in pairs:
        torch.testing.assert_close(value, want, rtol=1e-13, atol=1e-15)
    assert torch.equal(ours[0].detach(), gate) and torch.equal(ours[1].detach(), up), "the inputs were written to"
    swapped = F.silu(up) * gate
    assert (swapped - expected).norm() > 0.1 * expected.norm()


def test_gelu_equals_its_definition():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    exact = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    tanh = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    torch.testing.assert_close(gelu(x), exact, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(gelu_tanh(x), tanh, rtol=1e-13, atol=1e-15)
    assert (exact - tanh).abs().max() > 1e-4


@pytest.mark.parametrize(("activation", "gated"), [("silu", False), ("gelu", True)])
def test_blocks_that_are_not_built_are_refused(activation, gated):
    with pytest.raises(ValueError, match=f"activation '{activation}' with"):
        MLP(8, 8, Parallel(Mesh(rank=0), residual_layout(True)), activation=activation, gated=gated)


def test_panels_refuse_an_input_that_is_not_cut():
    """Gathered a second time it would have twice the tokens."""
    parallel = Parallel(Mesh(rank=0), residual_layout(True), schedule=Schedule(slices=2))
    with pytest.raises(ValueError, match="slices 2 takes x cut"):
        ColumnParallelLinear(8, 8, parallel)(torch.zeros(4, 8), uncut=True)
