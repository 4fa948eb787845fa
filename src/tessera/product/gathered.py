"""The distributed matrix product, `gather` schedule: every tensor-parallel geometry is a choice of `Roles`.

    Y[T, N] = X[T, K] · W[N, K]ᵀ            T tokens, K inputs, N outputs (W as torch stores it)

Every mesh axis has one role: it cuts T, N or K. The operand that lacks the cut dimension moves along that axis.
Local shapes, with t, n, k the number of ranks that cut each dimension:

    stored      x_TK [T/(t·n), K/k]     w_NK [N/n, K/(k·t)]     y_TN [T/(t·k), N/n]      (or w_NK [N/(n·t), K/k])
    multiplied  X    [T/t,     K/k]     W    [N/n, K/k]         Y    [T/t,     N/n]

                 axis cuts T              axis cuts N               axis cuts K
    forward      gather W                 gather X                  scatter-sum Y
    backward     scatter-sum dW           scatter-sum dX            gather dY (once, for dX and dW)

X and Y may instead be stored whole along their axis (no sequence parallelism): then X moves only in the backward and
Y only in the forward, each as one all-reduce. Several weights that share X make one product: one gather of X, one
reduction of dX. The backward hides what it can: X travels during the dX product, dX during the dW product; with a
`Site`, W travels during the product before and dW during the backward of the one after. The other schedules, which
multiply panel by panel, are in panels.py.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.core.collectives import Pending
from tessera.core.mesh import Group, Mesh
from tessera.product.overlap import Moving, Overlap
from tessera.product.roles import Roles, start_reduce, start_unshard
from tessera.sizes.schedule import GATHER, Schedule

Move = Callable[[Tensor, int | None, Group | None], Pending]


class Together:
    """Several tensors moved as one collective: joined along a dim that is not cut, split again on arrival.

    Those whose other dim differs (k and v beside q, scattered over features) move one by one.
    """

    def __init__(self, move: Move, tensors: Sequence[Tensor], dim: int | None, join: int, group: Group | None) -> None:
        self.parts, self.join = list(tensors), join
        one = len(self.parts) == 1 or group is None or len({x.shape[1 - join] for x in self.parts}) > 1
        joined = None if one else torch.cat(self.parts, join)
        self.pending = [move(x, dim, group) for x in (self.parts if joined is None else [joined])]

    def wait(self) -> list[Tensor]:
        arrived = [pending.wait() for pending in self.pending]
        if len(arrived) == len(self.parts):
            return arrived
        return list(arrived[0].split([part.shape[self.join] for part in self.parts], self.join))


@dataclass(frozen=True)
class Site:
    """The place of a product in a model: who it is, its weights outside autograd, and where late gradients go.

    `add_gradients` gets those of the weights that are trained.
    """

    key: Hashable
    overlap: Overlap
    weights: Callable[[], list[Tensor]]
    add_gradients: Callable[[list[Tensor]], None]


class DistributedProduct(torch.autograd.Function):
    """Y_i = X · W_iᵀ + b_i for one or more weights; `operands` are the weights, then as many biases (or None)."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x_TK: Tensor, roles: Roles, schedule: Schedule, site: Site | None, *operands: Tensor | None
    ):
        half = len(operands) // 2
        weights, biases = [w for w in operands[:half] if w is not None], operands[half:]
        gathering_x = start_unshard(x_TK, roles.x_dim, roles.outputs)
        W = _start_weights(weights, roles, schedule, site).wait()
        X = gathering_x.wait()
        if roles.inputs is None:  # nothing to reduce: the bias joins the product
            Y = [X @ w.T if b is None else torch.addmm(b, X, w.T) for w, b in zip(W, biases, strict=True)]
        else:
            join = 1 if roles.y_dim in (0, None) else 0
            Y = Together(start_reduce, [X @ w.T for w in W], roles.y_dim, join, roles.inputs).wait()
            Y = [y if b is None else y + b for y, b in zip(Y, biases, strict=True)]  # once, after the sum over ranks
        ctx.roles, ctx.schedule, ctx.site, ctx.has_bias = roles, schedule, site, [b is not None for b in biases]
        ctx.save_for_backward(*((X, *W) if schedule.keep else (x_TK, *weights)))
        return tuple(Y)

    @staticmethod
    def backward(ctx, *dy_TN: Tensor):  # type: ignore[no-untyped-def]
        (x, *weights), roles, schedule, site = ctx.saved_tensors, ctx.roles, ctx.schedule, ctx.site
        needs_x, needs_w = ctx.needs_input_grad[0], ctx.needs_input_grad[4 : 4 + len(weights)]
        trained = [i for i, needed in enumerate(needs_w) if needed]  # of the others no gradient is formed, none travels
        used = range(len(weights)) if needs_x else trained
        dY: list[Tensor] = []
        if used:
            join = 1 if roles.y_dim in (0, None) else 0
            dY = Together(start_unshard, [dy_TN[i] for i in used], roles.y_dim, join, roles.inputs).wait()
        gathering_x = Pending(x) if schedule.keep or not trained else start_unshard(x, roles.x_dim, roles.outputs)
        dX = None
        dW: list[Tensor | None] = [None] * len(weights)
        if needs_x:
            W = weights if schedule.keep else _start_weights(weights, roles, schedule, site).wait()
            dX = dY[0] @ W[0]
            for dy, w in zip(dY[1:], W[1:], strict=True):
                dX.addmm_(dy, w)
            reducing_x = start_reduce(dX, roles.x_dim, roles.outputs)
            if not schedule.overlap:
                reducing_x.wait()
        if trained:
            X = gathering_x.wait()
            reducing_w = _start_weight_sums([dy for i, dy in zip(used, dY, strict=True) if i in trained], X, roles)
        db = [dy.sum(0) if has else None for dy, has in zip(dy_TN, ctx.has_bias, strict=True)]
        if needs_x:
            dX = reducing_x.wait()
        if trained and schedule.defer and site is not None and roles.tokens is not None:
            site.overlap.finish_later(reducing_w, site.add_gradients)
        elif trained:
            for i, sum_w in zip(trained, reducing_w.wait(), strict=True):
                dW[i] = sum_w
        return dX, None, None, None, *dW, *db


