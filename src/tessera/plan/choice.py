"""A layout to choose: every key of a config that decides what a step costs, as one value."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from tessera.core.axes import DATA_AXES, MODEL_AXES, SEQUENCE_AXES
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.engine.optimizer import NAMES, refuse_options
from tessera.layout.parallel import Parallel
from tessera.layout.resolve import parallel_of
from tessera.layout.shape import Savers, StepShape, padded_length
from tessera.models.config import ModelConfig
from tessera.plan.update import ADAMW, Update
from tessera.sizes.bounds import TOKENS, at_most, of_kind, whole_number
from tessera.sizes.context import ContextParallel
from tessera.sizes.numbers import either
from tessera.sizes.rules import TensorParallel, modes_with

RECOMPUTES = ("false", "selective", "true")
"""The values of gradient_checkpointing, from the fastest to the one that keeps least."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Training:
    """What is trained, whatever the layout: rows of `sequence_len` tokens, `global_batch` of them in a step.

    Products run in `dtype`; parameters and gradients are held in `stored`, the moments of `optimizer` as it holds them
    (plan/update.py); `optim_args` are its options, as a config has them. Raises UserError for what nothing trains with.
    """

    sequence_len: int
    global_batch: int
    dtype: str = "bfloat16"
    stored: str = "float32"
    optimizer: str = ADAMW.name
    optim_args: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Raise UserError for a value that nothing can be trained with."""
        for name in ("sequence_len", "global_batch"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        at_most("sequence_len", self.sequence_len, TOKENS, "tokens of a row")
        stored = ("float32", "bfloat16") if self.dtype == "bfloat16" else ("float32",)
        for name, values in (("dtype", tuple(DTYPES)), ("stored", stored), ("optimizer", NAMES)):
            if getattr(self, name) not in values:
                raise UserError(name, repr(getattr(self, name)), "is none that trains", either(values))
        of_kind("optim_args", self.optim_args, (Mapping,), "options by name, as a config has them")
        refuse_options(self.optimizer, self.optim_args)

    @property
    def update(self) -> Update:
        """What an update costs."""
        return Update(self.optimizer, self.optim_args)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequence_len * self.global_batch


@dataclass(frozen=True)
class Beside:
    """What a config may ask for that a search does not turn: switches of the tensor axes, how sequences are shared."""

    tensor: TensorParallel = TensorParallel()
    context: ContextParallel = ContextParallel()
    by_layer: bool = True
    label_smoothing: bool = False


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes (those left out are 1), rows of a micro-batch and micro-batches of a step, and switches.

    `recompute` is the value of gradient_checkpointing; `offload`: what layers keep lies in host memory;
    `tiles`: of an MLP, None: as many as its tokens ask for; `offload_params`: the states lie in host memory;
    `sync_each_batch`: gradients are summed after every micro-batch.
    """

    sizes: Mapping[str, int] = field(hash=False)
    micro_batch: int
    micro_batches: int
    recompute: str = "false"
    reshard: bool = True
    schedule: str = "gather"
    slices: int = 1
    offload: bool = False
    tiles: int | None = 1
    offload_params: bool = False
    sync_each_batch: bool = False
    beside: Beside = Beside()

    @property
    def devices(self) -> int:
        return prod(self.sizes.values())

    def size(self, *axes: str) -> int:
        """How many ranks lie along `axes` together."""
        return prod(self.sizes.get(axis, 1) for axis in axes)

    @property
    def unusual(self) -> int:
        """How many ways of cutting and moving it combines: of equally fast layouts the one with fewer is shown."""
        tensor = sum(self.size(axis) > 1 for axis in MODEL_AXES) + 2 * (self.size("inner", "depth") > 1)
        context = 2 * sum(self.size(axis) > 1 for axis in SEQUENCE_AXES)
        moved = (self.schedule != "gather") + (self.slices > 1)
        saved = self.offload + (self.tiles != 1) + self.offload_params + self.sync_each_batch
        return tensor + context + moved + saved + (self.size("replicate") > 1)

    @property
    def mode(self) -> str:
        """The first geometry that has its tensor axes."""
        return modes_with({axis: self.size(axis) for axis in MODEL_AXES})[0]

    @property
    def tensor(self) -> TensorParallel:
        """The tensor axes and their schedule."""
        axes = {axis: self.size(axis) for axis in MODEL_AXES}
        made: dict[str, Any] = {"mode": self.mode, "size": None, "depth": None, "mesh": axes}
        return replace(self.beside.tensor, **made, schedule=self.schedule, slices=self.slices)

    @property
    def context(self) -> ContextParallel:
        """The sequence axes."""
        return replace(self.beside.context, size=self.size(*SEQUENCE_AXES), ulysses=self.size("ulysses"))

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh as rank 0 sees it; no process stands behind it."""
        return Mesh(self.sizes, rank=0)

    def parallel(self, model: ModelConfig, training: Training, mesh: Mesh | None = None) -> Parallel:
        """The layouts of the model's streams on rank 0, or on another mesh of these axes."""
        return parallel_of(
            self.tensor,
            self.mesh if mesh is None else mesh,
            self.micro_batch,
            model.dimensions,
            dtype=DTYPES[training.stored],
            compute=DTYPES[training.dtype],
            context=self.context,
        )

    def shape(self, training: Training, parallel: Parallel) -> StepShape:
        """What a data rank runs in a step, padded for `parallel`."""
        length = padded_length(training.sequence_len, self.micro_batch, parallel.residual, parallel.mesh)
        savers = Savers(self.recompute == "selective", self.offload, self.tiles)
        return StepShape(
            self.micro_batch,
            length,
            self.micro_batches,
            recompute=self.recompute != "false",
            label_smoothing=self.beside.label_smoothing,
            reshard=self.reshard,
            sync_each_batch=self.sync_each_batch,
            by_layer=self.beside.by_layer,
            savers=savers,
        )

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of a config that ask for it; those of their default values are left out."""
        data = self.size(*DATA_AXES, *SEQUENCE_AXES) > 1
        made: dict[str, Any] = {"dp_shard_size": self.size("shard")} if data else {}
        if self.size("replicate") > 1:
            made["dp_replicate_size"] = self.size("replicate")
        if self.size(*MODEL_AXES) > 1:
            made["tensor_parallel_mode"] = self.mode
            made |= {"tensor_parallel_size": self.size(*MODEL_AXES)}
            if self.mode != "1d":
                made["tensor_parallel_mesh"] = {axis: self.size(axis) for axis in MODEL_AXES if self.size(axis) > 1}
        if self.schedule != "gather":
            made["tensor_parallel_schedule"] = self.schedule
        if self.slices > 1:
            made["tensor_parallel_slices"] = self.slices
        if self.context.size > 1:
            made |= {"context_parallel_size": self.context.size, "ulysses_size": self.size("ulysses")}
        made |= {"micro_batch_size": self.micro_batch, "gradient_accumulation_steps": self.micro_batches}
        again: Any = {"false": False, "true": "offload" if self.offload else True}.get(self.recompute, self.recompute)
        made["gradient_checkpointing"] = again
        fsdp = {} if self.reshard or not data else {"reshard_after_forward": False}
        fsdp |= {"offload_params": True} if self.offload_params else {}
        fsdp |= {"sync_each_batch": True} if self.sync_each_batch else {}
        if fsdp:
            made["fsdp_config"] = fsdp
        if self.offload and again != "offload":
            made["activation_offloading"] = True
        if self.tiles != 1:
            made["tiled_mlp"] = True
        if self.tiles not in (1, None):
            made["tiled_mlp_num_shards"] = self.tiles
        return made

    def __str__(self) -> str:
        sizes = [f"{axis} {self.size(axis)}" for axis in (*DATA_AXES, *SEQUENCE_AXES) if self.size(axis) > 1]
        if self.size(*MODEL_AXES) > 1:
            sizes.append(
                f"{self.mode} (" + " × ".join(f"{a} {self.size(a)}" for a in MODEL_AXES if self.size(a) > 1) + ")"
            )
        words = [" × ".join(sizes) or "one device", f"micro-batch {self.micro_batch} × {self.micro_batches}"]
        words += [self.schedule] * (self.schedule != "gather") + [f"slices {self.slices}"] * (self.slices > 1)
        words += {"true": ["recompute"], "selective": ["recompute but attention"]}.get(self.recompute, [])
        words += ["weights kept"] * (not self.reshard and self.size(*DATA_AXES, *SEQUENCE_AXES) > 1)
        words += ["activations on the host"] * self.offload + ["MLP in tiles"] * (self.tiles != 1)
        words += ["states on the host"] * self.offload_params
        words += ["gradients summed every micro-batch"] * self.sync_each_batch
        return ", ".join(words)
