"""What every rank of a layout holds and receives, worked out in one process from the specs of the parameters.

The specs are those of models/anatomy.py, laid on a mesh of each rank: no process group, data or weights are needed, and
the numbers are those of the tensors that running ranks allocate. What ranks receive is the closed form of
plan/traffic.py.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from tessera.core.axes import AXES, SEQUENCE_AXES
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.spec import Init, ParameterSpec
from tessera.layout.streams import HIDDEN, Layout
from tessera.models.anatomy import anatomy_of
from tessera.models.config import ModelConfig
from tessera.plan.traffic import Transfer, step_transfers

MOMENTS = 2  # AdamW keeps two for each element, in the parameter's dtype
STEP_BYTES = 4  # and one float32 count of steps for each parameter


@dataclass(frozen=True)
class Held:
    """One parameter (or activation): its spec, the names of its dims, and the shape of its part on each rank in order.

    `copies` ranks hold the same part.
    """

    name: str
    spec: ParameterSpec
    dims: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    copies: int

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix or embedding, of which both dims are cut by the rules of a product."""
        return len(self.spec.shape) > 1 and all(self.spec.cuts)

    @cached_property
    def elements(self) -> tuple[int, ...]:
        """Elements on each rank."""
        return tuple(math.prod(shape) for shape in self.shapes)

    def bytes(self, dtype: torch.dtype) -> tuple[int, ...]:
        """Bytes on each rank, held in `dtype`."""
        return tuple(n * dtype.itemsize for n in self.elements)

    @property
    def whole(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.spec.shape)

    @property
    def range(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest and the largest local shape; the same unless a dim does not divide."""
        return min(self.shapes), max(self.shapes)


@dataclass(frozen=True)
class Totals:
    """Elements of some parameters: of the whole model, and on each rank; bytes follow from `itemsize`."""

    parameters: int
    whole: int
    by_rank: tuple[int, ...]
    itemsize: int

    @property
    def parameter_bytes(self) -> tuple[int, ...]:
        return tuple(n * self.itemsize for n in self.by_rank)

    @property
    def gradient_bytes(self) -> tuple[int, ...]:
        """A gradient has the shape and dtype of its parameter."""
        return self.parameter_bytes

    @property
    def optimizer_bytes(self) -> tuple[int, ...]:
        """AdamW: two moments an element, a count of steps a parameter."""
        return tuple(MOMENTS * n * self.itemsize + STEP_BYTES * self.parameters for n in self.by_rank)

    @property
    def bytes(self) -> tuple[int, ...]:
        """Parameters, gradients and optimizer state together."""
        three = zip(self.parameter_bytes, self.gradient_bytes, self.optimizer_bytes, strict=True)
        return tuple(sum(parts) for parts in three)


@dataclass(frozen=True)
class Inspection:
    """A model laid on a mesh: what each of `ranks` holds of each parameter."""

    parallel: Parallel
    ranks: tuple[Mesh, ...]
    parameters: tuple[Held, ...]

    @property
    def mesh(self) -> Mesh:
        return self.ranks[0]

    @property
    def share_axes(self) -> tuple[str, ...]:
        """The axes above size 1 that cut matrices and embeddings: those of the products, and FSDP2's."""
        return self.mesh.present(("inner", "col", *self.parallel.weights_over, *(self.parallel.fsdp or ())))

    @property
    def share(self) -> int:
        """The parts into which matrices and embeddings are cut: one a rank, alike along what is left of the mesh."""
        return self.mesh.size(self.share_axes)

    def totals(self, matrices: bool | None = None) -> Totals:
        """Of the matrices and embeddings, of everything else, or (None) of all parameters."""
        chosen = [held for held in self.parameters if matrices is None or held.is_matrix == matrices]
        by_rank = tuple(sum(held.elements[mesh.rank] for held in chosen) for mesh in self.ranks)
        return Totals(len(chosen), sum(held.whole for held in chosen), by_rank, self.parallel.dtype.itemsize)

    def share_is_exact(self) -> bool:
        """Whether all ranks together hold each matrix element exactly world / share times, shares equal where they can.

        The shares of a matrix of even dims are equal; those of an uneven one differ, and are equal on average.
        """
        matrices = [held for held in self.parameters if held.is_matrix]
        return all(sum(held.elements) * self.share == held.whole * len(self.ranks) for held in matrices)

    def uneven(self) -> list[Held]:
        """The parameters whose shards differ in size from rank to rank."""
        return [held for held in self.parameters if len(set(held.shapes)) > 1]


def inspect_model(model: ModelConfig, parallel: Parallel) -> Inspection:
    """What each rank of `parallel.mesh` holds of `model`. The mesh needs a rank; none of its ranks need run."""
    ranks = tuple(parallel.mesh.at(rank) for rank in range(parallel.mesh.world))
    shapes: dict[tuple[object, ...], tuple[tuple[int, ...], ...]] = {}  # layers repeat: each cut is worked out once
    parameters = []
    for name, dims, spec in anatomy_of(model).parameters(parallel):
        cut = (spec.shape, spec.cuts)
        if cut not in shapes:
            shapes[cut] = tuple(map(spec.stored_shape, ranks))
        parameters.append(Held(name, spec, dims, shapes[cut], _copies(spec, parallel.mesh)))
    return Inspection(parallel, ranks, tuple(parameters))


def activations(model: ModelConfig, inspection: Inspection, shape: StepShape) -> dict[str, Held]:
    """What the first decoder layer makes of a micro-batch as ranks hold it, by the names that `--activation` takes.

    k and v are as their product gives them: where kv heads are fewer than the parts, ranks then gather what they read.
    """
    parallel, held = inspection.parallel, {}

    def make(name: str, title: str, layout: Layout, dim: str, features: int) -> None:
        # where ranks share sequences, tokens are counted in the order in which these have them (nn/context/cut.py)
        cuts = ((*SEQUENCE_AXES, *layout.tokens), layout.features)
        spec = ParameterSpec((shape.tokens, features), cuts, layout, Init())
        shapes = tuple(map(spec.stored_shape, inspection.ranks))
        held[name] = Held(title, spec, ("T", dim), shapes, _copies(spec, parallel.mesh))

    make("residual", "residual stream", parallel.residual, "h", model.hidden_size)
    for block in anatomy_of(model).layers[0]:
        layout, (out,) = block.row.hidden(parallel), block.row.linears
        for linear in block.column.linears:
            name = linear.name.rpartition(".")[2]
            make(name, name, layout, linear.dim, linear.features)
        name, title = ("attention", "hidden stream in attention") if block.attention else ("hidden", "hidden stream")
        make(name, title, layout, out.dim, out.features)
    return held


def streams(model: ModelConfig, inspection: Inspection, shape: StepShape) -> list[Held]:
    """The residual stream and the hidden one of a micro-batch as the ranks hold them; attention's own if it differs."""
    made = activations(model, inspection, shape)
    names = ["residual", "hidden"] + ["attention"] * (inspection.parallel.attention != HIDDEN)
    return [made[name] for name in names]


@dataclass(frozen=True)
class Collective:
    """One kind of collective at one site of a step, as each rank takes part in it; `in_layers`: the site is theirs."""

    of_ranks: tuple[Transfer, ...]
    in_layers: bool

    @property
    def transfer(self) -> Transfer:
        """What all ranks share: the site, the axes, how often it runs (not the calls and bytes of one run)."""
        return self.of_ranks[0]

    @property
    def calls(self) -> tuple[int, ...]:
        return tuple(transfer.calls for transfer in self.of_ranks)

    @property
    def received(self) -> tuple[int, ...]:
        """Bytes that each rank receives in one run."""
        return tuple(transfer.received for transfer in self.of_ranks)


def traffic(model: ModelConfig, inspection: Inspection, shape: StepShape) -> list[Collective]:
    """Every collective of one optimizer step, in the order of plan/traffic.py.

    Ranks receive the same, but for the skew of cannon, for uneven vocabularies, and for keys and values of shared
    sequences, of which some ranks receive none.
    """
    of_ranks = [step_transfers(model, shape, replace(inspection.parallel, mesh=mesh)) for mesh in inspection.ranks]
    sites = {site for layer, _ in anatomy_of(model).kinds for block in layer for site in block.sites}
    return [Collective(each, each[0].site in sites) for each in _aligned(of_ranks)]


def _aligned(of_ranks: Sequence[Sequence[Transfer]]) -> list[tuple[Transfer, ...]]:
    """The same transfer of every rank together; of a rank that takes no part, one without calls."""
    by_rank: list[dict[tuple[object, ...], Transfer]] = []
    for transfers in of_ranks:
        met: Counter[tuple[object, ...]] = Counter()
        own: dict[tuple[object, ...], Transfer] = {}
        for each in transfers:
            which = (each.site, each.phase, each.what, each.kind, each.axes)
            own[*which, met[which]] = each
            met[which] += 1
        by_rank.append(own)
    fullest = max(by_rank, key=len)
    every = dict.fromkeys([*fullest, *(which for own in by_rank for which in own)])
    anyone = {which: next(own[which] for own in by_rank if which in own) for which in every}
    idle = {which: replace(each, calls=0, received=0) for which, each in anyone.items()}
    return [tuple(own.get(which, idle[which]) for own in by_rank) for which in every]


def _copies(spec: ParameterSpec, mesh: Mesh) -> int:
    """How many ranks hold the same block."""
    return mesh.size(axis for axis in AXES if axis not in spec.cut_axes)


def cut_in_words(dims: Sequence[str], cuts: Sequence[Sequence[str]], mesh: Mesh) -> str:
    """`[V: col][h: inner, row]`: the axes above size 1 that cut each dim, major to minor."""
    present = [[axis for axis in axes if mesh.sizes[axis] > 1] for axes in cuts]
    words = [f"{dim}: {', '.join(axes)}" if axes else dim for dim, axes in zip(dims, present, strict=True)]
    return "".join(f"[{word}]" for word in words)


def placements_in_words(spec: ParameterSpec, mesh: Mesh) -> list[str]:
    """The DTensor placement on each axis above size 1, in short: S(1) for Shard(dim=1), R for Replicate()."""
    dim_of = {axis: dim for dim, axes in enumerate(spec.stored_cuts) for axis in axes}
    return [f"S({dim_of[axis]})" if axis in dim_of else "R" for axis in mesh.present(AXES)]
