"""Whether a step fits into a device's memory, and what lowers what it holds, each with its saving, by the closed form.

    fits            1.03 · estimate / 0.85 + 1 GiB + buffers <= the device's memory
    may fit         the estimate alone is below it
    does not fit    it is not

1.03: the formula is held to within 3% of the traced step (tests/plan/test_peak.py). 0.85: torch's allocator reserves
more than is alive at once, for what is free lies in pieces. 1 GiB: the driver's context, and what libraries take for
themselves; `buffers` are those of the communication library, where they are known. So an estimate of up to four fifths
of a device with 80 GB fits: of 454 published runs none that was estimated so ran out of memory.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from tessera.core.axes import DATA_AXES
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.resolve import check_layout, parallel_of
from tessera.layout.shape import Savers, StepShape, padded_length
from tessera.layout.streams import joins_rows
from tessera.models.config import ModelConfig
from tessera.nn.context.heads import kv_heads_of
from tessera.plan.peak import RESERVED, peak_bytes
from tessera.sizes.context import WHOLE, ContextParallel, Surroundings, fitted
from tessera.sizes.rules import TensorParallel

MARGIN, USED = 1.03, 0.85
Verdict = Literal["fits", "may fit", "does not fit"]


def fits(estimate_bytes: int, device_bytes: int, buffers: int = 0) -> Verdict:
    """Whether a peak of so many bytes fits into a device of `device_bytes`, beside `buffers`; the rule is above."""
    if estimate_bytes <= most_that_fits(device_bytes, buffers):
        return "fits"
    return "may fit" if estimate_bytes < device_bytes else "does not fit"


def most_that_fits(device_bytes: int, buffers: int = 0) -> int:
    """The largest estimate in bytes that surely fits: what a search compares arrays of estimates with."""
    return max(0, math.floor((device_bytes - RESERVED - buffers) * USED / MARGIN))


@dataclass(frozen=True)
class MemoryLayout:
    """A model's step on a mesh, as keys of the YAML turn it: what `memory_remedies` changes.

    `data` are the sizes of replicate and shard. `offload`: FSDP2 keeps the states on the host.
    """

    model: ModelConfig
    shape: StepShape
    tensor: TensorParallel = TensorParallel()
    data: Mapping[str, int] | None = None
    context: ContextParallel = WHOLE
    dtype: torch.dtype = torch.float32
    compute: torch.dtype = torch.bfloat16
    offload: bool = False
    optimizer: str = "adamw_torch_fused"

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh. Raises UserError where keys do not agree."""
        every = {**(self.data or {}), **self.context.sizes, **self.tensor.axes}
        return {axis: size for axis, size in every.items() if size > 1}

    def parallel(self) -> Parallel:
        """The layouts on rank 0. Raises UserError, with the nearest sizes that fit, where they do not."""
        batch, data = self.shape.batch, {**(self.data or {}), **self.context.sizes}
        check_layout(self.tensor, data, self.model.dimensions, batch)
        mesh = Mesh(self.sizes, "meta", rank=0)
        made = parallel_of(
            self.tensor, mesh, batch, self.model.dimensions, None, self.dtype, self.compute, context=self.context
        )
        if self.context.size > 1 or joins_rows(self.tensor.axes, batch, self.model.dimensions):
            self._check_shared(made)
        return made

    def _check_shared(self, parallel: Parallel) -> None:
        if self.model.attention_dropout:
            reason = "shares sequences between ranks, and the model drops attention probabilities"
            raise UserError("context_parallel_size", self.context.size, reason, "attention_dropout 0 in config.json")
        heads = self.model.num_heads // parallel.mesh.size(parallel.attention.features)
        read = len(kv_heads_of(range(heads), self.model.num_heads, self.model.num_kv_heads))
        fitted(self.context, Surroundings(heads, read, self.model.head_dim))

    def peak(self) -> int:
        """Bytes of the peak on rank 0 by formula, of rows that are padded where that is needed. Raises UserError."""
        parallel = self.parallel()
        length = padded_length(self.shape.sequence, self.shape.batch, parallel.residual, parallel.mesh)
        shape = replace(self.shape, sequence=length)
        return int(peak_bytes(self.model, shape, parallel, offload=self.offload, optimizer=self.optimizer).total)


class Remedy(NamedTuple):
    """Keys of the YAML with other values, the bytes that a rank's peak falls by, and what else they mean."""

    keys: dict[str, Any]
    saved: int
    meaning: str


