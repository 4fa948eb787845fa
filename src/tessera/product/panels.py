"""The distributed matrix product panel by panel: the schedules `summa`, `cannon` and `gather` in slices.

A linear layer leads between the residual stream R and the hidden stream H, with one weight W. The features of R are
cut into panels; R moves along the columns of the row × col grid, W along its rows, and H stays where it is:

    layer                     forward, panel p                 backward, panel p
    column-parallel, R → H    in R_p, W_p:  H += R_p W_pᵀ      in W_p, R_p:   out dR_p = dH W_p, dW_p = dHᵀ R_p
    row-parallel,    H → R    in W_p:       out R_p = H W_pᵀ   in dR_p, W_p:  dH += dR_p W_p,    out dW_p = dR_pᵀ H

so that column layers run AB forward and ABᵀ, AᵀB backward, row layers ABᵀ forward and AB, AᵀB backward. The schedules
differ in how a panel comes in and how a partial sum goes out:

    schedule   panels                 in                                    out
    summa      q blocks of features   broadcast by the rank that has it     reduced to the rank that keeps it
    cannon     the same, each rank    skewed once, then shifted to the      the sum is shifted instead of the
               beginning elsewhere    neighbour after each product          operand, then brought home
    slices S   S-th parts of all      all-gather                            reduce-scatter
               blocks at once

Panel p + 1 travels while panel p multiplies. The reduction over `inner` closes the product: H is gathered along it when
it comes in and summed when it goes out, as in gathered.py. summa and cannon take R cut over features along `col`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tessera.core.collectives import Pending, start_broadcast, start_reduce_to, start_shift
from tessera.core.mesh import Group
from tessera.product.roles import Roles, ranks_of, start_reduce, start_unshard
from tessera.sizes.schedule import Schedule

# mypy: disable-error-code="no-untyped-def"


class Sum(Protocol):
    """Partial sums of panels on their way to where they are kept."""

    def add(self, partial: Tensor) -> None: ...
    def result(self) -> Tensor: ...


class Leg(Protocol):
    """One operand and the axis along which it moves. Every leg of a product yields its panels in the same order."""

    def incoming(self, own: Tensor) -> Iterator[Tensor]: ...
    def outgoing(self, like: Tensor | None = None) -> Sum: ...


class Broadcasts:
    """summa: the panel of each rank in turn, from it and to it."""

    def __init__(self, group: Group | None) -> None:
        self.group, self.panels, self.rank = group, group.size if group else 1, group.rank if group else 0

    def incoming(self, own: Tensor) -> Iterator[Tensor]:
        arriving = start_broadcast(own, 0, self.group)
        for panel in range(1, self.panels + 1):
            following = start_broadcast(own, panel, self.group) if panel < self.panels else None
            yield arriving.wait()
            if following is not None:
                arriving = following

    def outgoing(self, like: Tensor | None = None) -> Sum:
        return _Reduces(self)


class _Reduces:
    def __init__(self, leg: Broadcasts) -> None:
        self.leg, self.panel, self.leaving, self.own = leg, 0, Pending(torch.empty(0)), torch.empty(0)

    def add(self, partial: Tensor) -> None:
        leaving = start_reduce_to(partial, self.panel, self.leg.group)
        self._settle()
        self.leaving, self.panel = leaving, self.panel + 1

    def _settle(self) -> None:
        arrived = self.leaving.wait()
        if self.panel - 1 == self.leg.rank:
            self.own = arrived

    def result(self) -> Tensor:
        self._settle()
        return self.own


class Shifts:
    """cannon: rank (i, j) of the grid has panel (i + j + s) mod q at step s; `across`: its place on the other axis."""

    def __init__(self, group: Group | None, across: int) -> None:
        self.group, self.panels, self.across = group, group.size if group else 1, across

    def incoming(self, own: Tensor) -> Iterator[Tensor]:
        arriving = start_shift(own, self.across, self.group)
        for step in range(1, self.panels + 1):
            panel = arriving.wait()
            if step < self.panels:
                arriving = start_shift(panel, 1, self.group)
            yield panel

    def outgoing(self, like: Tensor | None = None) -> Sum:
        return _ShiftedSum(self)


class _ShiftedSum:
    def __init__(self, leg: Shifts) -> None:
        self.leg, self.step, self.passing = leg, 0, Pending(torch.empty(0))

    def add(self, partial: Tensor) -> None:
        self.step += 1
        if self.step > 1:
            partial += self.passing.wait()
        home = (1 - self.leg.across) % self.leg.panels  # after the last step the sum lies this far from its rank
        self.passing = start_shift(partial, home if self.step == self.leg.panels else 1, self.leg.group)

    def result(self) -> Tensor:
        return self.passing.wait()


class Slices:
    """gather in slices: panel s is the s-th part of each of the `blocks` into which W's axes cut the features."""

    def __init__(self, group: Group | None, stored_dim: int | None, feature_dim: int, blocks: int, slices: int) -> None:
        self.group, self.stored_dim, self.feature_dim = group, stored_dim, feature_dim
        self.blocks, self.panels = blocks, slices

    def _parts(self, x: Tensor) -> Tensor:
        """x with its features as [blocks, slices, the rest]."""
        return x.unflatten(self.feature_dim, (self.blocks, self.panels, -1))

    def incoming(self, own: Tensor) -> Iterator[Tensor]:
        parts, dim = self._parts(own), self.feature_dim
        panels = (parts.select(dim + 1, s).flatten(dim, dim + 1) for s in range(self.panels))
        arriving = start_unshard(next(panels), self.stored_dim, self.group)
        for panel in panels:
            following = start_unshard(panel, self.stored_dim, self.group)
            yield arriving.wait()
            arriving = following
        yield arriving.wait()

    def outgoing(self, like: Tensor | None = None) -> Sum:
        assert like is not None
        return _SlicedSum(self, torch.empty_like(like))


