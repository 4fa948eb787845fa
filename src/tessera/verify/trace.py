"""The activations of one optimizer step and their gradients, at the points of the model between its products.

    forward     embedding · norm → [q, k, v, attention] → out → norm → [gate, up] → down → … → norm → loss
    backward    the gradients of the same tensors, from the loss back

A point is the output of a norm, of the embedding or of a row-parallel layer, or the input of a row-parallel layer: so
between two points there is one product or norm, the `Operation` behind the later one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.gradients import first_copy
from tessera.engine.step import Step
from tessera.layout.spec import local_slice
from tessera.layout.streams import Layout
from tessera.models.anatomy import EMBEDDING, HEAD, LOSS, anatomy_of
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder


class Point(NamedTuple):
    """A tensor of one micro-batch: the input or output of the module `name`, or (`backward`) its gradient."""

    micro_batch: int
    backward: bool
    name: str
    output: bool

    def __str__(self) -> str:
        tensor = f"{'output' if self.output else 'input'} of {self.name}"
        phase = "backward" if self.backward else "forward"
        return (
            f"the {'gradient of the ' if self.backward else ''}{tensor}, {phase} of micro-batch {self.micro_batch + 1}"
        )


class Operation(NamedTuple):
    """What lies between two points: its sites, its modules, and in which `phase` it computes.

    `last` is the row-parallel layer whose output's gradient the operation's backward begins with; norms have none.
    """

    sites: tuple[str, ...]
    modules: tuple[str, ...]
    last: str = ""
    phase: str = "forward"


@dataclass
class Trace:
    """What passed every point, [T, F] shards as `layouts` says, in the order in which it did."""

    values: dict[Point, Tensor] = field(default_factory=dict)
    layouts: dict[Point, Layout] = field(default_factory=dict)
    arguments: dict[tuple[int, str], tuple[Any, ...]] = field(default_factory=dict)  # of modules, by micro-batch
    micro_batch: int = -1
    loss: float = 0.0

    def see(self, point: Point, tensor: Tensor, layout: Layout) -> None:
        """Note a tensor; a recomputed forward, which passes again, changes nothing."""
        if point not in self.values:
            self.values[point], self.layouts[point] = tensor.detach().clone(), layout

    def pass_point(self, name: str, output: bool, layout: Layout, tensor: Tensor) -> None:
        """Note a tensor of the forward, and its gradient when it comes."""
        point = Point(self.micro_batch, False, name, output)
        self.see(point, tensor, layout)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self.see(point._replace(backward=True), gradient, layout))


def traced(step: Step, batches: Sequence[MicroBatch]) -> Trace:
    """The gradients of one step of `step`, what passed on the way, and this rank's part of the loss."""
    trace = Trace()
    with _hooks(step.model, trace):
        loss = step.gradients(batches, 0)
    trace.loss = loss.item() if first_copy(step.mesh, step.streams.loss) else 0.0
    return trace


@contextmanager
def _hooks(model: Decoder, trace: Trace) -> Iterator[None]:
    def begin(*_: object) -> None:
        trace.micro_batch += 1

    def before(name: str, layout: Layout | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            trace.arguments.setdefault((trace.micro_batch, name), inputs)
            if layout is not None:
                trace.pass_point(name, False, layout, inputs[0])

        return hook

    def after(name: str, layout: Layout) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: trace.pass_point(name, True, layout, output)

    handles = [model.register_forward_pre_hook(begin)]
    handles.append(model.embedding.register_forward_pre_hook(before(EMBEDDING, None)))
    *chain, _ = _chain(model.config)
    for _, name, output in chain:
        module: Any = model.get_submodule(name)
        if output:
            handles.append(module.register_forward_hook(after(name, module.output)))
        else:  # of a row-parallel layer, the last of its block
            block = name.rpartition(".")[0]
            handles.append(model.get_submodule(block).register_forward_pre_hook(before(block, None)))
            handles.append(module.register_forward_pre_hook(before(name, module.input)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def part(whole: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    """What a rank holds of an activation [T, F]."""
    rows, features = whole.shape
    return whole[local_slice(rows, layout.tokens, mesh), local_slice(features, layout.features, mesh)]


def behind(point: Point, model: Decoder) -> Operation:
    """The operation whose result is at `point`: of two that meet there, in the backward the later one."""
    chain = _chain(model.config)
    operation = next(operation for operation, *at in chain if at == [point.name, point.output])
    if not point.backward:
        return operation
    later, *_ = next(chain)
    return later if HEAD in later.sites else later._replace(phase="backward")  # the head's gradients are formed early


def _chain(model: ModelConfig) -> Iterator[tuple[Operation, str, bool]]:
    """The operations of a forward in order, each with the module at whose output (or input) its result is a point."""
    anatomy = anatomy_of(model)
    yield Operation((EMBEDDING,), (EMBEDDING,)), EMBEDDING, True
    for index, layer in enumerate(anatomy.layers):
        here = f"layers.{index}."
        for block in layer:
            (row,) = (here + linear.name for linear in block.row.linears)
            columns = tuple(here + linear.name for linear in block.column.linears)
            yield _norm(block.norm.site, here + block.norm.name)
            yield Operation(block.sites[1:-1], columns, row), row, False
            yield Operation((block.row.site,), (row,), row), row, True
    yield _norm(anatomy.norm.site, anatomy.norm.name)
    yield Operation((HEAD, LOSS), (EMBEDDING if anatomy.tied else HEAD,)), HEAD, True


def _norm(site: str, name: str) -> tuple[Operation, str, bool]:
    return Operation((site,), (name,)), name, True