def memory_remedies(layout: MemoryLayout) -> list[Remedy]:
    """What lowers the peak of `layout`, the greatest saving first: each change by itself, by the closed form.

    Left out is what does not fit the model or the mesh, and what saves nothing. The global batch stays as it is.
    """
    now, found = layout.peak(), []
    for keys, other, meaning in _changes(layout):
        try:
            saved = now - other.peak()
        except UserError:
            continue
        if saved > 0:
            found.append(Remedy(keys, saved, meaning))
    return sorted(found, key=lambda remedy: -remedy.saved)


_Change = tuple[dict[str, Any], MemoryLayout, str]


def _changes(layout: MemoryLayout) -> Iterator[_Change]:
    yield from _of_fsdp(layout)
    yield from _of_layers(layout)
    shape = layout.shape
    if shape.micro_batches > 1:
        rows = shape.batch * shape.micro_batches
        keys = {"micro_batch_size": rows, "gradient_accumulation_steps": 1}
        whole = replace(shape, batch=rows, micro_batches=1, documents=())
        yield (
            keys,
            replace(layout, shape=whole),
            "the numbers stay; FSDP2 keeps no whole gradients between micro-batches",
        )
    if shape.batch % 2 == 0:
        times = 2 * shape.micro_batches
        keys = {"micro_batch_size": shape.batch // 2, "gradient_accumulation_steps": times}
        half = replace(shape, batch=shape.batch // 2, micro_batches=times, documents=())
        yield keys, replace(layout, shape=half), "the numbers stay; smaller products"
    tensor = layout.tensor
    if tensor.mesh is None:
        size = 2 * (tensor.size or 1)
        yield from _wider({"tensor_parallel_size": size}, replace(layout, tensor=replace(tensor, size=size)))
    size = 2 * layout.context.size
    context = replace(layout.context, size=size, ulysses=layout.context.ulysses or 1)
    yield from _wider({"context_parallel_size": size}, replace(layout, context=context))


def _wider(keys: dict[str, Any], wider: MemoryLayout) -> Iterator[_Change]:
    """On the same devices, taken from the data axes, with more micro-batches; or on twice as many."""
    data = dict(wider.data or {})
    for axis in reversed(DATA_AXES):
        if data.get(axis, 1) % 2 == 0:
            data[axis] //= 2
            times = 2 * wider.shape.micro_batches
            key = {"replicate": "dp_replicate_size", "shard": "dp_shard_size"}[axis]
            keys = {**keys, key: data[axis], "gradient_accumulation_steps": times}
            shape = replace(wider.shape, micro_batches=times, documents=())
            yield keys, replace(wider, data=data, shape=shape), "on the same devices; the numbers stay"
            return
    yield keys, wider, "on twice as many devices"


def _of_fsdp(layout: MemoryLayout) -> Iterator[_Change]:
    shape = layout.shape
    if not shape.reshard:
        keys = {"fsdp_config.reshard_after_forward": True}
        yield keys, replace(layout, shape=replace(shape, reshard=True)), "weights are gathered again for the backward"
    served = math.prod((*(layout.data or {}).values(), layout.context.size)) > 1
    if served and shape.micro_batches > 1 and not shape.sync_each_batch:
        meaning = "gradients are summed after every micro-batch; no whole ones are kept between them"
        keys = {"fsdp_config.sync_each_batch": True}
        yield keys, replace(layout, shape=replace(shape, sync_each_batch=True)), meaning
    if served and not layout.offload:
        keys = {"fsdp_config.offload_params": True}
        yield keys, replace(layout, offload=True), "the update runs on the host"


def _of_layers(layout: MemoryLayout) -> Iterator[_Change]:
    """Gradient checkpointing, offloaded activations, the MLP in tiles: the numbers stay."""
    shape = layout.shape
    savers, tiles = shape.savers, shape.savers.mlp_tiles

    def with_savers(recompute: bool, savers: Savers) -> MemoryLayout:
        return replace(layout, shape=replace(shape, recompute=recompute, savers=savers))

    ways = {
        True: (Savers(mlp_tiles=tiles), "layers run again: a third more products"),
        "selective": (Savers(attention_once=True, mlp_tiles=tiles), "layers run again, attention does not"),
        "offload": (Savers(offload=True, mlp_tiles=tiles), "layers run again; their inputs travel to the host"),
    }
    for value, (other, meaning) in ways.items():
        if (shape.recompute, savers) != (True, other):
            yield {"gradient_checkpointing": value}, with_savers(True, other), meaning
    if not shape.recompute and not savers.offload:
        meaning = "what layers keep travels to the host and back"
        yield {"activation_offloading": True}, with_savers(False, replace(savers, offload=True)), meaning
    if tiles == 1:
        meaning = "the MLP runs again, tile by tile"
        yield {"tiled_mlp": True}, with_savers(shape.recompute, replace(savers, mlp_tiles=None)), meaning