def _start_weights(weights: Sequence[Tensor], roles: Roles, schedule: Schedule, site: Site | None) -> Moving:
    """The weights on their way, gathered along the token axes; at a `Site` issued before, and the next one's issued."""
    if site is None or roles.tokens is None or not schedule.prefetch:
        return Together(start_unshard, weights, roles.w_dim, 1 - roles.w_dim, roles.tokens)
    return site.overlap.gather(
        site.key, lambda: Together(start_unshard, site.weights(), roles.w_dim, 1 - roles.w_dim, roles.tokens)
    )


def _start_weight_sums(dY: Sequence[Tensor], X: Tensor, roles: Roles) -> Moving:
    """dW_i = dY_iᵀ X on their way to the shards; where inputs are scattered, formed as [K, N]: none is copied."""
    if roles.tokens is None or roles.w_dim == 0:
        return Together(start_reduce, [dy.T @ X for dy in dY], roles.w_dim, 1 - roles.w_dim, roles.tokens)
    widths = [dy.shape[1] for dy in dY]
    joined_KN = X.new_empty(X.shape[1], sum(widths))
    for dy, place in zip(dY, joined_KN.split(widths, 1), strict=True):
        torch.mm(X.T, dy, out=place)
    return _Split(start_reduce(joined_KN.T, 1, roles.tokens), widths)


@dataclass(frozen=True)
class _Split:
    """Tensors that move joined along dim 0."""

    pending: Pending
    lengths: list[int]

    def wait(self) -> list[Tensor]:
        return list(self.pending.wait().split(self.lengths))


def distributed_product(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    roles: Roles,
    schedule: Schedule = GATHER,
    site: Site | None = None,
) -> tuple[Tensor, ...]:
    """Y_i = X · W_iᵀ + b_i on local shards (shapes above), differentiable; one Y for each weight.

    `schedule` has the switches of a gathered product; two of them need the `site` of the product in its model.
    """
    return DistributedProduct.apply(x, roles, schedule, site, *weights, *biases)


def matmul(
    x: Tensor,
    w: Tensor,
    mesh: Mesh,
    *,
    tokens: str | Iterable[str] = (),
    outputs: str | Iterable[str] = (),
    inputs: str | Iterable[str] = (),
    x_dim: int | None = 0,
    w_dim: int = 1,
    y_dim: int | None = 0,
    keep: bool = False,
) -> Tensor:
    """One distributed product `Y[T, N] = X[T, K] · W[N, K]ᵀ` on its own, differentiable.

    `tokens`, `outputs`, `inputs` name the axes that cut T, N and K; `x`, `w` and the result are this rank's shards,
    stored as the table at the top of this module says. Any floating dtype, the same for both. Raises ValueError when an
    axis has two roles or the local shapes do not fit each other.
    """
    axes = [(a,) if isinstance(a, str) else tuple(a) for a in (tokens, outputs, inputs)]
    named = [axis for group in axes for axis in group]
    if len(set(named)) != len(named):
        raise ValueError(
            f"an axis has one role in a product; given tokens={axes[0]}, outputs={axes[1]}, inputs={axes[2]}"
        )
    t, n, k = (mesh.group(a) for a in axes)
    roles = Roles(t, n, k, x_dim, w_dim, y_dim)
    x_inputs = x.shape[1] * (n.size if n and x_dim == 1 else 1)
    w_inputs = w.shape[1] * (t.size if t and w_dim == 1 else 1)
    if x_inputs != w_inputs:
        raise ValueError(
            f"x {tuple(x.shape)} and w {tuple(w.shape)} do not multiply: {x_inputs} inputs against {w_inputs}"
        )
    return distributed_product(x, [w], [None], roles, Schedule(keep=keep))[0]
