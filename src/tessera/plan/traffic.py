"""What one rank receives in one optimizer step, in closed form: every collective of every site of the model.

A linear layer leads between the residual stream R and the hidden stream H with a weight W; each of the three moves
along one set of axes: R along `col`, W along the token axes that cut it, H along `inner`.

    layer             forward                backward (a star: not with copies kept)
    column, R → H     R in, W in, H out      H in, R in *, W in *, R out, W out
    row,    H → R     H in, W in, R out      R in, H in *, W in *, H out, W out

With n ranks along the axes and b bytes a rank of the operand as it is stored cut over them, this rank receives

    schedule             in                                out
    gather               all-gather       (n−1) b          reduce-scatter   (n−1) b
      R stored whole     nothing                           all-reduce       2 (n−1) b
    slices S             the same bytes in S calls
    summa                n broadcasts     (n−1) b          n reduces        (n−1) b
    cannon               shifts           (n−1 + [s]) b    shifts           (n−1 + [e]) b

where [s] is 1 on the ranks that the skew moves and [e] on those that the way home does. H moves by all-gather and
reduce-scatter in every schedule, and so do the embedding and the head. What attention moves where ranks share
sequences is in sequences.py. `tests/plan` holds all of this, exactly, against what a recorder counts. The sizes of a
mesh and of a step may be arrays of candidates (plan/many.py): so are the calls and bytes then, on each one's rank 0.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from tessera.core.arrays import where
from tessera.core.axes import AXES
from tessera.core.mesh import Mesh
from tessera.engine.gradients import LARGE
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.spec import local_slice
from tessera.models.anatomy import EMBEDDING, HEAD, LOSS, Attention, Block, Norm, Parameter, Product, anatomy_of
from tessera.models.config import ModelConfig
from tessera.nn.context.cut import streams_of
from tessera.plan.many import ManyMeshes
from tessera.plan.sequences import attention_moves, whole_row_moves
from tessera.plan.tiles import counted_tiles, tile_forwards, tiled
from tessera.sizes.schedule import GATHER, Schedule


@dataclass(frozen=True)
class Transfer:
    """One kind of collective at one site, e.g. the weights of a layer's down projection gathered in the forward.

    `calls` and `received` (bytes that this rank receives) are those of one run of the site; it runs `times` a step.
    `what` is the operand that moves, `phase` forward, backward or step (once at its end).
    """

    site: str
    phase: str
    what: str
    kind: str
    axes: tuple[str, ...]
    calls: Any
    received: Any
    times: Any = 1

    @property
    def axis(self) -> str:
        """The axes as one name, as in `collectives.Record`."""
        return "·".join(self.axes)


def totals(transfers: Iterable[Transfer]) -> dict[tuple[str, str], tuple[int, int]]:
    """(axis, kind) → calls and bytes received in one step."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for transfer in transfers:
        calls, received = sums.get((transfer.axis, transfer.kind), (0, 0))
        more = (transfer.times * transfer.calls, transfer.times * transfer.received)
        sums[transfer.axis, transfer.kind] = (calls + more[0], received + more[1])
    return dict(sorted(sums.items()))


def received_bytes(transfers: Iterable[Transfer]) -> int:
    """Bytes received in one step, all kinds and axes together."""
    return sum(transfer.times * transfer.received for transfer in transfers)


LAYERS, OUTSIDE = "layers", "embedding and head"
"""The sites of what FSDP2 moves: each layer's parameters together, and those outside of the layers."""

Move = tuple[str, Any, Any]  # kind, calls, bytes received


