"""The keys that say how a run lies on its devices."""

import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tessera.config.sections.section import Section
from tessera.core.errors import UserError
from tessera.sizes import bounds
from tessera.sizes.context import ContextParallel
from tessera.sizes.geometries import GEOMETRIES
from tessera.sizes.rules import TensorParallel
from tessera.sizes.schedule import Schedule


class MeshConfig(Section):
    """The sizes of the tensor axes, given one by one."""

    inner: int = Field(
        1, ge=1, le=bounds.RANKS, description="Devices that split the features of the residual stream (3d)."
    )
    depth: int = Field(
        1,
        ge=1,
        le=bounds.RANKS,
        description="Devices that split tokens; each keeps a copy of the weights, or with "
        "tensor_parallel_depth_weights: shard a part (2.5d).",
    )
    row: int = Field(
        1,
        ge=1,
        le=bounds.RANKS,
        description="Devices that split tokens, and store a part of the weights each (2d, 2.5d, 3d).",
    )
    col: int = Field(
        1,
        ge=1,
        le=bounds.RANKS,
        description="Devices that split heads, feed-forward features and the vocabulary (every mode).",
    )


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class FsdpConfig(Section):
    """How FSDP2 cuts and moves parameters along the data axes."""

    reshard_after_forward: bool = Field(
        True, description="Free a layer's gathered weights after its forward, and gather them again in the backward."
    )
    forward_prefetch: bool = Field(
        False, description="Gather the next layer's weights before the current layer's forward."
    )
    offload_params: bool = Field(
        False,
        description="Keep parameters, gradients and optimizer state in host memory; a layer's weights are copied to "
        "the device when they are needed.",
    )
    sync_each_batch: bool = Field(
        False,
        description="With gradient accumulation, sum gradients over the data devices after every micro-batch, not once "
        "a step: less memory, more communication.",
    )
    auto_wrap_policy: Annotated[Literal["TRANSFORMER_BASED_WRAP", "NO_WRAP"], BeforeValidator(_upper)] = Field(
        "TRANSFORMER_BASED_WRAP",
        description="What FSDP2 gathers at a time: one decoder layer (TRANSFORMER_BASED_WRAP), or the whole model "
        "(NO_WRAP).",
    )
    mixed_precision_policy: Literal["bf16", "fp32"] | None = Field(
        None,
        description="Data type of gathered weights and of compute; gradients are summed in float32. Unset: follows "
        "bf16.",
    )


def _geometry(mode: str) -> str:
    if mode not in GEOMETRIES:
        raise UserError("tensor_parallel_mode", mode, "is not a geometry", f"one of {', '.join(GEOMETRIES)}")
    return mode


