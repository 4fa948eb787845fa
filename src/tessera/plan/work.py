"""What one rank does in an optimizer step, whatever the machine: products, attention, memory traffic, collectives.

A layer's products have M tokens, N outputs and K inputs on this rank, after what moves has come together. A micro-batch
runs each once forward (once more where layers are computed again) and twice backward, for dX and for dW. Beside the
products, in elements of the compute dtype, with t tokens of the residual stream, h features, and q, kv, f those of
queries, keys and gate (or up) in the hidden stream, memory moves

                        forward          backward
    norm                2 t h            4 t h
    added to residual   3 t h            2 t h
    rotation            2 t (q + kv)     2 t (q + kv)
    activation          3 t f            5 t f          without a gate 2 and 3
    loss                2 t V in float32 and 2 t V      once, in the forward

and what the update moves is in update.py. Sizes of a mesh and of a step may be arrays of candidates (plan/many.py).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from tessera.core.arrays import larger, rounded_up, smaller, where
from tessera.core.axes import AXES
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import HEAD, Attention, Block, Product, anatomy_of
from tessera.models.config import ModelConfig
from tessera.plan.host import HostTraffic, travelling
from tessera.plan.numbering import sizes_inside
from tessera.plan.sequences import query_heads_on
from tessera.plan.tiles import counted_tiles, tile_forwards, tiled
from tessera.plan.traffic import LAYERS, OUTSIDE, Transfer, step_transfers
from tessera.plan.update import ADAMW, Update

SCORE_PASSES = 12
"""Times that the step-by-step kernel of attention reads or writes a score, in each direction; an estimate."""
OPERATORS = {"norm": (4, 8), "product": (4, 8), "attention": (12, 20), "activation": (4, 6), "add": (2, 2)}
"""Operators that the host issues, forward and backward."""

Phase = Literal["forward", "backward"]
PHASES: tuple[Phase, Phase] = ("forward", "backward")


class Multiplied(NamedTuple):
    """A product of M tokens, N outputs and K inputs, run `times` in a step."""

    site: str
    phase: Phase
    m: Any
    n: Any
    k: Any
    times: Any

    @property
    def flops(self) -> Any:
        """Floating-point operations in a step."""
        return 2 * self.times * self.m * self.n * self.k


class Moved(NamedTuple):
    """A kind of collective in a step, as `traffic.Transfer` has it; `hidden`: what it can overlap with.

    `machines`: on how many the ranks of its group lie.
    """

    transfer: Transfer
    ranks: Any
    machines: Any
    hidden: Literal["", "compute", "attention"]


@dataclass(frozen=True)
class Work:
    """A step of one rank. Counts are those of the step: FLOPs, bytes, operators.

    `attention`: FLOPs, `per_key` those for each key that a query sees; `scores`: how many pairs of a query and a key
    there are, forward and backward; `optimizer`: bytes that the update moves in the device's memory,
    `optimizer_on_host` in the host's, and `optimizer_flops` what it multiplies; `on_machine`: how many ranks of its
    machine compute at once, of which `inside` says how many lie along each axis; `host`: what travels to the host's.
    """

    products: Sequence[Multiplied]
    attention: Mapping[Phase, Any]
    per_key: Mapping[Phase, Any]
    scores: Mapping[Phase, Any]
    elementwise: Mapping[Phase, Any]
    operators: Mapping[Phase, Any]
    moved: Sequence[Moved]
    optimizer: Any
    micro_batches: Any
    on_machine: Any
    inside: Mapping[str, Any]
    host: HostTraffic
    optimizer_on_host: Any
    optimizer_flops: Any

    @property
    def flops(self) -> Any:
        """Of all products and attention."""
        return sum(each.flops for each in self.products) + sum(self.attention.values())


def step_work(
    model: ModelConfig,
    shape: StepShape,
    parallel: Parallel,
    per_machine: int,
    *,
    offload: bool = False,
    update: Update = ADAMW,
) -> Work:
    """The work of the rank of `parallel.mesh`, where `per_machine` ranks that follow one another share a machine.

    `offload`: FSDP2 keeps the states on the host, where they are updated.
    """
    made = _Made(model, shape, parallel)
    for layer, count in anatomy_of(model).kinds:
        for block in layer:
            made.block(block, shape.micro_batches * count)
    made.head()
    transfers = [*step_transfers(model, shape, parallel), *update.transfers(model, parallel)]
    mesh = parallel.mesh
    moved = [
        Moved(part, mesh.size(each.axes), machines_of(each.axes, mesh, per_machine), hidden)
        for each in transfers
        for part, hidden in _by_overlap(each, shape, parallel, offload)
    ]
    optimizer = update.moved_bytes(model, parallel)
    return Work(
        made.products,
        dict(made.attention),
        dict(made.per_key),
        dict(made.scores),
        dict(made.elementwise),
        dict(made.operators),
        moved,
        0 if offload else optimizer,
        shape.micro_batches,
        smaller(mesh.size(AXES), per_machine),
        sizes_inside(mesh.sizes, per_machine),
        travelling(model, shape, parallel, offload),
        optimizer if offload else 0,
        update.flops(model, parallel),
    )


class _Made:
    """Collects the work of the layers and the head."""

    def __init__(self, model: ModelConfig, shape: StepShape, parallel: Parallel) -> None:
        self.model, self.shape, self.parallel, self.mesh = model, shape, parallel, parallel.mesh
        self.tokens = shape.tokens_on(self.mesh, parallel.streams.ids)
        self.stream = shape.tokens_on(self.mesh, parallel.residual.tokens)
        self.products: list[Multiplied] = []
        self.attention: defaultdict[Phase, Any] = defaultdict(int)
        self.per_key: defaultdict[Phase, Any] = defaultdict(int)
        self.elementwise: defaultdict[Phase, Any] = defaultdict(int)
        self.scores: defaultdict[Phase, Any] = defaultdict(int)
        self.operators: defaultdict[Phase, Any] = defaultdict(int)

    @property
    def panels(self) -> Any:
        """Into how many a product falls."""
        schedule = self.parallel.schedule
        return schedule.slices if schedule.name == "gather" else self.mesh.sizes["col"]

    def multiply(self, product: Product, tokens: Any, forwards: Any, backwards: Any) -> None:
        local, inside = product.features // self.mesh.sizes["col"], product.width // self.mesh.sizes["inner"]
        n, k = (local, inside) if product.column else (inside, local)
        panels = self.panels
        if product.column:  # X and W come in panels of K, of a row-parallel layer W and Y in panels of N
            k, forwards, backwards = k // panels, forwards * panels, backwards * panels
        else:
            n, forwards, backwards = n // panels, forwards * panels, backwards * panels
        self.products.append(Multiplied(product.site, "forward", tokens, n, k, forwards))
        self.products.append(Multiplied(product.site, "backward", tokens, n, k, 2 * backwards))

    def beside(self, what: str, elements: tuple[Any, Any], forwards: Any, backwards: Any) -> None:
        """Elements that an operator moves forward and backward."""
        forward, backward = OPERATORS[what]
        self.elementwise["forward"] += forwards * elements[0] * self.parallel.compute.itemsize
        self.elementwise["backward"] += backwards * elements[1] * self.parallel.compute.itemsize
        self.operators["forward"] += forwards * forward
        self.operators["backward"] += backwards * backward

    def block(self, block: Block, backwards: Any) -> None:
        forwards = backwards * (2 if self.shape.recompute else 1)
        width = block.norm.width // self.mesh.size(self.parallel.residual.features)
        stream = self.stream * width
        self.beside("norm", (2 * stream, 4 * stream), forwards, backwards)
        self.beside("add", (3 * stream, 2 * stream), forwards, backwards)
        runs = [(self.tokens, forwards, backwards)]
        if tiled(block, self.shape, self.parallel):
            sizes, again = counted_tiles(block, self.shape, self.parallel), tile_forwards(self.model, self.shape)
            runs = [(tokens, again * count * backwards, count * backwards) for tokens, count in sizes]
        for tokens, *times in runs:
            for product in block.products:
                self.multiply(product, tokens, *times)
                self.beside("product", (0, 0), *times)
        if block.attention is not None:
            once = backwards if self.shape.savers.attention_once else forwards
            self.attend(block.attention, once, backwards)
            return
        hidden = block.row.hidden(self.parallel)
        features = block.row.features // self.mesh.size(hidden.features)
        elements = self.shape.tokens_on(self.mesh, hidden.tokens) * features
        gated = len(block.column.linears) > 1
        moves = (3, 5) if gated else (2, 3)
        for tokens, *times in runs:
            part = elements * tokens // self.tokens
            self.beside("activation", (moves[0] * part, moves[1] * part), *times)

    def attend(self, attention: Attention, forwards: Any, backwards: Any) -> None:
        """Attention of this rank: two products of queries and keys forward, five backward; causal ones are half."""
        mesh, heads = self.mesh, query_heads_on(attention, self.parallel)
        tokens = self.shape.tokens_on(mesh, self.parallel.attention.tokens)
        width = heads * attention.head_dim
        flops = 2 * tokens * width * self._keys(attention)
        self.scores["forward"] += flops // (2 * attention.head_dim) * forwards
        self.scores["backward"] += flops // (2 * attention.head_dim) * backwards
        if attention.scores:
            moved = SCORE_PASSES * (flops // (2 * attention.head_dim)) * self.parallel.compute.itemsize
            # no += here: of candidates these are arrays of whole numbers, and half of the keys is none
            self.elementwise["forward"] = self.elementwise["forward"] + moved * forwards
            self.elementwise["backward"] = self.elementwise["backward"] + moved * backwards
        if self.parallel.context.transport == "ring":
            self.merge(tokens, width, forwards)
        self.attention["forward"] += 2 * flops * forwards
        self.attention["backward"] += 5 * flops * backwards
        self.per_key["forward"] += 4 * tokens * width * forwards
        self.per_key["backward"] += 10 * tokens * width * backwards
        kv = width * attention.kv_heads // attention.heads
        rotated = 2 * tokens * (width + kv) if attention.rotary else 0
        self.beside("attention", (rotated, rotated), forwards, backwards)

    def merge(self, tokens: Any, width: Any, forwards: Any) -> None:
        """Around a ring each hop's result is added to what was there: two are read and one is written, in float32."""
        hops = larger(self.mesh.sizes["ring"] - 1, 0)
        self.elementwise["forward"] += forwards * hops * 3 * tokens * width * torch.float32.itemsize
        self.operators["forward"] += forwards * hops * 10

    def _keys(self, attention: Attention) -> Any:
        """The keys that a query sees, on average over the tokens of a step."""
        causal = 2 if self.model.causal and not attention.scores else 1
        if not self.shape.documents:
            seen = self.shape.sequence
            return seen / causal if attention.window is None else smaller(seen / causal, attention.window)
        lengths = [
            end - start
            for starts in self.shape.documents
            for start, end in zip(starts, (*starts[1:], self.shape.tokens), strict=True)
        ]
        windows = (length if attention.window is None else min(length, 2 * attention.window) for length in lengths)
        return sum(n * seen for n, seen in zip(lengths, windows, strict=True)) / causal / sum(lengths)

    def head(self) -> None:
        """The head and the loss: gradients are formed in the forward, so all of it runs there."""
        head, times = anatomy_of(self.model).head, self.shape.micro_batches
        n, k = larger(1, head.features // self.mesh.sizes["col"]), head.width // self.mesh.sizes["inner"]
        self.products.append(Multiplied(HEAD, "forward", self.tokens, n, k, 3 * times))
        wide = torch.promote_types(self.parallel.compute, torch.float32).itemsize
        inner = self.mesh.sizes["inner"]
        self.elementwise["forward"] += times * self.tokens * n // inner * 2 * (wide + self.parallel.compute.itemsize)
        self.operators["forward"] += times * 12 * larger(1, self.tokens // self.shape.chunk_tokens)


def machines_of(axes: Sequence[str], mesh: Mesh, per_machine: int) -> Any:
    """On how many machines at most a group along `axes` lies, ranks being numbered as `AXES` has the axes."""
    stride: Any = 1
    beside: Any = 1
    straddles: Any = 0
    for axis in reversed(AXES):
        size = mesh.sizes[axis]
        if axis in axes:
            beside = beside * smaller(size, larger(1, per_machine // stride))
            whole = stride * size
            # neither fills machines nor a part of one that divides it: some group begins in one and ends in the next
            divides = (per_machine % whole == 0) | (whole % per_machine == 0) | (stride % per_machine == 0)
            straddles = larger(straddles, where(divides | (size == 1), 0, 1))
        stride = stride * size
    machines = rounded_up(mesh.size(axes), beside)
    return where(straddles > 0, larger(machines, 2), larger(1, machines))


def _by_overlap(
    transfer: Transfer, shape: StepShape, parallel: Parallel, offload: bool
) -> list[tuple[Transfer, Literal["", "compute", "attention"]]]:
    """A transfer with what it can overlap with; gradients that the host adds up are waited for (plan/host.py)."""
    hidden = hidden_under(transfer, shape, parallel)
    if not (offload and shape.sync_each_batch and transfer.site in (LAYERS, OUTSIDE) and transfer.what == "dW"):
        return [(transfer, hidden)]
    first = transfer.times // shape.micro_batches
    return [(replace(transfer, times=first), hidden), (replace(transfer, times=transfer.times - first), "")]


def hidden_under(transfer: Transfer, shape: StepShape, parallel: Parallel) -> Literal["", "compute", "attention"]:
    """What a transfer can overlap with: other compute, attention, or nothing."""
    schedule, what = parallel.schedule, transfer.what
    if transfer.site in (LAYERS, OUTSIDE):
        return "compute"
    if transfer.kind == "receive" or transfer.kind == "send":
        return "attention"
    if transfer.site == HEAD or transfer.phase == "step" or what not in ("X", "W", "Y", "dX", "dW", "dY"):
        return ""
    if schedule.in_panels:
        return "compute"
    early = what == "W" and schedule.prefetch or what == "dW" and schedule.defer or what == "dX" and schedule.overlap
    return "compute" if early else ""
