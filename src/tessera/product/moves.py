"""Differentiable moves between ranks, as conjugate pairs: the backward of each is the other one of its pair.

    function                     forward                       backward
    gather_then_reduce_scatter   all-gather along a dim        sum, each keeping its shard
    reduce_then_gather           sum, each keeping its shard   all-gather along the dim
    reduce_then_keep             sum, all keeping all          nothing: the gradient is whole on every rank
    split_then_gather            keep the own shard            all-gather along the dim

What a rank holds after `reduce_then_keep`, or before `split_then_gather`, is whole on each rank of the axis, and so is
its gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.core.collectives import all_gather, all_reduce, reduce_scatter
from tessera.core.mesh import Group, Mesh

# mypy: disable-error-code="no-untyped-def"


class _GatherThenReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return reduce_scatter(gradient, ctx.dim, ctx.group), None, None


class _ReduceThenGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return all_gather(gradient, ctx.dim, ctx.group), None, None


class _ReduceThenKeep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x.clone(), group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


class _SplitThenGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return x.chunk(group.size, dim)[group.rank].contiguous()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return all_gather(gradient, ctx.dim, ctx.group), None, None


def gather_then_reduce_scatter(x: Tensor, dim: int, group: Group | None) -> Tensor:
    """All-gather along `dim`; the gradient, different on every rank, is summed back into shards."""
    return x if group is None else _GatherThenReduceScatter.apply(x, dim, group)


def reduce_then_gather(x: Tensor, dim: int | None, group: Group | None) -> Tensor:
    """Sum partial results into shards along `dim`; with `dim` None every rank keeps the whole sum."""
    if group is None:
        return x
    return _ReduceThenKeep.apply(x, group) if dim is None else _ReduceThenGather.apply(x, dim, group)


def cut(x: Tensor, cuts: Sequence[Sequence[str]], mesh: Mesh) -> Tensor:
    """This rank's part of a tensor that every rank holds whole; the gradient comes back whole.

    `cuts[d]` are the axes that cut dim d, major to minor.
    """
    for dim, axes in enumerate(cuts):
        for axis in axes:
            group = mesh.group((axis,))
            if group is not None:
                if x.shape[dim] % group.size:
                    raise ValueError(
                        f"dim {dim} of {tuple(x.shape)} does not divide by the {group.size} ranks of {axis}"
                    )
                x = _SplitThenGather.apply(x, dim, group)
    return x
