"""Ulysses (Jacobs et al. 2023): heads against tokens, so that each rank has all of its owner's tokens for some heads.

    x before      [T, heads, D]           this rank's tokens, all heads
    x after       [U · T, heads / U, D]   the tokens of the U ranks in their order, a part of the heads

One all-to-all of equal parts each way; the backward of one way is the other.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tessera.core.collectives import all_to_all
from tessera.core.mesh import Group
from tessera.nn.once import Once, run_once

# mypy: disable-error-code="no-untyped-def"

Trade = Callable[[Tensor, Group], Tensor]


def to_heads(x_THD: Tensor, group: Group) -> Tensor:
    """All tokens of the ranks of `group`, of this rank's part of the heads; not differentiable."""
    parts = x_THD.unflatten(1, (group.size, -1)).transpose(0, 1)
    equal = [1] * group.size
    return all_to_all(parts, equal, equal, group).flatten(0, 1)


def to_tokens(x_THD: Tensor, group: Group) -> Tensor:
    """The way back; not differentiable."""
    equal = [1] * group.size
    parts = all_to_all(x_THD.unflatten(0, (group.size, -1)), equal, equal, group)
    return parts.transpose(0, 1).flatten(1, 2)


class _Trade(torch.autograd.Function):
    """`there` in the forward, `back` in the backward: the two are each other's conjugate."""

    @staticmethod
    def forward(ctx, x_THD: Tensor, group: Group, there: Trade, back: Trade, once: Once | None):
        ctx.back, ctx.group = back, group
        (traded,) = run_once(once, lambda: [there(x_THD, group)])
        return traded

    @staticmethod
    def backward(ctx, gradient_THD: Tensor):
        return ctx.back(gradient_THD, ctx.group), None, None, None, None


def tokens_for_heads(x_THD: Tensor, group: Group | None, once: Once | None = None) -> Tensor:
    """All tokens of the ranks of `group`, of this rank's part of the heads; heads are dim 1 and divide by the ranks."""
    return x_THD if group is None else _Trade.apply(x_THD, group, to_heads, to_tokens, once)


def heads_for_tokens(x_THD: Tensor, group: Group | None, once: Once | None = None) -> Tensor:
    """The way back: this rank's tokens, of all heads."""
    return x_THD if group is None else _Trade.apply(x_THD, group, to_tokens, to_heads, once)


def repeats(kv_heads: int, ranks: int) -> int:
    """How often each kv head is repeated, so that so many ranks get equally many: each query finds its own there."""
    return ranks // math.gcd(ranks, kv_heads)


def kv_heads_of(query_heads: range, num_heads: int, num_kv_heads: int) -> list[int]:
    """The kv heads these query heads need: each once if all are read equally often in a row, else one a query."""
    read = [head * num_kv_heads // num_heads for head in query_heads]
    once = list(dict.fromkeys(read))
    return once if read == [h for h in once for _ in range(len(read) // len(once))] else read
