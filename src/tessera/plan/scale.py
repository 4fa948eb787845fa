"""Geometries side by side: what one device receives and holds in a step, by formula, against the number of devices.

A layout is what a config can ask for: `sizes.rules.TensorParallel`. What is received is counted in elements of the
compute dtype.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tessera.core.axes import MODEL_AXES
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.core.text import human
from tessera.layout import resolve
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape, padded_length
from tessera.layout.streams import attention_layout, joins_rows
from tessera.models.anatomy import anatomy_of
from tessera.models.config import ModelConfig
from tessera.plan.memory import saved_bytes, state_bytes
from tessera.plan.traffic import received_bytes, step_transfers
from tessera.sizes.context import WHOLE, ContextParallel, Surroundings, fitted
from tessera.sizes.numbers import divisors_of
from tessera.sizes.rules import Ask, TensorParallel, first_misfit, modes_with

SHARING = ("Ulysses", "exchange", "ring")
FORMULA = "is a published formula of what is received: there is no code of it whose step could be counted"


def parallel_of(
    tensor: TensorParallel, batch: int, model: ModelConfig, rank: int = 0, context: ContextParallel = WHOLE
) -> Parallel:
    """The layouts of `tensor` as `rank` sees them, in float32, with no process behind it; weights move when needed."""
    moved, mesh = replace(tensor, prefetch=False, defer=False), Mesh(tensor.axes | context.sizes, rank=rank)
    return resolve.parallel_of(moved, mesh, batch, model.dimensions, context=context)


def padded(shape: StepShape, parallel: Parallel) -> StepShape:
    """The shape with sequences as long as both streams need them to be cut evenly."""
    return replace(shape, sequence=padded_length(shape.sequence, shape.batch, parallel.residual, parallel.mesh))


def received_elements(model: ModelConfig, shape: StepShape, tensor: TensorParallel) -> int:
    """Elements that rank 0 receives in one step."""
    parallel = parallel_of(tensor, shape.batch, model)
    return received_bytes(step_transfers(model, padded(shape, parallel), parallel)) // parallel.compute.itemsize


def every_mesh(ranks: int) -> Iterator[TensorParallel]:
    """Every (inner, depth, row, col) of so many ranks that some geometry has."""
    for inner in divisors_of(ranks):
        for depth in divisors_of(ranks // inner):
            for row in divisors_of(ranks // (inner * depth)):
                axes = dict(zip(MODEL_AXES, (inner, depth, row, ranks // (inner * depth * row)), strict=True))
                for mode in modes_with(axes)[:1]:
                    yield TensorParallel(mode, mesh=axes)


def misfit(model: ModelConfig, shape: StepShape, tensor: TensorParallel) -> str | None:
    """Why a layout does not fit the model and the batch; None when it does. Ranks that share rows are left out."""
    if found := first_misfit(Ask(tensor, model.dimensions, shape.batch)):
        return found.reason
    axes, batch = tensor.axes, shape.batch
    if joins_rows(axes, batch, model.dimensions):
        cutting = attention_layout(axes, batch, model.dimensions).tokens
        ways = f"{' × '.join(cutting)} = {math.prod(axes[axis] for axis in cutting)} ways"
        return f"cuts micro_batch_size = {batch} {ways}: ranks share rows"
    return None


def held_bytes(model: ModelConfig, shape: StepShape, tensor: TensorParallel) -> tuple[int, int]:
    """Parameters, gradients and moments of rank 0; and what its forward saves."""
    parallel = parallel_of(tensor, shape.batch, model)
    return state_bytes(model, parallel), saved_bytes(model, padded(shape, parallel), parallel)


def best_mesh(
    model: ModelConfig, shape: StepShape, ranks: int, keep: bool = False, memory: float = math.inf
) -> TensorParallel | None:
    """The mesh that receives the fewest elements in a step, of all that fit and hold at most `memory` bytes.

    Of several the one that holds the least.
    """
    return _best_of(fitting_meshes(model, shape, ranks, keep), model, shape, memory)


def fitting_meshes(
    model: ModelConfig, shape: StepShape, ranks: int, keep: bool = False
) -> list[tuple[TensorParallel, int]]:
    """Every mesh of so many ranks that fits the model and the batch, with the bytes that rank 0 holds in it."""
    meshes = (replace(tensor, keep_gathered=keep) for tensor in every_mesh(ranks))
    fitting = (tensor for tensor in meshes if misfit(model, shape, tensor) is None)
    return [(tensor, sum(held_bytes(model, shape, tensor))) for tensor in fitting]


def _best_of(
    fitting: list[tuple[TensorParallel, int]], model: ModelConfig, shape: StepShape, memory: float
) -> TensorParallel | None:
    within = [(tensor, held) for tensor, held in fitting if held <= memory]
    return min(within, key=lambda each: (received_elements(model, shape, each[0]), each[1]), default=(None, 0))[0]


def _why_no_mesh(fitting: list[tuple[TensorParallel, int]], memory: float) -> str:
    if not fitting:
        return "no mesh of so many devices divides the model and the batch"
    tensor, least = min(fitting, key=lambda each: each[1])
    mesh = "·".join(map(str, tensor.axes.values()))
    return f"no mesh fits {human(memory)}: the one that holds least, {mesh}, holds {human(least)}"


def published_loop_elements(model: ModelConfig, shape: StepShape, ranks: int) -> int | None:
    """Elements of a step with the SUMMA loop as published: C = A B in every layer, and both backward products as loops.

    Each of a layer's products broadcasts or reduces X and W panel by panel, (q−1)(|X| + |W|) / q² elements (van de
    Geijn & Watts 1997; Xu et al. 2021, Optimus). The rest of the step is ours. None where there is no q × q grid.
    """
    side = math.isqrt(ranks)
    tensor = TensorParallel("2d", mesh={"row": side, "col": side}, schedule="summa")
    if side**2 != ranks or misfit(model, shape, tensor):
        return None
    parallel, products = parallel_of(tensor, shape.batch, model), anatomy_of(model).products
    shape = padded(shape, parallel)
    loops = 0
    for product, count in products:
        inputs = product.width if product.column else product.features
        loops += count * ((side - 1) * (shape.tokens * inputs + product.width * product.features) // ranks)
    sites = {product.site for product, _ in products}
    rest = [transfer for transfer in step_transfers(model, shape, parallel) if transfer.site not in sites]
    passes = shape.micro_batches * (4 if shape.recompute else 3)
    return passes * loops + received_bytes(rest) // parallel.compute.itemsize


@dataclass(frozen=True)
class Contender:
    """One layout at one number of devices: what it costs by formula; `reason`: why it does not fit, or is not counted.

    `elements` are those received in a step, `kept` the same with gathered copies kept; `states` and `saved` are bytes,
    see plan/memory.py. `context`: how devices share rows.
    """

    name: str
    ranks: int
    tensor: TensorParallel | None
    reason: str = ""
    elements: int = 0
    kept: int = 0
    states: int = 0
    saved: int = 0
    context: ContextParallel = WHOLE

    @property
    def mesh(self) -> str:
        """The sizes of inner·depth·row·col."""
        return "—" if self.tensor is None else "·".join(map(str, self.tensor.axes.values()))


def contenders(
    model: ModelConfig, shape: StepShape, ranks: int, keep: bool = False, memory: float = math.inf
) -> list[Contender]:
    """Every layout of the comparison on so many devices; `memory` is the bytes that the best mesh may hold."""
    fitting = fitting_meshes(model, shape, ranks, keep)
    best = _best_of(fitting, model, shape, memory)
    asked = {
        "1D": TensorParallel("1d", ranks, sequence_parallel=False),
        "1D + SP": TensorParallel("1d", ranks),
        "FSDP": TensorParallel("2d", mesh={"row": ranks}),
        "2D": TensorParallel("2d", ranks),
        "2.5D": TensorParallel("2.5d", ranks),
        "3D": TensorParallel("3d", ranks),
        "best mesh": best,
        "SUMMA loop": TensorParallel("2d", ranks, schedule="summa"),
    }
    made = [
        Contender(name, ranks, None, _why_no_mesh(fitting, memory))
        if tensor is None
        else _contender(model, shape, name, ranks, tensor, keep)
        for name, tensor in asked.items()
    ]
    published = published_loop_elements(model, shape, ranks)
    if published is not None:
        made.append(Contender("SUMMA, published", ranks, None, FORMULA, elements=published, kept=published))
    return made


def sharing_rows(model: ModelConfig, shape: StepShape, ranks: int) -> list[Contender]:
    """The layouts in which so many devices share each row in one way, with no tensor axis; FSDP2 cuts their weights."""
    return [_sharing(model, shape, name, ContextParallel(ranks, name.lower())) for name in SHARING]


def _sharing(model: ModelConfig, shape: StepShape, name: str, context: ContextParallel) -> Contender:
    try:
        fitted(context, Surroundings(model.num_heads, model.num_kv_heads, model.head_dim))
    except UserError as error:
        return Contender(name, context.size, None, error.reason)
    parallel = parallel_of(TensorParallel(), shape.batch, model, context=context)
    shape = padded(shape, parallel)
    elements, kept = (
        received_bytes(step_transfers(model, replace(shape, reshard=reshard), parallel)) // parallel.compute.itemsize
        for reshard in (shape.reshard, False)
    )
    held = state_bytes(model, parallel), saved_bytes(model, shape, parallel)
    return Contender(name, context.size, TensorParallel(), "", elements, kept, *held, context)


def _contender(
    model: ModelConfig, shape: StepShape, name: str, ranks: int, tensor: TensorParallel, keep: bool
) -> Contender:
    if reason := misfit(model, shape, tensor):
        return Contender(name, ranks, None, reason)
    loop = tensor.schedule != "gather"
    tensor = replace(tensor, keep_gathered=keep and not loop)
    kept = received_elements(model, shape, replace(tensor, keep_gathered=not loop))
    return Contender(
        name, ranks, tensor, "", received_elements(model, shape, tensor), kept, *held_bytes(model, shape, tensor)
    )
