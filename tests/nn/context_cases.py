"""Runs on every rank of a pool: attention that ranks share, against dense attention of each document, in float64."""

import random
from typing import Any

import torch

from nn.shards import mesh_of
from nn.tile_cases import HEADS, SCALE, expected, inputs, mask, tokens
from tessera.data.batch import Stream
from tessera.layout.context import Context
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.nn.context.assign import assign
from tessera.nn.context.attention import shared_attention
from tessera.nn.context.route import route_of

WINDOWS = (None, None, 1, 7, 1000)
CAPS = (None, None, 1.5)
ASSIGNMENTS = ("balanced", "contiguous", "zigzag", "dealt", "one token here, the rest there")


def drawn(seed: int, owners: int, ulysses: int) -> dict[str, Any]:
    """A case: documents, some of one token, some over all ranks; who owns which tokens; heads, window, soft cap."""
    choose = random.Random(seed)
    kind = choose.choice(["several", "several", "one document", "single tokens", "long and short"])
    total = choose.randrange(1, 70)
    if kind == "one document":
        lengths = [total]
    elif kind == "single tokens":
        lengths = [1] * choose.randrange(1, 24)
    elif kind == "long and short":
        lengths = [1, total, 1, 2]
    else:
        lengths = [choose.randrange(1, 20) for _ in range(choose.randrange(1, 7))]
    unit = owners * ulysses
    if rest := -sum(lengths) % unit:  # what is odd is filled up by a document of its own
        lengths.append(rest)
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return {
        "bounds": tuple(bounds),
        "owned": owned(choose.choice(ASSIGNMENTS), bounds, owners, choose),
        "heads": choose.choice([heads for heads in HEADS if heads[0] % ulysses == 0]),
        "window": choose.choice(WINDOWS),
        "softcap": choose.choice(CAPS),
    }


def owned(kind: str, bounds: list[int], owners: int, choose: random.Random) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The chunks of each owner, equally many tokens each, in an assignment of this kind."""
    total = bounds[-1]
    if kind == "balanced":
        return assign(bounds, owners)
    if kind == "contiguous":
        order = list(range(total))
    elif kind == "zigzag":
        half, more = divmod(total // owners, 2)
        firsts = [list(range(r * (half + more), (r + 1) * (half + more))) for r in range(owners)]
        start = owners * (half + more)
        lasts = [list(range(start + r * half, start + (r + 1) * half)) for r in range(owners)]
        order = [token for r in range(owners) for token in (*firsts[r], *lasts[owners - 1 - r])]
    elif kind == "dealt":
        order = [token for r in range(owners) for token in range(r, total, owners)]
    else:
        order = [*range(1, total), 0]
    each = total // owners
    return tuple(_chunks(order[r * each : (r + 1) * each]) for r in range(owners))


def _chunks(tokens: list[int]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for token in sorted(tokens):
        if found and found[-1][1] == token:
            found[-1] = (found[-1][0], token + 1)
        else:
            found.append((token, token + 1))
    return tuple(found)


def worst_error(sizes: dict[str, int], transport: str, seeds: list[int]) -> tuple[float, int]:
    """The largest difference of output, dq, dk and dv on this rank over these cases, and the seed of it."""
    mesh = mesh_of(sizes)
    parallel = Parallel(mesh, residual_layout(True), context=Context(transport))
    return max((_error(parallel, seed), seed) for seed in seeds)


def _error(parallel: Parallel, seed: int) -> float:
    mesh = parallel.mesh
    ulysses = mesh.sizes["ulysses"]
    case = drawn(seed, mesh.sizes["ring"], ulysses)
    *whole, weight = inputs(case["heads"], case["bounds"][-1])
    wanted = expected(*whole, weight, mask(case["bounds"], case["window"]), case["softcap"])
    del wanted[1]  # the log-sum-exp, which each owner keeps to itself

    stream = Stream(case["bounds"], case["owned"])
    chunks = stream.owned[mesh.coordinates["ring"]]
    own = torch.tensor(tokens(chunks)).chunk(ulysses)[mesh.coordinates["ulysses"]]
    mine = [x[own].requires_grad_() for x in whole]
    route = route_of(stream, parallel, case["window"])
    out = shared_attention(*mine, route, parallel, scale=SCALE, softcap=case["softcap"])
    found = [out.detach(), *torch.autograd.grad((out * weight[own]).sum(), mine)]
    return max(((a - b[own]).abs().max().item() for a, b in zip(found, wanted, strict=True)), default=0.0)
