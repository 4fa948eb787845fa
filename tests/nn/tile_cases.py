"""Streams in chunks and attention over them: what a query sees, the dense formula, and the same by tiles."""

from itertools import pairwise

import torch

from support.compare import error
from tessera.nn.context.consume import backward_tiles, forward_tiles
from tessera.nn.context.tiles import Tile, tiles
from tessera.nn.kernels.merge import nothing_yet

D, SCALE = 8, 0.3
HEADS = [(8, 1), (8, 2), (8, 8), (6, 3)]
BOUNDS = [0, 1, 2, 19, 20, 53]


def sees(bounds, window, query, key):
    """Whether a query of the stream sees a key, said once more."""
    same = not any(query < bound <= key or key < bound <= query for bound in bounds)
    return same and key <= query and (window is None or query - key < window)


def tokens(chunks):
    return [token for first, end in chunks for token in range(first, end)]


def drawn(rng, length, cuts):
    """A stream of so many tokens in chunks, in a random order."""
    inside = sorted(rng.sample(range(1, length), min(rng.randint(0, cuts), length - 1)))
    chunks = list(pairwise([0, *inside, length]))
    rng.shuffle(chunks)
    return chunks


def inputs(heads, tokens, dtype=torch.float64):
    """q, k, v and the gradient of the result [T, H, D]."""
    generator = torch.Generator().manual_seed(tokens)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(tokens, n, D, generator=generator, dtype=torch.float64).to(dtype) for n in counts]


def dense(q, k, v, seen, softcap=None):
    """The formula over [T, H, D] where `seen` [q, k]: result and log-sum-exp [H, T]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    z = SCALE * torch.einsum("qhd,khd->hqk", q, k)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    powers = z.exp() * seen
    return torch.einsum("hqk,khd->qhd", powers / powers.sum(-1, keepdim=True), v), powers.sum(-1).log()


def expected(q, k, v, gradient, seen, softcap=None):
    """Result, log-sum-exp and the gradients of q, k and v, all dense."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = dense(*leaves, seen, softcap)
    out.backward(gradient.double())
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def mask(bounds, window):
    return torch.tensor([[sees(bounds, window, i, j) for j in range(bounds[-1])] for i in range(bounds[-1])])


def by_tiles(q, k, v, gradient, sides, blocks, bounds, window, softcap=None):
    """The same of a stream whose queries lie on several `sides`, and whose keys arrive in `blocks`, of chunks each."""

    def of(chunks):
        return torch.tensor(tokens(chunks), dtype=torch.int64)

    options = {"scale": SCALE, "softcap": softcap}
    out, lse = torch.empty_like(q), nothing_yet(q)[1]
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    for side in sides:
        rows = of(side)
        arriving = [(k[of(keys)], v[of(keys)], tiles(side, keys, bounds, window)) for keys in blocks]
        own_out, own_lse = forward_tiles(q[rows], arriving, **options)
        own_dq = torch.zeros_like(dq[rows])
        for keys, block in zip(blocks, arriving, strict=True):
            more_k, more_v = backward_tiles(gradient[rows], q[rows], own_out, own_lse, own_dq, block, **options)
            dk[of(keys)] += more_k
            dv[of(keys)] += more_v
        out[rows], lse[:, rows], dq[rows] = own_out, own_lse, own_dq
    return [out, lse, dq, dk, dv]


def errors(found, wanted, gradient):
    whole = gradient.double().norm().item()  # with a window of 1 the gradients of q and k are zero
    return [error(x.double(), y, whole) for x, y in zip(found, wanted, strict=True)]


TILES = {
    "rectangle": Tile(0, 9, 0, 14, False, 20, None),
    "triangle": Tile(0, 9, 0, 9, True, 0, None),
    "band": Tile(0, 9, 0, 9, False, 10, 11),
    "one query": Tile(0, 1, 0, 6, False, 6, None),
}


def tile_mask(tile):
    behind = tile.behind + torch.arange(tile.q1).unsqueeze(1) - torch.arange(tile.k1)
    seen = behind >= 0 if tile.causal else torch.ones_like(behind, dtype=torch.bool)
    return seen if tile.window is None else seen & (behind < tile.window)
