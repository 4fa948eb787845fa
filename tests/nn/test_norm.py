"""RMSNorm and LayerNorm against torch's, whole and with cut tokens or cut features; statistics of bf16 in float32."""

import pytest
import torch
import torch.nn.functional as F

from nn.linear_cases import norm_errors
from nn.shards import label, parallel_of, part, world
from support.compare import error
from support.pool import pool
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.nn.norm import LayerNorm, RMSNorm
from tessera.nn.parameter import to_local

KINDS = ["rms", "layer"]
CUT_TOKENS = [{"col": 2}, {"col": 4}, {"row": 2, "col": 2}]
CUT_FEATURES = [{"inner": 2}, {"inner": 4}, {"inner": 2, "col": 2}]


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize("sizes", CUT_TOKENS + CUT_FEATURES, ids=label)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_equals_torch(kind, sizes, sequence_parallel):
    for errors, axes in pool(world(sizes)).run(norm_errors, kind, sizes, sequence_parallel):
        assert max(errors.values()) <= 1e-12, errors
        statistics = [axis for axis in axes if axis == "inner"]
        assert len(statistics) == (2 if "inner" in sizes else 0), "one forward, one backward"


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_out_any_collective_is_seen(kind):
    run, sizes = pool(4).run, {"inner": 2, "col": 2}
    _, axes = run(norm_errors, kind, sizes, True)[0]
    for index in range(len(axes)):
        results = run(norm_errors, kind, sizes, True, index)
        assert max(max(errors.values()) for errors, _ in results) > 1e-2, f"{index} (over {axes[index]}) went unseen"


def alone(kind, features, dtype, eps=1e-5):
    norm = {"rms": RMSNorm, "layer": LayerNorm}[kind](
        features, residual_layout(True), Parallel(Mesh(rank=0), residual_layout(True), dtype=dtype, compute=dtype), eps
    )
    with torch.no_grad():
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            if name in norm.specs:
                getattr(norm, name).fill_(value)
    return norm


@pytest.mark.parametrize("kind", KINDS)
def test_float32_equals_torch(kind):
    torch.manual_seed(1)
    norm = alone(kind, 256, torch.float32)
    torch.nn.init.normal_(norm.weight)
    x = (3 + torch.randn(40, 256)).requires_grad_()
    theirs = x.detach().clone().requires_grad_()
    gain = norm.weight.detach().clone().requires_grad_()
    y = norm(x)
    want = (
        F.rms_norm(theirs, (256,), gain, 1e-5) if kind == "rms" else F.layer_norm(theirs, (256,), gain, norm.bias, 1e-5)
    )
    dy = torch.randn(40, 256)
    y.backward(dy)
    want.backward(dy)
    for value, reference in ((y, want), (x.grad, theirs.grad), (norm.weight.grad, gain.grad)):
        assert error(value.detach(), reference.detach()) <= 1e-6
        assert value.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_bf16_are_float32(kind):
    """With a gain of 1 what comes out is the exact norm rounded once; a mean or scale that was rounded moves it."""
    torch.manual_seed(2)
    x = (2 + torch.randn(64, 4096)).bfloat16()
    y = alone(kind, 4096, torch.bfloat16)(x)
    assert y.dtype == torch.bfloat16
    wide = x.double()
    mean = wide.mean(-1, keepdim=True) if kind == "layer" else torch.zeros(64, 1, dtype=torch.float64)
    scale = ((wide - mean).square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    exact = ((wide - mean) * scale).bfloat16()
    rounded = ((wide - mean.bfloat16().double()) * scale.bfloat16().double()).bfloat16()
    assert (y == exact).float().mean() > 0.999
    assert (rounded == exact).float().mean() < 0.9


def test_cut_moments_keep_small_variances_beside_large_means():
    """Sums of squares around zero would lose them in float32: 1e4² is 2²⁶ times the variance."""
    for spread in pool(2).run(spread_beside_a_large_mean):
        assert 0.9 < spread < 1.1


def spread_beside_a_large_mean():
    parallel = parallel_of({"inner": 2}, True, torch.float32)
    norm = LayerNorm(512, parallel.residual, parallel, 0.0)
    with torch.no_grad():
        to_local(norm.weight).fill_(1.0)
        to_local(norm.bias).zero_()
        x = 1e4 + torch.randn(8, 256, generator=torch.Generator().manual_seed(parallel.mesh.rank))
        return norm(x).square().mean().item()


def test_part_is_what_the_layout_says():
    """The helper of these tests, on a mesh that needs no processes."""
    x = torch.arange(8 * 4).reshape(8, 4)
    mesh = Mesh({"inner": 2, "row": 2, "col": 2}, rank=7)
    assert torch.equal(part(x, residual_layout(True), mesh), x[6:, 2:])
    assert torch.equal(part(x, residual_layout(False), mesh), x[4:, 2:])
