"""Attention tile by tile on a GPU against the formula in float64 on the CPU: bfloat16 to a hundredth of the norm.

Skipped where there is none.
"""

import random

import pytest
import torch

from nn.tile_cases import HEADS, SCALE, TILES, by_tiles, drawn, errors, expected, inputs, mask, tile_mask
from tessera.nn.attend import attend
from tessera.nn.documents import Documents
from tessera.nn.kernels import blockwise, tile_cuda
from tessera.nn.mask import Mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = [(torch.bfloat16, 1e-2), (torch.float32, 2e-5)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", TILES)
def test_each_kernel_of_a_tile_equals_the_formula(name, heads):
    tile = TILES[name]
    (q, _, _, gradient), (_, k, v, _) = (inputs(heads, n, torch.bfloat16) for n in (tile.q1, tile.k1))
    wanted = expected(q, k, v, gradient, tile_mask(tile))
    q, k, v, d_out = (x.cuda() for x in (q, k, v, gradient))
    for kernel, options in ((tile_cuda, (SCALE,)), (blockwise, (SCALE, None))):
        out, lse = kernel.forward(q, k, v, tile, *options)
        gradients = kernel.backward(d_out, q, k, v, out.bfloat16(), lse, tile, *options)
        found = [x.cpu() for x in (out, lse, *gradients)]
        assert found[1].dtype == torch.float32 and max(errors(found, wanted, gradient)) <= 1e-2


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_tiles_equal_the_formula(heads, window, softcap, dtype, tolerance):
    """Queries on two sides, keys in three blocks that cut anywhere."""
    bounds = [0, 1, 2, 190, 191, 531]
    rng = random.Random(heads[1])
    queries, keys = drawn(rng, bounds[-1], 6), drawn(rng, bounds[-1], 9)
    sides, blocks = (queries[:2], queries[2:]), (keys[:1], keys[1:3], keys[3:])
    tensors = inputs(heads, bounds[-1], dtype)
    wanted = expected(*tensors, mask(bounds, window), softcap)
    found = by_tiles(*(x.cuda() for x in tensors), sides, blocks, bounds, window, softcap)
    assert max(errors([x.cpu() for x in found], wanted, tensors[3])) <= tolerance


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 0.8}], ids=str)
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("packed", [False, True])
def test_windows_and_soft_caps_of_rows_equal_the_formula(packed, window, options, dtype, tolerance):
    """Through `attend`: by the kernel's own window where it has one, else tile by tile; the log-sum-exp too."""
    S, bounds = 150, [0, 1, 40, 150, 151, 300] if packed else [0, 150, 300]
    tensors = inputs((8, 2), 2 * S, dtype)
    wanted = expected(*tensors, mask(bounds, window), options.get("softcap"))
    rows = [x.cuda().unflatten(0, (2, S)).transpose(1, 2) for x in tensors]
    *leaves, gradient = (x.detach().requires_grad_() for x in rows)
    ids = torch.bucketize(torch.arange(2 * S), torch.tensor(bounds), right=True).view(2, S).cuda()
    documents = Documents.of(ids) if packed else None
    out, lse = attend(*leaves, Mask(True, window, documents), scale=SCALE, with_lse=True, **options)
    out.backward(gradient)
    found = [x.detach().transpose(1, 2).flatten(0, 1).cpu() for x in (out, *(leaf.grad for leaf in leaves))]
    found.insert(1, lse.transpose(0, 1).flatten(1).cpu())
    assert max(errors(found, wanted, tensors[3])) <= tolerance