@dataclass(frozen=True)
class _MovedOperand:
    """One operand: `whole` bytes when brought together along `axes` (`ranks` of them), stored `cut` over them or not.

    Gathered, it moves in `pieces`. `across` is cannon's: this rank's place on the other axis of the grid.
    """

    what: str
    axes: tuple[str, ...]
    ranks: Any
    whole: Any
    cut: bool = True
    schedule: str = "gather"
    pieces: int = 1
    across: int = 0

    def into(self) -> Move | None:
        """Brought together (or panel by panel) for a product."""
        return self._move("all_gather", "broadcast", self.across) if self.cut else None

    def out(self) -> Move | None:
        """Partial sums brought to where they are kept."""
        return self._move("reduce_scatter" if self.cut else "all_reduce", "reduce", 1 - self.across)

    def _move(self, one: str, panels: str, turns: int) -> Move | None:
        n, block = self.ranks, self.whole // self.ranks
        if isinstance(n, int) and n == 1:
            return None
        if self.schedule == "summa":
            return panels, where(n > 1, n, 0), (n - 1) * block
        if self.schedule == "cannon":
            shifts = n - 1 + (turns % n != 0)
            return "shift", shifts, shifts * block
        calls = where(n > 1, self.pieces, 0)
        if one == "all_reduce":  # which a ring cuts into n shards, even if they are not equal
            return one, calls, self.pieces * ring(one, self.whole // self.pieces, n)
        return one, calls, (n - 1) * block


def ring(kind: str, whole: Any, ranks: Any) -> Any:
    """Bytes a rank receives when a gather, scatter or all-reduce of `whole` bytes runs around a ring."""
    return (2 if kind == "all_reduce" else 1) * whole * (ranks - 1) // ranks


class _Step:
    """Collects the transfers of a step. Sizes are this rank's: what it multiplies, after what moves has come in."""

    def __init__(self, model: ModelConfig, shape: StepShape, parallel: Parallel) -> None:
        self.model, self.anatomy, self.shape = model, anatomy_of(model), shape
        self.parallel, self.mesh = parallel, parallel.mesh
        self.element, self.stored = parallel.compute.itemsize, parallel.dtype.itemsize
        self.statistic = torch.promote_types(parallel.compute, torch.float32).itemsize
        self.tokens = shape.tokens_on(self.mesh, parallel.streams.ids)
        self.features = model.hidden_size // self.mesh.sizes["inner"]
        vocabulary = local_slice(model.vocab_size, ("col",), self.mesh)
        self.vocabulary = vocabulary.stop - vocabulary.start
        self.added: list[Transfer] = []

    def add(self, site: str, phase: str, what: str, axes: Iterable[str], times: Any, move: Move | None) -> None:
        """One more transfer, or the same as before at a site that several blocks or kinds of layers share."""
        if move is not None and (not isinstance(times, int) or times):
            self.added.append(Transfer(site, phase, what, move[0], self.mesh.present(axes), move[1], move[2], times))

    @property
    def transfers(self) -> list[Transfer]:
        """All of them, the same at one site together; candidates' arrays stay as they were added."""
        times: Counter[Transfer] = Counter()
        of_candidates = []
        for each in self.added:
            if isinstance(each.calls * each.received * each.times, int):
                times[replace(each, times=1)] += each.times
            else:
                of_candidates.append(each)
        return [replace(each, times=count) for each, count in times.items()] + of_candidates

    def one(self, site: str, phase: str, what: str, axes: Iterable[str], times: Any, kind: str, whole: Any) -> None:
        """One collective of `whole` bytes."""
        axes = self.mesh.present(axes)
        if axes:
            ranks = self.mesh.size(axes)
            self.add(site, phase, what, axes, times, (kind, where(ranks > 1, 1, 0), ring(kind, whole, ranks)))

    def residual(self, what: str, schedule: Schedule = GATHER) -> _MovedOperand:
        cut, across = self.parallel.residual.stored_dim("col") is not None, self.mesh.coordinates["row"]
        whole = self.tokens * self.features * self.element
        return _MovedOperand(what, ("col",), self.mesh.sizes["col"], whole, cut, schedule.name, schedule.slices, across)

    def weight(self, rows: Any, itemsize: int, schedule: Schedule = GATHER) -> _MovedOperand:
        """A weight with `rows` features of H, or of the vocabulary, on this rank."""
        over, across = self.parallel.weights_over, self.mesh.coordinates["col"]
        whole = rows * self.features * itemsize
        return _MovedOperand("W", over, self.mesh.size(over), whole, True, schedule.name, schedule.slices, across)

    def hidden(self, what: str, features: Any, pieces: int = 1) -> _MovedOperand:
        whole = self.tokens * features * self.element
        return _MovedOperand(what, ("inner",), self.mesh.sizes["inner"], whole, pieces=pieces)

    def tiled(self, block: Block, backwards: Any) -> None:
        """The products of an MLP in tiles. Weights move once in each pass over these, unless they come in panels."""
        forwards = tile_forwards(self.model, self.shape)
        in_panels, whole = self.parallel.schedule.in_panels, self.tokens
        for tokens, count in counted_tiles(block, self.shape, self.parallel):
            self.tokens = tokens
            for product in block.products:
                self.product(product, count * backwards * forwards, count * backwards, weights=in_panels)
        self.tokens = whole
        for product in () if in_panels else block.products:
            W = self.weight(product.features // self.mesh.sizes["col"], self.element, self.parallel.schedule)
            self.add(product.site, "forward", W.what, W.axes, backwards * (forwards - 1), W.into())
            self.add(product.site, "backward", W.what, W.axes, backwards, W.into())
            self.add(product.site, "backward", f"d{W.what}", W.axes, backwards, W.out())

    def product(self, product: Product, forwards: Any, backwards: Any, weights: bool = True) -> None:
        """A matrix product of every layer of a kind; `weights`: its weights move for it."""
        schedule, site, local = self.parallel.schedule, product.site, product.features // self.mesh.sizes["col"]
        R = self.residual("X" if product.column else "Y", schedule)
        H = self.hidden("Y" if product.column else "X", local, self.pieces(product))
        W = self.weight(local, self.element, schedule)
        X, Y = (R, H) if product.column else (H, R)
        moving = [X, W] if weights else [X]
        for operand, move in [*((operand, operand.into()) for operand in moving), (Y, Y.out())]:
            self.add(site, "forward", operand.what, operand.axes, forwards, move)
        self.add(site, "backward", "dY", Y.axes, backwards, Y.into())
        if not schedule.keep:
            for operand in moving:
                self.add(site, "backward", operand.what, operand.axes, backwards, operand.into())
        for operand in moving:
            self.add(site, "backward", f"d{operand.what}", operand.axes, backwards, operand.out())

    def pieces(self, product: Product) -> int:
        """In how many collectives its hidden stream moves along inner: one for each of its linears where they are
        scattered over features and differ in width, e.g. q beside fewer k and v."""
        scattered = product.hidden(self.parallel).stored_dim("inner") == 1 and not self.parallel.schedule.in_panels
        widths = {linear.features for linear in product.linears}
        return len(product.linears) if scattered and len(widths) > 1 else 1

    def norm(self, norm: Norm, forwards: Any, backwards: Any) -> None:
        """Statistics of each token, where axes cut the features: one sum, or two, in float64 in LayerNorm's forward."""
        residual = self.parallel.residual
        tokens = self.shape.tokens_on(self.mesh, residual.tokens)
        forward = tokens * (2 * 8 if norm.centred else self.statistic)
        backward = tokens * norm.statistics * self.statistic
        self.one(norm.site, "forward", "statistics", residual.features, forwards, "all_reduce", forward)
        self.one(norm.site, "backward", "statistics", residual.features, backwards, "all_reduce", backward)

    def key_value_heads(self, attention: Attention, forwards: Any, backwards: Any) -> None:
        """k and v come together along the minor axes of the heads until no head is cut."""
        layout, heads = self.parallel.attention, attention.kv_heads
        tokens, axes, cut = self.shape.tokens_on(self.mesh, layout.tokens), list(layout.features), True
        while axes:
            cut = cut & (heads % self.mesh.size(axes) != 0)  # once no head is cut, nothing more comes together
            axis = axes.pop()
            whole = 2 * tokens * (heads * attention.head_dim // self.mesh.size(axes)) * self.element
            calls, ranks = where(cut, 1, 0), self.mesh.sizes[axis]
            for phase, what, kind, times in (
                ("forward", "k·v", "all_gather", forwards),
                ("backward", "dk·dv", "reduce_scatter", backwards),
            ):
                if self.mesh.present((axis,)) and cut is not False:
                    moves = (kind, where(ranks > 1, calls, 0), calls * ring(kind, whole, ranks))
                    self.add(attention.site, phase, what, (axis,), times, moves)

    def shared_sequences(self, attention: Attention, forwards: Any, backwards: Any) -> None:
        """Heads for tokens, and keys and values between owners, of every micro-batch as its documents lie."""
        parallel, tokens = self.parallel, self.shape.tokens_on(self.mesh, self.parallel.attention.tokens)
        if isinstance(self.mesh, ManyMeshes):
            for phase, what, kind, axes, calls, received in whole_row_moves(
                attention, self.shape.batch, tokens, parallel
            ):
                count = forwards if phase == "forward" else backwards
                self.add(attention.site, phase, what, axes, count, (kind, calls, received))
            return
        if not parallel.cuts_sequences:
            return
        for starts, batches in Counter(self.shape.document_starts).items():
            streams = streams_of(starts, self.shape.tokens, parallel, self.model.windows)
            own = streams[self.mesh.index(parallel.attention.tokens) if len(streams) > 1 else 0]
            times = {"forward": forwards, "backward": backwards}
            for phase, what, kind, axes, calls, received in attention_moves(attention, own, tokens, parallel):
                count = times[phase] * batches // self.shape.micro_batches
                self.add(attention.site, phase, what, axes, count, (kind, calls, received))

    def embedding(self, times: Any) -> None:
        """A row-parallel product whose X is free; its weight is looked up in the dtype it is stored in."""
        W, Y = self.weight(self.vocabulary, self.stored), self.residual("Y")
        self.add(EMBEDDING, "forward", "W", W.axes, times, W.into())
        self.add(EMBEDDING, "forward", "Y", Y.axes, times, Y.out())
        self.add(EMBEDDING, "backward", "dY", Y.axes, times, Y.into())
        self.add(EMBEDDING, "backward", "dW", W.axes, times, W.out())

    def head(self, times: Any) -> None:
        """A column-parallel product in chunks of tokens, whose gradients are formed in the forward."""
        X, W = self.residual("X"), self.weight(self.vocabulary, self.element)
        inner, col = self.mesh.sizes["inner"], self.mesh.sizes["col"]
        self.add(HEAD, "forward", "X", X.axes, times, X.into())
        self.add(HEAD, "forward", "W", W.axes, times, W.into())
        chunk, numbers = self.shape.chunk_tokens * inner, 3 if self.shape.label_smoothing else 2
        full, last = self.tokens // chunk, self.tokens % chunk
        for tokens, chunks in ((chunk, full), (last, where(last > 0, 1, 0))):
            logits = tokens * self.vocabulary * self.element
            exchanged = col * numbers * (tokens // inner) * self.statistic
            self.one(HEAD, "forward", "logits", ("inner",), times * chunks, "reduce_scatter", logits)
            self.one(LOSS, "forward", "log-sum-exp", ("col",), times * chunks, "all_gather", exchanged)
            self.one(HEAD, "forward", "dlogits", ("inner",), times * chunks, "all_gather", logits)
        self.add(HEAD, "forward", "dX", X.axes, times, X.out())
        self.add(HEAD, "forward", "dW", W.axes, times, W.out())

    def replicas(self) -> None:
        """Gradients summed at the end of a step, over `ParameterSpec.summed_axes`: for each set of axes the large ones
        each alone, the others in one all-reduce."""
        gradients: defaultdict[tuple[str, ...], list[tuple[Any, int]]] = defaultdict(list)
        for parameters, times in self.anatomy.units(self.parallel):
            for parameter in parameters:
                size = prod(parameter.spec.stored_shape(self.mesh)) * self.stored
                gradients[self.mesh.present(parameter.spec.summed_axes)].append((size, times))
        for axes, sizes in sorted(gradients.items()):
            ranks = self.mesh.size(axes)
            small = sum(times * where(size < LARGE, size, 0) for size, times in sizes)
            calls = sum(times * where(size >= LARGE, 1, 0) for size, times in sizes) + where(small > 0, 1, 0)
            large = sum(times * ring("all_reduce", where(size >= LARGE, size, 0), ranks) for size, times in sizes)
            if axes and not (isinstance(calls, int) and calls == 0):
                received = large + ring("all_reduce", small, ranks)
                self.add("gradients", "step", "replicas", axes, 1, ("all_reduce", calls, received))
        self.one("gradients", "step", "norm, loss, stop", AXES, 1, "all_reduce", 3 * 8)
        self.one(LOSS, "forward", "targets", self.parallel.streams.batch, 1, "all_reduce", 8)

    def data(self) -> None:
        """What FSDP2 moves: the weights of each layer together, those of the rest together, padded to equal shards.

        Gathered for every forward, a layer again for its backward unless kept, which holds for all micro-batches; their
        gradients once a step, or after every micro-batch with `sync_each_batch`.
        """
        parallel, shape = self.parallel, self.shape
        assert parallel.fsdp is not None
        ranks = self.mesh.size(parallel.fsdp)
        copies = tuple(axis for axis in parallel.served if axis not in parallel.fsdp)
        units = self.anatomy.units(parallel)
        shards = [(sum(padded_shard(each, self.mesh) for each in unit), times) for unit, times in units]
        sites = [(LAYERS, shard, times) for shard, times in shards[:-1]] + [(OUTSIDE, *shards[-1])]
        if not shape.by_layer:
            sites = [(OUTSIDE, sum(shard * times for shard, times in shards), 1)]
        forwards = shape.micro_batches if shape.reshard else 1
        sent = shape.micro_batches if shape.sync_each_batch else 1
        for site, shard, times in sites:
            again = forwards * times if shape.reshard and site == LAYERS else 0
            weights, sums = shard * ranks * self.element, shard * ranks * self.stored
            self.one(site, "forward", "W", parallel.fsdp, forwards * times, "all_gather", weights)
            self.one(site, "backward", "W", parallel.fsdp, again, "all_gather", weights)
            self.one(site, "backward", "dW", parallel.fsdp, sent * times, "reduce_scatter", sums)
            self.one(site, "backward", "dW", copies, sent * times, "all_reduce", shard * self.stored)


def padded_shard(parameter: Parameter, mesh: Mesh) -> int:
    """Elements of a parameter's longest shard over the axes that FSDP2 stores it over."""
    rows, *width = parameter.spec.local_shape(mesh)
    return -(-rows // mesh.size(parameter.spec.stored_over)) * prod(width)


def step_transfers(model: ModelConfig, shape: StepShape, parallel: Parallel) -> list[Transfer]:
    """Every collective of one optimizer step on the rank of `parallel.mesh`, which needs no process group.

    Raises nothing: sizes that do not divide are refused before (sizes/rules.py).
    """
    step, once = _Step(model, shape, parallel), shape.micro_batches
    step.embedding(once)
    for layer, count in step.anatomy.kinds:
        backwards = once * count
        forwards = backwards * (2 if shape.recompute else 1)
        for block in layer:
            step.norm(block.norm, forwards, backwards)
            if tiled(block, shape, parallel):
                step.tiled(block, backwards)
                continue
            step.product(block.column, forwards, backwards)
            if block.attention is not None:
                step.key_value_heads(block.attention, forwards, backwards)
                once_only = backwards if shape.savers.attention_once else forwards
                step.shared_sequences(block.attention, once_only, backwards)
            step.product(block.row, forwards, backwards)
    step.norm(step.anatomy.norm, once, once)
    step.head(once)
    if parallel.fsdp is not None:
        step.data()
    step.replicas()
    return step.transfers
