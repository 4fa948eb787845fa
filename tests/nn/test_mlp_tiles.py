"""The MLP in tiles: sizes, frozen weights, what is wide exists for one tile, and is not computed in a second run."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tessera.core.live_memory import PeakMemory
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.nn.mlp import MLP
from tessera.nn.mlp_tiles import tile_sizes, tiles_of

F, WIDE, T = 32, 256, 512


def block(tiles, **options):
    mlp = MLP(F, WIDE, Parallel(Mesh(rank=0), residual_layout(True), torch.float64, torch.float64), **options)
    mlp.tiles = tiles
    for parameter, generator in zip(mlp.parameters(), map(torch.Generator().manual_seed, range(9)), strict=False):
        with torch.no_grad():
            parameter.normal_(std=0.1, generator=generator)
    return mlp


def gradients(mlp, run=lambda mlp, x: mlp(x)):
    x = torch.randn(T, F, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with PeakMemory() as memory:
        y = run(mlp, x)
        (y * y).sum().backward()
    return memory.peak, [y.detach(), x.grad, *(p.grad for p in mlp.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    ("tokens", "tiles", "gathered", "scattered", "sizes"),
    [
        (10, 3, 1, 1, [4, 3, 3]),
        (10, 1, 1, 1, [10]),
        (4, 9, 1, 1, [1, 1, 1, 1]),
        (12, 5, 1, 2, [4, 2, 2, 2, 2]),  # a tile is cut over two ranks
        (12, 5, 2, 2, [3, 3, 2, 2, 2]),  # once it was brought together from two
        (12, 5, 2, 8, [4, 4, 4]),
        (100, None, 1, 1, [25] * 4),  # for 32 features: 100 / 32, rounded up
        (16, None, 2, 1, [16]),
    ],
)
def test_tiles_are_as_equal_as_they_can_be(tokens, tiles, gathered, scattered, sizes):
    assert tile_sizes(tokens, tiles, F, gathered, scattered) == sizes


def test_as_many_tiles_as_tokens_for_each_feature():
    assert [tiles_of(tokens, 4096) for tokens in (1, 4096, 4097, 131072)] == [1, 1, 2, 32]


@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "gated": False, "bias": True}], ids=["gated", "biases"])
@pytest.mark.parametrize("frozen", [(), ("down.weight",), ("gate.weight", "up.weight"), ("all",)], ids=str)
def test_frozen_weights_get_no_gradient(options, frozen):
    found = []
    for tiles in (1, 5):
        mlp = block(tiles, **options)
        for name, parameter in mlp.named_parameters():
            parameter.requires_grad_(name not in frozen and "all" not in frozen)
        found.append(gradients(mlp)[1])
    for one, several in zip(*found, strict=True):
        assert (one - several).norm() <= 1e-12 * one.norm()


def test_what_is_wide_exists_for_one_tile():
    """The peak is a part that stays, and one that falls as the tiles: at least gate, up and their product."""
    one, two, four, eight = (gradients(block(tiles))[0] for tiles in (1, 2, 4, 8))
    assert two - four == pytest.approx(2 * (four - eight), rel=0.1)
    assert one - two >= 3 * T * WIDE * 8 / 2 and eight < one / 3, (one, two, four, eight)


def test_a_second_run_of_the_layer_does_not_compute_tiles():
    runs = []

    def counting(mlp, x):
        activate = mlp.activate
        mlp.activate = lambda Y: runs.append(len(Y[0])) or activate(Y)
        return checkpoint(lambda x: x + mlp(x), x, use_reentrant=False)

    gradients(block(4), counting)
    assert runs == [T // 4] * 8  # each tile in the forward, and once more in the backward
