"""What is alive while one product of a layer runs, forward and backward, as product/gathered.py and panels.py go on.

R, W and H are the bytes of the residual stream, the weights and the hidden stream brought together; S, w and h those of
this rank's shards. A gathered product, column-parallel (row-parallel: R and H change places):

    forward     X, W and the next W gathered; Y; with `inner` its parts joined, and their sum
    backward    dY gathered; X, W and the next W; dX and its sum; the dW of the product before, if deferred; dW, its sum

In panels each operand that moves has two panels there and a third on its way, each sum that leaves three.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from tessera.core.arrays import larger, smaller, where
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import Product
from tessera.plan.ledger import Ledger


class Early(NamedTuple):
    """Bytes of weights that come a product early: what is held of them, and what passes when their gather begins."""

    held: Any = 0
    passing: Any = 0


@dataclass(frozen=True)
class ProductSizes:
    """Bytes of one product's operands in the compute dtype; `w` and `h` have one for each of its linears.

    `whole_r` is R; `s` its shard; whether each of R, W and H moves, 0 or 1, is `r_moves`, `w_moves` and `h_moves`;
    `col` and `rows` the ranks along which R and W move. `by_features`: H is cut over features along `inner`; `cast`:
    parameters are in another dtype.
    """

    column: bool
    whole_r: Any
    s: Any
    w: tuple[Any, ...]
    h: tuple[Any, ...]
    r_moves: Any
    w_moves: Any
    h_moves: Any
    col: Any
    rows: Any
    inner: Any
    by_features: bool
    cast: bool

    @property
    def shards(self) -> Any:
        """w of all linears."""
        return sum(self.w)

    @property
    def whole_w(self) -> Any:
        return self.shards * self.rows

    @property
    def hidden(self) -> Any:
        """h of all linears."""
        return sum(self.h)

    @property
    def whole_h(self) -> Any:
        return self.hidden * self.inner

    @property
    def early(self) -> "Early":
        """Its weights, while the product before runs: gathered, and held in the compute dtype until they are used."""
        return Early((self.whole_w + self.shards * self.cast) * self.w_moves, self.copies)

    @property
    def copies(self) -> Any:
        """Copies of the shards that are made to gather them: joined, and turned so that they lie behind one another."""
        return ((len(self.w) > 1) + 1) * self.shards * self.w_moves * self.column

    @property
    def late(self) -> Any:
        """What is held of its weights' gradients while the next product runs, if it waits for their sums late."""
        return (self.shards if self.column else self.whole_w + self.shards) * self.w_moves


