"""Attention tile by tile against a dense masked softmax, in float64: result, log-sum-exp, gradients of q, k and v."""

import random

import pytest
import torch

from nn.tile_cases import BOUNDS, HEADS, SCALE, TILES, by_tiles, drawn, errors, expected, inputs, mask, tile_mask
from tessera.nn.context.consume import backward_tiles, forward_tiles
from tessera.nn.context.tiles import Tile
from tessera.nn.kernels import blockwise, tile_cpu, tile_cuda
from tessera.nn.kernels.merge import merge, nothing_yet
from tessera.nn.kernels.tile import tile_backward, tile_forward

TOLERANCE = 1e-12


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_tiles_equal_the_formula(heads, window, softcap, monkeypatch):
    """Queries on two sides, keys in three blocks that cut anywhere; a soft cap in small blocks."""
    monkeypatch.setattr(blockwise, "block_size", lambda _: (5, 3))
    rng = random.Random(heads[1])
    queries, keys = drawn(rng, BOUNDS[-1], 6), drawn(rng, BOUNDS[-1], 9)
    sides, blocks = (queries[:2], queries[2:]), (keys[:1], keys[1:3], keys[3:])
    tensors = inputs(heads, BOUNDS[-1])
    wanted = expected(*tensors, mask(BOUNDS, window), softcap)
    found = by_tiles(*tensors, sides, blocks, BOUNDS, window, softcap)
    assert all(x.dtype == torch.float64 for x in found)
    assert max(errors(found, wanted, tensors[3])) <= TOLERANCE
    wrong = expected(*tensors, mask(BOUNDS, 2 if window == 1 else 6), softcap)
    assert min(errors(found, wrong, tensors[3])) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(150))
def test_drawn_streams_equal_the_formula(seed, monkeypatch):
    rng = random.Random(seed)
    size = rng.randint(1, 40), rng.randint(1, 40)
    monkeypatch.setattr(blockwise, "block_size", lambda _: size)
    length, heads = rng.randint(1, 130), rng.choice(HEADS)
    bounds = sorted({0, length, *(rng.randrange(length) for _ in range(rng.randint(0, 6)))})
    window, softcap = rng.choice([None, 1, 2, 7, 30, 200]), rng.choice([None, 0.8])
    queries, keys = drawn(rng, length, 8), drawn(rng, length, 8)
    cut, split = rng.randint(0, len(queries)), rng.randint(0, len(keys))
    sides, blocks = (queries[:cut], queries[cut:]), (keys[:split], keys[split:])
    tensors = inputs(heads, length)
    wanted = expected(*tensors, mask(bounds, window), softcap)
    found = by_tiles(*tensors, sides, blocks, bounds, window, softcap)
    assert max(errors(found, wanted, tensors[3])) <= TOLERANCE


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", TILES)
def test_each_kernel_of_a_tile_equals_the_formula(name, heads):
    """With the result and log-sum-exp of the tile, and with those of rows that saw other keys too."""
    tile = TILES[name]
    q, _, _, gradient = inputs(heads, tile.q1)
    _, k, v, _ = inputs(heads, tile.k1 + 3)
    seen = torch.cat([tile_mask(tile), torch.ones(tile.q1, 3, dtype=torch.bool)], 1)
    alone = expected(q, k[:-3], v[:-3], gradient, seen[:, :-3])
    out, lse, dq, dk, dv = expected(q, k, v, gradient, seen)
    rest = Tile(0, tile.q1, 0, 3, False, 100, None)
    for kernel, options in ((tile_cpu, (SCALE,)), (blockwise, (SCALE, None))):
        found = kernel.forward(q, k[:-3], v[:-3], tile, *options)
        assert max(errors(found, alone[:2], gradient)) <= TOLERANCE
        found = kernel.backward(gradient, q, k[:-3], v[:-3], *alone[:2], tile, *options)
        assert max(errors(found, alone[2:], gradient)) <= TOLERANCE
        part = kernel.backward(gradient, q, k[:-3], v[:-3], out, lse, tile, *options)
        other = kernel.backward(gradient, q, k[-3:], v[-3:], out, lse, rest, *options)
        sums = (part[0] + other[0], torch.cat([part[1], other[1]]), torch.cat([part[2], other[2]]))
        assert max(errors(sums, (dq, dk, dv), gradient)) <= TOLERANCE


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_sums_are_in_float32(dtype, tolerance, softcap):
    tensors = inputs((8, 2), BOUNDS[-1], dtype)
    sides, blocks = [[(0, 53)]], [[(0, 11), (30, 53)], [(11, 30)]]
    found = by_tiles(*tensors, sides, blocks, BOUNDS, 9, softcap)
    assert [x.dtype for x in found] == [dtype, *[torch.float32] * 4]
    assert max(errors(found, expected(*tensors, mask(BOUNDS, 9), softcap), tensors[3])) <= tolerance


def test_the_first_result_is_taken_as_it_is():
    q, k, v, _ = inputs((8, 2), 9)
    out, lse = nothing_yet(q)
    found = tile_forward(q, k, v, TILES["triangle"], scale=None, softcap=None)
    merge(out, lse, *found)
    assert torch.equal(out, found[0]) and torch.equal(lse, found[1])


def test_queries_without_a_key_have_zeros_and_no_nan():
    q, k, v, gradient = inputs((8, 2), 9)
    out, lse = forward_tiles(q, [(k, v, [])])
    assert not out.any() and (lse == -torch.inf).all()
    dq = torch.zeros_like(q)
    dk, dv = backward_tiles(gradient, q, out, lse, dq, (k, v, []))
    assert not (dq.any() or dk.any() or dv.any())


@pytest.mark.parametrize("name", TILES)
def test_the_kernel_of_gpus_gives_shapes_without_one(name):
    """On tensors without values: its operators take these arguments, forward and backward."""
    tile = TILES[name]
    q, _, _, gradient = (x.to("meta", torch.bfloat16) for x in inputs((8, 2), tile.q1))
    _, k, v, _ = (x.to("meta", torch.bfloat16) for x in inputs((8, 2), tile.k1))
    out, lse = tile_cuda.forward(q, k, v, tile, None)
    assert (out.shape, out.dtype) == (q.shape, q.dtype) and (lse.shape, lse.dtype) == ((8, tile.q1), torch.float32)
    gradients = tile_cuda.backward(gradient, q, k, v, out, lse, tile, None)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


def test_a_kernel_is_chosen_by_device_and_soft_cap(monkeypatch):
    ran = []
    for kernel in (blockwise, tile_cpu, tile_cuda):
        for name in ("forward", "backward"):
            monkeypatch.setattr(kernel, name, lambda *_, said=(kernel, name): ran.append(said))
    q = torch.zeros(2, 2, 8, dtype=torch.bfloat16)
    for softcap in (None, 1.0):
        tile_forward(q, q, q, TILES["triangle"], scale=None, softcap=softcap)
        tile_backward(q, q, q, q, q, q, TILES["triangle"], scale=None, softcap=softcap)
    assert ran == [(kernel, name) for kernel in (tile_cpu, blockwise) for name in ("forward", "backward")]
