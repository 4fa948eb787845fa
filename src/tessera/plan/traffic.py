"""What one rank receives in one optimizer step, in closed form: every collective of every place of the model.

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
reduce-scatter in every schedule, and so do the embedding and the head. `tests/plan` holds all of this, exactly,
against what a recorder counts.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tessera.core.axes import AXES, DATA_AXES, MODEL_AXES
from tessera.engine.gradients import LARGE
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.spec import local_slice
from tessera.models.config import ModelConfig
from tessera.plan.held import Parameters
from tessera.sizes.schedule import GATHER, Schedule


@dataclass(frozen=True)
class Row:
    """One kind of collective at one place, e.g. the weights of q·k·v gathered in the forward.

    `calls` and `received` (bytes that this rank receives) are those of one run of the place; it runs `times` a step.
    `what` is the operand that moves, `phase` forward, backward or step (once at its end).
    """

    place: str
    phase: str
    what: str
    kind: str
    axes: tuple[str, ...]
    calls: int
    received: int
    times: int = 1

    @property
    def axis(self) -> str:
        """The axes as one name, as in `collectives.Record`."""
        return "·".join(self.axes)


def totals(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[int, int]]:
    """(axis, kind) → calls and bytes received in one step."""
    calls: Counter[tuple[str, str]] = Counter()
    received: Counter[tuple[str, str]] = Counter()
    for row in rows:
        calls[row.axis, row.kind] += row.times * row.calls
        received[row.axis, row.kind] += row.times * row.received
    return {key: (calls[key], received[key]) for key in sorted(calls)}


def received_bytes(rows: Iterable[Row]) -> int:
    """Bytes received in one step, all kinds and axes together."""
    return sum(row.times * row.received for row in rows)


Move = tuple[str, int, int]  # kind, calls, bytes received


@dataclass(frozen=True)
class _Leg:
    """One operand: `whole` bytes when brought together along `axes` (`ranks` of them), stored `cut` over them or not.

    Gathered, it moves in `pieces`. `across` is cannon's: this rank's place on the other axis of the grid.
    """

    what: str
    axes: tuple[str, ...]
    ranks: int
    whole: int
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
        if n == 1:
            return None
        if self.schedule == "summa":
            return panels, n, (n - 1) * block
        if self.schedule == "cannon":
            shifts = n - 1 + (turns % n != 0)
            return "shift", shifts, shifts * block
        if one == "all_reduce":  # which a ring cuts into n shards, even if they are not equal
            return one, self.pieces, self.pieces * ring(one, self.whole // self.pieces, n)
        return one, self.pieces, (n - 1) * block


def ring(kind: str, whole: int, ranks: int) -> int:
    """Bytes a rank receives when a gather, scatter or all-reduce of `whole` bytes runs around a ring."""
    return (2 if kind == "all_reduce" else 1) * whole * (ranks - 1) // ranks


class _Step:
    """Collects the rows of one step. Sizes are this rank's: what it multiplies, after what moves has come in."""

    def __init__(self, model: ModelConfig, shape: StepShape, parallel: Parallel) -> None:
        self.model, self.shape, self.parallel, self.mesh = model, shape, parallel, parallel.mesh
        self.element, self.stored = parallel.compute.itemsize, parallel.dtype.itemsize
        self.statistic = torch.promote_types(parallel.compute, torch.float32).itemsize
        self.tokens = shape.tokens // self.mesh.size(("depth", "row"))
        self.features = model.hidden_size // self.mesh.sizes["inner"]
        vocabulary = local_slice(model.vocab_size, ("col",), self.mesh)
        self.vocabulary = vocabulary.stop - vocabulary.start
        self.rows: list[Row] = []

    def add(self, place: str, phase: str, what: str, axes: Iterable[str], times: int, move: Move | None) -> None:
        if move is not None and times:
            self.rows.append(Row(place, phase, what, move[0], self.mesh.present(axes), move[1], move[2], times))

    def one(self, place: str, phase: str, what: str, axes: Iterable[str], times: int, kind: str, whole: int) -> None:
        """One collective of `whole` bytes."""
        axes = self.mesh.present(axes)
        if axes:
            self.add(place, phase, what, axes, times, (kind, 1, ring(kind, whole, self.mesh.size(axes))))

    def residual(self, what: str, schedule: Schedule = GATHER) -> _Leg:
        cut, across = self.parallel.residual.stored_dim("col") is not None, self.mesh.coordinates["row"]
        whole = self.tokens * self.features * self.element
        return _Leg(what, ("col",), self.mesh.sizes["col"], whole, cut, schedule.name, schedule.slices, across)

    def weight(self, rows: int, itemsize: int, schedule: Schedule = GATHER) -> _Leg:
        """A weight with `rows` features of H, or of the vocabulary, on this rank."""
        over, across = self.parallel.weights_over, self.mesh.coordinates["col"]
        whole = rows * self.features * itemsize
        return _Leg("W", over, self.mesh.size(over), whole, True, schedule.name, schedule.slices, across)

    def hidden(self, what: str, features: int, pieces: int = 1) -> _Leg:
        whole = self.tokens * features * self.element
        return _Leg(what, ("inner",), self.mesh.sizes["inner"], whole, pieces=pieces)

    def product(self, place: str, column: bool, outputs: int, forwards: int, backwards: int, pieces: int = 1) -> None:
        """A linear layer between R and `outputs` features of H (of all ranks); column: R → H, else H → R."""
        schedule, local = self.parallel.schedule, outputs // self.mesh.sizes["col"]
        R = self.residual("X" if column else "Y", schedule)
        H = self.hidden("Y" if column else "X", local, pieces)
        W = self.weight(local, self.element, schedule)
        X, Y = (R, H) if column else (H, R)
        for leg, move in ((X, X.into()), (W, W.into()), (Y, Y.out())):
            self.add(place, "forward", leg.what, leg.axes, forwards, move)
        self.add(place, "backward", "dY", Y.axes, backwards, Y.into())
        if not schedule.keep:
            for leg in (X, W):
                self.add(place, "backward", leg.what, leg.axes, backwards, leg.into())
        for leg in (X, W):
            self.add(place, "backward", f"d{leg.what}", leg.axes, backwards, leg.out())

    def norms(self, place: str, forwards: int, backwards: int) -> None:
        """Statistics of each token, where axes cut the features: one sum, or two, in float64 in LayerNorm's forward."""
        residual = self.parallel.residual
        tokens = self.shape.tokens // self.mesh.size(residual.tokens)
        layer_norm = self.model.norm == "layer"
        forward = tokens * (2 * 8 if layer_norm else self.statistic)
        backward = tokens * (2 if layer_norm else 1) * self.statistic
        self.one(place, "forward", "statistics", residual.features, forwards, "all_reduce", forward)
        self.one(place, "backward", "statistics", residual.features, backwards, "all_reduce", backward)

    def key_value_heads(self, forwards: int, backwards: int) -> None:
        """k and v come together along the minor axes of the heads until no head is cut."""
        attention, heads = self.parallel.attention, self.model.num_kv_heads
        tokens, axes = self.shape.tokens // self.mesh.size(attention.tokens), list(attention.features)
        while heads % self.mesh.size(axes):
            axis = axes.pop()
            whole = 2 * tokens * (heads * self.model.head_dim // self.mesh.size(axes)) * self.element
            self.one("attention", "forward", "k·v", (axis,), forwards, "all_gather", whole)
            self.one("attention", "backward", "dk·dv", (axis,), backwards, "reduce_scatter", whole)

    def embedding(self, times: int) -> None:
        """A row-parallel product whose X is free; its weight is looked up in the dtype it is stored in."""
        W, Y = self.weight(self.vocabulary, self.stored), self.residual("Y")
        self.add("embedding", "forward", "W", W.axes, times, W.into())
        self.add("embedding", "forward", "Y", Y.axes, times, Y.out())
        self.add("embedding", "backward", "dY", Y.axes, times, Y.into())
        self.add("embedding", "backward", "dW", W.axes, times, W.out())

    def head(self, times: int) -> None:
        """A column-parallel product in chunks of tokens, whose gradients are formed in the forward."""
        X, W = self.residual("X"), self.weight(self.vocabulary, self.element)
        inner, col = self.mesh.sizes["inner"], self.mesh.sizes["col"]
        self.add("head", "forward", "X", X.axes, times, X.into())
        self.add("head", "forward", "W", W.axes, times, W.into())
        chunk, numbers = self.shape.chunk_tokens * inner, 3 if self.shape.label_smoothing else 2
        full, last = divmod(self.tokens, chunk)
        for tokens, chunks in ((chunk, full), (last, 1 if last else 0)):
            logits = tokens * self.vocabulary * self.element
            exchanged = col * numbers * (tokens // inner) * self.statistic
            self.one("head", "forward", "logits", ("inner",), times * chunks, "reduce_scatter", logits)
            self.one("loss", "forward", "log-sum-exp", ("col",), times * chunks, "all_gather", exchanged)
            self.one("head", "forward", "dlogits", ("inner",), times * chunks, "all_gather", logits)
        self.add("head", "forward", "dX", X.axes, times, X.out())
        self.add("head", "forward", "dW", W.axes, times, W.out())

    def replicas(self) -> None:
        """Gradients of what is stored whole along token axes, as far as FSDP2 does not serve them: for each set of axes
        the large ones each alone, the others in one all-reduce."""
        parallel, held = self.parallel, Parameters(self.model, self.parallel).all()
        gradients: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for axes, shapes in (
            (parallel.residual.tokens, held.residual),
            (("depth", "row", "inner"), held.hidden),
            (MODEL_AXES, held.heads),
            (("depth",) if "depth" not in parallel.weights_over else (), held.matrices),
        ):
            own = self.mesh.present(axis for axis in axes if axis not in parallel.served)
            gradients[own] += [shape.elements * self.stored for shape in shapes if shape.elements]
        for axes in sorted(axes for axes, sizes in gradients.items() if axes and sizes):
            wholes = [size for size in gradients[axes] if size >= LARGE]
            if small := [size for size in gradients[axes] if size < LARGE]:
                wholes.append(sum(small))
            received = sum(ring("all_reduce", whole, self.mesh.size(axes)) for whole in wholes)
            self.add("gradients", "step", "replicas", axes, 1, ("all_reduce", len(wholes), received))
        self.one("gradients", "step", "norm, loss, stop", AXES, 1, "all_reduce", 3 * 8)
        self.one("loss", "forward", "targets", DATA_AXES, 1, "all_reduce", 8)

    def data(self) -> None:
        """What FSDP2 moves: the weights of each layer together, those of the rest together, padded to equal shards.

        Gathered for every forward, a layer again for its backward unless kept, which holds for all micro-batches; their
        gradients once a step.
        """
        parallel, shape, L = self.parallel, self.shape, self.model.num_layers
        assert parallel.fsdp is not None
        ranks = self.mesh.size(parallel.fsdp)
        copies = tuple(axis for axis in parallel.served if axis not in parallel.fsdp)
        parameters = Parameters(self.model, parallel)
        layer, rest = ([*unit.every] for unit in (parameters.layer(), parameters.rest()))
        units = [("layers", layer, L), ("embedding and head", rest, 1)]
        if not shape.by_layer:
            units = [("embedding and head", layer * L + rest, 1)]
        forwards = shape.micro_batches if shape.reshard else 1
        for place, unit, times in units:
            shard = sum(-(-each.rows // ranks) * each.width for each in unit)
            again = forwards * times if shape.reshard and place == "layers" else 0
            weights, sums = shard * ranks * self.element, shard * ranks * self.stored
            self.one(place, "forward", "W", parallel.fsdp, forwards * times, "all_gather", weights)
            self.one(place, "backward", "W", parallel.fsdp, again, "all_gather", weights)
            self.one(place, "backward", "dW", parallel.fsdp, times, "reduce_scatter", sums)
            self.one(place, "backward", "dW", copies, times, "all_reduce", shard * self.stored)


def _one_by_one(model: ModelConfig, parallel: Parallel) -> bool:
    """Whether q, k and v leave their product one by one: scattered over features, but of different widths."""
    scattered = parallel.attention.stored_dim("inner") == 1 and not parallel.schedule.in_panels
    return scattered and model.num_kv_heads != model.num_heads


def step_rows(model: ModelConfig, shape: StepShape, parallel: Parallel) -> list[Row]:
    """Every collective of one optimizer step on the rank of `parallel.mesh`, which needs no process group.

    Raises nothing: sizes that do not divide are refused before (sizes/rules.py).
    """
    step, L = _Step(model, shape, parallel), model.num_layers
    once, layers = shape.micro_batches, shape.micro_batches * L
    forwards = layers * (2 if shape.recompute else 1)
    query, key_value = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    gate_up = "gate·up" if model.gated else "up"

    step.embedding(once)
    step.norms("layer norms", 2 * forwards, 2 * layers)
    step.product("q·k·v", True, query + key_value, forwards, layers, 3 if _one_by_one(model, parallel) else 1)
    step.key_value_heads(forwards, layers)
    step.product("attention out", False, query, forwards, layers)
    step.product(gate_up, True, model.ffn_size * (2 if model.gated else 1), forwards, layers)
    step.product("down", False, model.ffn_size, forwards, layers)
    step.norms("final norm", once, once)
    step.head(once)
    if parallel.fsdp is not None:
        step.data()
    step.replicas()
    return step.rows