def sizes_of(product: Product, shape: StepShape, parallel: Parallel) -> ProductSizes:
    """The sizes of `product` on the rank of `parallel.mesh`."""
    mesh, residual, element = parallel.mesh, parallel.residual, parallel.compute.itemsize
    inner, col, rows = mesh.sizes["inner"], mesh.sizes["col"], mesh.size(parallel.weights_over)
    s = shape.tokens_on(mesh, residual.tokens) * (product.width // mesh.size(residual.features)) * element
    whole = shape.tokens_on(mesh, parallel.streams.ids) * (product.width // inner) * element
    hidden = product.hidden(parallel)
    tokens = shape.tokens_on(mesh, hidden.tokens)
    width = product.width // inner // rows
    return ProductSizes(
        product.column,
        whole if residual.stored_dim("col") is not None else s,
        s,
        tuple(linear.features // col * width * element for linear in product.linears),
        tuple(tokens * (linear.features * element // mesh.size(hidden.features)) for linear in product.linears),
        (col > 1) * (residual.stored_dim("col") is not None),
        (rows > 1) * 1,
        (inner > 1) * 1,
        col,
        rows,
        inner,
        hidden.stored_dim("inner") == 1,
        parallel.dtype != parallel.compute,
    )


def forward(ledger: Ledger, p: ProductSizes, parallel: Parallel, ahead: Early) -> None:
    """Walk the forward; its result is not held afterwards. `ahead`: weights gathered meanwhile for the next product."""
    if parallel.schedule.in_panels:
        return _forward_in_panels(ledger, p, parallel)
    x = ledger.hold(p.whole_r * p.r_moves if p.column else p.whole_h * p.h_moves, "gathered")
    w = _gather_weights(ledger, p, ahead)
    if p.column:
        y = ledger.hold(p.whole_h)
        _sum_hidden(ledger, p, joined=len(p.h) > 1 and not _apart(p))
    else:
        y = ledger.hold(p.whole_r)
        ledger.touch(p.s * p.r_moves)
    ledger.drop(y)
    ledger.drop(x + w, "gathered")


def _apart(p: ProductSizes) -> bool:
    """Whether the results of several linears move one by one: they are cut over features, and of other widths."""
    return p.by_features and any(width is not p.h[0] and _differ(width, p.h[0]) for width in p.h)


def _differ(a: Any, b: Any) -> bool:
    return bool((a != b).any()) if hasattr(a != b, "any") else bool(a != b)


def _sum_hidden(ledger: Ledger, p: ProductSizes, *, joined: bool) -> None:
    """Partial sums of H, which are held, are joined where they move as one, and summed over `inner`."""
    copies = joined + p.by_features
    largest = p.whole_h if joined or len(p.h) == 1 else p.h[0] * p.inner
    ledger.touch((copies * largest + p.hidden) * p.h_moves)


def _gather_weights(ledger: Ledger, p: ProductSizes, ahead: Early) -> Any:
    """The weights gathered, and those of the next product; what is held of both."""
    ledger.touch(p.copies + p.whole_w * p.w_moves)
    held = ledger.hold(p.whole_w * p.w_moves + ahead.held, "gathered")
    ledger.touch(ahead.passing)
    return held


def backward(ledger: Ledger, p: ProductSizes, parallel: Parallel, ahead: Early, late: Any) -> None:
    """Walk the backward: held afterwards are dX, and dW in the compute dtype, both as working.

    The gradient of the result is the caller's. `late`: what is held of the gradients of the product before.
    """
    if parallel.schedule.in_panels:
        return _backward_in_panels(ledger, p, parallel)
    keep = parallel.schedule.keep
    if p.column:
        if len(p.h) > 1 and not _apart(p):
            ledger.touch(p.hidden * p.h_moves)
        dy, x, dx, dx_sum = p.whole_h * p.h_moves, p.whole_r * p.r_moves, p.whole_r, p.s * p.r_moves
    else:
        dy, x, dx, dx_sum = p.whole_r * p.r_moves, p.whole_h * p.h_moves, p.whole_h, p.hidden * p.h_moves
    came = ledger.hold(dy, "gathered")
    came += 0 if keep else ledger.hold(x, "gathered")
    came = came + (0 if keep else _gather_weights(ledger, p, ahead))
    ledger.hold(dx)
    if not p.column and p.by_features:
        ledger.touch(dx * p.h_moves)
    moved = p.r_moves if p.column else p.h_moves
    ledger.hold(dx_sum)
    ledger.hold(late)
    ledger.hold(p.whole_w)
    ledger.hold(p.shards * p.w_moves)
    ledger.drop(p.whole_w * p.w_moves)
    ledger.drop(late)
    ledger.drop(dx * moved)
    ledger.drop(came, "gathered")


def _panels(p: ProductSizes, parallel: Parallel) -> tuple[Any, Any, Any, Any]:
    """The panels of R and of W as (bytes of a panel, how many there are) each."""
    schedule = parallel.schedule
    if schedule.name == "gather":
        return p.whole_r // schedule.slices, schedule.slices, p.whole_w // schedule.slices, schedule.slices
    return p.s, p.col, p.shards, p.rows


def _comes(p: ProductSizes, parallel: Parallel) -> Any:
    """Whether panels of R are tensors of their own, 0 or 1: gathered, or slices of the parts that W's axes cut."""
    sliced = p.w_moves if parallel.schedule.name == "gather" else 0
    return where(p.r_moves + sliced > 0, 1, 0)


def _incoming(panel: Any, count: Any, moves: Any, parallel: Parallel) -> tuple[Any, Any]:
    """Bytes of an operand while a panel of it multiplies, that one and the next; and of one more, which is asked for
    before the last one is let go. Of a loop one is the rank's own."""
    own = 0 if parallel.schedule.name == "gather" else 1
    there = panel * smaller(2, count - own) * moves
    return there, panel * smaller(3, count - own) * moves - there


def _outgoing(panel: Any, shard: Any, count: Any, moves: Any, parallel: Parallel, across: Any = 0) -> tuple[Any, Any]:
    """Bytes of a sum that leaves panel by panel: what is held of it between two panels, and more while one is added.

    In slices the whole shard and the last panel's sum are held; a panel comes, and its sum, beside the last one's where
    the next operands come too. `across`: it is cut along its columns, and copied to be summed. In loops a panel comes
    beside two: the last one on its way, and what has come of it or was this rank's own.
    """
    if parallel.schedule.name == "gather":
        slices = parallel.schedule.slices
        return shard + shard // slices, panel * (1 + across) + shard // slices * moves * (slices > 2)
    if parallel.schedule.name == "cannon":
        total, held = panel * smaller(3, count + 1) * moves + panel * (1 - moves), panel * (1 + moves)
    else:
        total, held = panel * smaller(3, count), panel * smaller(2, count)
    return held, total - held


def _forward_in_panels(ledger: Ledger, p: ProductSizes, parallel: Parallel) -> None:
    r, r_count, w, w_count = _panels(p, parallel)
    r_comes = _comes(p, parallel)
    joined = p.shards if len(p.w) > 1 else 0
    held = ledger.hold(joined + _incoming(w, w_count, p.w_moves, parallel)[0], "gathered")
    if p.column:
        held = held + ledger.hold(_incoming(r, r_count, r_comes, parallel)[0], "gathered")
        y = ledger.hold(p.whole_h)
        ledger.touch(p.hidden * p.h_moves + p.by_features * p.whole_h * p.h_moves)
    else:
        held = held + ledger.hold(p.whole_h * p.h_moves, "gathered")
        y = ledger.hold(sum(_outgoing(r, p.s, r_count, p.r_moves, parallel)))
    ledger.drop(y)
    ledger.drop(held, "gathered")


def _backward_in_panels(ledger: Ledger, p: ProductSizes, parallel: Parallel) -> None:
    r, r_count, w, w_count = _panels(p, parallel)
    keep, several, r_comes = parallel.schedule.keep, len(p.w) > 1, _comes(p, parallel)
    comes_w, next_w = (0, 0) if keep else _incoming(w, w_count, p.w_moves, parallel)
    out_w, added_w = _outgoing(w, p.shards, w_count, p.w_moves, parallel, across=p.column * p.w_moves)
    if p.column:
        # dH joined from several, or gathered of these; the weights joined
        ledger.touch(several * p.hidden + p.whole_h * p.h_moves)
        joined = several * p.hidden * (1 - p.h_moves)
        held = ledger.hold(joined + p.whole_h * p.h_moves + several * p.shards, "gathered")
        # a place for dW is made as large as the weights are, joined once more for that
        ledger.touch(several * p.shards + p.shards * (parallel.schedule.name == "gather"))
        comes_r, next_r = (0, 0) if keep else _incoming(r, r_count, r_comes, parallel)
        held = held + ledger.hold(comes_w + comes_r, "gathered")
        out_r, added_r = _outgoing(r, p.s, r_count, p.r_moves, parallel)
        ledger.hold(out_r)
        ledger.touch(out_w + larger(larger(added_r, added_w), next_r + next_w))
        ledger.drop(out_r)
        ledger.hold(p.s)
    else:
        came = 0 if keep else p.whole_h * p.h_moves
        comes_r, next_r = _incoming(r, r_count, r_comes, parallel)
        held = ledger.hold(came + comes_w + comes_r, "gathered")
        dh = ledger.hold(p.whole_h)
        ledger.touch(out_w + larger(added_w, next_r + next_w))
        ledger.hold(p.hidden * p.h_moves)
        ledger.drop(dh * p.h_moves)
    ledger.hold(p.shards)
    ledger.drop(held, "gathered")