class LayoutKeys(Section):
    """The sizes of the axes, the switches of FSDP2, and how operands move."""

    dp_shard_size: int | None = Field(
        None,
        ge=1,
        le=bounds.RANKS,
        description="Data-parallel devices that share one copy of parameters, gradients and optimizer state "
        "(FSDP2). Unset: all processes that the other sizes leave, or 1.",
    )
    dp_replicate_size: int = Field(
        1, ge=1, le=bounds.RANKS, description="Data-parallel replicas, each with a copy of everything (HSDP)."
    )
    fsdp_config: FsdpConfig = Field(
        FsdpConfig.model_validate({}), description="FSDP2 settings; see fsdp_config.* below."
    )
    fsdp_version: Literal[2] = Field(2, description="FSDP2 is always used.")
    tensor_parallel_size: int | None = Field(
        None,
        ge=1,
        le=bounds.RANKS,
        description="Devices that split each layer. Unset: the product of tensor_parallel_mesh, or 1.",
    )
    tensor_parallel_mode: Annotated[str, AfterValidator(_geometry)] = Field(
        "1d", description="How each layer is split: 1d (Megatron), 2d (SUMMA), 2.5d (Tesseract) or 3d."
    )
    tensor_parallel_depth: int | None = Field(
        None,
        ge=1,
        le=bounds.RANKS,
        description="Size of the depth axis of 2.5d. Unset: 2, or the depth in tensor_parallel_mesh.",
    )
    tensor_parallel_mesh: MeshConfig | None = Field(
        None,
        examples=["{row: 2, col: 4}"],
        description="Sizes of the tensor axes, such as {row: 2, col: 4}. Unset: derived from mode and size.",
    )
    tensor_parallel_depth_weights: Literal["replicate", "shard"] = Field(
        "replicate",
        description="2.5d: each rank of depth keeps a copy of the weights (replicate), or a part, gathered for each "
        "product (shard).",
    )
    tensor_parallel_schedule: Literal["gather", "summa", "cannon", "auto"] = Field(
        "gather",
        description="How matrices move between devices: in one collective (gather), in loops (summa, cannon), or "
        "whichever is measured to be fastest at the start (auto).",
    )
    tensor_parallel_slices: int = Field(
        1,
        ge=1,
        le=bounds.WIDTH,
        description="Overlap: split each gather into this many pieces, so that a piece is sent while the one before "
        "is multiplied.",
    )
    tensor_parallel_keep_gathered: bool = Field(
        False, description="Keep gathered matrices for the backward instead of gathering them again; takes memory."
    )
    tensor_parallel_prefetch: bool = Field(
        True, description="Overlap: gather the weights of a product while the product before it runs."
    )
    tensor_parallel_defer: bool = Field(
        True,
        description="Overlap: start a weight gradient's reduce-scatter, and wait for it only after the next one has "
        "started.",
    )
    tensor_parallel_overlap: bool = Field(
        True,
        description="Overlap: sum the gradient of a product's input over devices while the gradient of its weight "
        "is computed.",
    )
    tensor_parallel_scratch_gib: float = Field(
        2.0,
        gt=0,
        le=bounds.GIB,
        description="Limit in GiB per device for temporary gathered matrices; used by schedule auto only.",
    )
    context_parallel_size: int = Field(
        1,
        ge=1,
        le=bounds.RANKS,
        description="Devices that share each sequence (context parallelism); parameters are sharded over them too.",
    )
    context_parallel_mode: Literal["auto", "ulysses", "exchange", "ring"] = Field(
        "auto",
        description="How attention reaches the rest of its sequence: heads are traded for tokens (ulysses), each "
        "device is sent the keys and values that its masks need (exchange), or they pass from neighbour to neighbour "
        "(ring). auto: the split into ulysses and exchange with which a device receives least.",
    )
    ulysses_size: int | None = Field(
        None,
        ge=1,
        le=bounds.RANKS,
        description="Of context_parallel_size, the devices that trade heads for tokens; the others exchange, or form "
        "a ring. Unset: follows context_parallel_mode.",
    )
    ulysses_chunks: int = Field(
        1,
        ge=1,
        le=bounds.WIDTH,
        description="Trade heads in so many groups one after another: less memory for attention, more and smaller "
        "messages.",
    )
    sequence_parallel: bool = Field(
        True, description="Split the residual stream over tokens along col, instead of repeating it there."
    )
    group_timeout_minutes: float = Field(
        10,
        gt=0,
        le=bounds.MINUTES,
        description="Minutes that a collective waits for a rank before the run ends with an error.",
    )

    @model_validator(mode="after")
    def _sizes_make_a_world(self) -> Self:
        mesh = self.tensor_parallel_mesh
        sizes = {"dp_replicate_size": self.dp_replicate_size, "dp_shard_size": self.dp_shard_size or 1}
        sizes |= {"context_parallel_size": self.context_parallel_size}
        if mesh is None:
            sizes |= {"tensor_parallel_size": self.tensor_parallel_size or 1}
        else:
            sizes |= {f"tensor_parallel_mesh.{axis}": size for axis, size in mesh.model_dump().items()}
        given = {key: size for key, size in sizes.items() if size > 1}
        if given:
            bounds.at_most(" × ".join(given), math.prod(given.values()), bounds.RANKS, "is the number of processes")
        return self

    @property
    def world_size(self) -> int:
        """Processes that the sizes given make."""
        return math.prod(self.mesh_sizes.values())

    @property
    def data_sizes(self) -> dict[str, int]:
        """The sizes of replicate and shard."""
        return {"replicate": self.dp_replicate_size, "shard": self.dp_shard_size or 1}

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """The sizes of all axes. Raises UserError as `axes`."""
        return self.data_sizes | self.context_parallel.sizes | self.axes

    @property
    def context_parallel(self) -> ContextParallel:
        """The sequence axes as the keys ask for them; `fitting_layout` of train/settings.py fills in what is open."""
        return ContextParallel(
            self.context_parallel_size, self.context_parallel_mode, self.ulysses_size, self.ulysses_chunks
        )

    def filled_in(self, processes: int | None, key: str = "processes") -> Self:
        """With dp_shard_size, where it is unset, as large as so many processes make it.

        Raises UserError, naming `key`, which gave the number, when no size does.
        """
        others = self.dp_replicate_size * self.context_parallel_size * math.prod(self.axes.values())
        if self.dp_shard_size is not None or processes is None:
            return self
        if processes % others:
            nearest = sorted({max(1, processes // others) * others, -(-processes // others) * others})
            context = " × context_parallel_size" if self.context_parallel_size > 1 else ""
            reason = f"does not divide by dp_replicate_size{context} × tensor axes = {others}"
            raise UserError(key, processes, reason, f"use {' or '.join(map(str, nearest))} processes")
        return self.model_copy(update={"dp_shard_size": processes // others})

    def idle_fsdp_keys(self) -> list[str]:
        """One line on the keys of fsdp_config that were given, where there is nothing over which FSDP2 could shard."""
        if max(*self.data_sizes.values(), self.context_parallel_size) > 1:
            return []
        given = [
            f"fsdp_config.{key}" for key, value in self.fsdp_config if value != FsdpConfig.model_fields[key].default
        ]
        why = "there is one data-parallel process; give dp_shard_size, or --num-processes"
        return [f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no effect: {why}"] if given else []

    @property
    def axes(self) -> dict[str, int]:
        """The sizes of inner, depth, row and col. Raises UserError when mode, size and mesh do not agree."""
        return self.tensor_parallel.axes

    @property
    def tensor_parallel(self) -> TensorParallel:
        """The tensor axes as the keys ask for them; see `sizes.remedies.check_sizes`."""
        mesh = self.tensor_parallel_mesh
        return TensorParallel(
            mode=self.tensor_parallel_mode,
            size=self.tensor_parallel_size,
            depth=self.tensor_parallel_depth,
            mesh=None if mesh is None else mesh.model_dump(),
            depth_weights=self.tensor_parallel_depth_weights,
            schedule=self.tensor_parallel_schedule,
            slices=self.tensor_parallel_slices,
            keep_gathered=self.tensor_parallel_keep_gathered,
            prefetch=self.tensor_parallel_prefetch,
            defer=self.tensor_parallel_defer,
            overlap=self.tensor_parallel_overlap,
            sequence_parallel=self.sequence_parallel,
        )

    @property
    def schedule(self) -> Schedule:
        """How operands move; before auto has measured, gathered."""
        return self.tensor_parallel.as_schedule
