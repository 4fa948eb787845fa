"""Counting a step without its machine: one rank of any world, in one process that communicates with nobody.

torch's `fake` backend takes every collective and completes it at once, and fake tensors have shapes but no data: so
the trainer's own step of a model of any size runs on a laptop, and what it hands to torch.distributed, and the tensors
it holds, are counted exactly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tessera.core.axes import AXES
from tessera.core.collectives import Record, Recorder, totals
from tessera.core.live_memory import PeakMemory
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.fsdp import build_decoder
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.shape import Fsdp, StepShape
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.nn.parameter import to_local
from tessera.plan.memory import StepMemory


@contextmanager
def fake_world(sizes: dict[str, int], rank: int) -> Iterator[Mesh]:
    """The mesh as `rank` sees it, on groups that communicate with nobody. Raises RuntimeError in a real world."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if dist.is_initialized():
        raise RuntimeError("a fake world needs a process that is no rank of a real one")
    mesh = Mesh(sizes, rank=rank)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.world)
    try:
        present = mesh.present(AXES)
        for choice in range(1, 2 ** len(present)):  # every group, while tensors are still real
            mesh.group(axis for place, axis in enumerate(present) if choice >> place & 1)
        yield mesh
    finally:
        dist.destroy_process_group()


class _NumbersAreOne(TorchFunctionMode):
    """A fake tensor has no value: the loss, the gradient norm and the targets that a step reads are 1."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (torch.Tensor.item, torch.Tensor.__int__):
            return 1 if function is torch.Tensor.__int__ else 1.0
        return function(*args, **(kwargs or {}))


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Tensors made here have no data. DTensor's own propagation of shapes stays apart: it would count as tensors."""
    propagation = "torch.distributed.tensor._sharding_prop.detect_fake_mode"
    with mock.patch(propagation, return_value=None, create=True), FakeTensorMode() as fake, _NumbersAreOne():
        yield fake


@dataclass(frozen=True)
class CountedStep:
    """What one rank hands to torch.distributed in an optimizer step, and the memory it holds."""

    records: list[Record]
    memory: StepMemory

    @property
    def received(self) -> int:
        """Bytes received."""
        return sum(record.received for record in self.records)

    @property
    def totals(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(axis, kind) → calls and bytes received."""
        return totals(self.records)


def counted_step(model: ModelConfig, shape: StepShape, parallel: Parallel) -> CountedStep:
    """Run one AdamW step of the trainer as the rank of `parallel.mesh`, on fake tensors in a fake world.

    The arguments are those of `plan.traffic.step_transfers`. The optimizer's state is there from the start, as in every
    step but the first, and the order of weight gathers is known when the schedule fetches them early.
    """
    sizes = {axis: size for axis, size in parallel.mesh.sizes.items() if size > 1}
    with fake_world(sizes, parallel.mesh.rank) as mesh:
        parallel = replace(parallel, mesh=mesh)
        with built(model, shape, parallel, PeakMemory()) as (decoder, memory):
            return _counted(decoder, shape, memory)


Memory = TypeVar("Memory", bound=PeakMemory)


@contextmanager
def built(model: ModelConfig, shape: StepShape, parallel: Parallel, memory: Memory) -> Iterator[tuple[Decoder, Memory]]:
    """The decoder, its parameters fake, with fake tensors from then on, which `memory` counts.

    FSDP2 arranges ranks before, with real ones.
    """
    asked = Fsdp(shape.reshard, by_layer=shape.by_layer, sync_each_batch=shape.sync_each_batch)
    again, savers = shape.recompute, shape.savers
    build = partial(build_decoder, model, parallel, asked, gradient_checkpointing=again, savers=savers)
    decoder = None
    if parallel.fsdp is not None:
        with mock.patch.object(Decoder, "to_empty"):
            decoder = build()
    with fake_tensors() as fake, memory:
        if decoder is None:
            decoder = build()
        else:
            fake.allow_non_fake_inputs = True  # those without data
            decoder.to_empty(device=parallel.mesh.device)
            fake.allow_non_fake_inputs = False
        yield decoder, memory


def _counted(decoder: Decoder, shape: StepShape, memory: PeakMemory) -> CountedStep:
    optimizer = build_optimizer(decoder, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.1)
    step = Step(decoder, optimizer, max_grad_norm=1.0, label_smoothing=0.1 if shape.label_smoothing else 0.0)
    batches = batches_of(shape)
    make_state(decoder, optimizer)
    if decoder.parallel.schedule.prefetch:
        step.gradients(batches[:1], 0)
        optimizer.zero_grad(set_to_none=True)
    before, live = memory.current, []
    memory.peak = before
    hook = decoder.register_forward_hook(lambda *_: live.append(memory.current))
    with Recorder() as recorder:
        step(batches, 0, 1e-3)
    hook.remove()
    parameters = list(decoder.parameters())
    return CountedStep(
        recorder.records,
        StepMemory(
            parameters=sum(to_local(p).nbytes for p in parameters),
            gradients=sum(to_local(p.grad).nbytes for p in parameters),
            optimizer=sum(to_local(s).nbytes for state in optimizer.state.values() for s in state.values()),
            activations=live[0] - before,
            peak=memory.peak,
        ),
    )


def batches_of(shape: StepShape) -> list[MicroBatch]:
    """The micro-batches of a step, with their documents where the shape has them."""
    ids = torch.zeros(shape.batch, shape.sequence, dtype=torch.int64)
    batch = MicroBatch(ids, ids, shape.tokens)
    if not shape.documents:
        return [batch] * shape.micro_batches
    batches = [replace(batch, positions=ids, documents=ids) for _ in shape.documents]
    for batch, starts in zip(batches, shape.documents, strict=True):
        vars(batch)["document_starts"] = starts  # which are otherwise read from the documents' numbers
    return batches


def make_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state, made by a step at rate 0 with gradients of zero."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