class _SlicedSum:
    def __init__(self, leg: Slices, total: Tensor) -> None:
        self.leg, self.total, self.leaving, self.slice = leg, total, Pending(torch.empty(0)), 0

    def add(self, partial: Tensor) -> None:
        leaving = start_reduce(partial, self.leg.stored_dim, self.leg.group)
        self._settle()
        self.leaving, self.slice = leaving, self.slice + 1

    def _settle(self) -> None:
        if self.slice:
            dim = self.leg.feature_dim
            place = self.leg._parts(self.total).select(dim + 1, self.slice - 1)
            place.copy_(self.leaving.wait().unflatten(dim, (self.leg.blocks, -1)))

    def result(self) -> Tensor:
        self._settle()
        return self.total


class _Panels:
    """The legs of R and W for one layer, and the axis that closes the product."""

    def __init__(self, roles: Roles, schedule: Schedule, column: bool) -> None:
        along_col, self.inner = (roles.outputs, roles.inputs) if column else (roles.inputs, roles.outputs)
        r_dim, self.h_dim = (roles.x_dim, roles.y_dim) if column else (roles.y_dim, roles.x_dim)
        self.keep = schedule.keep
        self.r: Leg
        self.w: Leg
        if schedule.name == "gather":
            self.r = Slices(along_col, r_dim, 1, ranks_of(roles.tokens), schedule.slices)
            self.w = Slices(roles.tokens, roles.w_dim, roles.w_dim, 1, schedule.slices)
        elif schedule.name == "summa":
            self.r, self.w = Broadcasts(along_col), Broadcasts(roles.tokens)
        else:
            self.r = Shifts(along_col, roles.tokens.rank if roles.tokens else 0)
            self.w = Shifts(roles.tokens, along_col.rank if along_col else 0)

    # Where the sum over `inner` scatters features, each of its ranks gets its part of every H: the joined weight has
    # a block for each rank, with its part of every weight.

    @property
    def _blocks(self) -> int:
        return self.inner.size if self.inner is not None and self.h_dim == 1 else 1

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        """The weights as one."""
        pieces = zip(*(w.chunk(self._blocks) for w in weights), strict=True)
        return _cat([piece for block in pieces for piece in block], 0)

    def part(self, joined: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """The conjugate of `join`."""
        blocks = [block.split(self.widths(weights)) for block in joined.chunk(self._blocks)]
        return [_cat(pieces, 0) for pieces in zip(*blocks, strict=True)]

    def some(self, joined_TH: Tensor, weights: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
        """Of H as `join` orders its features, those of the weights `chosen`."""
        if len(chosen) == len(weights):
            return joined_TH
        parts = joined_TH.unflatten(1, (self._blocks, -1)).split(self.widths(weights), 2)
        return torch.cat([parts[i] for i in chosen], 2).flatten(1)

    def widths(self, weights: Sequence[Tensor]) -> list[int]:
        """How many features of each H this rank gets."""
        return [w.shape[0] // self._blocks for w in weights]


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


class _ColumnProduct(torch.autograd.Function):
    """H_i = R · W_iᵀ; the weights move and multiply as one, joined anew in the backward: a copy is not kept."""

    @staticmethod
    def forward(ctx, r: Tensor, panels: _Panels, *weights: Tensor) -> tuple[Tensor, ...]:
        w, H, kept = panels.join(weights), None, []
        for r_p, w_p in zip(panels.r.incoming(r), panels.w.incoming(w), strict=True):
            H = r_p @ w_p.T if H is None else H.addmm_(r_p, w_p.T)
            if panels.keep:
                kept += [r_p, w_p]
        assert H is not None
        ctx.panels, ctx.count = panels, len(weights)
        ctx.save_for_backward(r, *weights, *kept)
        return start_reduce(H, panels.h_dim, panels.inner).wait().split(panels.widths(weights), 1)

    @staticmethod
    def backward(ctx, *dh: Tensor):
        (r, *saved), panels = ctx.saved_tensors, ctx.panels
        weights, kept = saved[: ctx.count], saved[ctx.count :]
        needs_r, needs_w = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        trained = [i for i, needed in enumerate(needs_w) if needed]  # of the others no gradient is formed, none travels
        chosen = [weights[i] for i in trained]
        dH, w = start_unshard(_cat(dh, 1), panels.h_dim, panels.inner).wait(), panels.join(weights)
        dR, dW, grads = None, None, [None] * len(weights)
        if needs_r:
            dR = panels.r.outgoing(r)
        if trained:
            dW, dH_trained = panels.w.outgoing(panels.join(chosen)), panels.some(dH, weights, trained)
        none = itertools.repeat(None)
        r_panels = (kept[::2] if panels.keep else panels.r.incoming(r)) if trained else none
        w_panels = (kept[1::2] if panels.keep else panels.w.incoming(w)) if needs_r else none
        for r_p, w_p in zip(r_panels, w_panels, strict=False):
            if dR is not None:
                dR.add(dH @ w_p)
            if dW is not None:
                dW.add(dH_trained.T @ r_p)
        if dW is not None:
            for i, part in zip(trained, panels.part(dW.result(), chosen), strict=True):
                grads[i] = part
        return None if dR is None else dR.result(), None, *grads


class _RowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, w: Tensor, panels: _Panels, r_shape: torch.Size) -> Tensor:
        H, kept = start_unshard(h, panels.h_dim, panels.inner).wait(), []
        R = panels.r.outgoing(h.new_empty(r_shape))
        for w_p in panels.w.incoming(w):
            R.add(H @ w_p.T)
            if panels.keep:
                kept.append(w_p)
        ctx.panels = panels
        ctx.save_for_backward(H if panels.keep else h, w, *kept)
        return R.result()

    @staticmethod
    def backward(ctx, dr: Tensor):
        (h, w, *kept), panels = ctx.saved_tensors, ctx.panels
        needs_h, needs_w = ctx.needs_input_grad[:2]
        gathering = Pending(h) if panels.keep or not needs_w else start_unshard(h, panels.h_dim, panels.inner)
        dH, dW = None, panels.w.outgoing(w) if needs_w else None
        H = gathering.wait()
        w_panels = (kept or panels.w.incoming(w)) if needs_h else itertools.repeat(None)
        for r_p, w_p in zip(panels.r.incoming(dr), w_panels, strict=False):
            if needs_h:
                dH = r_p @ w_p if dH is None else dH.addmm_(r_p, w_p)
            if dW is not None:
                dW.add(r_p.T @ H)
        if dH is not None:
            dH = start_reduce(dH, panels.h_dim, panels.inner).wait()
        return dH, None if dW is None else dW.result(), None, None


def panel_product(
    x: Tensor, weights: Sequence[Tensor], roles: Roles, schedule: Schedule, *, column: bool
) -> Sequence[Tensor]:
    """Y_i = X · W_iᵀ on local shards, stored as `roles` says, in the panels of `schedule`; differentiable.

    `column`: a column-parallel layer, which may have several weights, that move and multiply as one; else row-parallel.
    """
    panels = _Panels(roles, schedule, column)
    if column:
        return _ColumnProduct.apply(x, panels, *weights)
    (w,) = weights
    # the shape of R here: tokens come together along inner and are cut along col, or features are cut there
    inner, col = ranks_of(roles.outputs), ranks_of(roles.inputs)
    tokens = x.shape[0] * (inner if roles.x_dim == 0 else 1) // (col if roles.y_dim == 0 else 1)
    features = w.shape[0] * ranks_of(roles.tokens) // (col if roles.y_dim == 1 else 1)
    return [_RowProduct.apply(x, w, panels, torch.Size((tokens, features)))]
