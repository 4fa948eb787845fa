"""Scratch memory of a schedule: what a rank holds beside its shards while the products of a decoder layer run.

The most is held in the backward, where X and W come in (dY too, once) and dX and dW go out. R, W and H being the bytes
of the residual stream, the weight and the hidden stream brought together along the axes over which they are stored
cut (0 where nothing is cut), the two kinds of layer hold

    column-parallel    R in and out, W in and out, H in
    row-parallel       R in,         W in and out, H in and out

(the copies that `keep` saves for the backward do not come in again, but are held by all layers), and of an operand

                       in                in and out           out, with keep
    gather             1                 2                    1
    slices S           min(3, S) / S     min(4, S + 1) / S    2 / S
    summa, q ranks     min(3, q−1) / q   min(4, q) / q
    cannon             min(3, q) / q     min(4, q + 1) / q

at once: of a panel that comes in the next two are on their way while it multiplies, of one that goes out the last one
is; one of summa's panels is the rank's own. H moves in one piece in every schedule. A gathered product also holds the
weight of the next one with `prefetch`, and the gradient of the last one's with `defer`. Copies are not counted: those
that join several weights or make a tensor contiguous, and those of the backend.
"""

from dataclasses import dataclass

from tessera.core.axes import SEQUENCE_AXES
from tessera.layout.parallel import Parallel
from tessera.models.anatomy import Layer, anatomy_of
from tessera.models.config import ModelConfig
from tessera.sizes.schedule import Schedule


@dataclass(frozen=True)
class Operands:
    """Bytes of R, W and H of one product when brought together on a rank; 0 for one that does not move."""

    column: bool
    r: int
    w: int
    h: int


def operands_of(layer: Layer, tokens: int, parallel: Parallel) -> list[Operands]:
    """The operands of each product of a layer, in order, for a micro-batch of `tokens` (padded)."""
    mesh, itemsize = parallel.mesh, parallel.compute.itemsize
    rows, col = tokens // mesh.size((*SEQUENCE_AXES, *parallel.streams.ids)), mesh.sizes["col"]
    inner = mesh.sizes["inner"]
    moves_r = col > 1 and parallel.residual.stored_dim("col") is not None
    moves_w, moves_h = mesh.size(parallel.weights_over) > 1, inner > 1
    return [
        Operands(
            product.column,
            r=moves_r * rows * (product.width // inner) * itemsize,
            w=moves_w * (product.features // col) * (product.width // inner) * itemsize,
            h=moves_h * rows * (product.features // col) * itemsize,
        )
        for block in layer
        for product in block.products
    ]


def product_scratch(product: Operands, schedule: Schedule, ranks: int) -> int:
    """Bytes held at once by one product alone; `ranks` along a side of the grid. Copies kept are not among them."""
    comes, both = _parts(schedule, ranks)
    r, w, h = product.r, product.w, product.h
    if schedule.keep:  # gathered, whole or in slices
        leaves = min(2, schedule.slices) / schedule.slices
        return round(leaves * (r + w) + h if product.column else comes * r + leaves * w + h)
    return round(both * (r + w) + h if product.column else comes * r + both * w + 2 * h)


def _parts(schedule: Schedule, q: int) -> tuple[float, float]:
    """The part of an operand held at once when it comes in, and when it also goes out."""
    S = schedule.slices
    if schedule.name == "summa":
        return min(3, q - 1) / q, min(4, q) / q
    if schedule.name == "cannon":
        return min(3, q) / q, min(4, q + 1) / q
    return (1, 2) if S == 1 else (min(3, S) / S, min(4, S + 1) / S)


def scratch_bytes(model: ModelConfig, tokens: int, parallel: Parallel, *, recompute: bool = False) -> int:
    """The most that a rank holds at once in any product of `model`, and all the gathered copies that it keeps."""
    kinds = [(operands_of(layer, tokens, parallel), count) for layer, count in anatomy_of(model).kinds]
    running = max(_running(products, parallel) for products, _ in kinds)
    if not parallel.schedule.keep:
        return running
    kept = [(sum((p.r if p.column else p.h) + p.w for p in products), count) for products, count in kinds]
    return running + (max(copies for copies, _ in kept) if recompute else sum(c * count for c, count in kept))


def _running(products: list[Operands], parallel: Parallel) -> int:
    """The most that is held while a product of a layer runs, the weights of the next and last one included."""
    schedule, ranks = parallel.schedule, parallel.mesh.sizes["col"]
    early = 0 if schedule.in_panels or schedule.keep or not schedule.prefetch else 1
    late = 0 if schedule.in_panels or not schedule.defer else 1
    return max(
        product_scratch(product, schedule, ranks)
        + early * products[place - 1].w
        + late * products[(place + 1) % len(products)].w
        for place, product in enumerate(products)
    )
