"""The keys that say how a run lies on its devices."""

import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tessera.config.sections.section import Section
from tessera.core.errors import UserError
from tessera.sizes import bounds
from tessera.sizes.geometries import GEOMETRIES
from tessera.sizes.rules import TensorParallel
from tessera.sizes.schedule import Schedule


class MeshConfig(Section):
    """The sizes of the tensor axes, given one by one."""

    inner: int = Field(1, ge=1, le=bounds.RANKS, description="Cuts the features of the residual stream (3d).")
    depth: int = Field(
        1, ge=1, le=bounds.RANKS, description="Cuts tokens; weights are repeated along it (2.5d), or stored cut."
    )
    row: int = Field(
        1, ge=1, le=bounds.RANKS, description="Cuts tokens; weights are stored cut along it (2d, 2.5d, 3d)."
    )
    col: int = Field(
        1, ge=1, le=bounds.RANKS, description="Cuts heads, feed-forward features and the vocabulary (all geometries)."
    )


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class FsdpConfig(Section):
    """How FSDP2 cuts and moves parameters along the data axes."""

    reshard_after_forward: bool = Field(
        True, description="Drop a layer's gathered weights after its forward, and gather them again for its backward."
    )
    forward_prefetch: bool = Field(False, description="Gather the next layer's weights before this one's forward.")
    offload_params: bool = Field(
        False, description="Keep parameters, gradients and optimizer in host memory; weights come in for each layer."
    )
    auto_wrap_policy: Annotated[Literal["TRANSFORMER_BASED_WRAP", "NO_WRAP"], BeforeValidator(_upper)] = Field(
        "TRANSFORMER_BASED_WRAP", description="What is gathered at once: each decoder layer, or the whole model."
    )
    mixed_precision_policy: Literal["bf16", "fp32"] | None = Field(
        None,
        description="The dtype of gathered weights and of compute; gradients are summed in float32. "
        "Unset: as bf16 says.",
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
        description="Data-parallel devices over which FSDP2 cuts parameters, gradients and optimizer. "
        "Unset: as many as the processes given leave, or 1.",
    )
    dp_replicate_size: int = Field(
        1, ge=1, le=bounds.RANKS, description="Replicas of all that is cut otherwise (HSDP)."
    )
    fsdp_config: FsdpConfig = Field(FsdpConfig.model_validate({}), description="Switches of FSDP2.")
    fsdp_version: Literal[2] = Field(2, description="There is FSDP2 alone.")
    tensor_parallel_size: int | None = Field(
        None,
        ge=1,
        le=bounds.RANKS,
        description="Devices over which each layer is cut. Unset: from tensor_parallel_mesh, or 1.",
    )
    tensor_parallel_mode: Annotated[str, AfterValidator(_geometry)] = Field(
        "1d", description="The geometry of that cut: 1d (Megatron), 2d (SUMMA), 2.5d (Tesseract) or 3d."
    )
    tensor_parallel_depth: int | None = Field(
        None,
        ge=1,
        le=bounds.RANKS,
        description="Devices along depth in 2.5d. Unset: 2, or as tensor_parallel_mesh says.",
    )
    tensor_parallel_mesh: MeshConfig | None = Field(
        None, description="The sizes of the axes {inner, depth, row, col}. Unset: derived from mode and size."
    )
    tensor_parallel_depth_weights: Literal["replicate", "shard"] = Field(
        "replicate", description="shard: store weights cut over depth too and gather them for each product."
    )
    tensor_parallel_schedule: Literal["gather", "summa", "cannon", "auto"] = Field(
        "gather", description="How operands move: in one collective, in one of the loops, or as measured fastest."
    )
    tensor_parallel_slices: int = Field(
        1,
        ge=1,
        le=bounds.WIDTH,
        description="Panels into which a gathered product is cut, each gathered while the last multiplies.",
    )
    tensor_parallel_keep_gathered: bool = Field(
        False, description="Keep gathered operands for the backward instead of gathering them again."
    )
    tensor_parallel_prefetch: bool = Field(True, description="Gather the weights of a product during the one before.")
    tensor_parallel_defer: bool = Field(
        True, description="Wait for the sum of a weight's gradient only when the next one is on its way."
    )
    tensor_parallel_overlap: bool = Field(
        True, description="Sum the gradient of a product's input during the product that gives its weight's."
    )
    tensor_parallel_scratch_gib: float = Field(
        2.0,
        gt=0,
        le=bounds.GIB,
        description="Memory that schedule auto may use for gathered operands on a device, in GiB, copies for joining "
        "and contiguity not counted.",
    )
    sequence_parallel: bool = Field(
        True, description="Cut the residual stream over tokens along col instead of repeating it there."
    )
    group_timeout_minutes: float = Field(
        10,
        gt=0,
        le=bounds.MINUTES,
        description="Minutes a collective may wait for a rank before the run ends with an error.",
    )

    @model_validator(mode="after")
    def _sizes_make_a_world(self) -> Self:
        mesh = self.tensor_parallel_mesh
        sizes = {"dp_replicate_size": self.dp_replicate_size, "dp_shard_size": self.dp_shard_size or 1}
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
        return self.data_sizes | self.axes

    def filled_in(self, processes: int | None, key: str = "processes") -> Self:
        """With dp_shard_size, where it is unset, as large as so many processes make it.

        Raises UserError, naming `key`, which gave the number, when no size does.
        """
        others = self.dp_replicate_size * math.prod(self.axes.values())
        if self.dp_shard_size is not None or processes is None:
            return self
        if processes % others:
            nearest = sorted({max(1, processes // others) * others, -(-processes // others) * others})
            reason = f"does not divide by dp_replicate_size × tensor axes = {others}"
            raise UserError(key, processes, reason, f"use {' or '.join(map(str, nearest))} processes")
        return self.model_copy(update={"dp_shard_size": processes // others})

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
